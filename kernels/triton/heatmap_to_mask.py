"""Masks of heat maps: a launch each for the range, smoothing over time, enlargement (and dilation), and the comparison.

A quantile is found by radix selection on the values' bits, which are ordered as the values are, none being negative:
each launch counts the ten bits after those that are known of the wanted element, one histogram a block in shared
memory, then integer additions, whose order does not matter. Three such launches settle a float32. What follows the
wanted element, for the interpolation, is in the last histogram, or is the least beyond it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import cdiv, guard

#: Programs that look for a map's range together.
_SCOUTS = 16
_BLOCK = 1024
#: Elements that a program counts, and bits of a digit.
_COUNTED = 4096
_DIGIT = tl.constexpr(10)
_BINS = tl.constexpr(1024)
#: Where there is no element beyond the wanted one.
_NOTHING = tl.constexpr(0x7FFFFFFFFFFFFFFF)
#: Digits of all bits but the sign and the highest of the exponent, which are 0 up to 1.
_LEVELS = {4: 3, 8: 7}
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _scout(
    heat, lows, highs, counts, least, size, LEVELS: tl.constexpr, SCOUTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The least and the largest of a part of a map; an infinite largest where something is not finite.

    With `counts`, these and `least` are made ready for the histograms.
    """
    place = tl.program_id(0).to(tl.int64)
    if counts is not None:
        each: tl.constexpr = _BINS // SCOUTS
        none = tl.zeros([each], tl.int64)
        for level in tl.static_range(LEVELS):
            bins = (place % SCOUTS) * each + tl.arange(0, each)
            tl.store(counts + ((place // SCOUTS) * LEVELS + level) * _BINS + bins, none)
        tl.store(least + place // SCOUTS, _NOTHING)
    own = heat + (place // SCOUTS) * size
    lane = tl.arange(0, BLOCK)
    first = tl.load(own)
    low = tl.zeros([BLOCK], heat.dtype.element_ty) + first
    high = low
    odd = tl.zeros([BLOCK], tl.int32)
    for start in range((place % SCOUTS) * BLOCK, size, SCOUTS * BLOCK):
        x = tl.load(own + start + lane, mask=start + lane < size, other=first)
        odd = odd | tl.where(x - x == 0.0, 0, 1)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
    spoilt = tl.max(odd, 0) > 0
    tl.store(lows + place, tl.min(low, 0))
    tl.store(highs + place, tl.where(spoilt, float("inf"), tl.max(high, 0)))


@triton.jit
def _range(lows, highs, map, SCOUTS: tl.constexpr):
    """A map's least value and span; a span that is not finite where an element is not."""
    at = map * SCOUTS + tl.arange(0, SCOUTS)
    low = tl.min(tl.load(lows + at), 0)
    return low, tl.max(tl.load(highs + at), 0) - low


@triton.jit
def _quotient(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _smooth(
    heat, lows, highs, out, frames, plane, sigma: tl.float64, inverse: tl.float64, radius,
    SCOUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalised and smoothed along the frames: weights `inverse`·exp(−½ (i/σ)²)."""
    pid = tl.program_id(0).to(tl.int64)
    across = (plane + BLOCK - 1) // BLOCK
    at = (pid % across) * BLOCK + tl.arange(0, BLOCK)
    frame = (pid // across) % frames
    map = pid // across // frames
    low, span = _range(lows, highs, map, SCOUTS)
    here = at < plane
    total = tl.zeros([BLOCK], out.dtype.element_ty)
    flat = (span > 0.0) == 0
    span = tl.zeros([BLOCK], span.dtype) + tl.where(flat, 1.0, span)
    for i in range(-radius, radius + 1):
        other = tl.minimum(tl.maximum(frame + i, 0), frames - 1)
        x = tl.load(heat + (map * frames + other) * plane + at, mask=here, other=0.0)
        step = (tl.zeros([1], tl.float64) + i) / sigma
        weight = (inverse * tl.exp(-0.5 * step * step)).to(total.dtype)
        total += weight * tl.where(flat, 0.0, _quotient(x - low, span))
    tl.store(out + (map * frames + frame) * plane + at, total, mask=here)


@triton.jit
def _between(i, size, ratio):
    """(first, second, the second's share) for elements i of an enlarged dimension of `size`."""
    at = tl.maximum((i.to(tl.float64) + 0.5) * ratio - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int64), size - 1)
    return first, tl.minimum(first + 1, size - 1), at - first.to(tl.float64)


@triton.jit
def _row(x, start, left, right, share, rest, mask):
    return rest * tl.load(x + start + left, mask=mask, other=0.0) + share * tl.load(
        x + start + right, mask=mask, other=0.0
    )


@triton.jit
def _enlarge(
    x, out, numel, t, h, w, T, H, W, per_t: tl.float64, per_h: tl.float64, per_w: tl.float64, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < numel
    own: tl.constexpr = x.dtype.element_ty
    left, right, along = _between(at % W, w, per_w)
    up, down, below = _between((at // W) % H, h, per_h)
    before, after, later = _between((at // W // H) % T, t, per_t)
    map = x + (at // W // H // T) * (t * h * w)
    rest = (1.0 - along).to(own)
    along = along.to(own)
    upper = (1.0 - below).to(own)
    below = below.to(own)
    a = _row(map, (before * h + up) * w, left, right, along, rest, here)
    b = _row(map, (before * h + down) * w, left, right, along, rest, here)
    c = _row(map, (after * h + up) * w, left, right, along, rest, here)
    d = _row(map, (after * h + down) * w, left, right, along, rest, here)
    first = upper * a + below * b
    second = upper * c + below * d
    tl.store(out + at, (1.0 - later).to(own) * first + later.to(own) * second, mask=here)


@triton.jit
def _dilate(x, out, numel, size, stride, reach, BLOCK: tl.constexpr):
    """The largest within `reach` along a dimension of `size` elements, `stride` apart."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < numel
    place = (at // stride) % size
    most = tl.load(x + at, mask=here, other=0.0)
    for i in range(-reach, reach + 1):
        near = here & (place + i >= 0) & (place + i < size)
        most = tl.maximum(most, tl.load(x + at + i * stride, mask=near, other=0.0))
    tl.store(out + at, most, mask=here)


@triton.jit
def _bits(x):
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _descend(counts, rank, LEVEL: tl.constexpr):
    """(the first LEVEL digits of the element of a rank, its rank among those that share them)."""
    bins = tl.arange(0, _BINS)
    prefix = rank * 0
    for level in tl.static_range(LEVEL):
        up_to = tl.cumsum(tl.load(counts + level * _BINS + bins), 0)
        under = up_to <= rank
        prefix = (prefix << _DIGIT) + tl.sum(under.to(tl.int64), 0)
        rank = rank - tl.max(tl.where(under, up_to, 0), 0)
    return prefix, rank


@triton.jit
def _count(x, counts, least, size, rank, LEVEL: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to counts[map, LEVEL] the next digits of the elements that share the first LEVEL digits of the wanted one.

    At the last level, least[map] becomes the least bits of those beyond that.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = (size + BLOCK - 1) // BLOCK
    map = pid // blocks
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    own = counts + map * (LEVELS * _BINS)
    prefix, _ = _descend(own, tl.full([], 0, tl.int64) + rank, LEVEL)
    bits = _bits(tl.load(x + map * size + at, mask=here, other=0.0))
    shift: tl.constexpr = (LEVELS - 1 - LEVEL) * _DIGIT
    digits = bits >> shift
    shares = here & ((digits >> _DIGIT) == prefix)
    digit = tl.where(shares, digits & (_BINS - 1), 0).to(tl.int32)
    bins = tl.arange(0, _BINS)
    found = tl.histogram(digit, _BINS)
    # those that do not share them were counted as 0
    found -= tl.where(bins == 0, BLOCK - tl.sum(shares.to(tl.int32), 0), 0)
    tl.atomic_add(own + LEVEL * _BINS + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")
    if LEVEL == LEVELS - 1:
        beyond = here & ((digits >> _DIGIT) > prefix)
        tl.atomic_min(least + map, tl.min(tl.where(beyond, bits, _NOTHING), 0), sem="relaxed")


@triton.jit
def _value(bits, like):
    if like.dtype.element_ty == tl.float64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _compare(
    x, lows, highs, counts, least, size, rank, share: tl.float64, threshold: tl.float64, softness: tl.float64,
    KIND: tl.constexpr, SOFT: tl.constexpr, LEVELS: tl.constexpr, SCOUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place. KIND 0: the map as it is, 1: against a threshold, 2: against a quantile."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (size + BLOCK - 1) // BLOCK
    map = pid // blocks
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    own: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + map * size + at, mask=here, other=0.0)
    limit = tl.full([1], threshold, tl.float64).to(own)
    if KIND == 2:
        mine = counts + map * (LEVELS * _BINS)
        prefix, left = _descend(mine, tl.full([], 0, tl.int64) + rank, LEVELS)
        bins = tl.arange(0, _BINS)
        last = tl.load(mine + (LEVELS - 1) * _BINS + bins)
        digit = prefix & (_BINS - 1)
        again = tl.sum(tl.where(bins == digit, last, 0), 0) > left + 1
        later = tl.min(tl.where((bins > digit) & (last > 0), bins, _BINS), 0)
        beyond = tl.load(least + map)
        above = tl.where(later < _BINS, prefix - digit + later, beyond)
        # the largest element has none beyond it
        above = tl.where(again | (above == _NOTHING), prefix, above)
        lower, upper = _value(prefix, x), _value(above, x)
        limit = lower + tl.full([1], share, tl.float64).to(own) * (upper - lower)
    if KIND > 0:
        if SOFT:
            width = tl.zeros([BLOCK], own) + tl.full([1], softness, tl.float64).to(own)
            u = _quotient(value - limit, width) + 0.5
            u = tl.minimum(tl.maximum(u, 0.0), 1.0)
            value = u * u * (3.0 - 2.0 * u)
        else:
            value = (value > limit).to(own)
    _, span = _range(lows, highs, map, SCOUTS)
    value = tl.where(span - span == 0.0, value, float("nan"))
    tl.store(x + map * size + at, value, mask=here)


def heatmap_to_mask(
    heat: Tensor,
    grid: Sequence[int],
    threshold: float,
    quantile: float,
    softness: float,
    dilate: int,
    smooth_time: float,
    out: Tensor,
) -> None:
    """The operator `heatmap_to_mask` of `latentfast._operators`."""
    if not out.numel():
        return
    maps = out.shape[0] * out.shape[1]
    t, h, w = grid
    frames, height, width = out.shape[2:]
    size, numel = frames * height * width, out.numel()
    radius = math.ceil(3 * smooth_time)
    sigma = smooth_time or 1.0
    inverse = 1.0 / math.fsum(math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1))
    with guard(heat):
        levels = _LEVELS[out.element_size()]
        counts = least = None
        rank, share = 0, 0.0
        if not math.isnan(quantile):
            exact = quantile * (size - 1)
            rank, share = math.floor(exact), exact - math.floor(exact)
            counts = torch.empty((maps, levels, _BINS.value), dtype=torch.int64, device=out.device)
            least = torch.empty((maps,), dtype=torch.int64, device=out.device)
        lows, highs = heat.new_empty(2, maps * _SCOUTS).unbind(0)
        _scout[(maps * _SCOUTS,)](
            heat, lows, highs, counts, least, t * h * w, LEVELS=levels, SCOUTS=_SCOUTS, BLOCK=_BLOCK, **_OPTIONS
        )
        x = torch.empty_like(heat)
        _smooth[(maps * t * cdiv(h * w, _BLOCK),)](
            heat, lows, highs, x, t, h * w, sigma, inverse, radius, SCOUTS=_SCOUTS, BLOCK=_BLOCK, **_OPTIONS
        )
        blocks = (cdiv(numel, _BLOCK),)
        _enlarge[blocks](
            x, out, numel, t, h, w, frames, height, width, t / frames, h / height, w / width, BLOCK=_BLOCK, **_OPTIONS
        )
        if dilate:
            across = torch.empty_like(out)
            _dilate[blocks](out, across, numel, width, 1, min(dilate, width), BLOCK=_BLOCK, **_OPTIONS)
            _dilate[blocks](across, out, numel, height, width, min(dilate, height), BLOCK=_BLOCK, **_OPTIONS)
        for level in range(levels if counts is not None else 0):
            _count[(maps * cdiv(size, _COUNTED),)](
                out, counts, least, size, rank, LEVEL=level, LEVELS=levels, BLOCK=_COUNTED, num_warps=8,
                enable_fp_fusion=False,
            )  # fmt: skip
        kind = 2 if counts is not None else 0 if math.isnan(threshold) else 1
        _compare[(maps * cdiv(size, _COUNTED),)](
            out, lows, highs, counts, least, size, rank, share, 0.0 if kind != 1 else threshold, softness,
            KIND=kind, SOFT=softness > 0, LEVELS=levels, SCOUTS=_SCOUTS, BLOCK=_COUNTED, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
