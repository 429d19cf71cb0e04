"""Interpolation: lerp in one launch; nlerp and slerp in one for short vectors, in two (sums, values) for long ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._gradient import interpolate_bwd
from latentfast.kernels.triton._launch import OPTIONS, aligned, groups, guard, slots
from latentfast.kernels.triton._math import double, narrow, pick, widen
from latentfast.kernels.triton._vectors import (
    Tiling,
    add_last,
    combine,
    place,
    quarter_turn,
    store_partial,
    three_sums,
    tile_offsets,
    tile_rows_cols,
    tiling,
    vector_dots,
    vector_mix,
)
from latentfast.kernels.triton._weights import LERP, weights

__all__ = ["interpolate", "interpolate_bwd", "vector_dots", "vector_mix"]


@triton.jit
def _sums(
    a, b, partials, p, n, q, m, chunks, per_chunk,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    aa, bb, ab = three_sums(a, b, chunk * per_chunk, per_chunk, u, w, n, q, m, EVEN, ROWS, COLS, VECTORS)
    store_partial(partials, aa, 0, u, chunk, w, chunks, q)
    store_partial(partials, bb, p, u, chunk, w, chunks, q)
    store_partial(partials, ab, 2 * p, u, chunk, w, chunks, q)


@triton.jit
def _interpolate(
    a, b, t, partials, out,
    t0: tl.float64, t1: tl.float64, t2: tl.float64, t3: tl.float64,
    t4: tl.float64, t5: tl.float64, t6: tl.float64, t7: tl.float64,
    p, n, q, m, chunks, per_chunk, total, t_row,
    MODE: tl.constexpr, COUNT: tl.constexpr, LONG: tl.constexpr, EVEN: tl.constexpr, PER_VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    first = chunk * per_chunk
    aa = tl.full([VECTORS], 1.0, tl.float64)
    bb = aa
    ab = aa
    rest = aa
    stretch = aa
    if MODE != LERP:
        if partials is not None:
            rest = combine(partials, 0, u, w, chunks, q, VECTORS)
            bb = combine(partials, p, u, w, chunks, q, VECTORS)
            ab = combine(partials, 2 * p, u, w, chunks, q, VECTORS)
        else:
            aa_, bb_, ab_ = three_sums(a, b, first, per_chunk, u, w, n, q, m, EVEN, ROWS, COLS, VECTORS)
            rest = tl.sum(aa_, 0)
            bb = tl.sum(bb_, 0)
            ab = tl.sum(ab_, 0)
        aa, bb, ab, stretch = add_last(a, b, rest, bb, ab, u, w, n, q, m, EVEN)

    ts = ()
    was = ()
    wbs = ()
    wts = ()
    bends = aa < 0.0
    for k in tl.static_range(COUNT):
        if t is None:
            t_k = pick(k, t0, t1, t2, t3, t4, t5, t6, t7) + tl.zeros([VECTORS], tl.float64)
        else:
            v = (u * q + w) if PER_VECTOR else 0 * w
            t_k = double(tl.load(t + k * t_row + v, mask=w < q, other=0.0))
        wa, wb, wt = weights(t_k, aa, bb, ab, MODE, LONG)
        # Triton knows no starred tuples
        ts = ts + (t_k,)  # noqa: RUF005
        was = was + (wa,)  # noqa: RUF005
        wbs = wbs + (wb,)  # noqa: RUF005
        wts = wts + (wt * stretch,)  # noqa: RUF005
        bends = bends | (wt != 0.0)
    # turned vectors are rare: their second read of `a` is left out unless some vector here needs it
    turns = tl.max((bends & (w < q)).to(tl.int32), 0) > 0

    for s in range(per_chunk):
        i, j = tile_rows_cols(first + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        a_raw = tl.load(a + offsets, mask=mask, other=0.0)
        b_raw = tl.load(b + offsets, mask=mask, other=0.0)
        x = widen(a_raw)
        y = widen(b_raw)
        turned = tl.zeros([ROWS * COLS, VECTORS], x.dtype)
        if MODE != LERP and LONG:  # noqa: SIM102 (decided at compilation; the next by the program)
            if turns:
                turned = quarter_turn(a, i, j, u, w, n, q, m, rest, tl.sqrt(aa), EVEN)
        for k in tl.static_range(COUNT):
            mixed = tl.fma(was[k].to(x.dtype)[None, :], x, wbs[k].to(x.dtype)[None, :] * y)
            if MODE != LERP and LONG:
                bent = wts[k].to(x.dtype)[None, :]
                mixed = tl.where(bent == 0.0, mixed, tl.fma(bent, turned, mixed))
            result = narrow(mixed, out.dtype.element_ty)
            result = tl.where((ts[k] == 1.0)[None, :], b_raw, result)
            result = tl.where((ts[k] == 0.0)[None, :], a_raw, result)
            tl.store(out + tl.full([], k, tl.int64) * total + offsets, result, mask=mask)


def _sums_of(a: Tensor, b: Tensor, tile: Tiling, even: bool) -> Tensor:
    partials = torch.empty(3 * tile.p * tile.chunks * tile.q, dtype=torch.float64, device=a.device)
    _sums[(tile.programs * tile.chunks,)](a, b, partials, p=tile.p, **tile.layout, EVEN=even, **OPTIONS)
    return partials


def interpolate(
    a: Tensor, b: Tensor, t: Tensor | None, ts: Sequence[float], mode: int, p: int, n: int, q: int, m: int, out: Tensor
) -> None:
    """The operator `interpolate` of `latentfast._operators`."""
    if not out.numel():
        return
    count = len(ts) if t is None else t.shape[0]
    per_vector = t is not None and t.shape[1] > 1
    length = n * m
    if mode == LERP.value and not per_vector:
        p, n, q, m = 1, 1, 1, a.numel()  # one t for all: no vectors to tell apart
    with guard(a):
        a, b = aligned(a), aligned(b)
        tile = tiling(p, n, q, m, a.element_size(), reduces=mode != LERP.value)
        even = length % 2 == 0
        partials = None if mode == LERP.value or tile.chunks == 1 else _sums_of(a, b, tile, even)
        for first, number in groups(count):
            _interpolate[(tile.programs * tile.chunks,)](
                a, b, None if t is None else t[first:], partials, out.view(count, -1)[first:],
                *slots(ts[first : first + number] if t is None else ()),
                p=tile.p, total=a.numel(), t_row=1 if t is None else t.shape[1],
                MODE=mode, COUNT=number, LONG=length > 1, EVEN=even, PER_VECTOR=per_vector,
                **tile.layout, **OPTIONS,
            )  # fmt: skip
