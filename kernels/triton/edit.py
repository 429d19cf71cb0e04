"""Edits: one launch, each input read once, however many directions. Broadcast operands are read in place by strides."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import (
    OPTIONS,
    SLOTS,
    broadcast_strides,
    cdiv,
    collapse,
    contiguous_strides,
    guard,
    on_device,
    pow2,
    slots,
)
from latentfast.kernels.triton._math import narrow, pick, widen

#: Elements of a tile, by the size of one in bytes.
_BLOCK = {2: 2048, 4: 1024, 8: 512}
#: Dimensions in front of the innermost that a kernel takes apart; more only arise beyond five dimensions.
_OUTER = 4


class _Work(NamedTuple):
    """A tensor as rows × inner elements, and where an operand of other strides has its part of them."""

    rows: int
    inner: int
    sizes: tuple[int, ...]  # the dimensions that rows consists of, `_OUTER` of them
    strides: list[tuple[int, ...]]  # for each operand: along those, then along inner
    block_rows: int
    block_cols: int

    @property
    def programs(self) -> int:
        return cdiv(self.rows, self.block_rows) * cdiv(self.inner, self.block_cols)

    @property
    def layout(self) -> dict[str, int]:
        """The arguments that both kernels have."""
        return {
            "rows": self.rows, "inner": self.inner, "n1": self.sizes[1], "n2": self.sizes[2], "n3": self.sizes[3],
            "ROWS": self.block_rows, "COLS": self.block_cols,
        }  # fmt: skip


def _work(
    shape: Sequence[int], itemsize: int, *strides: Sequence[int], rowwise: Sequence[int] | None = None
) -> _Work | None:
    """The least number of dimensions that serves all operands; None if that is too many.

    `rowwise` are the strides of one more operand, which is constant along the inner dimension.
    """
    if rowwise is not None:
        strides = (*strides, rowwise)
    sizes, merged = collapse(shape, contiguous_strides(tuple(shape)), *strides)
    if not sizes:
        sizes, merged = [1], [[0] for _ in merged]
    if rowwise is not None and merged[-1][-1]:
        sizes, merged = [*sizes, 1], [[*m, 0] for m in merged]
    if len(sizes) > _OUTER + 1:
        return None
    pad = _OUTER + 1 - len(sizes)
    inner = sizes[-1]
    block = _BLOCK[itemsize]
    cols = min(pow2(inner), block)
    rows = 1
    for size in sizes[:-1]:
        rows *= size
    outer = (*([1] * pad), *sizes[:-1])
    return _Work(rows, inner, outer, [(*([0] * pad), *s) for s in merged[1:]], min(pow2(rows), block // cols), cols)


@triton.jit
def _place(rows, inner, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program's row numbers [ROWS], columns [COLS] and mask [ROWS, COLS]."""
    pid = tl.program_id(0).to(tl.int64)
    across = (inner + COLS - 1) // COLS
    row = (pid // across) * ROWS + tl.arange(0, ROWS)
    col = (pid % across) * COLS + tl.arange(0, COLS)
    return row, col, (row < rows)[:, None] & (col < inner)[None, :]


@triton.jit
def _offsets(row, n1, n2, n3, s0, s1, s2, s3):
    """Where the rows of an operand begin, [ROWS]."""
    offset = (row % n3) * s3
    row = row // n3
    offset += (row % n2) * s2
    row = row // n2
    return offset + (row % n1) * s1 + (row // n1) * s0


@triton.jit
def _edit(
    z, directions, strengths, mask, out,
    v0: tl.float64, v1: tl.float64, v2: tl.float64, v3: tl.float64,
    v4: tl.float64, v5: tl.float64, v6: tl.float64, v7: tl.float64,
    rows, inner, n1, n2, n3,
    d_each, d0, d1, d2, d3, d4, s_each, s0, s1, s2, s3, m_each, m0, m1, m2, m3, m4,
    count, COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """COUNT strengths come as arguments, or `count` of them lie on the device."""
    row, col, here = _place(rows, inner, ROWS, COLS)
    own = (row * inner)[:, None] + col[None, :]
    of_d = _offsets(row, n1, n2, n3, d0, d1, d2, d3)[:, None] + (col * d4)[None, :]
    total = widen(tl.load(z + own, mask=here, other=0.0))
    of_m = own
    if mask is not None:
        of_m = _offsets(row, n1, n2, n3, m0, m1, m2, m3)[:, None] + (col * m4)[None, :]
    if strengths is None:
        for k in tl.static_range(COUNT):
            step = widen(tl.load(directions + tl.full([], k, tl.int64) * d_each + of_d, mask=here, other=0.0))
            step = pick(k, v0, v1, v2, v3, v4, v5, v6, v7).to(total.dtype)[:, None] * step
            if mask is not None:
                weight = tl.load(mask + tl.full([], k, tl.int64) * m_each + of_m, mask=here, other=0.0)
                step = widen(weight).to(total.dtype) * step
            total += step
    else:
        of_s = _offsets(row, n1, n2, n3, s0, s1, s2, s3)
        for k in range(count):
            at = tl.full([], 0, tl.int64) + k
            strength = tl.load(strengths + at * s_each + of_s, mask=row < rows, other=0.0)
            step = widen(tl.load(directions + at * d_each + of_d, mask=here, other=0.0))
            step = strength.to(total.dtype)[:, None] * step
            if mask is not None:
                step = widen(tl.load(mask + at * m_each + of_m, mask=here, other=0.0)).to(total.dtype) * step
            total += step
    tl.store(out + own, narrow(total, out.dtype.element_ty), mask=here)


def _after_count(x: Tensor, count: int, shape: Sequence[int]) -> tuple[int, list[int]]:
    """(stride over N, strides over the rest) of what broadcasts to (N, *shape)."""
    strides = broadcast_strides(x.shape, (count, *shape))
    return strides[0], strides[1:]


def edit(
    z: Tensor,
    directions: Tensor,
    strengths: Tensor | None,
    host_strengths: Sequence[float],
    mask: Tensor | None,
    out: Tensor,
) -> None:
    """The operator `edit` of `latentfast._operators`."""
    if not z.numel():
        return
    count = len(host_strengths) if strengths is None else strengths.shape[0]
    shape = z.shape
    with guard(z):
        if strengths is None and count > SLOTS:
            strengths = on_device(host_strengths, z)
        if not count:
            out.copy_(z)
            return
        d_each, d_strides = _after_count(directions, count, shape)
        m_each, m_strides = (0, [0] * len(shape)) if mask is None else _after_count(mask, count, shape)
        per_sample = strengths is not None and strengths.ndim == 2
        s_each = strengths.shape[1] if per_sample else 1
        # a stride along the batch alone keeps it apart from the other dimensions, where the kernel can see it
        s_strides = [int(per_sample and d == 0) for d in range(len(shape))]
        work = _work(shape, z.element_size(), d_strides, m_strides, rowwise=s_strides)
        if work is None:
            directions = directions.expand(directions.shape[0], *shape).contiguous()
            if mask is not None:
                mask = mask.expand(mask.shape[0] if mask.ndim > len(shape) else 1, *shape).contiguous()
            edit(z, directions, strengths, host_strengths, mask, out)
            return
        d, m, s = work.strides
        _edit[(work.programs,)](
            z, directions, strengths, mask, out, *slots(host_strengths if strengths is None else ()),
            work.rows, work.inner, *work.sizes[1:], d_each, *d, s_each, *s[:-1], m_each, *m,
            count, COUNT=count if strengths is None else 0, ROWS=work.block_rows, COLS=work.block_cols, **OPTIONS,
        )  # fmt: skip


@triton.jit
def _blend(
    base, edited, mask, out, rows, inner, n1, n2, n3, m0, m1, m2, m3, m4, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row, col, here = _place(rows, inner, ROWS, COLS)
    own = (row * inner)[:, None] + col[None, :]
    of_m = _offsets(row, n1, n2, n3, m0, m1, m2, m3)[:, None] + (col * m4)[None, :]
    before = tl.load(base + own, mask=here, other=0.0)
    after = tl.load(edited + own, mask=here, other=0.0)
    x = widen(before)
    weight = widen(tl.load(mask + of_m, mask=here, other=0.0)).to(x.dtype)
    value = narrow(tl.fma(weight, widen(after) - x, x), out.dtype.element_ty)
    value = tl.where(weight == 1.0, after, value)
    tl.store(out + own, tl.where(weight == 0.0, before, value), mask=here)


def blend(base: Tensor, edited: Tensor, mask: Tensor, out: Tensor) -> None:
    """The operator `blend` of `latentfast._operators`."""
    if not base.numel():
        return
    with guard(base):
        work = _work(base.shape, base.element_size(), broadcast_strides(mask.shape, base.shape))
        if work is None:
            blend(base, edited, mask.expand(base.shape).contiguous(), out)
            return
        _blend[(work.programs,)](
            base, edited, mask, out, work.rows, work.inner, *work.sizes[1:], *work.strides[0],
            ROWS=work.block_rows, COLS=work.block_cols, **OPTIONS,
        )  # fmt: skip
