"""Previews of latents: `latent_to_rgb` (a whole clip to pixels) and `fit_rgb` (its factors for any VAE)."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast.backends import implementation
from latentfast.ops import _checks
from latentfast.ops._vectors import on_device

Factors = Tensor | Sequence[float] | Sequence[Sequence[float]]

#: Of the mean square of a latent channel, added to the normal equations' diagonal: channels that repeat each other
#: leave them singular. Ten orders below what is fitted, it moves no factor visibly.
_RIDGE = 1e-10


# --- latent_to_rgb ----------------------------------------------------------------------------------------------------


def _reduced(grad: Tensor, dim: int, size: int) -> Tensor:
    """The gradient of a bilinear enlargement along `dim`, with respect to its `size` inputs.

    Gathered: output i lies between the inputs i0 and i0 + 1, so an input is touched by a run of outputs no longer than
    `taps`, and their shares are added in order. No scatter, no matrix product: the same bits on every run, alone or in
    a batch. Positions are computed in integers, at twice the resolution.
    """
    full = grad.shape[dim]
    if full == size:
        return grad
    inputs = torch.arange(size, device=grad.device)
    first = (torch.div(full * (2 * inputs - 1) - size, 2 * size, rounding_mode="floor") + 1).clamp_min(0)
    taps = 2 * full // size + 2
    shape = [1] * grad.ndim
    shape[dim] = size
    total = grad.new_zeros(())
    for tap in range(taps):
        index = first + tap
        place = ((2 * index + 1) * size - full).clamp_min(0)  # in halves of an output
        low = torch.div(place, 2 * full, rounding_mode="floor").clamp_max(size - 1)
        share = (place - low * (2 * full)).to(grad.dtype) / (2 * full)
        own = torch.where(low == inputs, 1 - share, 0) + torch.where((low + 1).clamp_max(size - 1) == inputs, share, 0)
        own = torch.where(index < full, own, 0).to(grad.dtype).view(shape)
        total = total + own * grad.index_select(dim, index.clamp_max(full - 1))
    return total


class _LatentToRgb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, bias, shape):
        ctx.save_for_backward(z, weight)
        out = torch.empty(shape, dtype=weight.dtype, device=z.device)
        implementation("latent_to_rgb", z)(z, weight, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, weight = ctx.saved_tensors
        batch, channels, frames, height, width = z.shape
        g = _reduced(_reduced(grad, 2, height), 3, width)
        grad_z = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            red, green, blue = (g[..., k].unsqueeze(1) for k in range(3))
            w = weight.view(1, channels, 1, 1, 1, 3)
            grad_z = (red * w[..., 0] + green * w[..., 1] + blue * w[..., 2]).to(z.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            elements = frames * height * width
            x = torch.cat((z.transpose(0, 1).to(g.dtype), g.new_ones(1, *z.shape[:1], *z.shape[2:])))
            sums = torch.empty((3, batch, channels + 1), dtype=torch.float64, device=z.device)
            g = g.movedim(-1, 0).contiguous()
            implementation("vector_dots", z)(x, g, batch, 1, 1, elements, sums)
            total = sums.sum(1).to(g.dtype)
            grad_weight, grad_bias = total[:, :channels].t().contiguous(), total[:, channels].contiguous()
        return (
            grad_z,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def latent_to_rgb(
    z: Tensor,
    weight: Factors,
    bias: Factors,
    *,
    size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.uint8,
    out: Tensor | None = None,
) -> Tensor:
    """Shows latents as pictures: a linear map of their channels to RGB, enlarged bilinearly. No VAE, one launch.

    x = bias + Σ_c z[:, c] · weight[c] approximates the decoded pixels in [-1, 1]; `fit_rgb` finds the factors for any
    VAE, `latentfast.tiny.rgb_factors()` has the embedded model's. Positions lie as in `torch.nn.functional.interpolate`
    with `mode="bilinear", align_corners=False`, also where `size` is smaller (without antialiasing).

    Args:
        z: Latents of a clip `(B, C, T, H, W)` or of images `(B, C, H, W)`, float32, float16, bfloat16 or float64.
        weight: `(C, 3)`, for each channel what it adds to red, green and blue. A tensor, or nested sequences, which
            are copied to `z`'s device once and kept there (a tensor saves looking them up at every call).
        bias: `(3,)`, the colour of zero; likewise.
        size: `(H', W')` in pixels, usually the VAE's factor times `(H, W)`. None: `(H, W)`.
        dtype: `torch.uint8` for bytes: round((x + 1)·127.5), ties to even, clamped to 0…255. `torch.float32` for x
            itself, neither rounded nor clamped (float64 for float64 latents).
        out: A contiguous tensor like the result to write into; not differentiable.

    Returns:
        `(B, T, H', W', 3)` in `dtype`, contiguous, new; `(B, H', W', 3)` for images. NaN becomes the byte 0. An
        infinity can turn into NaN where it is interpolated.

    Raises:
        TypeError: an argument is no tensor, or of an unknown dtype.
        ValueError: shapes or devices do not fit.

    The float form is differentiable in `z` and in tensors `weight` and `bias`, once.

    Example:
        >>> import torch, latentfast
        >>> weight, bias = torch.eye(3), torch.zeros(3)
        >>> latentfast.latent_to_rgb(torch.zeros(1, 3, 5, 2, 2), weight, bias, size=(16, 16)).shape
        torch.Size([1, 5, 16, 16, 3])
    """
    _checks.latent("z", z)
    if z.ndim not in (4, 5):
        raise ValueError(f"z must have shape (B, C, T, H, W) or (B, C, H, W), got {tuple(z.shape)}")
    if dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"dtype must be torch.uint8 or torch.float32, got {dtype}")
    channels, (height, width) = z.shape[1], z.shape[-2:]
    weight = _factors("weight", weight, (channels, 3), z)
    bias = _factors("bias", bias, (3,), z)
    rows, columns = (height, width) if size is None else _size(size)
    if (height == 0 or width == 0) and (rows, columns) != (height, width):
        raise ValueError(
            f"z must have rows and columns to be enlarged to {(rows, columns)}, got shape {tuple(z.shape)}"
        )
    frames = z.shape[2:-2]  # of images: none
    shape = (z.shape[0], *frames, rows, columns, 3)
    x = z if frames else z.unsqueeze(2)
    if not x.is_contiguous():
        x = x.contiguous()
    result_dtype = dtype if dtype == torch.uint8 else _checks.wide(z.dtype)
    if out is not None:
        if isinstance(out, Tensor):
            if out.dtype != result_dtype:
                raise TypeError(f"out must be {_checks._short(result_dtype)}, got {_checks._short(out.dtype)}")
            _checks.same_device("out", out, "z", z)
        out = _checks.output(out, shape, "out", out, (z, weight, bias))
    elif torch.is_grad_enabled() and (z.requires_grad or weight.requires_grad or bias.requires_grad):
        if dtype != torch.uint8:
            return _LatentToRgb.apply(x, weight, bias, (*x.shape[:1], *x.shape[2:3], rows, columns, 3)).view(shape)
        out = torch.empty(shape, dtype=result_dtype, device=z.device)
        x, weight, bias = x.detach(), weight.detach(), bias.detach()  # bytes have no gradient
    else:
        out = torch.empty(shape, dtype=result_dtype, device=z.device)
    implementation("latent_to_rgb", z)(x, weight, bias, out if frames else out.unsqueeze(1))
    return out


def _size(size: object) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size must be (H', W'), got {size!r}")
    rows, columns = size
    if not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 1 for n in (rows, columns)):
        raise ValueError(f"size must be two positive integers (H', W'), got {tuple(size)}")
    return rows, columns


def _factors(name: str, values: Factors, shape: tuple[int, ...], z: Tensor) -> Tensor:
    """Factors of `shape` on `z`'s device in the precision that its elements are computed in, contiguous."""
    wide = _checks.wide(z.dtype)
    if not isinstance(values, Tensor):
        return _device_factors(name, values, shape, z.device, wide)
    if values.dtype not in _checks.DTYPES:
        raise TypeError(f"{name} must be floats, got a tensor of {_checks._short(values.dtype)}")
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(values.shape)}")
    _checks.same_device(name, values, "z", z)
    return values if values.dtype == wide and values.is_contiguous() else values.to(wide).contiguous()


def _device_factors(
    name: str, values: Sequence, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    try:
        rows = tuple(tuple(map(float, row)) for row in values) if len(shape) == 2 else (tuple(map(float, values)),)
    except TypeError:
        raise TypeError(
            f"{name} must be a tensor or {'nested sequences' if len(shape) == 2 else 'a sequence'} of floats, "
            f"got {type(values).__name__}"
        ) from None
    count = shape[0] if len(shape) == 2 else 1
    if len(rows) != count or any(len(row) != 3 for row in rows):
        found = (len(rows), *{len(row) for row in rows}) if len(shape) == 2 else (len(rows[0]),)
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {found}")
    flat = tuple(x for row in rows for x in row)
    if torch.compiler.is_compiling():
        return torch.tensor(flat, dtype=dtype, device=device).view(shape)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # the memory of a graph is no place to keep them, and a copy from the host cannot be captured
        like = torch.empty(0, device=device)
        return on_device(flat, like, dtype).view(shape)
    return _kept_factors(flat, device, dtype).view(shape)


@functools.lru_cache(maxsize=64)
def _kept_factors(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # later calls may want gradients
        return torch.tensor(values, dtype=dtype, device=device)


# --- fit_rgb ----------------------------------------------------------------------------------------------------------


class FitError(NamedTuple):
    """How far the fitted factors are from the frames that they were fitted to.

    `rms`: root of the mean square over all positions and colours, in units of [-1, 1]. `psnr`: the same in decibels,
    20·log10(2 / rms).
    """

    rms: float
    psnr: float


class RGBFit(NamedTuple):
    """Factors for `latent_to_rgb`: `weight` (C, 3), `bias` (3,), float32, and their `error`."""

    weight: Tensor
    bias: Tensor
    error: FitError


def fit_rgb(latents: Tensor, frames: Tensor) -> RGBFit:
    """Finds the factors of `latent_to_rgb` for a VAE: least squares from latents to the frames that they decode to.

    The frames are averaged over the pixels, and over the frames, that belong to a latent position; the normal equations
    are solved in float64. A few dozen varied clips are enough: there are 3·(C + 1) unknowns.

    In time, T' = 1 + r·(T - 1) frames are read as causal VAEs (Wan, HunyuanVideo, LTX) make them: the first latent
    frame is the first frame, each further one the mean of r. Otherwise T' = r·T, r frames each.

    Args:
        latents: `(B, C, T, H, W)` or `(B, C, H, W)`, floating; scaled as the previews' latents will be.
        frames: `(B, T', H', W', 3)` uint8, or `(B, 3, T', H', W')` floating in [-1, 1]; without T' for images. H' and
            W' are multiples of H and W.

    Returns:
        `RGBFit(weight, bias, error)`; the error is that of the fit, at the latents' resolution. Measure it on clips
        that were not fitted too.

    Raises:
        TypeError: an argument is no tensor, or of an unknown dtype.
        ValueError: shapes or devices do not fit, or there is nothing to fit to.

    Not differentiable. It waits for the device.

    Example:
        >>> import torch, latentfast
        >>> latents = torch.randn(2, 4, 3, 8, 8)
        >>> frames = latents[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4) * 0.1
        >>> latentfast.fit_rgb(latents, frames).weight.shape
        torch.Size([4, 3])
    """
    _checks.latent("latents", latents)
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames must be a tensor, got {type(frames).__name__}")
    if frames.dtype != torch.uint8 and frames.dtype not in _checks.DTYPES:
        raise TypeError(f"frames must be uint8 or floating, got {_checks._short(frames.dtype)}")
    if latents.ndim not in (4, 5):
        raise ValueError(f"latents must have shape (B, C, T, H, W) or (B, C, H, W), got {tuple(latents.shape)}")
    _checks.same_device("frames", frames, "latents", latents)
    colours = frames.ndim - 1 if frames.dtype == torch.uint8 else 1
    if frames.ndim != latents.ndim or frames.shape[colours] != 3 or frames.shape[0] != latents.shape[0]:
        batch, time = latents.shape[0], ", T'" if latents.ndim == 5 else ""
        expected = f"({batch}{time}, H', W', 3)" if frames.dtype == torch.uint8 else f"({batch}, 3{time}, H', W')"
        raise ValueError(
            f"frames of {_checks._short(frames.dtype)} must have shape {expected}, got {tuple(frames.shape)}"
        )
    if latents.numel() == 0:
        raise ValueError(f"latents must not be empty, got shape {tuple(latents.shape)}")
    with torch.no_grad():
        z = latents.double() if latents.ndim == 5 else latents.double().unsqueeze(2)
        y = frames.movedim(-1, 1).double() / 127.5 - 1 if frames.dtype == torch.uint8 else frames.double()
        y = _averaged(y if y.ndim == 5 else y.unsqueeze(2), z.shape[2:])
        x = z.movedim(1, -1).reshape(-1, z.shape[1])
        target = y.movedim(1, -1).reshape(-1, 3)
        # centred, so that the ridge holds back no bias
        x_mean, target_mean = x.mean(0), target.mean(0)
        x, target = x - x_mean, target - target_mean
        gram = x.t() @ x
        diagonal = gram.diagonal()
        ridge = (_RIDGE * diagonal.mean()).clamp_min(torch.finfo(torch.float64).tiny)
        weight = torch.linalg.solve(gram + torch.diag(ridge.expand_as(diagonal)), x.t() @ target)
        bias = target_mean - x_mean @ weight
        rms = float((x @ weight - target).square().mean().sqrt())
    if not math.isfinite(rms):
        raise ValueError("latents and frames must be finite, got NaN or infinity in one of them")
    return RGBFit(weight.float(), bias.float(), FitError(rms, 20 * math.log10(2 / rms) if rms else math.inf))


def _averaged(frames: Tensor, grid: Sequence[int]) -> Tensor:
    """Frames (B, 3, T', H', W') as their means over what belongs to each position of a latent grid (T, H, W)."""
    time, height, width = grid
    b, _, count, rows, columns = frames.shape
    if rows == 0 or columns == 0 or rows % height or columns % width:
        raise ValueError(
            f"frames must have a multiple of the latents' rows and columns {(height, width)}, got {(rows, columns)}"
        )
    frames = F.avg_pool2d(
        frames.movedim(2, 1).flatten(0, 1), (rows // height, columns // width)
    ).view(b, count, 3, height, width).movedim(1, 2)  # fmt: skip
    if count == time:
        return frames
    if time > 1 and count > 1 and (count - 1) % (time - 1) == 0:
        rest = frames[:, :, 1:].unflatten(2, (time - 1, -1)).mean(3)
        return torch.cat((frames[:, :, :1], rest), 2)
    if count and count % time == 0:
        return frames.unflatten(2, (time, -1)).mean(3)
    raise ValueError(f"frames must be 1 + r·{time - 1} or r·{time} in number for {time} latent frames, got {count}")
