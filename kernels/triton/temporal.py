"""The temporal loss with its gradient: one pass over z with a window of three frames in registers.

Launches: sums of the mask's weights (only with a mask), the pass, and the sum of its partial losses. A clip is seen as
(B, P, T, I) with the frames at T. A program has one tile of I and some consecutive frames; those it shares with the
programs before and after are read again, from the cache. Everything that decides the order of a sum depends on a
sample's size alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import (
    OPTIONS,
    broadcast_strides,
    cdiv,
    collapse,
    contiguous_strides,
    guard,
    pow2,
)
from latentfast.kernels.triton._math import narrow, ordered_sum, square_root, widen
from latentfast.kernels.triton.warp import warp_loss

__all__ = ["temporal_loss", "warp_loss"]

#: Elements of a tile, by the size of one in bytes.
_BLOCK = {2: 1024, 4: 512, 8: 256}
#: Programs that a sample is cut into before each is given all frames, and the fewest frames that one is given.
_ENOUGH_PROGRAMS = 512
_FEWEST_FRAMES = 4
#: Lanes that partial sums are added in.
_LANES = 256

L2 = tl.constexpr(0)
L1 = tl.constexpr(1)
CHARBONNIER = tl.constexpr(2)


@triton.jit
def _penalty(d, eps, NORM: tl.constexpr):
    """ρ(d)."""
    if NORM == L2:
        return d * d
    elif NORM == L1:
        return tl.abs(d)
    else:  # sqrt(d² + eps²) − eps without its cancellation
        return tl.where(d == 0.0, 0.0, d * d / (square_root(d * d + eps * eps) + eps))


@triton.jit
def _slope(d, eps, NORM: tl.constexpr):
    """ρ'(d), 0 at 0."""
    if NORM == L2:
        return 2.0 * d
    elif NORM == L1:
        return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0)).to(d.dtype)  # of a NaN 0, as torch.sign
    else:
        return tl.where(d == 0.0, 0.0, d / square_root(d * d + eps * eps))


@triton.jit
def _mask_sums(mask, partials, groups, frames, inner, mask_frames, chunks, reps, BLOCK: tl.constexpr):
    """Σ m[t]m[t+1] and Σ m[t]m[t+1]m[t+2] over a chunk of a mask (samples, groups, mask_frames, inner).

    A mask of one frame stands for all `frames`.
    """
    chunk = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    step = tl.where(mask_frames == 1, 0, inner)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for rep in range(reps):
        e = (chunk * reps + rep) * BLOCK + tl.arange(0, BLOCK)
        here = e < groups * inner
        at = mask + sample * groups * mask_frames * inner + (e // inner) * mask_frames * inner + e % inner
        m0 = widen(tl.load(at, mask=here, other=0.0))
        m1 = widen(tl.load(at + step, mask=here & (frames > 1), other=0.0))
        for t in range(frames - 1):
            at += step
            m2 = widen(tl.load(at + step, mask=here & (t + 2 < frames), other=0.0))
            first += (m0 * m1).to(tl.float64)
            second += (m0 * m1 * m2).to(tl.float64)
            m0 = m1
            m1 = m2
    tl.store(partials + (sample * 2) * chunks + chunk, tl.sum(first, 0))
    tl.store(partials + (sample * 2 + 1) * chunks + chunk, tl.sum(second, 0))


@triton.jit
def _frame(z, ref, at, here):
    """A tile of a frame, `ref` taken off."""
    x = widen(tl.load(z + at, mask=here, other=0.0))
    if ref is not None:
        x -= widen(tl.load(ref + at, mask=here, other=0.0))
    return x


@triton.jit
def _weight(mask, at, here, like):
    return widen(tl.load(mask + at, mask=here, other=0.0)).to(like)


@triton.jit
def _weights(partials, sample, total1, total2, repeats, chunks, sample_step, LANES: tl.constexpr):
    """Σ w of a sample's first and second differences; `total1` and `total2` where there is no mask."""
    w1 = tl.full([1], total1, tl.float64)
    w2 = tl.full([1], total2, tl.float64)
    if partials is not None:
        at = partials + sample * sample_step * 2 * chunks
        w1 = ordered_sum(at, chunks, LANES) * tl.full([1], repeats, tl.float64)
        w2 = ordered_sum(at + chunks, chunks, LANES) * tl.full([1], repeats, tl.float64)
    return w1, w2


@triton.jit
def _temporal(
    z, ref, mask, mask_partials, partials, grad,
    first: tl.float64, second: tl.float64, eps: tl.float64, scale: tl.float64,
    total1: tl.float64, total2: tl.float64, repeats: tl.float64,
    groups, frames, inner, tiles, segments, per_segment, mask_chunks, mask_sample, mb, p1, mp0, mp1, mt,
    i1, i2, mi0, mi1, mi2,
    NORM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Losses go to partials (B, 2, groups·tiles·segments). total1, total2: Σ w of a sample where there is no mask."""
    pid = tl.program_id(0).to(tl.int64)
    programs = groups * tiles * segments
    sample = pid // programs
    segment = pid % segments
    tile = (pid // segments) % tiles
    group = (pid // segments // tiles) % groups
    e = tile * BLOCK + tl.arange(0, BLOCK)
    here = e < inner
    at = (sample * groups + group) * frames * inner + e
    of_m = e
    if mask is not None:
        of_m = sample * mb + (group // p1) * mp0 + (group % p1) * mp1
        of_m += (e // i2 // i1) * mi0 + (e // i2 % i1) * mi1 + (e % i2) * mi2

    start = segment * per_segment
    stop = tl.minimum(start + per_segment, frames)
    begin = tl.maximum(start - 2, 0)
    x0 = _frame(z, ref, at + begin * inner, here)
    x1 = _frame(z, ref, at + (begin + 1) * inner, here & (begin + 1 < frames))
    kind = x0.dtype
    width = tl.full([1], eps, tl.float64).to(kind)
    factor = tl.full([1], scale, tl.float64)
    w1, w2 = _weights(mask_partials, sample, total1, total2, repeats, mask_chunks, mask_sample, LANES)
    c1 = tl.where(w1 == 0.0, 0.0, tl.full([1], first, tl.float64) * factor / tl.where(w1 == 0.0, 1.0, w1)).to(kind)
    c2 = tl.where(w2 == 0.0, 0.0, tl.full([1], second, tl.float64) * factor / tl.where(w2 == 0.0, 1.0, w2)).to(kind)
    m0 = x0
    m1 = x0
    if mask is not None:
        m0 = _weight(mask, of_m + begin * mt, here, kind)
        m1 = _weight(mask, of_m + (begin + 1) * mt, here & (begin + 1 < frames), kind)
    loss1 = tl.zeros([BLOCK], kind)
    loss2 = tl.zeros([BLOCK], kind)
    r1 = tl.zeros([BLOCK], kind)  # the slopes of earlier frames' terms: r1 of t − 1, r2 of t − 1, r2_ of t − 2
    r2 = tl.zeros([BLOCK], kind)
    r2_ = tl.zeros([BLOCK], kind)
    for t in range(begin, stop):
        own = t >= start
        here1 = here & (t + 1 < frames)
        here2 = here & (t + 2 < frames)
        ahead = here2 if SECOND else here2 & (t + 1 < stop)
        x2 = _frame(z, ref, at + (t + 2) * inner, ahead)
        m2 = m1
        if mask is not None:
            m2 = _weight(mask, of_m + (t + 2) * mt, ahead, kind)
        along = tl.zeros([BLOCK], kind)
        if FIRST:
            d = x1 - x0
            use = here1
            rho = _penalty(d, width, NORM)
            slope = c1 * _slope(d, width, NORM)
            if mask is not None:
                weight = m0 * m1
                use = use & (weight != 0.0)
                rho = weight * rho
                slope = weight * slope
            loss1 += tl.where(use & own, rho, 0.0)
            slope = tl.where(use & (c1 != 0.0), slope, 0.0)
            along += r1 - slope
            r1 = slope
        if SECOND:
            d = x2 - 2.0 * x1 + x0
            use = here2
            rho = _penalty(d, width, NORM)
            slope = c2 * _slope(d, width, NORM)
            if mask is not None:
                weight = m0 * m1 * m2
                use = use & (weight != 0.0)
                rho = weight * rho
                slope = weight * slope
            loss2 += tl.where(use & own, rho, 0.0)
            slope = tl.where(use & (c2 != 0.0), slope, 0.0)
            along += slope - 2.0 * r2 + r2_
            r2_ = r2
            r2 = slope
        if grad is not None:
            tl.store(grad + at + t * inner, narrow(along, grad.dtype.element_ty), mask=here & own)
        x0 = x1
        x1 = x2
        m0 = m1
        m1 = m2
    out = partials + sample * 2 * programs + pid % programs
    tl.store(out, tl.sum(loss1.to(tl.float64), 0))
    tl.store(out + programs, tl.sum(loss2.to(tl.float64), 0))


@triton.jit
def _finish(
    partials, mask_partials, loss, first: tl.float64, second: tl.float64, total1: tl.float64, total2: tl.float64,
    repeats: tl.float64, programs, mask_chunks, mask_sample, LANES: tl.constexpr,
):  # fmt: skip
    """One sample's loss from its partial sums."""
    sample = tl.program_id(0).to(tl.int64)
    l1 = ordered_sum(partials + sample * 2 * programs, programs, LANES)
    l2 = ordered_sum(partials + (sample * 2 + 1) * programs, programs, LANES)
    w1, w2 = _weights(mask_partials, sample, total1, total2, repeats, mask_chunks, mask_sample, LANES)
    term1 = tl.full([1], first, tl.float64) * tl.where(w1 == 0.0, 0.0, l1 / tl.where(w1 == 0.0, 1.0, w1))
    term2 = tl.full([1], second, tl.float64) * tl.where(w2 == 0.0, 0.0, l2 / tl.where(w2 == 0.0, 1.0, w2))
    tl.store(loss + sample + tl.arange(0, 1), (term1 + term2).to(loss.dtype.element_ty))


def _within(dims: Sequence[int], strides: Sequence[int], most: int) -> tuple[list[int], list[int]] | None:
    """`dims` merged as far as a mask of `strides` allows, padded in front to `most`; None if there are more."""
    sizes, (_, merged) = collapse(dims, contiguous_strides(tuple(dims)), strides)
    if len(sizes) > most:
        return None
    pad = most - len(sizes)
    return [1] * pad + sizes, [0] * pad + merged


def temporal_loss(
    z: Tensor, ref: Tensor | None, mask: Tensor | None, first: float, second: float, norm: int, eps: float,
    grad_scale: float, frame_dim: int, loss: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """The operator `temporal_loss` of `latentfast._operators`."""
    shape = tuple(z.shape)
    batch, frames = shape[0], shape[frame_dim]
    if not z.numel() or frames < 2 or not (first or second):
        loss.zero_()
        if grad is not None:
            grad.zero_()
        return
    if norm == CHARBONNIER.value and eps == 0:
        norm = L1.value
    outer, rest = shape[1:frame_dim], shape[frame_dim + 1 :]
    groups, inner = math.prod(outer), math.prod(rest)
    strides = [0] * len(shape) if mask is None else broadcast_strides(mask.shape, shape)
    of_outer = _within(outer, strides[1:frame_dim], 2)
    of_inner = _within(rest, strides[frame_dim + 1 :], 3)
    if of_outer is None or of_inner is None:  # a mask that alternates over many dimensions
        mask = mask.expand(shape).contiguous()
        temporal_loss(z, ref, mask, first, second, norm, eps, grad_scale, frame_dim, loss, grad)
        return
    block = min(_BLOCK[z.element_size()], max(32, pow2(inner)))
    tiles = cdiv(inner, block)
    wanted = max(1, cdiv(_ENOUGH_PROGRAMS, groups * tiles))
    per_segment = min(frames, max(_FEWEST_FRAMES, cdiv(frames, wanted)))
    segments = cdiv(frames, per_segment)
    programs = groups * tiles * segments
    with guard(z):
        mask_partials, mask_chunks, mask_sample, repeats = None, 1, 0, 1
        if mask is not None:
            sizes = [1] * (len(shape) - mask.ndim) + list(mask.shape)
            own_groups, own_inner = math.prod(sizes[1:frame_dim]), math.prod(sizes[frame_dim + 1 :])
            blocks = cdiv(own_groups * own_inner, _LANES)
            reps = cdiv(blocks, _LANES)
            mask_chunks, mask_sample = cdiv(blocks, reps), int(sizes[0] > 1)
            repeats = groups // own_groups * (inner // own_inner)
            mask_partials = torch.empty((sizes[0], 2, mask_chunks), dtype=torch.float64, device=z.device)
            _mask_sums[(mask_chunks, sizes[0])](
                mask,
                mask_partials,
                own_groups,
                frames,
                own_inner,
                sizes[frame_dim],
                mask_chunks,
                reps,
                BLOCK=_LANES,
                **OPTIONS,
            )
        partials = torch.empty((batch, 2, programs), dtype=torch.float64, device=z.device)
        totals = float((frames - 1) * groups * inner), float((frames - 2) * groups * inner)
        _temporal[(batch * programs,)](
            z, ref, mask, mask_partials, partials, grad, float(first), float(second), float(eps), float(grad_scale),
            *totals, float(repeats), groups, frames, inner, tiles, segments, per_segment, mask_chunks, mask_sample,
            strides[0], of_outer[0][1], *of_outer[1], strides[frame_dim], *of_inner[0][1:], *of_inner[1],
            NORM=norm, FIRST=first != 0, SECOND=second != 0 and frames > 2, BLOCK=block, LANES=_LANES, **OPTIONS,
        )  # fmt: skip
        _finish[(batch,)](
            partials, mask_partials, loss, float(first), float(second), *totals, float(repeats), programs, mask_chunks,
            mask_sample, LANES=_LANES, **OPTIONS,
        )  # fmt: skip
