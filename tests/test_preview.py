"""Previews on every backend: bytes against float64, sizes, edges, bad input; and the fit of their factors."""

import math
import re

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import latentfast
from latentfast import reference
from tests.helpers import DTYPES, LAYOUTS, Draw, Target, widened

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sides = st.sampled_from([1, 2, 3, 5, 8, 13])
seeds = st.integers(0, 2**31 - 1)

#: (shape, size): the factors that kernels unroll, at widths that fill their vectors and that do not; other factors,
#: fewer pixels than positions, one position, no enlargement.
SIZES = [
    ((2, 4, 2, 6, 10), (48, 80)),
    ((1, 4, 2, 5, 8), (80, 128)),
    ((1, 4, 2, 5, 8), (20, 32)),
    ((1, 4, 2, 5, 8), (10, 16)),
    ((1, 3, 2, 5, 7), (40, 56)),
    ((1, 3, 1, 1, 2), (8, 16)),
    ((1, 5, 1, 4, 6), (48, 80)),
    ((2, 3, 2, 7, 9), (11, 31)),
    ((1, 3, 1, 16, 24), (2, 3)),
    ((1, 3, 1, 33, 41), (1, 1)),
    ((2, 4, 3, 1, 1), (5, 7)),
    ((2, 4, 3, 5, 16), None),
    ((1, 4, 1, 3, 11), None),
    ((1, 2, 1, 3, 150), (24, 1200)),
]


def _inputs(draw: Draw, shape: tuple[int, ...], spread: float = 0.5) -> dict[str, torch.Tensor]:
    """Latents and factors whose previews reach a little beyond [-1, 1], so that both clamps act."""
    weight = draw.uniform(shape[1], 3, low=-spread, high=spread)
    return {"z": draw.normal(*shape), "weight": weight, "bias": draw.uniform(3, low=-0.3, high=0.3)}


def assert_bytes(got: torch.Tensor, inputs: dict[str, torch.Tensor], size: tuple[int, int] | None) -> None:
    """The bytes of the specification in float64; 1 beside them only where it lies within 1e-3 of a border.

    float32's error is below 1e-4 here: 127.5 times a dozen roundings of sums of a few units, 6e-8 each.
    """
    x = reference.preview.latent_to_rgb(**widened(inputs, torch.float64), size=size, dtype=torch.float64)
    exact = ((x + 1) * 127.5).clamp(0, 255).cpu()
    got = got.cpu()
    assert got.dtype == torch.uint8
    assert got.shape == exact.shape
    assert got.is_contiguous()
    difference = (got.double() - exact.round()).abs()
    at_border = (exact - exact.floor() - 0.5).abs() <= 1e-3
    wrong = (difference > 0) & ~(at_border & (difference == 1))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} bytes differ, the first at {wrong.nonzero()[0].tolist()}: "
        f"got {got[wrong][0]}, exact {exact[wrong][0]}"
    )


# --- Bytes ------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
def test_bytes_are_the_specifications(shape: tuple, size: tuple | None, dtype: torch.dtype, target: Target) -> None:
    inputs = _inputs(Draw(dtype, target.device, 3), shape)
    got = latentfast.latent_to_rgb(**inputs, size=size)
    assert_bytes(got, inputs, size)
    if got.numel() > 1000:
        assert got.min() == 0 and got.max() == 255, "the inputs must reach both clamps"


@given(batch=st.integers(1, 2), channels=st.integers(1, 5), height=sides, width=sides, rows=sides, columns=sides,
       seed=seeds)  # fmt: skip
def test_bytes_of_any_sizes(target: Target, batch, channels, height, width, rows, columns, seed) -> None:
    inputs = _inputs(Draw(torch.float32, target.device, seed), (batch, channels, 2, height, width))
    assert_bytes(latentfast.latent_to_rgb(**inputs, size=(rows, columns)), inputs, (rows, columns))


@given(height=st.integers(1, 6), pairs=st.integers(1, 12), factor=st.sampled_from([2, 4, 8, 16]), seed=seeds)
def test_bytes_of_whole_factors(target: Target, height: int, pairs: int, factor: int, seed: int) -> None:
    inputs = _inputs(Draw(torch.bfloat16, target.device, seed), (1, 3, 2, height, 2 * pairs))
    size = (factor * height, factor * 2 * pairs)
    assert_bytes(latentfast.latent_to_rgb(**inputs, size=size), inputs, size)


@pytest.mark.parametrize("shape", [(1, 16, 2, 30, 52), (2, 128, 1, 8, 16), (1, 1, 3, 9, 24)], ids=str)
def test_bytes_of_usual_channels(shape: tuple, target: Target) -> None:
    """Those of Wan (16), LTX (128) and one; sizes that take several blocks or threads."""
    if target.interpreted and shape[1] == 16:
        shape = (1, 16, 1, 6, 10)
    inputs = _inputs(Draw(torch.bfloat16, target.device, 4), shape, 1 / math.sqrt(shape[1]))
    size = (8 * shape[3], 8 * shape[4])
    assert_bytes(latentfast.latent_to_rgb(**inputs, size=size), inputs, size)


def test_images_are_clips_of_one_frame(target: Target) -> None:
    inputs = _inputs(Draw(torch.float32, target.device), (2, 4, 1, 3, 5))
    for options in ({}, {"size": (9, 20)}, {"dtype": torch.float32}):
        clip = latentfast.latent_to_rgb(**inputs, **options)
        image = latentfast.latent_to_rgb(**{**inputs, "z": inputs["z"][:, :, 0]}, **options)
        assert image.shape == (clip.shape[0], *clip.shape[2:])
        assert torch.equal(image, clip[:, 0])


def test_the_float_form_is_what_the_bytes_round(target: Target) -> None:
    inputs = _inputs(Draw(torch.float32, target.device, 5), (2, 4, 2, 5, 6))
    x = latentfast.latent_to_rgb(**inputs, size=(40, 48), dtype=torch.float32)
    values = ((x + 1) * 127.5).clamp(0, 255)
    got = latentfast.latent_to_rgb(**inputs, size=(40, 48))
    assert (got - values).abs().max() <= 0.5 + 1e-4  # see assert_bytes
    assert x.dtype == torch.float32
    double = {name: v.double() for name, v in inputs.items()}
    assert latentfast.latent_to_rgb(**double, dtype=torch.float32).dtype == torch.float64


@pytest.mark.parametrize(
    ("value", "byte"), [(-1.0, 0), (1.0, 255), (-2.0, 0), (1e30, 255), (-1e30, 0), (0.0, 128), (-1 + 2 / 255, 1)]
)
def test_known_values(value: float, byte: int, target: Target) -> None:
    """The ends of the range, beyond them, and the tie 127.5, which goes to the even 128."""
    z = torch.full((1, 1, 1, 2, 3), value, device=target.device)
    weight, bias = torch.ones(1, 3, device=target.device), torch.zeros(3, device=target.device)
    for size in (None, (16, 24), (3, 5)):
        assert (latentfast.latent_to_rgb(z, weight, bias, size=size) == byte).all()


@every_dtype
def test_nan_is_zero_and_stays_where_it_is_sampled(dtype: torch.dtype, target: Target) -> None:
    inputs = _inputs(Draw(dtype, target.device, 6), (2, 3, 2, 6, 6))
    for size in (None, (12, 12) if target.interpreted else (48, 48), (9, 7)):
        clean = latentfast.latent_to_rgb(**inputs, size=size)
        poisoned = inputs["z"].clone()
        poisoned[1, 2, 1, 0, 0] = math.nan
        got = latentfast.latent_to_rgb(**{**inputs, "z": poisoned}, size=size)
        assert (got[1, 1, 0, 0] == 0).all()
        assert torch.equal(got[0], clean[0]) and torch.equal(got[1, 0], clean[1, 0])
        rows, columns = clean.shape[2] // 2, clean.shape[3] // 2
        assert torch.equal(got[1, 1, rows:], clean[1, 1, rows:])
        assert torch.equal(got[1, 1, :, columns:], clean[1, 1, :, columns:])


def test_infinities_stay_in_their_sample(target: Target) -> None:
    inputs = _inputs(Draw(torch.float32, target.device, 6), (2, 3, 2, 6, 6))
    clean = latentfast.latent_to_rgb(**inputs, size=(48, 48))
    inputs["z"][1, 0] = math.inf
    assert torch.equal(latentfast.latent_to_rgb(**inputs, size=(48, 48))[0], clean[0])


@pytest.mark.parametrize(("shape", "size"), [((4, 3, 6, 10), (48, 80)), ((4, 3, 5, 7), (9, 31))], ids=str)
def test_bytes_are_the_same_on_every_run_alone_and_for_any_threads(shape, size, target: Target) -> None:
    batch = 2 if target.interpreted else 8
    inputs = _inputs(Draw(torch.bfloat16, target.device, 7), (batch, *shape))
    first = latentfast.latent_to_rgb(**inputs, size=size)
    assert torch.equal(latentfast.latent_to_rgb(**inputs, size=size), first)
    alone = latentfast.latent_to_rgb(**{**inputs, "z": inputs["z"][-1:].clone()}, size=size)
    assert torch.equal(alone, first[-1:])
    torch.set_num_threads(2)
    assert torch.equal(latentfast.latent_to_rgb(**inputs, size=size), first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [None, (48, 80), (7, 11)], ids=str)
def test_bytes_of_any_layout(layout: str, size: tuple | None, target: Target) -> None:
    inputs = _inputs(Draw(torch.bfloat16, target.device, 8), (1, 4, 2, 6, 10))
    expected = latentfast.latent_to_rgb(**inputs, size=size)
    viewed = {name: LAYOUTS[layout](x) for name, x in inputs.items()}
    assert torch.equal(latentfast.latent_to_rgb(**viewed, size=size), expected)


@pytest.mark.parametrize("margin", [16, 3, 1])
@pytest.mark.parametrize("size", [None, (48, 80), (7, 11)], ids=str)
def test_bytes_go_into_out_and_nowhere_beside_it(size: tuple | None, margin: int, target: Target) -> None:
    inputs = _inputs(Draw(torch.bfloat16, target.device, 9), (1, 4, 2, 6, 10))
    expected = latentfast.latent_to_rgb(**inputs, size=size)
    buffer = torch.full((expected.numel() + 2 * margin,), 77, dtype=torch.uint8, device=target.device)
    out = buffer[margin:-margin].view(expected.shape)
    assert latentfast.latent_to_rgb(**inputs, size=size, out=out) is out
    assert torch.equal(out, expected)
    assert (buffer[:margin] == 77).all() and (buffer[-margin:] == 77).all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (2, 3, 0, 4, 5)], ids=str)
def test_nothing_makes_nothing(shape: tuple, target: Target) -> None:
    inputs = _inputs(Draw(torch.float32, target.device), shape)
    assert latentfast.latent_to_rgb(**inputs, size=(8, 10)).shape == (shape[0], shape[2], 8, 10, 3)
    assert latentfast.latent_to_rgb(**{**inputs, "z": inputs["z"][:, :, :, :0]}).shape == (shape[0], shape[2], 0, 5, 3)


def test_without_channels_all_is_bias(target: Target) -> None:
    z = torch.empty(1, 0, 2, 3, 4, device=target.device)
    out = latentfast.latent_to_rgb(z, torch.empty(0, 3, device=target.device), [-1.0, 0.0, 1.0], size=(6, 8))
    assert (out == torch.tensor([0, 128, 255], dtype=torch.uint8, device=target.device)).all()


def test_bytes_compile_as_one_graph(target: Target) -> None:
    inputs = _inputs(Draw(torch.float32, target.device), (1, 3, 2, 4, 6))
    weight = inputs["weight"].tolist()

    def preview(z, bias):
        return latentfast.latent_to_rgb(z * 2, weight, bias, size=(32, 48)).float().mean(1)

    compiled = torch.compile(preview, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs["z"], inputs["bias"]), preview(inputs["z"], inputs["bias"]))


def test_factors_as_sequences_and_of_other_dtypes(target: Target) -> None:
    inputs = _inputs(Draw(torch.bfloat16, target.device, 10), (1, 4, 1, 3, 4))
    expected = latentfast.latent_to_rgb(**inputs, size=(6, 8))
    weight, bias = inputs["weight"].tolist(), inputs["bias"].tolist()
    for _ in range(2):  # the second time from what was kept
        assert torch.equal(latentfast.latent_to_rgb(inputs["z"], weight, tuple(bias), size=(6, 8)), expected)
    wide = {name: x.double() if name != "z" else x for name, x in inputs.items()}
    assert torch.equal(latentfast.latent_to_rgb(**wide, size=(6, 8)), expected)
    with torch.inference_mode():
        latentfast.latent_to_rgb(inputs["z"], [[0.25] * 3] * 4, [0.125] * 3)
    z = inputs["z"].clone().requires_grad_()
    latentfast.latent_to_rgb(z, [[0.25] * 3] * 4, [0.125] * 3, dtype=torch.float32).sum().backward()
    assert torch.equal(z.grad, torch.full_like(z, 0.75))


def test_bytes_of_latents_that_want_a_gradient(target: Target) -> None:
    inputs = _inputs(Draw(torch.float32, target.device), (1, 4, 1, 3, 4))
    expected = latentfast.latent_to_rgb(**inputs)
    inputs["z"].requires_grad_()
    got = latentfast.latent_to_rgb(**inputs)
    assert not got.requires_grad
    assert torch.equal(got, expected)


# --- Bad input --------------------------------------------------------------------------------------------------------

Z, W, B = torch.zeros(2, 4, 3, 5, 6), torch.zeros(4, 3), torch.zeros(3)
rgb, fit = latentfast.latent_to_rgb, latentfast.fit_rgb
FRAMES = torch.zeros(2, 9, 40, 48, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rgb([1.0], W, B), TypeError, "z must be a tensor, got list"),
        (lambda: rgb(Z.int(), W, B), TypeError, "z must be float32, float16, bfloat16 or float64, got int32"),
        (lambda: rgb(Z[0, 0], W, B), ValueError, "z must have shape (B, C, T, H, W) or (B, C, H, W), got (3, 5, 6)"),
        (lambda: rgb(Z, W[:3], B), ValueError, "weight must have shape (4, 3), got (3, 3)"),
        (lambda: rgb(Z, W.int(), B), TypeError, "weight must be floats, got a tensor of int32"),
        (lambda: rgb(Z, W.to("meta"), B), ValueError, "weight must be on z's device cpu, got meta"),
        (lambda: rgb(Z, [[0.0] * 3] * 5, B), ValueError, "weight must have shape (4, 3), got (5, 3)"),
        (lambda: rgb(Z, [[0.0] * 2] * 4, B), ValueError, "weight must have shape (4, 3), got (4, 2)"),
        (lambda: rgb(Z, 0.5, B), TypeError, "weight must be a tensor or nested sequences of floats, got float"),
        (lambda: rgb(Z, W, [0.0]), ValueError, "bias must have shape (3,), got (1,)"),
        (lambda: rgb(Z, W, B[:2]), ValueError, "bias must have shape (3,), got (2,)"),
        (lambda: rgb(Z, W, None), TypeError, "bias must be a tensor or a sequence of floats, got NoneType"),
        (lambda: rgb(Z, W, B, size=40), ValueError, "size must be (H', W'), got 40"),
        (lambda: rgb(Z, W, B, size=(40, 0)), ValueError, "size must be two positive integers (H', W'), got (40, 0)"),
        (lambda: rgb(Z, W, B, size=(4.0, 8)), ValueError, "size must be two positive integers (H', W'), got (4.0, 8)"),
        (lambda: rgb(Z[..., :0], W, B, size=(4, 8)), ValueError, "z must have rows and columns to be enlarged"),
        (lambda: rgb(Z, W, B, dtype=torch.float16), ValueError, "dtype must be torch.uint8 or torch.float32, got"),
        (lambda: rgb(Z, W, B, out=[1]), TypeError, "out must be a tensor, got list"),
        (lambda: rgb(Z, W, B, out=torch.zeros(2, 3, 5, 6, 3)), TypeError, "out must be uint8, got float32"),
        (lambda: rgb(Z, W, B, out=FRAMES), ValueError, "out must have shape (2, 3, 5, 6, 3), got (2, 9, 40, 48, 3)"),
        (lambda: fit([1.0], FRAMES), TypeError, "latents must be a tensor, got list"),
        (lambda: fit(Z, [1.0]), TypeError, "frames must be a tensor, got list"),
        (lambda: fit(Z, FRAMES.int()), TypeError, "frames must be uint8 or floating, got int32"),
        (lambda: fit(Z[0, 0], FRAMES), ValueError, "latents must have shape (B, C, T, H, W) or (B, C, H, W), got (3,"),
        (lambda: fit(Z, FRAMES[:1]), ValueError, "frames of uint8 must have shape (2, T', H', W', 3), got (1, 9,"),
        (lambda: fit(Z, FRAMES.double()), ValueError, "frames of float64 must have shape (2, 3, T', H', W'), got (2,"),
        (lambda: fit(Z, FRAMES[:, :8]), ValueError, "frames must be 1 + r·2 or r·3 in number for 3 latent frames, got"),
        (lambda: fit(Z, FRAMES[:, :, :39]), ValueError, "frames must have a multiple of the latents' rows and columns"),
        (lambda: fit(Z[:0], FRAMES[:0]), ValueError, "latents must not be empty, got shape (0, 4, 3, 5, 6)"),
        (lambda: fit(Z * math.nan, FRAMES), ValueError, "latents and frames must be finite"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


# --- The fit ----------------------------------------------------------------------------------------------------------


def _known(frames_of, count: int = 4) -> tuple[latentfast.RGBFit, torch.Tensor, torch.Tensor]:
    """The fit to frames made from known factors, and those factors."""
    draw = Draw(torch.float64, seed=11)
    z = draw.normal(2, 5, count, 6, 7)
    weight, bias = draw.uniform(5, 3, low=-0.1, high=0.1), draw.uniform(3, low=-0.2, high=0.2)
    x = reference.preview.latent_to_rgb(z, weight, bias, dtype=torch.float64)  # (B, T, H, W, 3)
    frames = x.movedim(-1, 1).repeat_interleave(4, 3).repeat_interleave(8, 4)
    return latentfast.fit_rgb(z, frames_of(frames)), weight, bias


@pytest.mark.parametrize(
    "frames_of",
    [
        lambda x: x,
        lambda x: x.repeat_interleave(3, 2),
        lambda x: torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(4, 2)), 2),
    ],
    ids=["a frame each", "three frames each", "causal, four frames each"],
)
def test_the_fit_finds_known_factors(frames_of) -> None:
    found, weight, bias = _known(frames_of)
    # float32 factors: half a unit of 0.3, and the ridge's share of 1e-10
    assert (found.weight - weight).abs().max() < 3e-8
    assert (found.bias - bias).abs().max() < 3e-8
    assert found.error.rms < 1e-9
    assert found.weight.dtype == found.bias.dtype == torch.float32


def test_the_fit_takes_area_means() -> None:
    """Noise whose mean over each position's pixels is zero changes nothing; so it does over a causal group."""
    noise = Draw(torch.float64, seed=12).normal(2, 3, 13, 24, 56)
    _, weight, _ = _known(lambda x: x)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        frames = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(4, 2)), 2)
        cells = noise.unflatten(3, (6, 4)).unflatten(5, (7, 8))
        return frames + (cells - cells.mean((4, 6), keepdim=True)).flatten(5, 6).flatten(3, 4)

    found, _, _ = _known(noisy)
    assert (found.weight - weight).abs().max() < 3e-8
    assert found.error.rms < 1e-9


def test_the_fit_of_bytes_and_its_error() -> None:
    """Bytes are off by up to half a step, 1/255, evenly: an error of 1/255/√3, which the means over 32 pixels keep
    where the pixels of a position are alike."""
    found, weight, _ = _known(lambda x: ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1))
    step = 1 / 255 / math.sqrt(3)
    assert 0.8 * step < found.error.rms < 1.1 * step
    assert found.error.psnr == pytest.approx(20 * math.log10(2 / found.error.rms))
    # the standard error of a factor: the step over the root of 336 positions of unit variance, times six
    assert (found.weight - weight).abs().max() < 6 * step / math.sqrt(336)


def test_the_fits_error_is_that_of_the_best_factors() -> None:
    draw = Draw(torch.float64, seed=13)
    z, frames = draw.normal(3, 4, 2, 5, 6), draw.normal(3, 3, 2, 5, 6)
    found = latentfast.fit_rgb(z, frames)

    def error(weight: torch.Tensor, bias: torch.Tensor) -> float:
        x = reference.preview.latent_to_rgb(z, weight, bias, dtype=torch.float64)
        return float((x.movedim(-1, 1) - frames).square().mean().sqrt())

    assert found.error.rms == pytest.approx(error(found.weight.double(), found.bias.double()), rel=1e-9)
    for _ in range(20):
        other = found.weight + 0.01 * draw.normal(4, 3), found.bias + 0.01 * draw.normal(3)
        assert error(*other) > found.error.rms


def test_the_fit_of_images_and_of_channels_that_repeat() -> None:
    draw = Draw(torch.float64, seed=14)
    z = draw.normal(4, 3, 5, 6)
    doubled = torch.cat((z, z, torch.zeros_like(z[:, :1])), 1)  # singular normal equations
    frames = z.repeat_interleave(8, 2).repeat_interleave(8, 3) * 0.1
    found = latentfast.fit_rgb(doubled, frames)
    assert torch.isfinite(found.weight).all()
    x = latentfast.latent_to_rgb(doubled, found.weight, found.bias, dtype=torch.float32)
    assert (x.movedim(-1, 1) - 0.1 * z).abs().max() < 1e-6  # the factors are float32


# --- The embedded model -----------------------------------------------------------------------------------------------


def _psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return 20 * math.log10(2 / float((x - y).square().mean().sqrt()))


def test_previews_of_the_embedded_model_resemble_its_pictures() -> None:
    """On rendered clips through its encoder: neither these clips nor any like them were fitted to.

    Measured: 20.9 dB. A wrong preview stays below 19.8 dB, measured too: each clip's mean colour (19.6), red and blue
    exchanged (18.0), a latent frame late (18.3), a quarter of the width aside (15.0).
    """
    pytest.importorskip("diffusers")
    from latentfast import tiny

    generator = torch.Generator().manual_seed(21)
    clips = tiny.render(tiny.random_scenes(3, generator=generator), generator=generator)
    vae = tiny.load_pipeline().vae
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        z = (vae.encode(clips.video).latent_dist.mode() - mean) / std
    weight, bias = tiny.rgb_factors()
    got = latentfast.latent_to_rgb(z, weight, bias, dtype=torch.float32)
    positions = F.avg_pool3d(clips.video, (1, 8, 8))
    later = F.avg_pool3d(positions[:, :, 1:], (4, 1, 1))
    shown = torch.cat((positions[:, :, :1], later), 2).movedim(1, -1)
    wrong = (shown.mean((1, 2, 3), keepdim=True).expand_as(shown), got.flip(-1), got.roll(1, 1), got.roll(4, 3))
    assert _psnr(got, shown) > 20
    assert all(_psnr(x, shown) < 19.8 for x in wrong)


def test_the_embedded_models_factors() -> None:
    from latentfast import tiny

    weight, bias = tiny.rgb_factors()
    assert weight.shape == (16, 3) and bias.shape == (3,)
    assert weight.dtype == bias.dtype == torch.float32
    weight.zero_()  # each call gives new tensors
    assert tiny.rgb_factors()[0].abs().max() > 0
