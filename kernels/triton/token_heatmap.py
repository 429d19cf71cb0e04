"""Heat maps of tokens: softmax masses on some keys, averaged over heads, without the matrix of scores.

A program takes a tile of queries through some of the heads and keeps what it sums up in registers. For each head it
walks over the keys, a tile at a time: their scores by the tensor cores, then each row's running maximum and sum of
exponentials (online softmax). So a score costs one multiply-add, one exponential, one addition, one comparison; the
exponentials (16 a clock on an SM) take about as long as the products, and two programs on each SM let one's run
beside the other's.

The masses come cheap where few keys are asked for: their scores are made once more at the end, by one product with a
tile of 16 keys gathered from K, when maximum and sum are known. With weights for all keys, or more of them, the
exponentials are multiplied by the weights as they come, rescaled as the sum is.

Where all keys of a head fit into shared memory, as prompts' do, and there are queries enough (`_resident`), the loops
change places: a program keeps one head's keys and lets tiles of queries pass, which spares it the waits for keys and,
with tiles of keys twice as wide, half of the reductions. A head is a part then.

Else the heads are split into even parts of at most `_HEADS`, whatever the batch, so that the programs are enough to
end at about the same time; a second launch adds the parts in order. No atomics, the same bits always.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast._settings import triton_interpreted
from latentfast.kernels.triton._launch import aligned, cdiv, guard, pow2
from latentfast.kernels.triton._math import widen

#: Keys that one launch takes as arguments, and columns of the tile in which masses are summed up.
USED = 16
#: Groups that the arguments' bits can name.
_MOST_GROUPS = 31
#: The most heads that one program sums up: 4 parts of Wan 14B's 40, whose 2,364 programs fill an H200's 264 places
#: nine times but for twelve.
_HEADS = 10
#: Queries and keys of a tile, warps, and tiles of keys in flight, by an element's size and whether the padded width is
#: above 128. Halves: four programs on an SM, by registers (at most 128 a thread) and by shared memory (48 of 227 KiB).
_TILES = {
    (2, False): (64, 64, 4, 2),
    (2, True): (64, 64, 4, 2),
    (4, False): (64, 32, 4, 2),
    (4, True): (32, 16, 4, 1),
    (8, False): (8, 8, 4, 1),
    (8, True): (4, 8, 4, 1),
}
#: The other form: queries and keys of a tile, how many tiles of keys are kept, warps, tiles of queries in flight; from
#: how many queries on; programs a head, which with 40 heads make ten full rounds of an H200's 132 SMs.
_RESIDENT_TILE, _RESIDENT_TILES, _RESIDENT_WARPS, _RESIDENT_STAGES = (128, 128), 4, 8, 2
_RESIDENT_QUERIES = 8192
_RESIDENT_PROGRAMS = 1320
_LOG2E = 1.4426950408889634
#: Sums of exponentials from which on the resident form looks for the maximum of all keys: some way below float32's end.
_LARGEST = tl.constexpr(2.0**120)
#: Triton's interpreter multiplies the bits of halves as if they were integers.
_INTERPRETED = tl.constexpr(triton_interpreted())
_ENTRIES = [f"e{i}" for i in range(USED)]


@triton.jit
def _entries(e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15):
    """The arguments as a vector."""
    lane = tl.arange(0, 16)
    x = tl.full([16], 0, tl.int64)
    x = tl.where(lane == 0, e0, x)
    x = tl.where(lane == 1, e1, x)
    x = tl.where(lane == 2, e2, x)
    x = tl.where(lane == 3, e3, x)
    x = tl.where(lane == 4, e4, x)
    x = tl.where(lane == 5, e5, x)
    x = tl.where(lane == 6, e6, x)
    x = tl.where(lane == 7, e7, x)
    x = tl.where(lane == 8, e8, x)
    x = tl.where(lane == 9, e9, x)
    x = tl.where(lane == 10, e10, x)
    x = tl.where(lane == 11, e11, x)
    x = tl.where(lane == 12, e12, x)
    x = tl.where(lane == 13, e13, x)
    x = tl.where(lane == 14, e14, x)
    return tl.where(lane == 15, e15, x)


@triton.jit
def _product(x, y):
    """x·yᵀ of tiles [M, D] and [N, D] (or [16, N] for weights), in the working precision.

    Float32 in three products of TF32, whose sum has its precision but for a few units in the last place: its own
    multiply-adds, without tensor cores, would have whole rows of both operands in registers.
    """
    if x.dtype == tl.float64:
        return tl.sum(x[:, None, :] * y[None, :, :], 2)
    elif _INTERPRETED:
        return tl.dot(widen(x), tl.trans(widen(y)), input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(y), input_precision="tf32x3")


@triton.jit(do_not_specialize=[*_ENTRIES, "count", "groups", "first_group"])
def _heat(
    q, k, weights, key_mask, out,
    e0: tl.int64, e1: tl.int64, e2: tl.int64, e3: tl.int64, e4: tl.int64, e5: tl.int64, e6: tl.int64, e7: tl.int64,
    e8: tl.int64, e9: tl.int64, e10: tl.int64, e11: tl.int64, e12: tl.int64, e13: tl.int64, e14: tl.int64,
    e15: tl.int64,
    scale: tl.float64, share: tl.float64, count, groups, first_group,
    batch, heads, queries, keys, width, tiles, parts,
    q_b, q_h, q_n, k_b, k_h, k_n, m_b,
    EVEN_KEYS: tl.constexpr, EVEN_WIDTH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[part, b, g, query]: `share` times the sum over a part's heads.

    Without `weights`, `count` entries name keys (their low 32 bits) and the groups that each is in (a bit a group from
    32 on). With weights (G, Nk), the groups are `first_group` and the 15 that follow.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    part = (pid // tiles) % parts
    b = (pid // tiles // parts).to(tl.int64)
    row = tl.arange(0, ROWS)
    start = tile.to(tl.int64) * ROWS
    own = start + row < queries
    element = tl.arange(0, WIDTH)
    inside = element < width
    col = tl.arange(0, COLS)
    lane = tl.arange(0, 16)
    work: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    each = tl.full([1], scale, work)
    c = each[:, None]
    zero = tl.full([], 0, tl.int64)  # widens the counters of loops, which the interpreter has as Python's integers
    q_tile = q + b * q_b + start * q_n + row[:, None] * q_n + element[None, :]
    k_tile = k + b * k_b + col[:, None] * k_n + element[None, :]
    total = tl.zeros([ROWS, 16], work)
    if weights is None:
        entries = _entries(e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15)
        key = entries & 0xFFFFFFFF
        used = lane < count
        k_used = k + b * k_b + key[:, None] * k_n + element[None, :]
        if key_mask is not None:
            used = used & tl.load(key_mask + b * m_b + key, mask=used, other=0).to(tl.int1)
    else:
        group = first_group + lane
        w_tile = weights + group[:, None].to(tl.int64) * keys + col[None, :]

    for h in range(part * HEADS, tl.minimum(part * HEADS + HEADS, heads)):
        q_head = q_tile + (zero + h) * q_h
        k_head = k_tile + (zero + h) * k_h
        if EVEN_WIDTH:
            x = tl.load(q_head, mask=own[:, None], other=0.0)
        else:
            x = tl.load(q_head, mask=own[:, None] & inside[None, :], other=0.0)
        top = tl.full([ROWS], float("-inf"), work)
        norm = tl.zeros([ROWS], work)
        mass = tl.zeros([ROWS, 16], work)
        for n in tl.range(0, keys, COLS, num_stages=STAGES):
            here = n + col < keys
            at = k_head + (zero + n) * k_n
            if EVEN_KEYS and EVEN_WIDTH:
                y = tl.load(at)
            else:
                y = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0)
            s = _product(x, y)
            if key_mask is not None:
                here = here & tl.load(key_mask + b * m_b + n + col, mask=here, other=0).to(tl.int1)
                s = tl.where(here[None, :], s, float("-inf"))
            elif not EVEN_KEYS:
                s = tl.where(here[None, :], s, float("-inf"))
            before = top
            top = tl.maximum(before, tl.max(s, 1) * each)
            base = top
            if key_mask is not None:  # no key so far: not −∞ − −∞
                base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(tl.fma(s, c, -base[:, None]))
            shrink = tl.exp2(before - base)
            norm = norm * shrink + tl.sum(p, 1)
            if weights is not None:
                w = tl.load(w_tile + n, mask=(group < groups)[:, None] & (n + col < keys)[None, :], other=0.0)
                mass = mass * shrink[:, None] + _product(p, w)
        base = top
        inverse = 1.0 / norm
        if key_mask is not None:  # a query's keys are the sample's: none for one is none for all
            empty = top == float("-inf")
            base = tl.where(empty, 0.0, top)
            inverse = tl.where(empty, 0.0, inverse)
        if weights is None:
            y = tl.load(k_used + (zero + h) * k_h, mask=used[:, None] & inside[None, :], other=0.0)
            s = _product(x, y)
            mass = tl.where(used[None, :], tl.exp2(tl.fma(s, c, -base[:, None])), 0.0)
        total += mass * inverse[:, None]

    total = total * tl.full([1, 1], share, work)
    out += (part.to(tl.int64) * batch + b) * groups * queries + start + row
    if weights is None:
        for g in range(groups):
            belongs = ((entries >> (32 + g)) & 1).to(work)
            tl.store(out + (zero + g) * queries, tl.sum(total * belongs[None, :], 1), mask=own)
    else:
        at = out[:, None] + group[None, :].to(tl.int64) * queries
        tl.store(at, total, mask=own[:, None] & (group < groups)[None, :])


@triton.jit
def _fold(s, c, each, top, norm):
    """A row's running maximum and sum of exponentials, with those of one more tile of scores."""
    base = tl.maximum(top, tl.max(s, 1) * each)
    return base, norm * tl.exp2(top - base) + tl.sum(tl.exp2(tl.fma(s, c, -base[:, None])), 1)


@triton.jit
def _sums(
    x, y, c, each, top, norm, safe_top, safe_norm, here, FIRST: tl.constexpr, EVEN: tl.constexpr, SAFE: tl.constexpr
):
    """One more tile of keys: the sum of exponentials from the first tile's maximum, and, if SAFE, online softmax."""
    s = _product(x, y)
    if not EVEN:
        s = tl.where(here[None, :], s, float("-inf"))
    if FIRST:
        top = tl.max(s, 1) * each
    norm += tl.sum(tl.exp2(tl.fma(s, c, -top[:, None])), 1)
    if SAFE:
        safe_top, safe_norm = _fold(s, c, each, safe_top, safe_norm)
    return top, norm, safe_top, safe_norm


@triton.jit
def _masses(
    q_head, out, tile, y0, y1, y2, y3, y_used, c, each, share, here, used, inside, queries, q_n,
    EVEN_KEYS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Writes the masses of a tile of queries; returns which of its rows' sums are too large for that.

    Those rows are written if SAFE, and no others.
    """
    zero = tl.full([], 0, tl.int64)
    at = (zero + tile) * ROWS + tl.arange(0, ROWS)
    own = at < queries
    x = tl.load(
        q_head + at[:, None] * q_n + tl.arange(0, WIDTH)[None, :], mask=own[:, None] & inside[None, :], other=0.0
    )
    top, safe_top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    norm, safe_norm = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    top, norm, safe_top, safe_norm = _sums(
        x, y0, c, each, top, norm, safe_top, safe_norm, here, True, EVEN_KEYS or TILES > 1, SAFE
    )
    if TILES > 1:
        top, norm, safe_top, safe_norm = _sums(
            x, y1, c, each, top, norm, safe_top, safe_norm, here, False, EVEN_KEYS or TILES > 2, SAFE
        )
    if TILES > 2:
        top, norm, safe_top, safe_norm = _sums(
            x, y2, c, each, top, norm, safe_top, safe_norm, here, False, EVEN_KEYS or TILES > 3, SAFE
        )
    if TILES > 3:
        top, norm, safe_top, safe_norm = _sums(
            x, y3, c, each, top, norm, safe_top, safe_norm, here, False, EVEN_KEYS, SAFE
        )
    beyond = norm > _LARGEST
    if SAFE:
        top, norm, own = safe_top, safe_norm, own & beyond
    mass = tl.exp2(tl.fma(_product(x, y_used), c, -top[:, None])) * (share / norm)[:, None]
    lane = tl.arange(0, 16)
    tl.store(out + lane[None, :] * queries + at[:, None], mask=own[:, None] & used[None, :], value=mass)
    return beyond


@triton.jit(do_not_specialize=[*_ENTRIES, "count"])
def _heat_resident(
    q, k, out,
    e0: tl.int64, e1: tl.int64, e2: tl.int64, e3: tl.int64, e4: tl.int64, e5: tl.int64, e6: tl.int64, e7: tl.int64,
    e8: tl.int64, e9: tl.int64, e10: tl.int64, e11: tl.int64, e12: tl.int64, e13: tl.int64, e14: tl.int64,
    e15: tl.int64,
    scale: tl.float64, share: tl.float64, count, batch, heads, queries, keys, width, tiles, programs,
    q_b, q_h, q_n, k_b, k_h, k_n,
    EVEN_KEYS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[head, b, entry, query], for every `programs`-th tile of queries; entries as in `_heat`. TILES ≤ 4 of keys.

    Exponentials are taken from the maximum of the first tile of keys only: finding that of the others costs as much
    time as a fifth of the products. Their sum then is 1 at least, and float32 holds it unless a later score is above
    that maximum by 83 or more. Rows for which one is are done once more, by online softmax.
    """
    pid = tl.program_id(0)
    first = pid % programs
    head = (pid // programs % heads).to(tl.int64)
    b = (pid // programs // heads).to(tl.int64)
    element = tl.arange(0, WIDTH)
    inside = element < width
    col = tl.arange(0, COLS)
    lane = tl.arange(0, 16)
    each = tl.full([1], scale, tl.float32)
    c = each[:, None]
    entries = _entries(e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15)
    used = lane < count
    k_head = k + b * k_b + head * k_h + element[None, :]
    y_used = tl.load(k_head + (entries & 0xFFFFFFFF)[:, None] * k_n, mask=used[:, None] & inside[None, :], other=0.0)
    within = inside[None, :]
    last: tl.constexpr = (TILES - 1) * COLS
    here = last + col < keys  # only the last tile of keys can be a part of one
    k_tile = k_head + col[:, None] * k_n
    step = k_n * COLS
    if TILES == 1:
        y0 = tl.load(k_tile, mask=here[:, None] & within, other=0.0)
    else:
        y0 = tl.load(k_tile, mask=within, other=0.0)
    y1, y2, y3 = y0, y0, y0
    if TILES == 2:
        y1 = tl.load(k_tile + step, mask=here[:, None] & within, other=0.0)
    elif TILES > 2:
        y1 = tl.load(k_tile + step, mask=within, other=0.0)
    if TILES == 3:
        y2 = tl.load(k_tile + 2 * step, mask=here[:, None] & within, other=0.0)
    elif TILES > 3:
        y2 = tl.load(k_tile + 2 * step, mask=within, other=0.0)
        y3 = tl.load(k_tile + 3 * step, mask=here[:, None] & within, other=0.0)

    out += (head * batch + b) * count * queries
    q_head = q + b * q_b + head * q_h
    part = tl.full([1], share, tl.float32)
    again = tl.zeros([ROWS], tl.int32)
    for tile in tl.range(first, tiles, programs, num_stages=STAGES):
        beyond = _masses(
            q_head, out, tile, y0, y1, y2, y3, y_used, c, each, part, here, used, inside, queries, q_n,
            EVEN_KEYS, ROWS, WIDTH, TILES, False,
        )  # fmt: skip
        again |= beyond.to(tl.int32)
    if tl.max(again, 0) > 0:
        for tile in tl.range(first, tiles, programs, num_stages=1):
            _masses(
                q_head, out, tile, y0, y1, y2, y3, y_used, c, each, part, here, used, inside, queries, q_n,
                EVEN_KEYS, ROWS, WIDTH, TILES, True,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*_ENTRIES, "count", "groups", "batch"])  # batch of 1 would be a number, not a tensor
def _add_heads(
    parts, out,
    e0: tl.int64, e1: tl.int64, e2: tl.int64, e3: tl.int64, e4: tl.int64, e5: tl.int64, e6: tl.int64, e7: tl.int64,
    e8: tl.int64, e9: tl.int64, e10: tl.int64, e11: tl.int64, e12: tl.int64, e13: tl.int64, e14: tl.int64,
    e15: tl.int64,
    count, groups, batch, heads, queries, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, g, query]: the sum of parts[head, b, entry, query] over a group's entries, then over the heads."""
    pid = tl.program_id(0)
    block = pid % blocks
    g = pid // blocks % groups
    b = (pid // blocks // groups).to(tl.int64)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = at < queries
    lane = tl.arange(0, 16)
    entries = _entries(e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15)
    each = batch.to(tl.int64) * count * queries
    total = tl.zeros([BLOCK], tl.float32)
    for e in range(count):
        if (tl.sum(tl.where(lane == e, entries, 0)) >> (32 + g)) & 1:
            head = parts + (b * count + e) * queries + at
            for h in tl.range(0, heads, loop_unroll_factor=8):  # noqa: B007 - eight loads are under way together
                total += tl.load(head, mask=own, other=0.0)
                head += each
    tl.store(out + (b * groups + g) * queries + at, total, mask=own)


@triton.jit
def _add_parts(parts, out, size, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    total = tl.load(parts + at, mask=here, other=0.0)
    for i in range(1, COUNT):
        total += tl.load(parts + tl.full([], i, tl.int64) * size + at, mask=here, other=0.0)
    tl.store(out + at, total, mask=here)


@triton.jit(do_not_specialize=[*_ENTRIES, "count"])
def _mark(
    weights, keys,
    e0: tl.int64, e1: tl.int64, e2: tl.int64, e3: tl.int64, e4: tl.int64, e5: tl.int64, e6: tl.int64, e7: tl.int64,
    e8: tl.int64, e9: tl.int64, e10: tl.int64, e11: tl.int64, e12: tl.int64, e13: tl.int64, e14: tl.int64,
    e15: tl.int64, count,
):  # fmt: skip
    """weights[entry >> 32, entry & (2³² − 1)] = 1."""
    entries = _entries(e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15)
    lane = tl.arange(0, 16)
    one = tl.full([16], 1.0, weights.dtype.element_ty)
    tl.store(weights + (entries >> 32) * keys + (entries & 0xFFFFFFFF), one, mask=lane < count)


def _padded(entries: Sequence[int]) -> tuple[int, ...]:
    return (*entries, *([0] * (USED - len(entries))))


def _as_weights(keys: Sequence[int], sizes: Sequence[int], count: int, like: Tensor) -> Tensor:
    """Lists as weights (G, count). They travel as arguments: a copy from the host would wait for the device."""
    weights = torch.zeros((len(sizes), count), dtype=like.dtype, device=like.device)
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    entries = [(g << 32) | key for g, key in zip(groups, keys, strict=True)]
    for at in range(0, len(entries), USED):
        some = entries[at : at + USED]
        _mark[(1,)](weights, count, *_padded(some), len(some), num_warps=1)
    return weights


def _as_entries(keys: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """Each key that some list names, with the bits of its groups; None if they are too many for arguments."""
    members: dict[int, int] = {}
    at = 0
    for g, size in enumerate(sizes):
        for key in keys[at : at + size]:
            members[key] = members.get(key, 0) | 1 << (32 + g)
        at += size
    if len(members) > USED or len(sizes) > _MOST_GROUPS:
        return None
    return [key | bits for key, bits in members.items()]


def _strides(x: Tensor, heads_last: bool) -> tuple[int, int, int]:
    """Elements from one sample, head and row to the next."""
    b, first, second = x.stride(0), x.stride(1), x.stride(2)
    return (b, second, first) if heads_last else (b, first, second)


def _resident(q: Tensor, queries: int, keys: int, padded: int) -> bool:
    """Whether a head's keys are kept in shared memory: a matter of sizes alone, whatever the batch."""
    cols = _RESIDENT_TILE[1]
    fits = q.element_size() == 2 and padded in (64, 128) and keys <= _RESIDENT_TILES * cols
    return fits and keys > cols // 2 and queries >= _RESIDENT_QUERIES


def _sum_parts(partial: Tensor, out: Tensor) -> None:
    block = 1024
    _add_parts[(cdiv(out.numel(), block),)](partial, out, out.numel(), partial.shape[0], BLOCK=block, num_warps=4)


def token_heatmap(
    q: Tensor,
    k: Tensor,
    q_heads_last: bool,
    k_heads_last: bool,
    weights: Tensor | None,
    keys: Sequence[int],
    sizes: Sequence[int],
    key_mask: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """The operator `token_heatmap` of `latentfast._operators`."""
    if not out.numel():
        return
    batch, groups, queries = out.shape
    heads, width = q.shape[2 if q_heads_last else 1], q.shape[3]
    count = k.shape[1 if k_heads_last else 2]
    if not heads or not count:
        out.zero_()
        return
    with guard(q):
        entries = _as_entries(keys, sizes) if weights is None else None
        if entries is None and weights is None:
            weights = _as_weights(keys, sizes, count, out)
        padded = max(16, pow2(width))
        q, k = aligned(q), aligned(k)
        weights = None if weights is None else aligned(weights)
        if entries is not None and key_mask is None and _resident(q, queries, count, padded):
            rows, cols = _RESIDENT_TILE
            tiles, named = cdiv(queries, rows), _padded(entries)
            partial = out.new_empty((heads, batch, len(entries), queries))
            programs = max(1, min(tiles, _RESIDENT_PROGRAMS // (heads * batch)))
            _heat_resident[(programs * heads * batch,)](
                q, k, partial, *named, scale * _LOG2E, 1.0 / heads, len(entries),
                batch, heads, queries, count, width, tiles, programs,
                *_strides(q, q_heads_last), *_strides(k, k_heads_last),
                EVEN_KEYS=count % cols == 0, ROWS=rows, COLS=cols, WIDTH=padded, TILES=cdiv(count, cols),
                STAGES=_RESIDENT_STAGES, num_warps=_RESIDENT_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            block = 256
            blocks = cdiv(queries, block)
            _add_heads[(batch * groups * blocks,)](
                partial, out, *named, len(entries), groups, batch, heads, queries, blocks, BLOCK=block, num_warps=4
            )
            return
        rows, cols, warps, stages = _TILES[q.element_size(), padded > 128]
        tiles, parts = cdiv(queries, rows), cdiv(heads, _HEADS)
        single = parts == 1
        partial = out if single else out.new_empty((parts, *out.shape))
        for first in range(0, 1 if entries is not None else groups, USED):
            _heat[(tiles * parts * batch,)](
                q, k, weights, None if key_mask is None else key_mask.view(torch.uint8), partial,
                *_padded(entries or ()), scale * _LOG2E, 1.0 / heads, len(entries or ()), groups, first,
                batch, heads, queries, count, width, tiles, parts,
                *_strides(q, q_heads_last), *_strides(k, k_heads_last),
                0 if key_mask is None or key_mask.shape[0] == 1 else count,
                EVEN_KEYS=count % cols == 0, EVEN_WIDTH=width == padded, HEADS=cdiv(heads, parts), ROWS=rows, COLS=cols,
                WIDTH=padded, STAGES=stages,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
        if not single:
            _sum_parts(partial, out)
