"""The loss along an optical flow. Its gradient scatters: integers are added, whose sum has no order.

Launches: partial sums (Σ w d², Σ w, max |w d|); the loss and each sample's power of two; then, for the gradient, the
scatter into 64-bit integers and their conversion. A sample's power of two leaves the integers room for every pixel of a
frame pointing at one place; for a frame of 2^14 pixels the step is 2^-45 of the largest term, far below float32.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import OPTIONS, broadcast_strides, cdiv, guard, pow2
from latentfast.kernels.triton._math import narrow, ordered_sum, widen

#: Pixels of a tile, and elements of the conversion's.
_BLOCK = 256
_CONVERT = 1024
_LANES = 256


@triton.jit
def _taps(flow, sample, t, e, here, frames, height, width, kind):
    """The four taps (pixel numbers), the two fractions, and whether the sampling point lies inside the frame."""
    size = height * (width + 0 * sample)
    at = flow + (sample * 2 * (frames - 1) + t) * size + e
    x = (e % width).to(kind) + widen(tl.load(at, mask=here, other=0.0)).to(kind)
    y = (e // width).to(kind) + widen(tl.load(at + (frames - 1) * size, mask=here, other=0.0)).to(kind)
    inside = (x >= 0.0) & (x <= width - 1) & (y >= 0.0) & (y <= height - 1) & here
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    x0 = tl.floor(x)
    y0 = tl.floor(y)
    left = x0.to(tl.int64)
    top = y0.to(tl.int64)
    right = tl.minimum(left + 1, width - 1)
    bottom = tl.minimum(top + 1, height - 1)
    p00 = top * width + left
    p01 = top * width + right
    p10 = bottom * width + left
    p11 = bottom * width + right
    return p00, p01, p10, p11, x - x0, y - y0, inside


@triton.jit
def _difference(z, after, before, e, p00, p01, p10, p11, fx, fy, inside):
    """z[t + 1] at the sampling points minus z[t]."""
    v00 = widen(tl.load(z + after + p00, mask=inside, other=0.0))
    v01 = widen(tl.load(z + after + p01, mask=inside, other=0.0))
    v10 = widen(tl.load(z + after + p10, mask=inside, other=0.0))
    v11 = widen(tl.load(z + after + p11, mask=inside, other=0.0))
    upper = v00 * (1.0 - fx) + v01 * fx
    lower = v10 * (1.0 - fx) + v11 * fx
    return upper * (1.0 - fy) + lower * fy - widen(tl.load(z + before + e, mask=inside, other=0.0))


@triton.jit
def _place(frames, tiles, BLOCK: tl.constexpr):
    """(sample, t, pixels [BLOCK]) of a program."""
    pid = tl.program_id(0).to(tl.int64)
    e = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    return pid // tiles // (frames - 1), pid // tiles % (frames - 1), e


@triton.jit
def _weight(mask, sample, c, t, e, inside, width, mb, mc, mt, my, mx, kind):
    """w of a tile: the mask, 0 outside."""
    if mask is None:
        return inside.to(kind)
    else:
        at = sample * mb + c * mc + t * mt + (e // width) * my + (e % width) * mx
        return widen(tl.load(mask + at, mask=inside, other=0.0)).to(kind)


@triton.jit
def _warp_sums(
    z, flow, mask, partials, channels, frames, height, width, tiles, zc, zt, mb, mc, mt, my, mx, BLOCK: tl.constexpr
):  # fmt: skip
    sample, t, e = _place(frames, tiles, BLOCK)
    size = height * (width + 0 * sample)
    here = e < size
    kind = widen(tl.zeros([1], z.dtype.element_ty)).dtype
    p00, p01, p10, p11, fx, fy, inside = _taps(flow, sample, t, e, here, frames, height, width, kind)
    loss = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], kind)
    for c in range(channels):
        before = sample * channels * frames * size + c * zc + t * zt
        d = _difference(z, before + zt, before, e, p00, p01, p10, p11, fx, fy, inside)
        w = _weight(mask, sample, c, t, e, inside, width, mb, mc, mt, my, mx, kind)
        counts = inside & (w != 0.0)
        loss += tl.where(counts, w * (d * d), 0.0).to(tl.float64)
        total += w.to(tl.float64)
        term = tl.abs(tl.where(counts, w * d, 0.0))
        largest = tl.where(term > largest, term, largest)
    programs = (frames - 1) * tiles
    out = partials + sample * 3 * programs + tl.program_id(0).to(tl.int64) % programs
    tl.store(out, tl.sum(loss, 0))
    tl.store(out + programs, tl.sum(total, 0))
    tl.store(out + 2 * programs, tl.max(largest, 0).to(tl.float64))


@triton.jit
def _warp_finish(partials, loss, scales, programs, pixels, scale: tl.float64, LANES: tl.constexpr):
    """A sample's loss, the power of two that multiplies its terms, and the factor that turns sums into gradients."""
    sample = tl.program_id(0).to(tl.int64)
    at = partials + sample * 3 * programs
    lane = tl.arange(0, LANES)
    value = ordered_sum(at, programs, LANES)
    total = ordered_sum(at + programs, programs, LANES)
    largest = tl.zeros([LANES], tl.float64)
    for start in range(0, programs, LANES):
        here = start + lane < programs
        largest = tl.maximum(largest, tl.load(at + 2 * programs + start + lane, mask=here, other=0.0))
    some = total != 0.0
    mean = tl.where(some, value / tl.where(some, total, 1.0), 0.0)
    one = tl.arange(0, 1)
    tl.store(loss + sample + one, (mean + tl.zeros([1], tl.float64)).to(loss.dtype.element_ty))
    if scales is not None:
        # at most `pixels` points sample one place, and it is itself sampled from one: the sum stays below 2^62
        bound = tl.max(largest, 0) * (pixels + 1.0)
        exponent = ((bound.to(tl.int64, bitcast=True) >> 52) & 2047) - 1023
        power = 60 - tl.minimum(tl.maximum(exponent, -960), 1020)
        up = ((power + 1023) << 52).to(tl.float64, bitcast=True)
        down = ((1023 - power) << 52).to(tl.float64, bitcast=True)
        factor = tl.where(some, tl.full([1], scale, tl.float64) * 2.0 / tl.where(some, total, 1.0) * down, 0.0)
        # a sample with a NaN or an overflow has no gradient that means anything: all of it is NaN
        finite = value - value == 0.0
        tl.store(scales + sample * 2 + one, tl.where(finite, up, 0.0) + tl.zeros([1], tl.float64))
        tl.store(scales + sample * 2 + 1 + one, tl.where(finite | (some == 0), factor, value - value))


@triton.jit
def _add(sums, at, term, scale, use):
    units = tl.floor(tl.where(use, term, 0.0).to(tl.float64) * scale + 0.5)
    tl.atomic_add(sums + at, units.to(tl.int64), mask=use, sem="relaxed")


@triton.jit
def _warp_scatter(
    z, flow, mask, scales, sums, channels, frames, height, width, tiles, zc, zt, mb, mc, mt, my, mx, BLOCK: tl.constexpr
):  # fmt: skip
    sample, t, e = _place(frames, tiles, BLOCK)
    size = height * (width + 0 * sample)
    here = e < size
    kind = widen(tl.zeros([1], z.dtype.element_ty)).dtype
    p00, p01, p10, p11, fx, fy, inside = _taps(flow, sample, t, e, here, frames, height, width, kind)
    scale = tl.load(scales + sample * 2 + tl.arange(0, 1))
    for c in range(channels):
        before = sample * channels * frames * size + c * zc + t * zt
        after = before + zt
        d = _difference(z, after, before, e, p00, p01, p10, p11, fx, fy, inside)
        w = _weight(mask, sample, c, t, e, inside, width, mb, mc, mt, my, mx, kind)
        use = inside & (w != 0.0) & (scale != 0.0)
        term = w * d
        _add(sums, before + e, -term, scale, use)
        _add(sums, after + p00, term * (1.0 - fx) * (1.0 - fy), scale, use)
        _add(sums, after + p01, term * fx * (1.0 - fy), scale, use)
        _add(sums, after + p10, term * (1.0 - fx) * fy, scale, use)
        _add(sums, after + p11, term * fx * fy, scale, use)


@triton.jit
def _warp_convert(sums, scales, grad, each, blocks, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // blocks
    e = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    at = sample * each + e
    value = tl.load(sums + at, mask=e < each, other=0).to(tl.float64) * tl.load(scales + sample * 2 + 1)
    tl.store(grad + at, narrow(value, grad.dtype.element_ty), mask=e < each)


def warp_loss(
    z: Tensor, flow: Tensor, mask: Tensor | None, grad_scale: float, frame_dim: int, loss: Tensor, grad: Tensor | None
) -> None:
    """The operator `warp_loss` of `latentfast._operators`."""
    batch, frames, channels = z.shape[0], z.shape[frame_dim], z.shape[3 - frame_dim]
    height, width = z.shape[3:]
    if not z.numel() or frames < 2:
        loss.zero_()
        if grad is not None:
            grad.zero_()
        return
    size = height * width
    zc, zt = (frames * size, size) if frame_dim == 2 else (size, channels * size)
    target = tuple(n - 1 if d == frame_dim else n for d, n in enumerate(z.shape))
    strides = [0] * 5 if mask is None else broadcast_strides(mask.shape, target)
    block = min(_BLOCK, pow2(size))
    tiles = cdiv(size, block)
    programs = (frames - 1) * tiles
    with guard(z):
        partials = torch.empty((batch, 3, programs), dtype=torch.float64, device=z.device)
        scales = None if grad is None else torch.empty((batch, 2), dtype=torch.float64, device=z.device)
        shape = (channels, frames, height, width, tiles, zc, zt)
        of_mask = (strides[0], strides[3 - frame_dim], strides[frame_dim], *strides[3:])
        _warp_sums[(batch * programs,)](z, flow, mask, partials, *shape, *of_mask, BLOCK=block, **OPTIONS)
        _warp_finish[(batch,)](partials, loss, scales, programs, size, float(grad_scale), LANES=_LANES, **OPTIONS)
        if grad is None:
            return
        sums = torch.zeros(z.shape, dtype=torch.int64, device=z.device)
        _warp_scatter[(batch * programs,)](z, flow, mask, scales, sums, *shape, *of_mask, BLOCK=block, **OPTIONS)
        each = channels * frames * size
        blocks = cdiv(each, _CONVERT)
        _warp_convert[(batch * blocks,)](sums, scales, grad, each, blocks, BLOCK=_CONVERT, **OPTIONS)
