"""Guidance: a sample's sums, then everything else in one go; two launches, one where no sums are needed.

Sums and coefficients are those of csrc/common/guidance_coefficients.h: the guided prediction is a linear combination of
c = cond, d = cond − uncond and the momentum. Tiles, chunks and the order of the sums are those of `_vectors`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast._operators import GUIDANCE
from latentfast.kernels.triton._launch import (
    BLOCK,
    OPTIONS,
    aligned,
    broadcast_strides,
    cdiv,
    collapse,
    contiguous_strides,
    guard,
    pow2,
    slots,
)
from latentfast.kernels.triton._math import narrow, pick, widen
from latentfast.kernels.triton._vectors import (
    Tiling,
    accumulate,
    place,
    store_partial,
    tile_offsets,
    tile_rows_cols,
    tiling,
)  # fmt: skip
from latentfast.kernels.triton._vectors import (
    combine as combine_partials,
)
from latentfast.kernels.triton.edit import _offsets

CFG = tl.constexpr(GUIDANCE["cfg"])
APG = tl.constexpr(GUIDANCE["apg"])
CFG_ZERO = tl.constexpr(GUIDANCE["cfg_zero"])
TCFG = tl.constexpr(GUIDANCE["tcfg"])
MAGNITUDE_AWARE = tl.constexpr(GUIDANCE["magnitude_aware"])
ZERO = tl.constexpr(GUIDANCE["zero"])
#: As kConstantShare of csrc/common/guidance_coefficients.h.
_CONSTANT_SHARE = tl.constexpr(1e-12)
#: Sums of a sample, in this order: c·c, c·d, d·d, c, d, c·m, d·m, m·m, m.
_SUMS = 9
#: Dimensions of a sample along which a mask is taken apart.
_MASK_DIMS = 4


@triton.jit
def _sums(
    cond, uncond, momentum, partials, beta: tl.float64, n, q, m, chunks, per_chunk,
    RESCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    zeros = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    cc = zeros
    cd = zeros
    dd = zeros
    c1 = zeros
    d1 = zeros
    cm = zeros
    dm = zeros
    mm = zeros
    m1 = zeros
    for s in range(per_chunk):
        i, j = tile_rows_cols(chunk * per_chunk + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        c = widen(tl.load(cond + offsets, mask=mask, other=0.0))
        d = c - widen(tl.load(uncond + offsets, mask=mask, other=0.0))
        cc = accumulate(cc, c, c)
        cd = accumulate(cd, c, d)
        dd = accumulate(dd, d, d)
        if RESCALE:
            c1 += c.to(tl.float64)
            d1 += d.to(tl.float64)
        if momentum is not None:
            old = widen(tl.load(momentum + offsets, mask=mask, other=0.0)).to(c.dtype)
            onward = d + tl.full([1, 1], beta, tl.float64).to(c.dtype) * old
            cm = accumulate(cm, c, onward)
            mm = accumulate(mm, onward, onward)
            if RESCALE:
                dm = accumulate(dm, d, onward)
                m1 += onward.to(tl.float64)
    store_partial(partials, cc, 0, u, chunk, w, chunks, q)
    store_partial(partials, cd, 1, u, chunk, w, chunks, q)
    store_partial(partials, dd, 2, u, chunk, w, chunks, q)
    if RESCALE:
        store_partial(partials, c1, 3, u, chunk, w, chunks, q)
        store_partial(partials, d1, 4, u, chunk, w, chunks, q)
    if momentum is not None:
        store_partial(partials, cm, 5, u, chunk, w, chunks, q)
        store_partial(partials, mm, 7, u, chunk, w, chunks, q)
        if RESCALE:
            store_partial(partials, dm, 6, u, chunk, w, chunks, q)
            store_partial(partials, m1, 8, u, chunk, w, chunks, q)


@triton.jit
def _away_from(c, d, scale, ORIGINAL: tl.constexpr):
    """The coefficients of base + scale·(cond − u') with u' = c·cond + d·(cond − uncond)."""
    if ORIGINAL:
        return 1.0 + scale - scale * c, -scale * d
    else:
        return scale + (1.0 - scale) * c, (1.0 - scale) * d


@triton.jit
def _coefficients(
    cc, cd, dd, cm, mm, scale, eta, threshold, alpha,
    KIND: tl.constexpr, ORIGINAL: tl.constexpr, LIMITED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Those of c, d and m, before the rescaling, [VECTORS] float64 each."""
    zero = tl.zeros(cc.shape, tl.float64)
    if KIND == APG:
        step = zero + scale
        if LIMITED:
            length = tl.sqrt(mm)
            short = length <= threshold
            step = tl.where(short, step, step * (threshold / tl.where(short, 1.0, length)))
        none = cc == 0.0
        along = tl.where(none, 0.0, cm / tl.where(none, 1.0, cc))
        a = 1.0 - step * (1.0 - eta) * along
        base = zero if ORIGINAL else zero - 1.0
        if MOMENTUM:
            return a, base, step
        else:
            return a, base + step, zero
    elif KIND == CFG_ZERO:
        share = (cc - cd) / ((cc - cd) - (cd - dd) + 1e-8)
        a, b = _away_from(share, -share, scale, ORIGINAL)
        return a, b, zero
    elif KIND == TCFG:
        cu = cc - cd
        longer = cd + (cd - dd)
        h = tl.sqrt(longer * longer + 4.0 * cu * cu)
        equal = h == 0.0
        h = tl.where(equal, 1.0, h)
        xy = cu / h
        first = longer > 0.0
        yy = tl.where(first, 2.0 * xy * (cu / (h + tl.where(first, longer, 0.0))), 0.5 * (1.0 - longer / h))
        yy = tl.where(equal, 0.0, yy)
        a, b = _away_from(xy + yy, -yy, scale, ORIGINAL)
        return a, b, zero
    elif KIND == MAGNITUDE_AWARE:
        square = (cc - cd) - (cd - dd)
        uu = tl.where(square < 0.0, 0.0, square)
        beyond = (uu == 0.0) & (dd != 0.0)
        ratio = tl.sqrt(dd) / tl.where(uu == 0.0, 1.0, tl.sqrt(uu))
        damping = tl.exp(-alpha * ratio)
        damping = tl.where(beyond & (alpha > 0.0), 0.0, tl.where(alpha == 0.0, 1.0, damping))
        return zero + 1.0, (scale if ORIGINAL else scale - 1.0) * damping, zero
    else:
        return zero + 1.0, zero + (scale if ORIGINAL else scale - 1.0), zero


@triton.jit
def _rescaling(a, b, e, cc, cd, dd, c1, d1, cm, dm, mm, m1, phi, elements):
    """φ·std(c)/std(p) + 1 − φ; 1 where p is constant or a single element."""
    vc = cc - c1 * (c1 / elements)
    squares = cc + a * a * cc + b * b * dd + e * e * mm
    vp = a * a * vc + 2.0 * a * b * (cd - c1 * (d1 / elements)) + b * b * (dd - d1 * (d1 / elements))
    vp += e * (2.0 * a * (cm - c1 * (m1 / elements)) + 2.0 * b * (dm - d1 * (m1 / elements)))
    vp += e * e * (mm - m1 * (m1 / elements))
    plain = (vp <= squares * _CONSTANT_SHARE) | (elements < 2.0)
    flat = vc <= cc * _CONSTANT_SHARE
    ratio = tl.where(flat, 0.0, tl.sqrt(tl.where(flat, 1.0, vc) / tl.where(plain, 1.0, vp)))
    return tl.where(plain, 1.0, phi * ratio + 1.0 - phi)


@triton.jit
def _guide(
    cond, uncond, sample, momentum, weight, known, partials, out, x0,
    scale: tl.float64, rescale: tl.float64, eta: tl.float64, threshold: tl.float64,
    beta: tl.float64, alpha: tl.float64, sigma: tl.float64, dt: tl.float64,
    n, q, m, chunks, per_chunk, n1, n2, n3, w_each, w0, w1, w2, w3,
    KIND: tl.constexpr, ORIGINAL: tl.constexpr, RESCALE: tl.constexpr, LIMITED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    one = tl.full([VECTORS], 1.0, tl.float64)
    cc = one
    cd = one
    dd = one
    c1 = one
    d1 = one
    cm = one
    dm = one * 0.0
    mm = one * 0.0
    m1 = one * 0.0
    if partials is not None:
        cc = combine_partials(partials, 0, u, w, chunks, q, VECTORS)
        cd = combine_partials(partials, 1, u, w, chunks, q, VECTORS)
        dd = combine_partials(partials, 2, u, w, chunks, q, VECTORS)
        cm = cd
        mm = dd
        if RESCALE:
            c1 = combine_partials(partials, 3, u, w, chunks, q, VECTORS)
            d1 = combine_partials(partials, 4, u, w, chunks, q, VECTORS)
        if momentum is not None:
            cm = combine_partials(partials, 5, u, w, chunks, q, VECTORS)
            mm = combine_partials(partials, 7, u, w, chunks, q, VECTORS)
            if RESCALE:
                dm = combine_partials(partials, 6, u, w, chunks, q, VECTORS)
                m1 = combine_partials(partials, 8, u, w, chunks, q, VECTORS)
    a, b, e = _coefficients(
        cc, cd, dd, cm, mm,
        tl.full([1], scale, tl.float64), tl.full([1], eta, tl.float64),
        tl.full([1], threshold, tl.float64), tl.full([1], alpha, tl.float64),
        KIND, ORIGINAL, LIMITED, momentum is not None,
    )  # fmt: skip
    if RESCALE:
        factor = _rescaling(
            a, b, e, cc, cd, dd, c1, d1, cm, dm, mm, m1,
            tl.full([1], rescale, tl.float64), tl.full([1], m, tl.float64),
        )  # fmt: skip
        a *= factor
        b *= factor
        e *= factor
    for s in range(per_chunk):
        i, j = tile_rows_cols(chunk * per_chunk + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        c = widen(tl.load(cond + offsets, mask=mask, other=0.0))
        if KIND == ZERO:  # whatever the predictions hold
            p = tl.zeros(c.shape, c.dtype)
        else:
            d = c - widen(tl.load(uncond + offsets, mask=mask, other=0.0))
            p = tl.fma(b.to(c.dtype)[None, :], d, a.to(c.dtype)[None, :] * c)
            if momentum is not None:
                old = widen(tl.load(momentum + offsets, mask=mask, other=0.0)).to(c.dtype)
                onward = d + tl.full([1, 1], beta, tl.float64).to(c.dtype) * old
                p = tl.fma(e.to(c.dtype)[None, :], onward, p)
                tl.store(momentum + offsets, narrow(onward, momentum.dtype.element_ty), mask=mask)
        if sample is None:
            result = narrow(p, out.dtype.element_ty)
        else:
            x = widen(tl.load(sample + offsets, mask=mask, other=0.0))
            step = tl.fma(tl.full([1, 1], dt, tl.float64).to(c.dtype), p, x)
            result = narrow(step, out.dtype.element_ty)
            if x0 is not None:
                clean = tl.fma(tl.full([1, 1], sigma, tl.float64).to(c.dtype), -p, x)
                tl.store(x0 + offsets, narrow(clean, x0.dtype.element_ty), mask=mask)
            if weight is not None:
                of_w = _offsets(j, n1, n2, n3, w0, w1, w2, w3)[:, None] + (w * w_each)[None, :]
                t = widen(tl.load(weight + of_w, mask=mask, other=0.0)).to(c.dtype)
                kept = tl.load(known + offsets, mask=mask, other=0.0)
                k = widen(kept)
                mixed = narrow(tl.fma(t, step - k, k), out.dtype.element_ty)
                result = tl.where(t == 0.0, kept, tl.where(t == 1.0, result, mixed))
        tl.store(out + offsets, result, mask=mask)


def _mask_layout(mask: Tensor | None, shape: Sequence[int]) -> tuple[tuple[int, ...], int, tuple[int, ...]] | None:
    """Sizes and strides of a mask along a sample's dimensions, as `_offsets` takes them, and its stride from sample to
    sample; None if those are too many dimensions.
    """
    if mask is None:
        return (1,) * _MASK_DIMS, 0, (0,) * _MASK_DIMS
    each, *strides = broadcast_strides(mask.shape, shape)
    sizes, (_, merged) = collapse(shape[1:], contiguous_strides(tuple(shape[1:])), strides)
    pad = _MASK_DIMS - len(sizes)
    return None if pad < 0 else ((1,) * pad + tuple(sizes), each, (0,) * pad + tuple(merged))


def _tiles(cond: Tensor, reduces: bool, by_sample: bool) -> Tiling:
    samples, elements = cond.shape[0], cond.numel() // cond.shape[0]
    if not by_sample:
        samples, elements = 1, cond.numel()
    return tiling(samples, 1, 1, elements, cond.element_size(), reduces)


def guide(
    cond: Tensor, uncond: Tensor, sample: Tensor | None, momentum: Tensor | None, mask: Tensor | None,
    known: Tensor | None, kind: int, original: int, scale: float, rescale: float, eta: float, norm_threshold: float,
    beta: float, alpha: float, sigma: float, dt: float, out: Tensor, x0: Tensor | None,
) -> None:  # fmt: skip
    """The operator `guide` of `latentfast._operators`."""
    if not cond.numel():
        return
    rescales = rescale > 0 and kind != ZERO.value
    reduces = rescales or kind not in (CFG.value, ZERO.value)
    layout = _mask_layout(mask, cond.shape)
    if layout is None:
        mask = mask.expand(cond.shape).contiguous()  # type: ignore[union-attr]
        layout = _mask_layout(mask, cond.shape)
        assert layout is not None  # a full mask is one dimension
    sizes, each, strides = layout
    with guard(cond):
        cond, uncond = aligned(cond), aligned(uncond)
        tile = _tiles(cond, reduces, reduces or mask is not None)
        partials = None
        if reduces:
            partials = torch.empty(_SUMS * tile.p * tile.chunks * tile.q, dtype=torch.float64, device=cond.device)
            _sums[(tile.programs * tile.chunks,)](
                cond, uncond, None if momentum is None else aligned(momentum), partials, float(beta),
                RESCALE=rescales, **tile.layout, **OPTIONS,
            )  # fmt: skip
        _guide[(tile.programs * tile.chunks,)](
            cond, uncond, sample, momentum, mask, known, partials, out, x0,
            *map(float, (scale, rescale, eta, norm_threshold, beta, alpha, sigma, dt)),
            n1=sizes[1], n2=sizes[2], n3=sizes[3], w_each=each,
            w0=strides[0], w1=strides[1], w2=strides[2], w3=strides[3],
            KIND=kind, ORIGINAL=bool(original), RESCALE=rescales, LIMITED=norm_threshold > 0, **tile.layout, **OPTIONS,
        )  # fmt: skip


@triton.jit
def _term(x, at, here, DOUBLE: tl.constexpr):
    value = widen(tl.load(x + at, mask=here, other=0.0))
    return value.to(tl.float64) if DOUBLE else value


@triton.jit
def _combine(
    x0, x1, x2, x3, x4, x5, x6, x7, out0, out1, out2, out3,
    a0: tl.float64, a1: tl.float64, a2: tl.float64, a3: tl.float64,
    a4: tl.float64, a5: tl.float64, a6: tl.float64, a7: tl.float64,
    b0: tl.float64, b1: tl.float64, b2: tl.float64, b3: tl.float64,
    b4: tl.float64, b5: tl.float64, b6: tl.float64, b7: tl.float64,
    c0: tl.float64, c1: tl.float64, c2: tl.float64, c3: tl.float64,
    c4: tl.float64, c5: tl.float64, c6: tl.float64, c7: tl.float64,
    d0: tl.float64, d1: tl.float64, d2: tl.float64, d3: tl.float64,
    d4: tl.float64, d5: tl.float64, d6: tl.float64, d7: tl.float64,
    numel, COUNT: tl.constexpr, DOUBLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = at < numel
    x = (x0, x1, x2, x3, x4, x5, x6, x7)
    value = _term(x0, at, here, DOUBLE)
    sum0 = pick(0, a0, a1, a2, a3, a4, a5, a6, a7).to(value.dtype) * value
    sum1 = pick(0, b0, b1, b2, b3, b4, b5, b6, b7).to(value.dtype) * value
    sum2 = pick(0, c0, c1, c2, c3, c4, c5, c6, c7).to(value.dtype) * value
    sum3 = pick(0, d0, d1, d2, d3, d4, d5, d6, d7).to(value.dtype) * value
    for k in tl.static_range(1, COUNT):
        value = _term(x[k], at, here, DOUBLE)
        sum0 = tl.fma(pick(k, a0, a1, a2, a3, a4, a5, a6, a7).to(value.dtype), value, sum0)
        if out1 is not None:
            sum1 = tl.fma(pick(k, b0, b1, b2, b3, b4, b5, b6, b7).to(value.dtype), value, sum1)
        if out2 is not None:
            sum2 = tl.fma(pick(k, c0, c1, c2, c3, c4, c5, c6, c7).to(value.dtype), value, sum2)
        if out3 is not None:
            sum3 = tl.fma(pick(k, d0, d1, d2, d3, d4, d5, d6, d7).to(value.dtype), value, sum3)
    tl.store(out0 + at, narrow(sum0, out0.dtype.element_ty), mask=here)
    if out1 is not None:
        tl.store(out1 + at, narrow(sum1, out1.dtype.element_ty), mask=here)
    if out2 is not None:
        tl.store(out2 + at, narrow(sum2, out2.dtype.element_ty), mask=here)
    if out3 is not None:
        tl.store(out3 + at, narrow(sum3, out3.dtype.element_ty), mask=here)


def combine(
    tensors: Sequence[Tensor], coefficients: Sequence[float], precise: int, out: Tensor, out1: Tensor | None,
    out2: Tensor | None, out3: Tensor | None,
) -> None:  # fmt: skip
    """The operator `combine` of `latentfast._operators`."""
    numel, count = out.numel(), len(tensors)
    if not numel:
        return
    outs = (out, out1, out2, out3)
    everything = (*tensors, *(x for x in outs if x is not None))
    size = min(BLOCK[max(x.element_size() for x in everything)], pow2(numel))
    rows = [slots(coefficients[k * count : (k + 1) * count]) for k in range(len(outs))]
    with guard(out):
        pointers = (*tensors, *[tensors[0]] * (8 - count))
        _combine[(cdiv(numel, size),)](
            *pointers, *outs, *(number for row in rows for number in row), numel, COUNT=count,
            DOUBLE=bool(precise) or any(x.dtype == torch.float64 for x in everything), SIZE=size, **OPTIONS,
        )  # fmt: skip
