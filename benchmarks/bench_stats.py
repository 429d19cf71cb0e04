"""Statistics: what of them is measured, at which sizes."""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

import latentfast
from latentfast.benchmarks import peers
from latentfast.benchmarks.draws import clips
from latentfast.benchmarks.operation import Baseline, Call, Case, Operation
from latentfast.reference import stats as reference

COMPRESSION = 0.6
TOKEN = (1, 1, 1)  # the patch of a token, LTX-Video's
PATCH = (1, 2, 2)  # Wan's, HunyuanVideo's


def _upsampler(name: str) -> Call:
    """A method of diffusers' LTXLatentUpsamplePipeline; it asks nothing of its pipeline."""

    def call(*args):
        from diffusers.pipelines.ltx.pipeline_ltx_latent_upsample import LTXLatentUpsamplePipeline

        return getattr(LTXLatentUpsamplePipeline, name)(SimpleNamespace(), *args)

    return call


def _ltx_pack(z: Tensor, mean: Tensor, std: Tensor, patch: int = 1) -> Tensor:
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

    return LTXPipeline._pack_latents(LTXPipeline._normalize_latents(z, mean, std), patch)


def _ltx_unpack(tokens: Tensor, mean: Tensor, std: Tensor, size: tuple[int, int, int]) -> Tensor:
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

    return LTXPipeline._denormalize_latents(LTXPipeline._unpack_latents(tokens, *size), mean, std)


def _free_init(low: Tensor, high: Tensor) -> Tensor:
    """As FreeInit does at each of its iterations, the filter included."""
    from diffusers.pipelines.free_init_utils import FreeInitMixin

    mixin = FreeInitMixin()
    shape = (1, *low.shape[1:])
    response = mixin._get_free_init_freq_filter(shape, low.device, "butterworth", 4, 0.25, 0.25)
    return mixin._apply_freq_filter(low.float(), high.float(), response).to(low.dtype)


def _pair(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Of other means and deviations than one another."""
    z, other = clips(2)(shape, dtype, device)
    return z, other * 2 + 1


def _with_channels(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    mean, std = torch.randn(shape[1], device=device), torch.rand(shape[1], device=device) + 0.5
    return *clips(1)(shape, dtype, device), mean, std


def _tokens(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple:
    """Of latents of that shape, with the size that they lack."""
    z, mean, std = _with_channels(shape, dtype, device)
    return z.flatten(2).transpose(1, 2).contiguous(), mean, std, shape[2:]


@functools.cache
def _response(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.fft.ifftshift(reference.low_pass(size, 0.25, 4, 0.25, "butterworth", dtype, device))


def _field_mix(low: Tensor, high: Tensor) -> Tensor:
    return peers.frequency_mix(low, high, _response(tuple(low.shape[-3:]), torch.float32, low.device))


CHANNEL_STATS = Operation(
    stem="stats",
    name="channel_stats",
    variant="",
    inputs=clips(1),
    batch_dims=(0,),
    outputs=(0, 0),
    ours=latentfast.channel_stats,
    reference=Baseline(reference.channel_stats, "latentfast.reference"),
    field=Baseline(lambda z: torch.std_mean(z.float(), (2, 3, 4))[::-1], "torch.std_mean"),
)
ADAIN = Operation(
    stem="stats",
    name="adain",
    variant="",
    inputs=_pair,
    batch_dims=(0, 0),
    outputs=(0,),
    ours=latentfast.adain,
    reference=Baseline(reference.adain, "latentfast.reference"),
    field=Baseline(peers.adain, "torch.std_mean of both"),
    peer=Baseline(_upsampler("adain_filter_latent"), "diffusers adain_filter_latent"),
)
STANDARDIZE = Operation(
    stem="stats",
    name="standardize",
    variant="to tokens",
    inputs=_with_channels,
    batch_dims=(0, None, None),
    outputs=(0,),
    ours=lambda z, mean, std: latentfast.standardize(z, mean, std, patch=TOKEN),
    reference=Baseline(lambda z, mean, std: reference.standardize(z, mean, std, patch=TOKEN), "latentfast.reference"),
    field=Baseline(peers.standardize_to_tokens, "(z-mean)/std, flatten, transpose"),
    peer=Baseline(_ltx_pack, "diffusers LTX _normalize_latents, _pack_latents"),
)
STANDARDIZE_PATCHES = Operation(
    stem="stats",
    name="standardize",
    variant="to tokens of 1x2x2",
    inputs=_with_channels,
    batch_dims=(0, None, None),
    outputs=(0,),
    ours=lambda z, mean, std: latentfast.standardize(z, mean, std, patch=PATCH),
    reference=Baseline(lambda z, mean, std: reference.standardize(z, mean, std, patch=PATCH), "latentfast.reference"),
    field=Baseline(lambda z, mean, std: peers.standardize_to_tokens(z, mean, std, 2), "(z-mean)/std, permute"),
    peer=Baseline(lambda z, mean, std: _ltx_pack(z, mean, std, 2), "diffusers LTX _normalize_latents, _pack_latents"),
)
UNSTANDARDIZE = Operation(
    stem="stats",
    name="unstandardize",
    variant="from tokens",
    inputs=_tokens,
    batch_dims=(0, None, None, None),
    outputs=(0,),
    ours=lambda z, mean, std, size: latentfast.unstandardize(z, mean, std, patch=TOKEN, size=size),
    reference=Baseline(
        lambda z, mean, std, size: reference.unstandardize(z, mean, std, patch=TOKEN, size=size),
        "latentfast.reference",
    ),
    field=Baseline(peers.unstandardize_from_tokens, "transpose, z*std + mean"),
    peer=Baseline(_ltx_unpack, "diffusers LTX _unpack_latents, _denormalize_latents"),
)
TONE_MAP = Operation(
    stem="stats",
    name="tone_map",
    variant="",
    inputs=clips(1),
    batch_dims=(0,),
    outputs=(0,),
    ours=lambda z: latentfast.tone_map(z, COMPRESSION),
    reference=Baseline(lambda z: reference.tone_map(z, COMPRESSION), "latentfast.reference"),
    field=Baseline(lambda z: peers.tone_map(z, COMPRESSION), "z * (1 - 0.8*s*sigmoid(...))"),
    peer=Baseline(lambda z: _upsampler("tone_map_latents")(z, COMPRESSION), "diffusers tone_map_latents"),
)
FREQUENCY_MIX = Operation(
    stem="stats",
    name="frequency_mix",
    variant="",
    inputs=_pair,
    batch_dims=(0, 0),
    outputs=(0,),
    ours=latentfast.frequency_mix,
    reference=Baseline(reference.frequency_mix, "latentfast.reference"),
    field=Baseline(_field_mix, "fftn of both, filter ready"),
    peer=Baseline(_free_init, "diffusers FreeInit with its filter"),
)

CASES = [
    *(
        Case(operation, "ltx", batch)
        for operation in (ADAIN, CHANNEL_STATS, STANDARDIZE, TONE_MAP)
        for batch in (32, 64)
    ),
    *(Case(operation, "ltx", 1) for operation in (ADAIN, STANDARDIZE)),
    Case(UNSTANDARDIZE, "ltx", 32),
    *(Case(STANDARDIZE_PATCHES, size, 8) for size in ("wan720", "hunyuan720")),
    Case(ADAIN, "wan720", 32),
    Case(FREQUENCY_MIX, "animatediff", 2, torch.float32),
]
CPU_CASES = [
    *(Case(operation, "wan480", 1, torch.float32) for operation in (ADAIN, CHANNEL_STATS, STANDARDIZE, TONE_MAP)),
    Case(FREQUENCY_MIX, "animatediff", 2, torch.float32),
]
