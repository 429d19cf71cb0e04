"""Autoencoders with seams in one launch: the parent's bits in every family, and the very object back afterwards."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import same_bits

diffusers = pytest.importorskip("diffusers")
vaes = pytest.importorskip("latentfast.integrations.diffusers.vaes")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FOUR, FIVE = (4,) * 4, (1,) * 5
WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
SCALED = (True, True, False, False)
#: Of each family: how a tiny one is made.
FAMILIES: dict[str, Callable[[], Any]] = {
    "Wan 2.1": lambda: diffusers.AutoencoderKLWan(**WAN),
    "Wan 2.2": lambda: diffusers.AutoencoderKLWan(
        **WAN, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16
    ),
    "Qwen-Image": lambda: diffusers.AutoencoderKLQwenImage(**WAN),
    "HunyuanVideo": lambda: diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=2
    ),
    "LTX": lambda: diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=FOUR, decoder_block_out_channels=FOUR, layers_per_block=FIVE,
        decoder_layers_per_block=FIVE, spatio_temporal_scaling=SCALED, decoder_spatio_temporal_scaling=SCALED,
        patch_size=2,
    ),
    "CogVideoX": lambda: diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=2, sample_height=96,
        sample_width=96,
    ),
    "Mochi": lambda: diffusers.AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=FIVE, add_attention_block=(False,) * 5,
    ),
    "AutoencoderKL": lambda: diffusers.AutoencoderKL(
        block_out_channels=FOUR, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, sample_size=64,
    ),
}  # fmt: skip
#: Those whose tiles are cut by strides; the others' by the share that overlaps.
OVERLAPPING = ("CogVideoX", "AutoencoderKL")
CHUNKED = ["Wan 2.1", "Wan 2.2", "Qwen-Image", "CogVideoX"]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_device = pytest.mark.parametrize("device", DEVICES)


def _made(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    torch.manual_seed(3)
    vae = FAMILIES[family]().eval()
    with torch.no_grad():  # values beyond what is clamped, too
        for name in ("conv_out", "proj_out"):
            if hasattr(vae.decoder, name):
                convolution = getattr(vae.decoder, name)
                getattr(convolution, "conv", convolution).weight.mul_(3)
    return vae.to(device, dtype)


def _tiled(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Tiles of 8x8 latents; they share 2 rows and 3 columns, or, where it is one share for both, 2."""
    vae = _made(family, dtype, device)
    pixels = 16 if family == "Wan 2.2" else 8
    if family == "AutoencoderKL":
        vae.enable_tiling()
    elif family in OVERLAPPING:
        vae.enable_tiling(64, 64, 0.25, 0.375)
    else:
        vae.enable_tiling(
            tile_sample_min_height=8 * pixels, tile_sample_min_width=8 * pixels,
            tile_sample_stride_height=6 * pixels, tile_sample_stride_width=5 * pixels,
        )  # fmt: skip
    return vae


def _latents(family: str, size: tuple[int, int], like: Any, frames: int = 3, batch: int = 1) -> Tensor:
    shape = (batch, 4, *size) if family == "AutoencoderKL" else (batch, 4, frames, *size)
    return torch.randn(shape, dtype=torch.float64).to(next(like.parameters()))


def _video(family: str, size: tuple[int, int], like: Any, frames: int = 5, batch: int = 1) -> Tensor:
    """Of so many pixels: latents of an eighth or (Wan 2.2) a sixteenth of them."""
    lead = (batch, 3) if family == "AutoencoderKL" else (batch, 3, 6 if family == "Mochi" else frames)
    return torch.randn((*lead, *size), dtype=torch.float64).to(next(like.parameters())).clamp(-1, 1)


def _same(vae: Any, call: Callable[[], Tensor]) -> Tensor:
    """What the parent returns, once it is certain that its replacement returns the same."""
    with torch.no_grad():
        expected = call()
        replacement = vaes.accelerate_vae(vae)
        assert isinstance(replacement, vaes.Replacement), replacement
        got = call()
        replacement.undo()
    assert got.dtype == expected.dtype and same_bits(got, expected)
    return expected


@contextmanager
def _stitched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What `latentfast.stitch` returned."""
    import latentfast

    results: list[Tensor] = []
    stitch = latentfast.stitch

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        results.append(stitch(*arguments, **options))
        return results[-1]

    with monkeypatch.context() as patch:
        patch.setattr(latentfast, "stitch", recorded)
        yield results


# --- The parent's bits ------------------------------------------------------------------------------------------------


#: Latents: tiles of every kind; one row of them, with a last one within the overlap; one column.
SIZES = [
    (family, size)
    for family in FAMILIES
    for size in ([(9, 8)] if family == "Mochi" else [(14, 13), (7, 17), (9, 4)])
    if size == (14, 13) or family not in ("Wan 2.2", "Qwen-Image")  # are cut as Wan 2.1 is
]


@every_device
@pytest.mark.parametrize(("family", "size"), SIZES, ids=str)
def test_tiled_decode_has_the_parents_bits(family: str, size, device: str, monkeypatch) -> None:
    vae = _tiled(family, device=device)
    z = _latents(family, size, vae, batch=1 if family == "Mochi" else 2)
    with _stitched(monkeypatch) as results:
        decoded = _same(vae, lambda: vae.decode(z).sample)
    assert len(results) == 1, "one stitch for all seams"
    assert decoded.shape[-2:] == tuple(n * (16 if family == "Wan 2.2" else 8) for n in size)


@every_device
@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tiled_decode_in_every_dtype(family: str, dtype: torch.dtype, device: str, monkeypatch) -> None:
    if family == "Mochi" and dtype != torch.bfloat16 and device == "cpu":
        pytest.skip("32 channels at least, which the CPU convolves slowly in this dtype")
    vae = _tiled(family, dtype, device)
    z = _latents(family, (9, 8), vae, frames=2)
    with _stitched(monkeypatch) as results:
        _same(vae, lambda: vae.decode(z, return_dict=False)[0])
    assert len(results) == 1


@every_device
@pytest.mark.parametrize(("family", "size"), SIZES, ids=str)
def test_tiled_encode_has_the_parents_bits(family: str, size, device: str, monkeypatch) -> None:
    vae = _tiled(family, device=device)
    scale = 16 if family == "Wan 2.2" else 8
    x = _video(family, (size[0] * scale, size[1] * scale), vae, batch=1 if family == "Mochi" else 2)
    with _stitched(monkeypatch) as results:
        _same(vae, lambda: vae.encode(x).latent_dist.parameters)
    assert len(results) == 1


@every_device
@pytest.mark.parametrize("family", ["Wan 2.1", "CogVideoX"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiled_encode_in_half_types(family: str, dtype: torch.dtype, device: str) -> None:
    vae = _tiled(family, dtype, device)
    x = _video(family, (72, 64), vae)
    _same(vae, lambda: vae.encode(x, return_dict=False)[0].parameters)


@every_device
@every_family
def test_what_is_smaller_than_a_tile_is_not_tiled(family: str, device: str, monkeypatch) -> None:
    vae = _tiled(family, device=device)
    z, x = _latents(family, (4, 8), vae), _video(family, (32, 64), vae)
    with _stitched(monkeypatch) as results:
        _same(vae, lambda: vae.decode(z).sample)
        _same(vae, lambda: vae.encode(x).latent_dist.parameters)
    assert not results


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Mochi"])
def test_sliced_batches_and_defaults_of_enable_tiling(family: str) -> None:
    vae = _tiled(family)
    vae.enable_slicing()
    z = _latents(family, (9, 8), vae, frames=2, batch=2)
    _same(vae, lambda: vae.decode(z).sample)
    vae = _made(family)
    vae.enable_tiling()
    if family not in OVERLAPPING and family not in ("Wan 2.2", "LTX"):  # 256 pixels of them are enough
        z = _latents(family, (33, 4), vae, frames=2)
        _same(vae, lambda: vae.decode(z).sample)


@pytest.mark.parametrize(
    ("family", "cut"),
    [
        ("Wan 2.1", (68, 68, 50, 44)),  # no multiples of 8
        ("Wan 2.1", (64, 64, 24, 64)),  # more than half of a tile is shared; columns share nothing
        ("Wan 2.2", (128, 128, 100, 80)),
        ("HunyuanVideo", (64, 64, 16, 44)),
        ("CogVideoX", (60, 100, 1 / 6, 1 / 5)),
        ("CogVideoX", (64, 64, 0.3, 0.7)),
    ],
    ids=str,
)
def test_tiles_that_do_not_meet_go_the_parents_way(family: str, cut: tuple, monkeypatch) -> None:
    vae = _made(family)
    if family in OVERLAPPING:
        vae.enable_tiling(*cut)
    else:
        names = ("min_height", "min_width", "stride_height", "stride_width")
        vae.enable_tiling(**{f"tile_sample_{name}": n for name, n in zip(names, cut, strict=True)})
    z = _latents(family, (14, 13), vae, frames=2)
    with _stitched(monkeypatch) as results:
        _same(vae, lambda: vae.decode(z).sample)
    assert not results


def test_a_decoder_of_another_compression_than_its_autoencoder_says(monkeypatch) -> None:
    vae = diffusers.AutoencoderKLWan(**(WAN | {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True]})).eval()
    vae.enable_tiling(64, 64, 48, 40)
    z = torch.randn(1, 4, 2, 14, 13)
    with _stitched(monkeypatch) as results:
        _same(vae, lambda: vae.decode(z).sample)
    assert not results


@every_device
@pytest.mark.parametrize("family", ["HunyuanVideo", "LTX"])
@pytest.mark.parametrize("size", [(7, 5), (10, 5)], ids=["whole clips", "tiled clips"])
@pytest.mark.parametrize("frames", range(5, 9))
def test_framewise_decoding_and_encoding(family: str, frames: int, size, device: str, monkeypatch) -> None:
    """Clips of 16 frames that share 4, with every number of latent frames that is left for the last."""
    vae = _tiled(family, torch.bfloat16 if frames == 6 else torch.float32, device)
    vae.use_framewise_decoding = vae.use_framewise_encoding = True
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 16, 12
    z = _latents(family, size, vae, frames=frames)
    with _stitched(monkeypatch) as results:
        decoded = _same(vae, lambda: vae.decode(z).sample)
        tiles = len(results) - 1
        _same(vae, lambda: vae.encode(decoded.clamp(-1, 1)).latent_dist.parameters)
    assert decoded.shape[2] == 4 * (frames - 1) + 1
    assert tiles == (0 if size == (7, 5) else len(range(0, frames, 3))) and len(results) == 2 * (tiles + 1)


def test_framewise_decoding_by_strides_that_do_not_divide(monkeypatch) -> None:
    vae = _tiled("HunyuanVideo")
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 15, 10
    z = _latents("HunyuanVideo", (6, 5), vae, frames=8)
    with _stitched(monkeypatch) as results:
        _same(vae, lambda: vae.decode(z).sample)
    assert not results


def test_ltx_with_a_timestep(monkeypatch) -> None:
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=FOUR, decoder_block_out_channels=FOUR, layers_per_block=FIVE,
        decoder_layers_per_block=FIVE, spatio_temporal_scaling=SCALED, decoder_spatio_temporal_scaling=SCALED,
        patch_size=2, timestep_conditioning=True,
    ).eval()  # fmt: skip
    vae.enable_tiling(64, 64, 16, 48, 40, 12)
    z = torch.randn(1, 4, 6, 9, 8)
    for framewise in (False, True):
        vae.use_framewise_decoding = framewise
        early, late = (
            _same(vae, lambda t=t: vae.decode(z, torch.tensor([t]), return_dict=False)[0]) for t in (0.05, 0.9)
        )
        assert not same_bits(early, late)


@every_family
def test_public_methods_called_as_the_parents(family: str) -> None:
    vae = _tiled(family)
    z = _latents(family, (9, 8), vae, frames=2)
    temb = (None,) if family == "LTX" else ()
    _same(vae, lambda: vae.tiled_decode(z, *temb, False)[0])
    _same(vae, lambda: vae.tiled_decode(z, *temb).sample)
    _same(vae, lambda: vae.tiled_decode(z=z, **({"temb": None} if temb else {}), return_dict=False)[0])
    if family == "AutoencoderKL":
        x = _video(family, (72, 64), vae)
        _same(vae, lambda: vae.tiled_encode(x, False)[0].parameters)


def test_mochi_by_groups_of_frames_and_with_all_of_them() -> None:
    vae = _tiled("Mochi")
    vae.drop_last_temporal_frames = False
    z = _latents("Mochi", (9, 8), vae, frames=3)
    assert _same(vae, lambda: vae.decode(z).sample).shape[2] == 18
    vae.use_framewise_decoding = True
    _same(vae, lambda: vae.decode(z).sample)
    vae.use_framewise_encoding = True
    vaes.accelerate_vae(vae)
    with pytest.raises(NotImplementedError, match="Frame-wise encoding"):
        vae.encode(_video("Mochi", (72, 64), vae))


def test_an_image_of_qwen_is_one_frame() -> None:
    vae = _tiled("Qwen-Image")
    for size in ((6, 6), (12, 6)):
        z = _latents("Qwen-Image", size, vae, frames=1)
        decoded = _same(vae, lambda z=z: vae.decode(z).sample)
        _same(vae, lambda decoded=decoded: vae.encode(decoded).latent_dist.parameters)


@every_device
@pytest.mark.parametrize("family", CHUNKED)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_whole_clips_by_groups_of_frames(family: str, frames: int, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        vae = _made(family, dtype, device)
        z = _latents(family, (6, 5), vae, frames=frames, batch=2)
        decoded = _same(vae, lambda vae=vae, z=z: vae.decode(z).sample)
        _same(vae, lambda vae=vae, decoded=decoded: vae.encode(decoded).latent_dist.parameters)


@pytest.mark.parametrize("family", ["Wan 2.1", "CogVideoX", "AutoencoderKL"])
def test_gradients_are_the_parents(family: str) -> None:
    vae = _tiled(family, torch.float64)
    for size in ((9, 8), (4, 5)):  # tiled, and not
        z = _latents(family, size, vae, frames=2).requires_grad_()
        found = []
        for replaced in (False, True):
            replacement = vaes.accelerate_vae(vae) if replaced else None
            out = vae.decode(z).sample
            found.append(torch.autograd.grad(out.square().sum(), z)[0])
            if replacement:
                replacement.undo()
        # the parent sums what tiles have in common in another order
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


# --- What it saves ----------------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Counts the operators called, and the elements that concatenation writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.concatenated = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        self.calls[str(operator)] += 1
        if operator is torch.ops.aten.cat.default and result.shape[1] == 3:  # pixels; features have 4 channels
            self.concatenated += result.numel()
        return result


def _counted(call: Callable[[], Any]) -> _Operations:
    with torch.no_grad(), _Operations() as operations:
        call()
    return operations


def test_the_seams_are_one_operation() -> None:
    """Beside the decoder's own, of which both have as many."""
    vae = _tiled("Wan 2.1")
    z = _latents("Wan 2.1", (14, 13), vae, frames=2)
    parent = _counted(lambda: vae.decode(z)).calls
    vaes.accelerate_vae(vae)
    ours = _counted(lambda: vae.decode(z)).calls
    assert ours["latentfast.stitch.default"] == 1
    # Nine tiles, of 64, 64, 16 rows and 64, 64, 24 columns: six seams of 16 rows and six of 24 columns.
    assert parent["aten.mul.Tensor"] - ours["aten.mul.Tensor"] == 2 * (2 * 3 * 16 + 2 * 3 * 24)
    # Two groups a tile, the tiles of three rows, and the rows.
    assert parent["aten.cat.default"] - ours["aten.cat.default"] == 9 + 3 + 1
    assert sum(parent.values()) - sum(ours.values()) > 1500


def test_a_clip_does_not_grow_by_concatenation() -> None:
    vae = _made("Wan 2.1")
    z = _latents("Wan 2.1", (3, 3), vae, frames=5)
    parent = _counted(lambda: vae.decode(z)).concatenated
    frame = 3 * 24 * 24
    assert parent == (5 + 9 + 13 + 17) * frame
    vaes.accelerate_vae(vae)
    assert _counted(lambda: vae.decode(z)).concatenated == 0


# --- In place, and back -----------------------------------------------------------------------------------------------


@every_family
def test_undo_gives_the_very_class_back(family: str) -> None:
    vae = _tiled(family)
    parent, before = type(vae), dict(vae.__dict__)
    assert vaes.why_not(vae) == "" and vaes.replacement_for(vae).__name__ == parent.__name__
    replacement = vaes.accelerate_vae(vae, cuda_graph=True)
    assert type(vae) is not parent and isinstance(vae, parent) and type(vae).__name__ == parent.__name__
    assert replacement.parent is parent and parent.__name__ in replacement.note
    assert vaes.accelerate_vae(vae) == f"{parent.__name__} is replaced already" == vaes.why_not(vae)
    for _ in range(2):
        replacement.undo()
        assert type(vae) is parent and vae.__dict__ == before
        assert vae not in vaes.families.GRAPHS


@every_family
def test_saves_copies_and_pickles_as_the_parent(family: str, tmp_path: Path) -> None:
    vae = _tiled(family)
    parent = type(vae)
    vaes.accelerate_vae(vae, cuda_graph=True)
    vae.save_pretrained(tmp_path)
    assert parent.load_config(tmp_path)["_class_name"] == parent.__name__
    for loaded in (parent.from_pretrained(tmp_path), copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert type(loaded) is parent and set(vae.config) - set(loaded.config) <= {"_use_default_values"}
        assert all(same_bits(a, b) for a, b in zip(loaded.parameters(), vae.parameters(), strict=True))


def test_pipelines_made_of_it_name_diffusers_class(tmp_path: Path) -> None:
    vae = _tiled("Wan 2.1")
    vaes.accelerate_vae(vae)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=None)
    pipe.save_pretrained(tmp_path)
    assert diffusers.WanPipeline.load_config(tmp_path)["vae"] == ["diffusers", "AutoencoderKLWan"]


def test_classes_are_loaded_as_any_other(tmp_path: Path) -> None:
    vae = _tiled("Wan 2.1")
    vae.save_pretrained(tmp_path)
    ours = vaes.AutoencoderKLWan.from_pretrained(tmp_path)
    ours.enable_tiling(64, 64, 48, 40)
    z = _latents("Wan 2.1", (14, 13), vae)
    with torch.no_grad():
        assert same_bits(ours.decode(z).sample, vae.decode(z).sample)


def test_what_is_left_as_it_is() -> None:
    class Own(diffusers.AutoencoderKLWan):
        pass

    vae = Own(**WAN)
    reason = "Own is a subclass, which may do otherwise what would be replaced"
    assert vaes.accelerate_vae(vae) == reason and type(vae) is Own
    assert "AutoencoderTiny does not decode" in vaes.accelerate_vae(diffusers.AutoencoderTiny())
    assert vaes.replacement_for(None) is None and "NoneType" in vaes.why_not(None)
