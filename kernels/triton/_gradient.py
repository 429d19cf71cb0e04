"""The gradients of interpolation: sums of a, b and the incoming gradient; coefficients, one set a vector; values.

With wa, wb, wt the weights of `_weights`, g[k] the gradients that come in and R the quarter turn,
dL/da = Σ_k (wa[k]·g[k] + wt[k]·Rᵀg[k]) + caa·a + cab·b and dL/db = Σ_k wb[k]·g[k] + cbb·b + cab·a.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import OPTIONS, aligned, guard, on_device, wide
from latentfast.kernels.triton._math import double, narrow, widen
from latentfast.kernels.triton._vectors import (
    accumulate,
    add_last,
    combine,
    place,
    quarter_turn,
    store_partial,
    three_sums,
    tile_offsets,
    tile_rows_cols,
    tiling,
)
from latentfast.kernels.triton._weights import LERP, NLERP, nlerp_gradient, slerp_gradient, weights

#: What `_coefficients` leaves for each k and vector: wa, wb, wt, caa, cab, cbb.
_SLOTS = 6


@triton.jit
def _grad_sums(
    grad, a, b, partials, p, n, q, m, chunks, per_chunk, total,
    EVEN: tl.constexpr, TURN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Partial sums aa, bb, ab, g·a, g·b and, with TURN, g·turn(a) (pairs only) for the k of axis 1."""
    chunk, u, w = place(chunks, q, VECTORS)
    k = tl.program_id(1).to(tl.int64)
    first = chunk * per_chunk
    slot = k * 6 * p
    aa, bb, ab = three_sums(a, b, first, per_chunk, u, w, n, q, m, EVEN, ROWS, COLS, VECTORS)
    store_partial(partials, aa, slot, u, chunk, w, chunks, q)
    store_partial(partials, bb, slot + p, u, chunk, w, chunks, q)
    store_partial(partials, ab, slot + 2 * p, u, chunk, w, chunks, q)
    ga = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    gb = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    gt = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    there = tl.full([VECTORS], 1.0, tl.float64)
    for s in range(per_chunk):
        i, j = tile_rows_cols(first + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        g = tl.load(grad + k * total + offsets, mask=mask, other=0.0)
        ga = accumulate(ga, g, tl.load(a + offsets, mask=mask, other=0.0))
        gb = accumulate(gb, g, tl.load(b + offsets, mask=mask, other=0.0))
        if TURN:
            gt = accumulate(gt, g, quarter_turn(a, i, j, u, w, n, q, m, there, there, EVEN))
    store_partial(partials, ga, slot + 3 * p, u, chunk, w, chunks, q)
    store_partial(partials, gb, slot + 4 * p, u, chunk, w, chunks, q)
    store_partial(partials, gt, slot + 5 * p, u, chunk, w, chunks, q)


@triton.jit
def _coefficients(
    partials, t, a, b, grad, table, grad_t, p, n, q, m, chunks, total, t_row,
    MODE: tl.constexpr, SUMS: tl.constexpr, LONG: tl.constexpr, EVEN: tl.constexpr, PER_VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    _, u, w = place(1, q, VECTORS)
    k = tl.program_id(1).to(tl.int64)
    v = u * q + w
    here = w < q
    value = double(tl.load(t + k * t_row + (v if PER_VECTOR else 0 * w), mask=here, other=0.0))
    aa = tl.full([VECTORS], 1.0, tl.float64)
    bb = aa
    ab = aa
    stretch = aa
    caa = 0.0 * aa
    cab = caa
    cbb = caa
    if SUMS:
        slot = k * 6 * p
        rest = combine(partials, slot, u, w, chunks, q, VECTORS)
        bb = combine(partials, slot + p, u, w, chunks, q, VECTORS)
        ab = combine(partials, slot + 2 * p, u, w, chunks, q, VECTORS)
        ga = combine(partials, slot + 3 * p, u, w, chunks, q, VECTORS)
        gb = combine(partials, slot + 4 * p, u, w, chunks, q, VECTORS)
        gt = combine(partials, slot + 5 * p, u, w, chunks, q, VECTORS)
        aa, bb, ab, stretch = add_last(a, b, rest, bb, ab, u, w, n, q, m, EVEN)
        gt = gt * stretch
        if not EVEN:  # nothing but the last element: the turned vector is the first unit vector by |a|
            g0 = double(tl.load(grad + k * total + (u * n * q + w) * m, mask=here, other=0.0))
            gt = tl.where(rest > 0.0, gt, g0 * tl.sqrt(aa))
            stretch = tl.where(rest > 0.0, stretch, 0.0)
        if MODE == LERP:
            speed = gb - ga
        elif MODE == NLERP:
            caa, cab, cbb, speed = nlerp_gradient(value, aa, bb, ab, ga, gb, gt, LONG)
        else:
            caa, cab, cbb, speed = slerp_gradient(value, aa, bb, ab, ga, gb, gt, LONG)
        if grad_t is not None:
            tl.store(grad_t + k * p * q + v, narrow(speed, grad_t.dtype.element_ty), mask=here)
    wa, wb, wt = weights(value, aa, bb, ab, MODE, LONG)
    row = table + k * 6 * p * q + v
    step = p * q + 0 * k
    dtype = table.dtype.element_ty
    tl.store(row, wa.to(dtype), mask=here)
    tl.store(row + step, wb.to(dtype), mask=here)
    tl.store(row + 2 * step, (wt * stretch).to(dtype), mask=here)
    tl.store(row + 3 * step, caa.to(dtype), mask=here)
    tl.store(row + 4 * step, cab.to(dtype), mask=here)
    tl.store(row + 5 * step, cbb.to(dtype), mask=here)


@triton.jit
def _grad_values(
    grad, a, b, table, grad_a, grad_b, p, n, q, m, chunks, per_chunk, total, count,
    MODE: tl.constexpr, TURNS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    here = w < q
    step = p * q + 0 * chunk
    there = tl.full([VECTORS], 1.0, tl.float64)
    for s in range(per_chunk):
        i, j = tile_rows_cols(chunk * per_chunk + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        along_a = widen(tl.zeros([ROWS * COLS, VECTORS], a.dtype.element_ty))
        along_b = along_a
        caa = tl.zeros([VECTORS], along_a.dtype)
        cab = caa
        cbb = caa
        for k in range(count):
            row = table + k * 6 * step + u * q + w
            g = widen(tl.load(grad + k * (total + 0 * chunk) + offsets, mask=mask, other=0.0))
            along_a = tl.fma(tl.load(row, mask=here, other=0.0)[None, :], g, along_a)
            along_b = tl.fma(tl.load(row + step, mask=here, other=0.0)[None, :], g, along_b)
            if TURNS:
                wt = tl.load(row + 2 * step, mask=here, other=0.0)
                if tl.max((wt != 0.0).to(tl.int32), 0) > 0:  # opposite vectors; the transposed turn is the turn back
                    back = quarter_turn(grad + k * (total + 0 * chunk), i, j, u, w, n, q, m, there, there, EVEN)
                    along_a = tl.where((wt == 0.0)[None, :], along_a, tl.fma(-wt[None, :], back, along_a))
            if MODE != LERP:
                caa += tl.load(row + 3 * step, mask=here, other=0.0)
                cab += tl.load(row + 4 * step, mask=here, other=0.0)
                cbb += tl.load(row + 5 * step, mask=here, other=0.0)
        if MODE != LERP:
            x = widen(tl.load(a + offsets, mask=mask, other=0.0))
            y = widen(tl.load(b + offsets, mask=mask, other=0.0))
            along_a = tl.fma(caa[None, :], x, tl.fma(cab[None, :], y, along_a))
            along_b = tl.fma(cbb[None, :], y, tl.fma(cab[None, :], x, along_b))
        if grad_a is not None:
            tl.store(grad_a + offsets, narrow(along_a, a.dtype.element_ty), mask=mask)
        if grad_b is not None:
            tl.store(grad_b + offsets, narrow(along_b, a.dtype.element_ty), mask=mask)


def interpolate_bwd(
    grad: Tensor, a: Tensor, b: Tensor, t: Tensor | None, ts: Sequence[float], mode: int,
    p: int, n: int, q: int, m: int, grad_a: Tensor | None, grad_b: Tensor | None, grad_t: Tensor | None,
) -> None:  # fmt: skip
    """The operator `interpolate_bwd` of `latentfast._operators`."""
    count = len(ts) if t is None else t.shape[0]
    if not a.numel() or not count:
        for slot in (grad_a, grad_b, grad_t):
            if slot is not None:
                slot.zero_()
        return
    with guard(a):
        grad, a, b = aligned(grad), aligned(a), aligned(b)
        t = on_device(ts, a).unsqueeze(1) if t is None else t
        tile = tiling(p, n, q, m, a.element_size())
        even, long = n * m % 2 == 0, n * m > 1
        sums = mode != LERP.value or grad_t is not None
        partials = None
        layout = tile.layout
        if sums:
            partials = torch.empty((count, _SLOTS, tile.p * tile.chunks * tile.q), dtype=torch.float64, device=a.device)
            _grad_sums[(tile.programs * tile.chunks, count)](
                grad, a, b, partials, p=tile.p, total=a.numel(), EVEN=even, TURN=grad_t is not None and long,
                **layout, **OPTIONS,
            )  # fmt: skip
        table = torch.empty((count, _SLOTS, p * q), dtype=wide(a.dtype), device=a.device)
        _coefficients[(tile.programs, count)](
            partials, t, a, b, grad, table, grad_t, tile.p, tile.n, tile.q, tile.m, tile.chunks, a.numel(), t.shape[1],
            MODE=mode, SUMS=sums, LONG=long, EVEN=even, PER_VECTOR=t.shape[1] > 1, VECTORS=tile.vectors, **OPTIONS,
        )  # fmt: skip
        if grad_a is not None or grad_b is not None:
            _grad_values[(tile.programs * tile.chunks,)](
                grad, a, b, table, grad_a, grad_b, p=tile.p, total=a.numel(), count=count,
                MODE=mode, TURNS=mode != LERP.value and long, EVEN=even, **layout, **OPTIONS,
            )  # fmt: skip
