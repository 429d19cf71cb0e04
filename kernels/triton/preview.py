"""Previews: the latents mapped to RGB in one launch, enlarged in a second one if they are.

The map reads every latent once. What lies between, three float32 numbers a latent position, is small beside latents and
pixels and stays in L2; so the second kernel can take one output value a lane and gather its four neighbours.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import OPTIONS, cdiv, guard, wide
from latentfast.kernels.triton._math import widen

#: Latent positions of a program that maps, output values of one that enlarges.
_POSITIONS, _VALUES = 256, 1024


@triton.jit
def _whole(x):
    """x rounded to the nearest whole number, ties to even, clamped to 0…255; NaN becomes 0."""
    x = tl.where(x > 0.0, x, 0.0)
    x = tl.where(x < 255.0, x, 255.0)
    if x.dtype == tl.float64:
        return (x + 4503599627370496.0) - 4503599627370496.0
    else:
        return (x + 8388608.0) - 8388608.0


@triton.jit
def _store(out, value, here, BYTES: tl.constexpr):
    if BYTES:
        tl.store(out, _whole(value).to(tl.int32).to(tl.uint8), mask=here)
    else:
        tl.store(out, value, mask=here)


@triton.jit
def _factor(ptr, BYTES: tl.constexpr):
    """One factor of the map, in units of a byte's steps where bytes are made."""
    if BYTES:
        return tl.load(ptr) * 127.5
    else:
        return tl.load(ptr)


@triton.jit
def _map(
    z, weight, bias, out, plane, frames, channels, BLOCK: tl.constexpr, SCALED: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """x = bias + Σ_c weight[c]·z[c] for a block of one frame's positions. SCALED: (x + 1)·127.5; BYTES: as bytes."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (plane + BLOCK - 1) // BLOCK
    frame = pid // blocks
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    here = at < plane
    step = frames * plane
    x = z + (frame // frames) * channels * step + (frame % frames) * plane + at
    lift: tl.constexpr = 127.5 if SCALED else 0.0
    zero = tl.zeros([BLOCK], weight.dtype.element_ty)
    red = zero + (_factor(bias, SCALED) + lift)
    green = zero + (_factor(bias + 1, SCALED) + lift)
    blue = zero + (_factor(bias + 2, SCALED) + lift)
    for c in range(channels):
        value = widen(tl.load(x + c * step, mask=here, other=0.0))
        w = weight + 3 * c
        red = tl.fma(value, zero + _factor(w, SCALED), red)
        green = tl.fma(value, zero + _factor(w + 1, SCALED), green)
        blue = tl.fma(value, zero + _factor(w + 2, SCALED), blue)
    to = out + (frame * plane + at) * 3
    _store(to, red, here, BYTES)
    _store(to + 1, green, here, BYTES)
    _store(to + 2, blue, here, BYTES)


@triton.jit
def _place(i, full, size, dtype: tl.constexpr):
    """Output i of `full` lies at (i + ½)·size/full − ½, not below 0: the input before it, and how far beyond.

    In whole numbers up to the one division, which is as exact as one can be.
    """
    twice = (2 * i + 1) * size - full
    twice = tl.where(twice > 0, twice, 0)
    low = twice // (2 * full)
    rest = (twice - low * 2 * full).to(dtype)
    if dtype == tl.float32:
        return low, tl.div_rn(rest, tl.full([1], 2 * full, tl.int64).to(dtype) + tl.zeros_like(rest))
    else:
        return low, rest / tl.full([1], 2 * full, tl.int64).to(dtype)


@triton.jit
def _enlarge(rgb, out, height, width, rows, columns, BLOCK: tl.constexpr, BYTES: tl.constexpr):
    """A block of one output row's interleaved values."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (3 * columns + BLOCK - 1) // BLOCK
    line = pid // blocks  # of all frames' rows
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    here = at < 3 * columns
    dtype: tl.constexpr = rgb.dtype.element_ty
    top, down = _place(tl.full([1], 0, tl.int64) + line % rows, rows, height, dtype)
    left, right = _place(at // 3, columns, width, dtype)
    beside = 3 * (tl.minimum(left + 1, width - 1) - left)
    below = 3 * (tl.minimum(top + 1, height - 1) - top) * width
    start = rgb + ((line // rows) * height + top) * width * 3 + left * 3 + at % 3
    a = tl.load(start, mask=here, other=0.0)
    b = tl.load(start + beside, mask=here, other=0.0)
    c = tl.load(start + below, mask=here, other=0.0)
    d = tl.load(start + below + beside, mask=here, other=0.0)
    before = tl.fma(down + tl.zeros_like(a), c - a, a)
    after = tl.fma(down + tl.zeros_like(a), d - b, b)
    _store(out + line * 3 * columns + at, tl.fma(right, after - before, before), here, BYTES)


def latent_to_rgb(z: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """The operator `latent_to_rgb` of `latentfast._operators`."""
    if not out.numel():
        return
    batch, channels, frames, height, width = z.shape
    rows, columns = out.shape[2:4]
    plane = height * width
    bytes_out = out.dtype == torch.uint8
    enlarged = (rows, columns) != (height, width)
    with guard(z):
        rgb = torch.empty((batch, frames, plane, 3), dtype=wide(z.dtype), device=z.device) if enlarged else out
        _map[(batch * frames * cdiv(plane, _POSITIONS),)](
            z, weight, bias, rgb, plane, frames, channels,
            BLOCK=_POSITIONS, SCALED=bytes_out, BYTES=bytes_out and not enlarged, **OPTIONS,
        )  # fmt: skip
        if enlarged:
            _enlarge[(batch * frames * rows * cdiv(3 * columns, _VALUES),)](
                rgb, out, height, width, rows, columns, BLOCK=_VALUES, BYTES=bytes_out, **OPTIONS
            )
