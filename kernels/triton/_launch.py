"""What the launchers share: device guard, block sizes, scalars for the device, broadcast layouts."""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._math import pick

#: Elements of a tile whose vectors are summed up, by the size of one in bytes: at most eight a thread of four warps,
#: which keeps three float64 sums for each in registers.
BLOCK = {2: 1024, 4: 1024, 8: 512}
#: How many host scalars one launch carries as arguments.
SLOTS = 8
#: Options of every launch. No fusion: see `_math`.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def guard(x: Tensor) -> AbstractContextManager:
    """Launches go to the current device; make that the device of `x`."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def aligned(x: Tensor) -> Tensor:
    """`x` at a 16-byte boundary.

    The compiler lays out a reduction by its pointers' alignment, so a misaligned view could be summed in another order.
    """
    return x if x.data_ptr() % 16 == 0 else x.clone()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that elements of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def slots(values: Sequence[float]) -> tuple[float, ...]:
    """Up to `SLOTS` host scalars as so many arguments."""
    return (*map(float, values), *([0.0] * (SLOTS - len(values))))


def groups(count: int) -> Iterator[tuple[int, int]]:
    """(first, number) of each group of at most `SLOTS`."""
    for first in range(0, count, SLOTS):
        yield first, min(SLOTS, count - first)


@triton.jit
def _write(
    out,
    v0: tl.float64, v1: tl.float64, v2: tl.float64, v3: tl.float64,
    v4: tl.float64, v5: tl.float64, v6: tl.float64, v7: tl.float64,
    COUNT: tl.constexpr,
):  # fmt: skip
    for k in tl.static_range(COUNT):
        tl.store(out + k + tl.arange(0, 1), pick(k, v0, v1, v2, v3, v4, v5, v6, v7))


def on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """Host scalars as a float64 tensor on `like`'s device.

    They travel as kernel arguments: a copy from host memory would wait, or could not be captured in a CUDA graph.
    """
    out = torch.empty(len(values), dtype=torch.float64, device=like.device)
    for first, count in groups(len(values)):
        _write[(1,)](out[first:], *slots(values[first : first + count]), COUNT=count, num_warps=1)
    return out


def broadcast_strides(shape: Sequence[int], target: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor of `shape` when it is broadcast to `target`: 0 along what is repeated."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(0 if size == 1 else step)
        step *= size
    strides += [0] * (len(target) - len(shape))
    return strides[::-1]


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """`shape` with as few dimensions as operands of these `strides` allow: neighbours are merged where all agree."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(m[-1] == s[d] * size for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= size
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[d]
        else:
            sizes.append(size)
            for m, s in zip(merged, strides, strict=True):
                m.append(s[d])
    return sizes, merged


@functools.cache
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
