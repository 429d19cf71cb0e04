"""Tensors seen as p·q vectors of n·m elements: how they are cut into tiles, and the two operators that are plain sums.

Element (i, j) of vector (u, w) lies at ((u·n + i)·q + w)·m + j. A tile is [ROWS·COLS elements, VECTORS vectors]: ROWS
values of i by COLS of j, for VECTORS values of w. A program walks over the tiles of one chunk. Everything
that decides the order of a sum depends on n, m and the element's size alone, so a vector's bits do not depend on what
lies beside it.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import BLOCK, OPTIONS, aligned, cdiv, guard, pow2
from latentfast.kernels.triton._math import double, narrow, widen

#: Runs of fewer elements than this do not fill a memory transaction: neighbouring vectors are then taken together.
_SHORT_RUN = 32
#: A vector's partial sums are combined by every program that needs them, so there are not many.
_MAX_CHUNKS = 256


@dataclass(frozen=True)
class Tiling:
    """The canonical (p, n, q, m) of a layout and the shape of the work on it."""

    p: int
    n: int
    q: int
    m: int
    rows: int
    cols: int
    vectors: int
    tiles: int
    per_chunk: int

    @property
    def chunks(self) -> int:
        return cdiv(self.tiles, self.per_chunk)

    @property
    def programs(self) -> int:
        """Blocks of vectors."""
        return self.p * cdiv(self.q, self.vectors)

    @property
    def layout(self) -> dict[str, int]:
        """The arguments that every kernel on vectors has."""
        return {
            "n": self.n, "q": self.q, "m": self.m, "chunks": self.chunks, "per_chunk": self.per_chunk,
            "ROWS": self.rows, "COLS": self.cols, "VECTORS": self.vectors,
        }  # fmt: skip


@functools.lru_cache(maxsize=4096)
def tiling(p: int, n: int, q: int, m: int, itemsize: int, reduces: bool = True) -> Tiling:
    """The tiling for vectors of n·m elements; `reduces` if each is summed up, which limits the number of its chunks."""
    if n == 1:
        p, q = 1, p * q
    elif q == 1:
        p, n, q, m = 1, 1, p, n * m
    block = BLOCK[itemsize]
    cols = min(pow2(m), block)
    rows = min(pow2(n), block // cols)
    if m < _SHORT_RUN:
        rows = min(rows, max(1, 16 // cols))
    tiles = cdiv(n, rows) * cdiv(m, cols)
    vectors = block // (rows * cols)
    per_chunk = 1
    if reduces:
        per_chunk = min(tiles, max(4 if vectors == 1 else 64, cdiv(tiles, _MAX_CHUNKS)))
    return Tiling(p, n, q, m, rows, cols, vectors, tiles, per_chunk)


@triton.jit
def place(chunks, q, VECTORS: tl.constexpr):
    """What a program works on: (chunk, u, its values of w [VECTORS])."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (q + VECTORS - 1) // VECTORS
    chunk = pid % chunks
    block = (pid // chunks) % blocks
    return chunk, pid // chunks // blocks, block * VECTORS + tl.arange(0, VECTORS)


@triton.jit
def tile_rows_cols(tile, m, ROWS: tl.constexpr, COLS: tl.constexpr):
    """i and j of a tile's elements, [ROWS·COLS] each."""
    across = (m + COLS - 1) // COLS
    lane = tl.arange(0, ROWS * COLS)
    return (tile // across) * ROWS + lane // COLS, (tile % across) * COLS + lane % COLS


@triton.jit
def tile_offsets(i, j, u, w, n, q, m):
    """(offsets, mask) of a tile [elements, vectors]."""
    row = (u * n + i) * q
    offsets = (row * m + j)[:, None] + (w * m)[None, :]
    return offsets, ((i < n) & (j < m))[:, None] & (w < q)[None, :]


@triton.jit
def accumulate(acc, x, y):
    """acc + x·y in float64, where products of anything narrower are exact.

    Summing halves in float32 first would save conversions, but rounds |a|², |b|² and a·b differently: opposite vectors
    such as a and −3a would then lie 1e-4 rad beside π, and not be recognised.
    """
    return tl.fma(double(x), double(y), acc)


@triton.jit
def store_partial(partials, acc, slot, u, chunk, w, chunks, q):
    """Write a program's sums, one a vector, to partials (slots, chunks, q) where slot counts p too."""
    tl.store(partials + ((slot + u) * chunks + chunk) * q + w, tl.sum(acc, 0), mask=w < q)


@triton.jit
def combine(partials, slot, u, w, chunks, q, VECTORS: tl.constexpr):
    """The whole sums [VECTORS], from the chunks' in a fixed order."""
    CHUNKS: tl.constexpr = 256 // VECTORS if VECTORS < 256 else 1
    acc = tl.zeros([CHUNKS, VECTORS], tl.float64)
    for first in range(0, chunks, CHUNKS):
        c = first + tl.arange(0, CHUNKS)
        pointers = partials + (((slot + u) * chunks + c) * q)[:, None] + w[None, :]
        acc += tl.load(pointers, mask=(c < chunks)[:, None] & (w < q)[None, :], other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def three_sums(
    a, b, first, per_chunk, u, w, n, q, m, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """|a|², |b|², a·b over `per_chunk` tiles, before the sum over a tile; without the last element unless EVEN.

    The last element of an odd vector has no partner in the quarter turn; left out here and added by `add_last`, what
    the turn leaves is known without cancellation.
    """
    aa = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    bb = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    ab = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    for s in range(per_chunk):
        i, j = tile_rows_cols(first + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        x = widen(tl.load(a + offsets, mask=mask, other=0.0))
        y = widen(tl.load(b + offsets, mask=mask, other=0.0))
        if not EVEN:
            last = ((i == n - 1) & (j == m - 1))[:, None]
            x = tl.where(last, 0.0, x)
            y = tl.where(last, 0.0, y)
        aa = accumulate(aa, x, x)
        bb = accumulate(bb, y, y)
        ab = accumulate(ab, x, y)
    return aa, bb, ab


@triton.jit
def add_last(a, b, rest, bb, ab, u, w, n, q, m, EVEN: tl.constexpr):
    """(|a|², |b|², a·b, stretch) from `three_sums`; the quarter turn of `a`, times stretch, has the length of `a`."""
    if EVEN:
        return rest, bb, ab, tl.full(rest.shape, 1.0, tl.float64)
    else:
        last = ((u * n + n - 1) * q + w) * m + m - 1
        x = double(tl.load(a + last, mask=w < q, other=0.0))
        y = double(tl.load(b + last, mask=w < q, other=0.0))
        aa = tl.fma(x, x, rest)
        left = rest > 0.0
        stretch = tl.where(left, tl.sqrt(aa) / tl.sqrt(tl.where(left, rest, 1.0)), 1.0)
        return aa, tl.fma(y, y, bb), tl.fma(x, y, ab), stretch


@triton.jit
def quarter_turn(a, i, j, u, w, n, q, m, rest, length, EVEN: tl.constexpr):
    """A tile of `a` with every pair of a vector's elements turned, (x0, x1) → (−x1, x0), before `add_last`'s stretch.

    The last element of an odd vector becomes 0; where nothing is left, `rest` = 0, it is the first unit vector by
    `length`.
    """
    e = i * m + j
    partner = e ^ 1
    offsets, mask = tile_offsets(partner // m, partner % m, u, w, n, q, m)
    value = widen(tl.load(a + offsets, mask=mask, other=0.0))
    value = tl.where(((e & 1) == 0)[:, None], -value, value)
    if not EVEN:
        first = tl.where((e == 0)[:, None], length.to(value.dtype)[None, :], 0.0)
        value = tl.where((rest > 0.0)[None, :], value, first)
    return value


@triton.jit
def _dots(
    x, y, partials, p, n, q, m, chunks, per_chunk, stride, count,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    pair = tl.program_id(1).to(tl.int64)
    x += (pair % count) * stride
    y += (pair // count) * stride
    acc = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    for s in range(per_chunk):
        i, j = tile_rows_cols(chunk * per_chunk + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        acc = accumulate(acc, tl.load(x + offsets, mask=mask, other=0.0), tl.load(y + offsets, mask=mask, other=0.0))
    store_partial(partials, acc, pair * p, u, chunk, w, chunks, q)


@triton.jit
def _combine_dots(partials, out, p, q, chunks, count, VECTORS: tl.constexpr):
    _, u, w = place(1, q, VECTORS)
    pair = tl.program_id(1).to(tl.int64)
    total = combine(partials, pair * p, u, w, chunks, q, VECTORS)
    vector = (pair // count) * p * q + u * q + w
    tl.store(out + vector * count + pair % count, total, mask=w < q)


def vector_dots(x: Tensor, y: Tensor, p: int, n: int, q: int, m: int, out: Tensor) -> None:
    """Inner products out (K, p·q, N) of the vectors of x (N, …) with those of y (K, …)."""
    if not out.numel():
        return
    if not x.numel():
        out.zero_()
        return
    with guard(x):
        tile = tiling(p, n, q, m, x.element_size())
        count, pairs = x.shape[0], x.shape[0] * y.shape[0]
        partials = torch.empty(pairs * tile.p * tile.chunks * tile.q, dtype=torch.float64, device=x.device)
        _dots[(tile.programs * tile.chunks, pairs)](
            aligned(x), aligned(y), partials, p=tile.p, stride=p * n * q * m, count=count, **tile.layout,
            **OPTIONS,
        )  # fmt: skip
        _combine_dots[(tile.programs, pairs)](
            partials, out, tile.p, tile.q, tile.chunks, count, VECTORS=tile.vectors, **OPTIONS
        )


@triton.jit
def _mix(
    x, coefficients, out, p, n, q, m, chunks, per_chunk, stride, count,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr, PER_VECTOR: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    k = tl.program_id(1).to(tl.int64)
    i, j = tile_rows_cols(chunk, m, ROWS, COLS)
    offsets, mask = tile_offsets(i, j, u, w, n, q, m)
    row = (k * p * q + u * q + w) if PER_VECTOR else k + 0 * w
    total = widen(tl.zeros([ROWS * COLS, VECTORS], x.dtype.element_ty))
    if coefficients.dtype.element_ty == tl.float64:
        total = total.to(tl.float64)
    for index in range(count):
        c = tl.load(coefficients + row * count + index, mask=w < q, other=0.0)[None, :].to(total.dtype)
        value = widen(tl.load(x + index * stride + offsets, mask=mask, other=0.0)).to(total.dtype)
        total += tl.where(c == 0.0, 0.0, c * value)
    tl.store(out + k * stride + offsets, narrow(total, out.dtype.element_ty), mask=mask)


def vector_mix(x: Tensor, coefficients: Tensor, p: int, n: int, q: int, m: int, out: Tensor) -> None:
    """out[k] = Σ_n coefficients[k, v, n] · x[n]; a coefficient of exactly 0 leaves its vector out."""
    if not out.numel():
        return
    if not x.numel():
        out.zero_()
        return
    with guard(x):
        tile = tiling(p, n, q, m, x.element_size(), reduces=False)
        _mix[(tile.programs * tile.chunks, out.numel() // (p * n * q * m))](
            x, coefficients, out, p=tile.p, stride=p * n * q * m, count=x.shape[0],
            PER_VECTOR=coefficients.shape[1] > 1, **tile.layout, **OPTIONS,
        )  # fmt: skip
