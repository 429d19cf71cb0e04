"""Groups of frames by graphs: their buffers on the CPU, by a recorder that repeats functions; the graphs on a GPU."""

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import same_bits
from tests.integrations.test_diffusers_vaes import CHUNKED, _latents, _made, _tiled

vaes = pytest.importorskip("latentfast.integrations.diffusers.vaes")
graphs = vaes.graphs
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class Repeated:
    """As a graph: nothing is computed while it is recorded, and all results stay where they were then."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        result = body()
        for leaf in self._tensors(result):
            leaf.fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            for place, new in zip(self._tensors(result), self._tensors(body()), strict=True):
                if new is not place:
                    place.copy_(new)

        return replay, result

    @staticmethod
    def _tensors(result: Any) -> list[Tensor]:
        return [leaf for leaf in graphs.leaves(result) if isinstance(leaf, Tensor)]


def _repeating(vae: Any) -> Repeated:
    """Replaces the class of an autoencoder on the CPU, with such graphs."""
    record = Repeated()
    vaes.accelerate_vae(vae)
    graphs.GRAPHS[vae] = vaes.ChunkGraphs(lambda: record, "cpu")
    return record


@pytest.mark.parametrize("family", CHUNKED)
def test_every_step_reads_and_writes_where_it_was_recorded(family: str) -> None:
    vae = _made(family)
    clips = [_latents(family, (4, 3), vae, frames=n) for n in (5, 5, 9, 3)]
    with torch.no_grad():
        expected = [vae.decode(z).sample for z in clips]
        record = _repeating(vae)
        got = [vae.decode(z).sample for z in clips]
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    if family == "CogVideoX":  # by groups of 3 frames and 2; of one shape with a second group, and without
        assert (record.recorded, record.replayed) == (3 + 1, 2 + 2 + 4 + 1)
    else:
        assert (record.recorded, record.replayed) == (3, 5 + 5 + 9 + 3)


def test_a_chain_grows_with_the_clips() -> None:
    vae = _made("Wan 2.1")
    record = _repeating(vae)
    with torch.inference_mode():
        for frames, recorded in ((1, 1), (2, 2), (1, 2), (3, 3), (2, 3), (7, 3)):
            vae.decode(_latents("Wan 2.1", (3, 2), vae, frames=frames))
            assert record.recorded == recorded


def test_tiles_of_one_shape_share_their_graphs() -> None:
    vae = _tiled("Wan 2.1")
    z = _latents("Wan 2.1", (14, 13), vae, frames=4)
    with torch.no_grad():
        expected = vae.decode(z).sample
        record = _repeating(vae)
        assert same_bits(vae.decode(z).sample, expected)
        assert (record.recorded, record.replayed) == (4 * 3, 9 * 4)  # whole, right edge, lower edge, corner
        assert same_bits(vae.decode(z).sample, expected) and record.recorded == 4 * 3
        vae.disable_tiling()
        vae.decode(z[..., :8, :8])  # a whole clip goes through post_quant_conv before it is in groups
    assert record.recorded == 5 * 3


def test_a_graph_made_in_inference_mode_works_outside_and_the_other_way_round() -> None:
    vae = _made("Wan 2.1")
    z = _latents("Wan 2.1", (3, 3), vae, frames=4)
    with torch.no_grad():
        expected = vae.decode(z).sample
    for first, then in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        record = _repeating(vae) if type(vae) in vaes.families.REPLACEMENTS else Repeated()
        graphs.GRAPHS[vae] = vaes.ChunkGraphs(lambda record=record: record, "cpu")
        for mode in (first, then):
            with mode():
                assert same_bits(vae.decode(z.clone()).sample, expected)
        assert record.recorded == 3


def test_weights_that_moved_are_recorded_anew_and_changed_ones_are_read() -> None:
    vae = _made("Wan 2.1")
    z = _latents("Wan 2.1", (3, 3), vae, frames=3)
    with torch.no_grad():
        record = _repeating(vae)
        vae.decode(z)
        vae.decoder.conv_out.weight.mul_(0.5)
        plain = type(vae).__bases__[-1]
        expected = plain._decode(vae, z).sample
        assert same_bits(vae.decode(z).sample, expected) and record.recorded == 3
        vae.decoder.conv_out.weight.data = vae.decoder.conv_out.weight * 0.5
        expected = plain._decode(vae, z).sample
        assert same_bits(vae.decode(z).sample, expected) and record.recorded == 6


def test_the_least_recently_used_shape_goes() -> None:
    vae = _made("Wan 2.1")
    record = _repeating(vae)
    most = vaes.ChunkGraphs.MOST_SHAPES
    with torch.no_grad():
        for width in range(2, 2 + most):
            vae.decode(_latents("Wan 2.1", (2, width), vae, frames=1))
        vae.decode(_latents("Wan 2.1", (2, 2), vae, frames=1))
        vae.decode(_latents("Wan 2.1", (2, 2 + most), vae, frames=1))
        assert record.recorded == most + 1
        vae.decode(_latents("Wan 2.1", (2, 2), vae, frames=1))
        assert record.recorded == most + 1
        vae.decode(_latents("Wan 2.1", (2, 3), vae, frames=1))
        assert record.recorded == most + 2


def _hooked(vae: Any) -> None:
    vae.decoder.conv_in.register_forward_pre_hook(lambda *_: None)


def _offloaded(vae: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(vae, accelerate.hooks.ModelHook())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda vae: vae.train(), "in training mode"),
        (_hooked, "hooks on the modules"),
        (_offloaded, "hooks on the modules"),
        (lambda vae: setattr(graphs.GRAPHS[vae], "_device", "cuda"), "latents on cpu"),
    ],
    ids=["training", "a hook", "offloading", "another device"],
)
def test_what_cannot_be_recorded_is_decoded_step_by_step(change, reason: str) -> None:
    vae = _made("Wan 2.1")
    z = _latents("Wan 2.1", (3, 3), vae, frames=3)
    with torch.no_grad():
        expected = vae.decode(z).sample
        record = _repeating(vae)
        change(vae)
        assert same_bits(vae.decode(z).sample, expected)
        assert record.recorded == 0 and reason in graphs.GRAPHS[vae].why_not([z], vae)


def test_with_gradients_on_nothing_is_recorded() -> None:
    vae = _tiled("Wan 2.1")
    record = _repeating(vae)
    for size in ((3, 3), (9, 8)):
        assert vae.decode(_latents("Wan 2.1", size, vae, frames=2)).sample.requires_grad
    assert record.recorded == 0 and "gradients are on" in graphs.GRAPHS[vae].why_not([torch.zeros(1)], vae)


def test_a_recording_that_fails_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    vae = _tiled("Wan 2.1")
    z = _latents("Wan 2.1", (9, 8), vae, frames=3)

    def fails(body: Callable[[], Any]) -> Any:
        raise torch.OutOfMemoryError("no memory for it")

    with torch.no_grad(), caplog.at_level(logging.WARNING, "latentfast"):
        expected = vae.decode(z).sample
        vaes.accelerate_vae(vae)
        graphs.GRAPHS[vae] = vaes.ChunkGraphs(lambda: fails, "cpu")
        for _ in range(2):
            assert same_bits(vae.decode(z).sample, expected)
    assert caplog.text.count("without CUDA graphs from now on: recording failed: no memory for it") == 1


def test_graphs_do_not_hold_their_autoencoder() -> None:
    vae = _made("Wan 2.1")
    vaes.accelerate_vae(vae, cuda_graph=True)
    assert isinstance(graphs.GRAPHS[vae], vaes.ChunkGraphs)
    alive = weakref.ref(vae)
    del vae
    gc.collect()
    assert alive() is None


def test_families_that_do_not_decode_by_groups_say_so() -> None:
    vae = _tiled("HunyuanVideo")
    assert "no CUDA graphs" in vaes.accelerate_vae(vae, cuda_graph=True).note and vae not in graphs.GRAPHS


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CHUNKED)
def test_cuda_graphs_have_the_bits_of_single_steps(family: str, dtype: torch.dtype) -> None:
    vae = _tiled(family, dtype, "cuda")
    sizes = [((6, 5), 5), ((14, 13), 4), ((6, 5), 1), ((14, 13), 4)]
    clips = [_latents(family, size, vae, frames=frames) for size, frames in sizes]
    with torch.inference_mode():
        expected = [vae.decode(z).sample for z in clips]
        replacement = vaes.accelerate_vae(vae, cuda_graph=True)
        for _ in range(2):
            assert all(same_bits(vae.decode(z).sample, x) for z, x in zip(clips, expected, strict=True))
        assert graphs.GRAPHS[vae].failure == ""
        replacement.undo()


@gpu
@needs_gpu
def test_a_group_of_frames_is_a_few_launches_and_waits_for_nothing() -> None:
    profiled = pytest.importorskip("latentfast.benchmarks.vae_decode").profiled
    vae = _tiled("Wan 2.1", torch.bfloat16, "cuda")
    z = _latents("Wan 2.1", (14, 13), vae, frames=5)
    with torch.inference_mode():
        parent = profiled(lambda: vae.decode(z))[1]
        vaes.accelerate_vae(vae, cuda_graph=True)
        vae.decode(z)
        ours = profiled(lambda: vae.decode(z))[1]
        groups, tiles = 9 * 5, 9
        # into the graph's input, the graph, from its result to its place; a tile's first result aside; the seams
        assert ours <= 3 * groups + tiles + 1 and parent > 50 * groups
        torch.cuda.set_sync_debug_mode("error")
        try:
            vae.decode(z)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_gpu
def test_graphs_free_their_memory() -> None:
    vae = _tiled("Wan 2.1", torch.bfloat16, "cuda")
    z = _latents("Wan 2.1", (14, 13), vae, frames=5)
    with torch.inference_mode():
        vae.decode(z)
        before = torch.cuda.memory_allocated()
        replacement = vaes.accelerate_vae(vae, cuda_graph=True)
        vae.decode(z)
        held = torch.cuda.memory_allocated() - before
        results = [weakref.ref(link.result) for chain in graphs.GRAPHS[vae]._chains.values() for link in chain.links]
        assert held > 0 and len(results) == 4 * 3
        replacement.undo()
        gc.collect()
        assert not any(result() is not None for result in results)
        assert torch.cuda.memory_allocated() - before < held
