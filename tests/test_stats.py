"""Statistics, AdaIN, the VAE's affine with packing, tone mapping and frequency mixing on every backend: against
diffusers' own code, properties, edges, bad input."""

import math
import re
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import latentfast as lf
from latentfast import reference
from latentfast.ops import frequency
from tests.helpers import DTYPES, HALVES, Draw, Target, assert_matches_spec, assert_within, gradients, offset, same_bits

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = st.tuples(*[st.sampled_from([1, 2, 3, 5, 7])] * 5)
seeds = st.integers(0, 2**31 - 1)


def _ltx():
    return pytest.importorskip("diffusers.pipelines.ltx.pipeline_ltx").LTXPipeline


def _upsampler():
    return pytest.importorskip("diffusers.pipelines.ltx.pipeline_ltx_latent_upsample").LTXLatentUpsamplePipeline


# --- Against the peers' own code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.4, 0.0, -0.5])
def test_adain_is_diffusers(factor: float, target: Target) -> None:
    draw = Draw(device=target.device)
    z, ref = draw.normal(2, 3, 4, 5, 6) + 1, draw.normal(2, 3, 2, 3, 5) * 3
    theirs = _upsampler().adain_filter_latent(SimpleNamespace(), z, ref, factor)
    # both round every element a few times; the largest is about 10
    torch.testing.assert_close(lf.adain(z, ref, factor), theirs, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("compression", [0.0, 0.3, 1.0])
def test_tone_map_is_diffusers(compression: float, target: Target) -> None:
    z = Draw(device=target.device).normal(2, 3, 4, 5) * 4
    theirs = _upsampler().tone_map_latents(SimpleNamespace(), z, compression)
    torch.testing.assert_close(lf.tone_map(z, compression), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 3, 1), (1, 1, 3), (4, 6, 6)], ids=str)
@every_dtype
def test_packed_layout_is_that_of_ltx(patch: tuple[int, int, int], dtype: torch.dtype, target: Target) -> None:
    # theirs are square; test_reference_packs_as_ltx ties the reference to them
    square = patch[1] == patch[2]
    z = Draw(dtype, target.device).normal(2, 5, 4, 6, 12)
    ones, zeros = [1.0] * 5, [0.0] * 5
    tokens = lf.standardize(z, zeros, ones, patch=patch)
    expected = _ltx()._pack_latents(z, patch[1], patch[0]) if square else reference.stats.pack(z, patch)
    assert same_bits(tokens, expected.contiguous())
    assert same_bits(lf.unstandardize(tokens, zeros, ones, patch=patch, size=(4, 6, 12)), z)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 4, 4)], ids=str)
@pytest.mark.parametrize("width", [4, 8, 12, 20])  # rows that start at multiples of 8 bytes and of 16, and joined
@every_dtype
def test_packing_at_every_alignment(
    width: int, patch: tuple[int, int, int], dtype: torch.dtype, target: Target
) -> None:
    """Channels enough for 16 bytes of features; means and deviations by which no element is rounded."""
    draw = Draw(dtype, target.device)
    mean, std = draw.grid(16).to(draw.parameter_dtype), 2.0 ** draw.grid(16).round().to(draw.parameter_dtype)
    for frames in (2, 6):
        z = draw.grid(2, 16, frames, 4, width)
        exact = (z.double() - mean.double().view(16, 1, 1, 1)) / std.double().view(16, 1, 1, 1)
        expected = reference.stats.pack(exact, patch).to(dtype)
        for latents in (z, offset(z)):
            tokens = lf.standardize(latents, mean, std, patch=patch)
            assert same_bits(tokens, expected)
        for packed in (tokens, offset(tokens)):
            assert same_bits(lf.unstandardize(packed, mean, std, patch=patch, size=z.shape[2:]), z)


def test_reference_packs_as_ltx() -> None:
    z = Draw().normal(2, 3, 4, 6, 8)
    for p, pt in ((1, 1), (2, 1), (2, 2), (1, 4)):
        theirs = _ltx()._pack_latents(z, p, pt)
        assert same_bits(reference.stats.pack(z, (pt, p, p)), theirs)
        back = _ltx()._unpack_latents(theirs, 4 // pt, 6 // p, 8 // p, p, pt)
        assert same_bits(reference.stats.unpack(theirs, (pt, p, p), (4, 6, 8)), back)


def test_packed_layout_is_that_of_flux(target: Target) -> None:
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux").FluxPipeline
    z = Draw(torch.bfloat16, target.device).normal(2, 16, 6, 10)
    tokens = lf.standardize(z, [0.0] * 16, [1.0] * 16, patch=(2, 2))
    assert same_bits(tokens, flux._pack_latents(z, 2, 16, 6, 10))
    assert same_bits(lf.unstandardize(tokens, [0.0] * 16, [1.0] * 16, patch=(2, 2), size=(6, 10)), z)


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_affine_with_packing_is_that_of_ltx(patch: tuple[int, int, int], target: Target) -> None:
    draw = Draw(device=target.device)
    z, mean, std = draw.normal(2, 5, 4, 6, 8), draw.normal(5), draw.uniform(5, low=0.5)
    pt, p, _ = patch
    theirs = _ltx()._pack_latents(_ltx()._normalize_latents(z, mean, std, 0.7), p, pt)
    ours = lf.standardize(z, mean, std, 0.7, patch=patch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    unpacked = _ltx()._unpack_latents(theirs, 4 // pt, 6 // p, 8 // p, p, pt)
    back = lf.unstandardize(theirs, mean, std, 0.7, patch=patch, size=(4, 6, 8))
    torch.testing.assert_close(back, _ltx()._denormalize_latents(unpacked, mean, std, 0.7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", frequency.KINDS)
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9), (1, 4, 6), (21, 5, 6)], ids=str)
def test_frequency_mix_is_freeinit(size: tuple[int, int, int], kind: str, target: Target) -> None:
    """Odd sizes too, where FreeInit's filter is not symmetric."""
    free_init = pytest.importorskip("diffusers.pipelines.free_init_utils").FreeInitMixin()
    draw = Draw(device=target.device)
    low, high = draw.normal(2, 3, *size), draw.normal(2, 3, *size)
    response = free_init._get_free_init_freq_filter((1, 3, *size), target.device, kind, 4, 0.25, 0.4)
    theirs = free_init._apply_freq_filter(low, high, response)
    ours = lf.frequency_mix(low, high, 0.25, 4, temporal_cutoff=0.4, kind=kind)
    # Fourier transforms over a few hundred elements round to about 2e-7 of the largest
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)
    same = reference.stats.frequency_mix(low, high, 0.25, 4, temporal_cutoff=0.4, kind=kind)
    torch.testing.assert_close(same, theirs, rtol=0, atol=1e-6)


# --- Statistics -------------------------------------------------------------------------------------------------------


@every_dtype
def test_stats_are_torchs(dtype: torch.dtype, target: Target) -> None:
    z = Draw(dtype, target.device).normal(2, 3, 4, 5, 6)
    mean, std = lf.channel_stats(z)
    assert mean.dtype == std.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact_std, exact_mean = torch.std_mean(z.double(), (2, 3, 4))
    # half a unit of float32, or the few units by which torch's own sums in float32 are off on a GPU
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6 if str(target) == "eager@cuda" else 1e-7
    torch.testing.assert_close(mean.double(), exact_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(std.double(), exact_std, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first", [0.0, 30.0])
def test_a_mean_far_from_zero_costs_no_digits(first: float, target: Target) -> None:
    """Also beside a first element that is none of the others' kind."""
    z = Draw(torch.float32, target.device).normal(1, 2, 5, 6, 7) + 3e4
    z[:, :, 0, 0, 0] += first
    _, std = lf.channel_stats(z)
    exact = z.double().std((2, 3, 4))
    torch.testing.assert_close(std.double(), exact, rtol=1e-7, atol=0)  # float32's rounding, once
    assert_matches_spec(lf.adain(z, z.flip(1) - 3e4), reference.stats.adain, {"z": z, "ref": z.flip(1) - 3e4})


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
@every_dtype
def test_a_constant_channel_takes_the_styles_mean(count: int, dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    z = torch.full((2, 2, count), 0.1, dtype=dtype, device=target.device)  # a value that no sum of it hits
    ref = draw.normal(2, 2, 7)
    assert (lf.channel_stats(z)[1] == 0).all()
    expected = lf.channel_stats(ref)[0].to(dtype)[..., None].expand(z.shape)
    torch.testing.assert_close(lf.adain(z, ref), expected, rtol=3e-7 if dtype not in HALVES else 1e-2, atol=1e-6)
    out, found = gradients(lf.adain, {"z": z, "ref": ref}, ("z", "ref"))
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(x).all() for x in found.values())


@given(shape=sizes, seed=seeds)
def test_adain_twice_is_adain_once(target: Target, shape: tuple, seed: int) -> None:
    draw = Draw(torch.float64, target.device, seed)
    z, ref = draw.normal(*shape), draw.normal(*shape) * 2 + 1
    once = lf.adain(z, ref)
    torch.testing.assert_close(lf.adain(once, ref), once, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(lf.channel_stats(once), lf.channel_stats(ref), strict=True):
        if math.prod(shape[2:]) > 1:
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@every_dtype
def test_adain_with_factor_zero_keeps_bits(dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    z, ref = draw.normal(2, 3, 5, 7) + 5, draw.normal(2, 3, 5, 7)
    assert same_bits(lf.adain(z, ref, 0.0), z)


@pytest.mark.parametrize("count", [63, 64, 2047, 2048, 2049, 5280, 8200, 33000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adain_of_channels_of_many_lengths(count: int, dtype: torch.dtype, target: Target) -> None:
    """Across the lengths at which kernels go another way."""
    if target.interpreted and count > 5280:
        pytest.skip("takes Triton's interpreter minutes")
    draw = Draw(dtype, target.device)
    for ref_count in {count, 77}:
        inputs = {"z": draw.normal(2, 3, count), "ref": draw.normal(2, 3, ref_count) * 2 + 1}
        assert_matches_spec(lf.adain(**inputs), reference.stats.adain, inputs)


@pytest.mark.parametrize("channel_dim", [1, 2, -1])
def test_one_style_for_all_is_that_style_for_each(channel_dim: int, target: Target) -> None:
    draw = Draw(device=target.device)
    z = draw.normal(3, 4, 4, 4)
    ref = draw.normal(1, *(4 if d == channel_dim % 4 else 5 for d in (1, 2, 3)))
    repeated = ref.expand(3, *ref.shape[1:])
    assert same_bits(lf.adain(z, ref, channel_dim=channel_dim), lf.adain(z, repeated, channel_dim=channel_dim))


# --- The affine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 500])  # more than go into a kernel's arguments
@every_dtype
def test_numbers_on_the_host_and_on_the_device_agree(channels: int, dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    z, mean, std = draw.normal(2, channels, 4), draw.uniform(channels), draw.uniform(channels, low=0.5)
    for function in (lf.standardize, lf.unstandardize):
        device = function(z, mean, std, 0.5)
        spec = getattr(reference.stats, function.__name__)
        for host_mean, host_std in ((mean.tolist(), std.tolist()), (mean, tuple(std.tolist())), (mean.tolist(), std)):
            got = function(z, host_mean, host_std, 0.5)
            inputs = {"z": z, "mean": mean, "std": std}
            assert_matches_spec(got, lambda **i: spec(**i, scale=0.5), inputs)  # noqa: B023
            torch.testing.assert_close(got, device, rtol=1e-6 if dtype not in HALVES else 1e-2, atol=1e-6)


@given(shape=sizes, seed=seeds)
def test_unstandardize_is_the_inverse(target: Target, shape: tuple, seed: int) -> None:
    draw = Draw(torch.float64, target.device, seed)
    z, mean, std = draw.normal(*shape), draw.normal(shape[1]), draw.uniform(shape[1], low=0.5)
    patch = tuple(n if n < 4 else 1 for n in shape[2:])
    there = lf.standardize(z, mean, std, 1.3, patch=patch)
    back = lf.unstandardize(there, mean, std, 1.3, patch=patch, size=shape[2:])
    torch.testing.assert_close(back, z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patch", [(1, 2, 3), (1, 1, 70), (2, 1, 1)], ids=str)
def test_gradients_of_packing(patch: tuple[int, int, int], target: Target) -> None:
    draw = Draw(torch.float64, target.device)
    z, mean, std = draw.normal(1, 2, 2, 2, 3 * patch[2]), draw.normal(2), draw.uniform(2, low=0.5)
    tokens = lf.standardize(z, mean, std, patch=patch)
    size = tuple(z.shape[2:])
    pack = lambda x: lf.standardize(x, mean, std, 0.7, patch=patch)  # noqa: E731
    unpack = lambda x: lf.unstandardize(x, mean.tolist(), std.tolist(), 0.7, patch=patch, size=size)  # noqa: E731
    assert torch.autograd.gradcheck(pack, z.requires_grad_(), fast_mode=True)
    assert torch.autograd.gradcheck(unpack, tokens.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 2, 4, 6, 8), (2, 2, 0, 6, 8)], ids=str)
def test_packing_nothing(shape: tuple, target: Target) -> None:
    z = torch.empty(shape, device=target.device)
    tokens = lf.standardize(z, [0.0, 1.0], [1.0, 2.0], patch=(1, 2, 2))
    assert tokens.shape == (shape[0], shape[2] * 12, 8)


# --- Tone and frequencies ---------------------------------------------------------------------------------------------


@every_dtype
def test_tone_map_of_any_size_of_number(dtype: torch.dtype, target: Target) -> None:
    z = torch.tensor([0.0, 1e-6, 0.5, 1.0, 1.5, 3.0, 30.0, 1e4, -2.0, -1e4], dtype=dtype, device=target.device)
    assert_matches_spec(lf.tone_map(z, 0.9), lambda z: reference.stats.tone_map(z, 0.9), {"z": z})
    assert same_bits(lf.tone_map(z, 0.0), z)


@every_dtype
def test_frequency_mix_against_the_reference(dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    inputs = {"low": draw.normal(2, 3, 5, 6, 7), "high": draw.normal(2, 3, 5, 6, 7)}
    got = lf.frequency_mix(**inputs)
    assert got.dtype == dtype
    # the reference transforms both clips and rounds each: a few more units than its own error, in another order
    exact, same = (
        reference.stats.frequency_mix(**{k: x.to(wide) for k, x in inputs.items()})
        for wide in (torch.float64, torch.float64 if dtype == torch.float64 else torch.float32)
    )
    assert_within(got, exact, same, {torch.float32: 16.0, torch.float64: 64.0})


def test_frequency_mix_of_a_clip_with_itself(target: Target) -> None:
    z = Draw(device=target.device).normal(1, 2, 5, 6, 8)
    torch.testing.assert_close(lf.frequency_mix(z, z), z, rtol=1e-6, atol=1e-6)
    noise = z.flip(0, 1)
    assert same_bits(lf.frequency_mix(z, noise, 0.0), noise)  # nothing passes


def test_frequency_mix_runs_again_with_the_same_bits(target: Target) -> None:
    draw = Draw(device=target.device)
    low, high = draw.normal(2, 2, 5, 6, 7), draw.normal(2, 2, 5, 6, 7)
    first = lf.frequency_mix(low, high)
    assert all(same_bits(lf.frequency_mix(low, high), first) for _ in range(3))
    strided = low.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert same_bits(lf.frequency_mix(strided, high), first)


def test_gradients_of_frequency_mix(target: Target) -> None:
    draw = Draw(torch.float64, target.device)
    low, high = (draw.normal(1, 2, 3, 4, 5).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: lf.frequency_mix(a, b, 0.4), (low, high), fast_mode=True)


def test_frequency_mix_compiles_as_one_graph(target: Target) -> None:
    torch._dynamo.reset()
    draw = Draw(device=target.device)
    low, high = draw.normal(1, 2, 3, 4, 6), draw.normal(1, 2, 3, 4, 6)
    compiled = torch.compile(lf.frequency_mix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(low, high), lf.frequency_mix(low, high), rtol=1e-6, atol=1e-6)


def test_frequency_mix_keeps_a_few_filters(target: Target) -> None:
    draw = Draw(device=target.device)
    low, high = draw.normal(1, 1, 2, 3, 4), draw.normal(1, 1, 2, 3, 4)
    first = lf.frequency_mix(low, high, 0.5)
    for step in range(2 * frequency._MOST_KEPT):
        lf.frequency_mix(low, high, step / 100)
    assert len(frequency._kept) <= frequency._MOST_KEPT
    assert same_bits(lf.frequency_mix(low, high, 0.5), first)


def test_frequency_mix_in_a_graph_reads_the_kept_filter(target: Target) -> None:
    """And still does when calls of other settings have driven it out."""
    if target.device != "cuda":
        pytest.skip("graphs are a GPU's")
    draw = Draw(device=target.device)
    low, high = draw.normal(1, 2, 4, 6, 8), draw.normal(1, 2, 4, 6, 8)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = lf.frequency_mix(low, high, 0.33)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = lf.frequency_mix(low, high, 0.33)
    assert any(0.33 in settings for settings in frequency._read_by_graphs)
    others = [lf.frequency_mix(low, high, step / 100) for step in range(34, 34 + 2 * frequency._MOST_KEPT)]
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, expected)
    assert not same_bits(others[0], expected)


# --- Bad input --------------------------------------------------------------------------------------------------------

Z = torch.zeros(2, 3, 4, 6, 8)
ONES = [1.0] * 3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lf.channel_stats([1.0]), TypeError, "z must be a tensor, got list"),
        (lambda: lf.channel_stats(Z.long()), TypeError, "z must be float32, float16, bfloat16 or float64, got int64"),
        (lambda: lf.channel_stats(Z, channel_dim=0), ValueError, "channel_dim must name a dimension after the batch"),
        (lambda: lf.channel_stats(Z, channel_dim=5), ValueError, "1 to 4 for a 5-D z, got 5"),
        (lambda: lf.channel_stats(Z, channel_dim=1.0), TypeError, "channel_dim must be an int, got float"),
        (lambda: lf.channel_stats(Z[0, 0, 0, 0]), ValueError, "channel_dim must name a dimension after the batch"),
        (lambda: lf.adain(Z, None), TypeError, "ref must be a tensor, got NoneType"),
        (lambda: lf.adain(Z, Z.half()), TypeError, "ref must have z's dtype float32, got float16"),
        (lambda: lf.adain(Z, Z.to("meta")), ValueError, "ref must be on z's device cpu, got meta"),
        (lambda: lf.adain(Z, Z[:, :2]), ValueError, "ref must have shape (2 or 1, 3, …, …, …), got (2, 2, 4, 6, 8)"),
        (lambda: lf.adain(Z, Z[0]), ValueError, "ref must have shape (2 or 1, 3, …, …, …), got (3, 4, 6, 8)"),
        (lambda: lf.adain(Z, Z[:, :, :0]), ValueError, "ref must have elements to take the statistics of"),
        (lambda: lf.adain(Z, Z, "1"), TypeError, "factor must be a number, got str"),
        (lambda: lf.adain(Z, Z, math.nan), ValueError, "factor must be finite, got nan"),
        (lambda: lf.adain(Z, Z, out=Z), ValueError, "out must not share memory with an input"),
        (lambda: lf.standardize(Z, 0.0, ONES), TypeError, "mean must be a sequence of floats or a tensor, got float"),
        (lambda: lf.standardize(Z, [0.0], ONES), ValueError, "mean must hold 3 numbers, one for each channel, got 1"),
        (lambda: lf.standardize(Z, ONES, torch.ones(2)), ValueError, "std must have shape (3,), one for each channel"),
        (lambda: lf.standardize(Z, ONES, torch.ones(3).int()), TypeError, "std must be floats, got a tensor of"),
        (lambda: lf.standardize(Z, ONES, [1.0, 0.0, 1.0]), ValueError, "std must be positive and finite, got 0.0"),
        (lambda: lf.standardize(Z, ONES, ONES, 0.0), ValueError, "scale must not be 0"),
        (
            lambda: lf.standardize(Z, torch.zeros(3, requires_grad=True), ONES),
            ValueError,
            "mean requires grad, but is not differentiable here; pass mean.detach()",
        ),
        (lambda: lf.standardize(Z, ONES, ONES, patch=2), TypeError, "patch must be positive ints, got 2"),
        (lambda: lf.standardize(Z, ONES, ONES, patch=(2, 2)), ValueError, "patch must have 3 numbers, got (2, 2)"),
        (
            lambda: lf.standardize(Z, ONES, ONES, patch=(3, 2, 2)),
            ValueError,
            "patch must divide the latents' size (4, 6, 8), got (3, 2, 2)",
        ),
        (
            lambda: lf.standardize(Z[0, 0], [0.0] * 6, [1.0] * 6, patch=(1, 1, 1)),
            ValueError,
            "z must be (B, C, T, H, W) or (B, C, H, W) beside patch, got shape (4, 6, 8)",
        ),
        (lambda: lf.standardize(Z, ONES, ONES, channel_dim=2, patch=(1, 1, 1)), ValueError, "channel_dim must be 1"),
        (lambda: lf.unstandardize(Z, ONES, ONES, size=(4, 6, 8)), ValueError, "size is for packed latents"),
        (
            lambda: lf.unstandardize(Z, ONES, ONES, patch=(1, 1, 1)),
            ValueError,
            "z must be packed, (B, tokens, C·patch)",
        ),
        (lambda: lf.unstandardize(Z[0, 0], ONES, ONES, patch=(1, 1, 1)), ValueError, "size must be given beside patch"),
        (
            lambda: lf.unstandardize(Z[0, 0], ONES, ONES, patch=(1, 1, 3), size=(1, 1, 3)),
            ValueError,
            "z's last dimension must be a multiple of 3",
        ),
        (
            lambda: lf.unstandardize(Z[0, 0], ONES, ONES, patch=(1, 1, 1), size=(1, 1, 5)),
            ValueError,
            "z must hold 5 tokens",
        ),
        (lambda: lf.tone_map(Z, 1.5), ValueError, "compression must lie in [0, 1], got 1.5"),
        (lambda: lf.tone_map(Z, None), TypeError, "compression must be a number, got NoneType"),
        (lambda: lf.frequency_mix(Z, Z[:1]), ValueError, "high must have low's shape"),
        (lambda: lf.frequency_mix(Z[0], Z[0]), ValueError, "low must have 5 dimensions (B, C, T, H, W)"),
        (lambda: lf.frequency_mix(Z, Z, 2.0), ValueError, "cutoff must lie in [0, 1], got 2.0"),
        (lambda: lf.frequency_mix(Z, Z, temporal_cutoff="a"), TypeError, "temporal_cutoff must be a number, got str"),
        (
            lambda: lf.frequency_mix(Z, Z, kind="box"),
            ValueError,
            "kind must be butterworth, gaussian or ideal, got 'box'",
        ),
    ],
)
def test_rule8_bad_input(call, error, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        call()
