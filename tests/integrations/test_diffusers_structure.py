"""Edits with their source's layout: whose queries, keys and values the models' attention gets, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers import WanPipeline

from latentfast.integrations.diffusers import AttentionCapture, accelerate, localized_edit
from latentfast.integrations.diffusers._structure import SourceStructure
from latentfast.tiny import load_pipeline
from tests.integrations.diffusers_models import MODELS, made

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
NAMES = ["wan", "cogvideox", "hunyuan", "mochi"]
CALL: dict[str, Any] = {
    "height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 1.5,
    "max_sequence_length": 48, "output_type": "latent",
}  # fmt: skip
SOURCE, EDITED = "a red circle and a blue star", "a green circle and a blue star"

#: Of one sample in one layer: (queries, keys, values), each of the video and of the text.
Parts = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def attended(monkeypatch: pytest.MonkeyPatch, name: str, model: nn.Module, inputs: dict[str, Any]) -> list[list[Parts]]:
    """What the attention of the video to itself gets: for each layer and sample."""
    seen: list[Parts] = []
    tokens = MODELS[name].grid[0] * MODELS[name].grid[1] * MODELS[name].grid[2]
    attention = nn.functional.scaled_dot_product_attention

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        text = x.shape[1] - tokens
        return (x[:, text:], x[:, :text]) if MODELS[name].joint == "first" else (x[:, :tokens], x[:, tokens:])

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if key.shape[2] >= tokens:
            seen.extend([parts(x) for x in sample] for sample in zip(query, key, value, strict=True))
        return attention(query, key, value, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        run(model, inputs)
    samples = inputs["hidden_states"].shape[0]
    layers = [seen[at : at + samples] for at in range(0, len(seen), samples)]
    assert len(layers) == MODELS[name].layers and len(layers[-1]) == samples
    return layers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_the_video_attends_as_its_source_does(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made(name, device)
    plain, before = run(model, inputs), hooks(model)
    with SourceStructure(SimpleNamespace(transformer=model, guidance_scale=1.0), 1):
        layers = attended(monkeypatch, name, model, inputs)
        result = run(model, inputs)
    assert hooks(model) == before
    for source, edited in layers:
        for (video, text), (edited_video, edited_text) in zip(source[:2], edited[:2], strict=True):
            assert torch.equal(video, edited_video)
            assert not text.numel() or text.shape != edited_text.shape or not torch.equal(text, edited_text)
        assert not torch.equal(source[2][0], edited[2][0])
    assert torch.equal(result[0], plain[0]) and not torch.equal(result[1], plain[1])


def test_two_halves_of_guidance_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("cogvideox")
    inputs = {
        key: torch.cat([x, 1.5 * x]) if isinstance(x, Tensor) and x.ndim > 1 else x for key, x in inputs.items()
    } | {"timestep": torch.full((4,), 500)}
    pipe = SimpleNamespace(transformer=model, guidance_scale=4.0)
    with SourceStructure(pipe, 1):
        layers = attended(monkeypatch, "cogvideox", model, inputs)
    for source, edited, guided_source, guided_edit in layers:
        for part in (0, 1):
            assert torch.equal(source[part][0], edited[part][0])
            assert torch.equal(guided_source[part][0], guided_edit[part][0])
            assert not torch.equal(source[part][0], guided_source[part][0])


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_fused_projections(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made(name)
    model.fuse_qkv_projections()
    with SourceStructure(SimpleNamespace(transformer=model, guidance_scale=1.0), 1):
        for source, edited in attended(monkeypatch, name, model, inputs):
            assert all(torch.equal(source[part][0], edited[part][0]) for part in (0, 1))


def test_hooks_go_with_the_last_of_the_steps_and_with_an_error() -> None:
    model, inputs = made("wan")
    before = hooks(model)
    structure = SourceStructure(SimpleNamespace(transformer=model), 2)
    with structure:
        for step, left in enumerate((True, False, False)):
            run(model, inputs)
            structure.stepped(step)
            assert (hooks(model) > before) == left
    with pytest.raises(ZeroDivisionError), SourceStructure(SimpleNamespace(transformer=model), 1):
        raise ZeroDivisionError
    assert hooks(model) == before


def test_compiled_models_are_not_passed_over() -> None:
    model, inputs = made("wan")
    compiled = torch.compile(model, backend="eager")
    run(compiled, inputs)
    with SourceStructure(SimpleNamespace(transformer=compiled), 1) as structure:
        run(compiled, inputs)
        with pytest.raises(RuntimeError, match="compiled code runs no hooks"):
            structure.stepped(0)
    with (
        SourceStructure(SimpleNamespace(transformer=compiled), 1) as structure,
        torch.compiler.set_stance("force_eager"),
    ):
        run(compiled, inputs)
        structure.stepped(0)


def test_models_without_such_attention_are_refused() -> None:
    model, _ = made("ltx")
    with pytest.raises(ValueError, match=r"structure needs a transformer of Wan, .*got LTXVideo.*: pass structure=0"):
        SourceStructure(SimpleNamespace(transformer=model), 1)


# ------------------------------------------------------------------------------------------------------ in an edit


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def edit(pipe: WanPipeline, edit_prompt: str = EDITED, **options: Any) -> Any:
    noise = torch.randn((1, 16, 2, 8, 8), generator=torch.Generator().manual_seed(7))
    return localized_edit(pipe, SOURCE, edit_prompt, **{"words": ["circle"], "latents": noise, **CALL, **options})


def outside_is_the_source(made: Any) -> bool:
    outside = (made.mask == 0).expand_as(made.source)
    return torch.equal(made.source[outside], made.edited[outside])


@pytest.mark.parametrize("look", [False, True])
def test_structure_changes_the_edit_alone(pipe: WanPipeline, look: bool) -> None:
    free, some, whole = (edit(pipe, structure=share, look=look) for share in (0.0, 0.5, 1.0))
    assert torch.equal(free.source, some.source) and torch.equal(free.source, whole.source)
    assert not torch.equal(free.edited, some.edited) and not torch.equal(some.edited, whole.edited)
    assert outside_is_the_source(some) and outside_is_the_source(whole)
    assert hooks(pipe.transformer) == 0


def test_no_structure_sets_no_hook(pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceStructure, "_hook", lambda *_: pytest.fail("a hook was set"))
    edit(pipe, structure=0.0, mask=torch.ones(1, 1, 1, 1, 1))


def test_an_edit_that_says_what_its_source_says_is_its_source(pipe: WanPipeline) -> None:
    made = edit(pipe, edit_prompt=SOURCE, structure=1.0)
    # both rows of a batch are multiplied alike, but for the order of a sum
    torch.testing.assert_close(made.edited, made.source, rtol=1e-3, atol=1e-3)


def test_accelerated_and_captured_in_the_same_run(pipe: WanPipeline) -> None:
    options = {"prompt": SOURCE, "own_tokens": True, "max_sequence_length": 48, "samples": slice(0, 1)}
    plain = edit(pipe, structure=1.0)
    with AttentionCapture(pipe, ["circle"], **options) as capture:
        captured = edit(pipe, structure=1.0)
        assert torch.equal(captured.edited, plain.edited)
        torch.testing.assert_close(capture.maps()[0], captured.maps[0], rtol=0, atol=1e-6)
        with accelerate(pipe):
            fast = edit(pipe, structure=1.0)
    assert outside_is_the_source(fast)
    # accelerated schedulers are within a few roundings a step of diffusers' own
    torch.testing.assert_close(fast.source, plain.source, rtol=1e-3, atol=1e-3)
    inside = (fast.mask * plain.mask).bool().expand_as(fast.edited)
    torch.testing.assert_close(fast.edited[inside], plain.edited[inside], rtol=1e-2, atol=1e-2)
    assert hooks(pipe.transformer) == 0


def test_no_hook_is_left_after_an_error(pipe: WanPipeline) -> None:
    def fails(*_: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edit(pipe, structure=1.0, callback_on_step_end=fails)
    assert hooks(pipe.transformer) == 0


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_that_are_refused(pipe: WanPipeline, share: float) -> None:
    with pytest.raises(ValueError, match=r"structure must be in \[0, 1\], got"):
        edit(pipe, structure=share)
