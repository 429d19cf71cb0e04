"""Statistics of latents' channels and what is done with them: AdaIN, the VAE's affine, tone and frequencies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentfast.reference._common import working


def _elements(z: Tensor, channel_dim: int) -> Tensor:
    """`z` as (B, C, elements of a channel), in the working precision."""
    return working(z).movedim(channel_dim, 1).unsqueeze(-1).flatten(2)


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean, mean, unbiased std) of the rows of x (B, C, N), the last two (B, C, 1).

    Counted from each row's first element, so that a constant row has a deviation of exactly 0, whatever its value.
    """
    count = x.shape[-1]
    if count == 0:
        zero = x.new_zeros(*x.shape[:-1], 1)
        return x, zero, zero
    first = x[..., :1]
    distance = x - first
    middle = distance.mean(-1, keepdim=True)
    rest = distance - middle
    variance = rest.square().sum(-1, keepdim=True) / max(count - 1, 1)
    # the square root's slope is infinite at 0: there the deviation is a constant
    std = torch.where(variance == 0, variance.detach(), torch.where(variance == 0, 1.0, variance).sqrt())
    return rest, first + middle, std


def channel_stats(z: Tensor, *, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each (sample, channel), two (B, C) in the working precision.

    A channel of one element has std 0, one of none has mean 0 as well.
    """
    _, mean, std = _centred(_elements(z, channel_dim))
    return mean.squeeze(-1), std.squeeze(-1)


def adain(z: Tensor, ref: Tensor, factor: float = 1.0, *, channel_dim: int = 1) -> Tensor:
    """factor · ((z − μ_z)/σ_z · σ_r + μ_r) + (1 − factor) · z for each (sample, channel); μ_r in place of the bracket
    where z is constant.

    `ref` (B or 1, …, C, …) may differ from z in all other dimensions. Adaptive instance normalisation: Huang and
    Belongie, 2017, equation 8.
    """
    x = _elements(z, channel_dim)
    rest, _, std = _centred(x)
    _, ref_mean, ref_std = _centred(_elements(ref, channel_dim))
    styled = rest * torch.where(std == 0, 0.0, ref_std / torch.where(std == 0, 1.0, std)) + ref_mean
    mixed = factor * styled + (1 - factor) * x
    moved = z.movedim(channel_dim, 1).shape
    return mixed.reshape(moved).movedim(1, channel_dim).to(z.dtype).contiguous()


def _per_channel(values: Tensor | Sequence[float], x: Tensor, channel_dim: int) -> Tensor:
    """(C,) as a tensor that broadcasts against x."""
    values = torch.as_tensor(values, dtype=x.dtype, device=x.device)
    return values.reshape([-1 if d == channel_dim % x.ndim else 1 for d in range(x.ndim)])


def pack(z: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, T, H, W) -> (B, T/pt · H/ph · W/pw, C·pt·ph·pw): the tokens of LTX-Video and Flux.

    A token holds its patch channel by channel, each with its frames, rows and columns in order. Images have no T.
    """
    b, c, *size = z.shape
    for d, part in enumerate(patch):
        z = z.unflatten(2 + 2 * d, (size[d] // part, part))  # each dimension as (patches, place in the patch)
    k = len(patch)
    z = z.permute(0, *range(2, 2 + 2 * k, 2), 1, *range(3, 3 + 2 * k, 2))
    tokens = math.prod([n // part for n, part in zip(size, patch, strict=True)])
    return z.reshape(b, tokens, c * math.prod(patch))


def unpack(z: Tensor, patch: Sequence[int], size: Sequence[int]) -> Tensor:
    """The inverse of `pack`, for latents of `size` (T, H, W) or (H, W)."""
    k = len(patch)
    z = z.reshape(z.shape[0], *(n // part for n, part in zip(size, patch, strict=True)),
                  z.shape[2] // math.prod(patch), *patch)  # fmt: skip
    order = [0, 1 + k]
    for d in range(k):
        order += [1 + d, 2 + k + d]
    return z.permute(order).reshape(z.shape[0], z.shape[1 + k], *size)


def standardize(
    z: Tensor,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    scale: float = 1.0,
    *,
    channel_dim: int = 1,
    patch: Sequence[int] | None = None,
) -> Tensor:
    """(z − mean)/std · scale for each channel, packed to tokens if `patch` is given."""
    x = working(z)
    m, s = _per_channel(mean, x, channel_dim), _per_channel(std, x, channel_dim)
    out = ((x - m) / s * scale).to(z.dtype)
    return (out if patch is None else pack(out, patch)).contiguous()


def unstandardize(
    z: Tensor,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    scale: float = 1.0,
    *,
    channel_dim: int = 1,
    patch: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """The inverse of `standardize`: z · std/scale + mean, the tokens unpacked to `size` if `patch` is given."""
    x = working(z)
    if patch is not None and size is not None:
        x = unpack(x, patch, size)
    m, s = _per_channel(mean, x, channel_dim), _per_channel(std, x, channel_dim)
    return (x * s / scale + m).to(z.dtype).contiguous()


def tone_map(z: Tensor, compression: float) -> Tensor:
    """z · (1 − 0.8·s·sigmoid(4·s·(|z| − 1))) with s = 0.75·compression: the tone map of LTX-Video's upsampler."""
    x = working(z)
    s = 0.75 * compression
    return (x * (1 - 0.8 * s * torch.sigmoid(4 * s * (x.abs() - 1)))).to(z.dtype).contiguous()


def low_pass(
    size: Sequence[int],
    cutoff: float,
    order: float,
    temporal_cutoff: float,
    kind: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Tensor:
    """FreeInit's low-pass filter over all frequencies of (T, H, W), the zero frequency at (T//2, H//2, W//2).

    A function of d² = ((cutoff/temporal_cutoff)·(2t/T − 1))² + (2h/H − 1)² + (2w/W − 1)²; 0 if a cutoff is 0.
    """
    if cutoff == 0 or temporal_cutoff == 0:
        return torch.zeros(*size, dtype=dtype, device=device)
    t, h, w = (2 * torch.arange(n, dtype=torch.float64, device=device) / n - 1 for n in size)
    d2 = (cutoff / temporal_cutoff * t)[:, None, None] ** 2 + (h**2)[:, None] + w**2
    if kind == "butterworth":
        response = 1 / (1 + (d2 / cutoff**2) ** order)
    elif kind == "gaussian":
        response = torch.exp(-d2 / (2 * cutoff**2))
    else:
        response = (d2 <= 2 * cutoff).double()  # compares a square with a frequency, as FreeInit's code does
    return response.to(dtype)


def frequency_mix(
    low: Tensor,
    high: Tensor,
    cutoff: float = 0.25,
    order: float = 4,
    *,
    temporal_cutoff: float | None = None,
    kind: str = "butterworth",
) -> Tensor:
    """The low frequencies over (T, H, W) of one clip with the high ones of another: FreeInit (Wu et al., 2023)."""
    x, noise = working(low), working(high)
    dims = (-3, -2, -1)
    temporal = cutoff if temporal_cutoff is None else temporal_cutoff
    response = low_pass(x.shape[-3:], cutoff, order, temporal, kind, x.dtype, x.device)
    x_freq, noise_freq = (torch.fft.fftshift(torch.fft.fftn(y, dim=dims), dim=dims) for y in (x, noise))
    mixed = x_freq * response + noise_freq * (1 - response)
    return torch.fft.ifftn(torch.fft.ifftshift(mixed, dim=dims), dim=dims).real.to(low.dtype).contiguous()
