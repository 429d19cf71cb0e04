"""Statistics: sums over channels in fixed order from each one's first element on, and affines of channels.

The channels are vectors (p, n, q, m) as in `_vectors`. Counted from its first element, a constant channel has a
variance of exactly 0.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from latentfast._operators import LAYOUTS
from latentfast.kernels.triton._launch import OPTIONS, aligned, cdiv, guard, on_device, pow2
from latentfast.kernels.triton._math import double, narrow, widen
from latentfast.kernels.triton._vectors import (
    Tiling,
    combine,
    place,
    store_partial,
    tile_offsets,
    tile_rows_cols,
    tiling,
)

#: Elements of a block of what is done element by element, by the size of one in bytes.
_BLOCK = {2: 2048, 4: 1024, 8: 512}
#: Features and positions of a tile on its way to or from tokens.
_FEATURES, _ACROSS = 32, 64


@triton.jit
def _sums(
    z, partials, p, n, q, m, chunks, per_chunk, ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    first = double(tl.load(z + (u * n * q + w) * m, mask=w < q, other=0.0))
    total = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    squares = tl.zeros([ROWS * COLS, VECTORS], tl.float64)
    for s in range(per_chunk):
        i, j = tile_rows_cols(chunk * per_chunk + s, m, ROWS, COLS)
        offsets, mask = tile_offsets(i, j, u, w, n, q, m)
        distance = double(tl.load(z + offsets, mask=mask, other=0.0)) - first[None, :]
        distance = tl.where(mask, distance, 0.0)
        total += distance
        squares = tl.fma(distance, distance, squares)
    store_partial(partials, total, 0, u, chunk, w, chunks, q)
    store_partial(partials, squares, p, u, chunk, w, chunks, q)


@triton.jit
def _moments(z, partials, mean, std, p, n, q, m, chunks, VECTORS: tl.constexpr):
    _, u, w = place(1, q, VECTORS)
    count = ((tl.full([VECTORS], 0, tl.int64) + n) * m).to(tl.float64)
    middle = combine(partials, 0 * p, u, w, chunks, q, VECTORS) / count
    squares = combine(partials, p, u, w, chunks, q, VECTORS)
    variance = tl.fma(-middle * count, middle, squares) / tl.where(count > 1.0, count - 1.0, 1.0)
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays
    first = double(tl.load(z + (u * n * q + w) * m, mask=w < q, other=0.0))
    tl.store(mean + u * q + w, (first + middle).to(mean.dtype.element_ty), mask=w < q)
    tl.store(std + u * q + w, tl.sqrt(variance).to(std.dtype.element_ty), mask=w < q)


def _find_moments(z: Tensor, tile: Tiling, mean: Tensor, std: Tensor) -> None:
    z = aligned(z)
    partials = torch.empty(2 * tile.p * tile.chunks * tile.q, dtype=torch.float64, device=z.device)
    _sums[(tile.programs * tile.chunks,)](z, partials, tile.p, **tile.layout, **OPTIONS)
    _moments[(tile.programs,)](
        z, partials, mean, std, tile.p, tile.n, tile.q, tile.m, tile.chunks, VECTORS=tile.vectors, **OPTIONS
    )


def channel_stats(z: Tensor, p: int, n: int, q: int, m: int, mean: Tensor, std: Tensor) -> None:
    """The operator `channel_stats` of `latentfast._operators`."""
    if not mean.numel():
        return
    if not z.numel():
        mean.zero_()
        std.zero_()
        return
    with guard(z):
        _find_moments(z, tiling(p, n, q, m, z.element_size()), mean, std)


@triton.jit
def _restyle(
    z, mean, std, ref_mean, ref_std, out, factor: tl.float64, styles, n, q, m, chunks, per_chunk,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    vector = u * q + w
    far = tl.full([1], factor, tl.float64)
    own_std = tl.load(std + vector, mask=w < q, other=0.0)
    style_mean = tl.load(ref_mean + vector % styles, mask=w < q, other=0.0)
    scaled = far * tl.load(ref_std + vector % styles, mask=w < q, other=0.0) / tl.where(own_std == 0.0, 1.0, own_std)
    scaled = tl.where(own_std == 0.0, 0.0, scaled)
    i, j = tile_rows_cols(chunk, m, ROWS, COLS)
    offsets, mask = tile_offsets(i, j, u, w, n, q, m)
    x = widen(tl.load(z + offsets, mask=mask, other=0.0))
    # (z − centre)·gain + offset, counted from the mean as the working precision has it
    own_mean = tl.where(scaled == 0.0, 0.0, tl.load(mean + vector, mask=w < q, other=0.0))
    centre = own_mean.to(x.dtype)
    rest = own_mean - centre.to(tl.float64)
    kept = 1.0 - far
    gain = (scaled + kept).to(x.dtype)
    offset = (far * style_mean - scaled * rest + kept * centre.to(tl.float64)).to(x.dtype)
    value = (x - centre[None, :]) * gain[None, :] + offset[None, :]
    tl.store(out + offsets, narrow(value, out.dtype.element_ty), mask=mask)


def adain(
    z: Tensor, ref: Tensor, factor: float, p: int, n: int, q: int, m: int, ref_p: int, ref_n: int, ref_m: int,
    out: Tensor,
) -> None:  # fmt: skip
    """The operator `adain` of `latentfast._operators`."""
    if not z.numel():
        return
    with guard(z):
        size = z.element_size()
        mean, std = torch.empty((2, p * q), dtype=torch.float64, device=z.device).unbind(0)
        ref_mean, ref_std = torch.empty((2, ref_p * q), dtype=torch.float64, device=z.device).unbind(0)
        _find_moments(z, tiling(p, n, q, m, size), mean, std)
        _find_moments(ref, tiling(ref_p, ref_n, q, ref_m, size), ref_mean, ref_std)
        tile = tiling(p, n, q, m, size, reduces=False)
        _restyle[(tile.programs * tile.chunks,)](
            z, mean, std, ref_mean, ref_std, out, float(factor), ref_p * q, **tile.layout, **OPTIONS
        )


@triton.jit
def _affine(x, c, here, mean, std, scale, INVERSE: tl.constexpr):
    """(x − mean)·scale/std or x·std/scale + mean, for the channels `c`."""
    deviation = tl.load(std + c, mask=here, other=1.0).to(tl.float64)
    middle = tl.zeros_like(deviation) if mean is None else tl.load(mean + c, mask=here, other=0.0).to(tl.float64)
    middle = middle.to(x.dtype)
    factor = tl.full([1], scale, tl.float64)
    if INVERSE:
        return x * (deviation / factor).to(x.dtype)[None, :] + middle[None, :]
    else:
        return (x - middle[None, :]) * (factor / deviation).to(x.dtype)[None, :]


@triton.jit
def _standardize(
    z, mean, std, out, scale: tl.float64, channels, n, q, m, chunks, per_chunk, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    chunk, u, w = place(chunks, q, VECTORS)
    i, j = tile_rows_cols(chunk, m, ROWS, COLS)
    offsets, mask = tile_offsets(i, j, u, w, n, q, m)
    x = widen(tl.load(z + offsets, mask=mask, other=0.0))
    value = _affine(x, w % channels, w < q, mean, std, scale, INVERSE)
    tl.store(out + offsets, narrow(value, out.dtype.element_ty), mask=mask)


@triton.jit
def _repack(
    z, mean, std, out, scale: tl.float64, c, t, h, w, pt, ph, pw, INVERSE: tl.constexpr, PACKS: tl.constexpr,
    ACROSS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """A tile of some positions of a row of tokens by some rows of the latents that they are made of."""
    pid = tl.program_id(0).to(tl.int64)
    rows = c * pt * ph  # of the latents in a row of tokens
    pieces = (w + ACROSS - 1) // ACROSS
    groups = (rows + FEATURES - 1) // FEATURES
    x = (pid % pieces) * ACROSS + tl.arange(0, ACROSS)
    row = (pid // pieces % groups) * FEATURES + tl.arange(0, FEATURES)
    strip = pid // pieces // groups
    down = strip % (h // ph)
    frame = strip // (h // ph) % (t // pt)
    sample = strip // (h // ph) // (t // pt)
    channel = row // (pt * ph)
    i = row // ph % pt
    start = (((sample * c + channel) * t + frame * pt + i) * h + down * ph + row % ph) * w
    in_latents = start[None, :] + x[:, None]
    in_tokens = ((strip * (w // pw) + x // pw) * rows * pw)[:, None] + (row * pw)[None, :] + (x % pw)[:, None]
    here = (x < w)[:, None] & (row < rows)[None, :]
    value = widen(tl.load(z + (in_latents if PACKS else in_tokens), mask=here, other=0.0))
    value = _affine(value, channel, row < rows, mean, std, scale, INVERSE)
    tl.store(out + (in_tokens if PACKS else in_latents), narrow(value, out.dtype.element_ty), mask=here)


_kept_on_device = functools.lru_cache(maxsize=64)(
    lambda values, device: on_device(values, torch.empty(0, device=device))
)


def _numbers(device: Tensor | None, host: Sequence[float], z: Tensor) -> Tensor | None:
    """A tensor of numbers on the host, made once; a graph that is being captured gets its own."""
    if device is not None or not len(host):
        return device
    if z.is_cuda and torch.cuda.is_current_stream_capturing():
        return on_device(host, z)
    return _kept_on_device(tuple(host), z.device)


def standardize(
    z: Tensor, mean: Tensor | None, std: Tensor | None, host_mean: Sequence[float], host_std: Sequence[float],
    scale: float, inverse: bool, layout: int, b: int, c: int, t: int, h: int, w: int, pt: int, ph: int, pw: int,
    out: Tensor,
) -> None:  # fmt: skip
    """The operator `standardize` of `latentfast._operators`."""
    if not out.numel():
        return
    with guard(z):
        mean, std = _numbers(mean, host_mean, z), _numbers(std, host_std, z)
        if layout == LAYOUTS["same"]:
            tile = tiling(b, 1, c, t * h * w, z.element_size(), reduces=False)
            _standardize[(tile.programs * tile.chunks,)](
                z, mean, std, out, float(scale), c, INVERSE=inverse, **tile.layout, **OPTIONS
            )
            return
        if ph == 1:  # rows that follow one another in the latents as their tokens do are one
            w, h = w * h, 1
            if pt == 1:
                w, t = w * t, 1
        rows = c * pt * ph
        across, features = min(pow2(w), _ACROSS), min(pow2(rows), _FEATURES)
        grid = b * (t // pt) * (h // ph) * cdiv(w, across) * cdiv(rows, features)
        _repack[(grid,)](
            z, mean, std, out, float(scale), c, t, h, w, pt, ph, pw, INVERSE=inverse,
            PACKS=layout == LAYOUTS["pack"], ACROSS=across, FEATURES=features, **OPTIONS,
        )  # fmt: skip


@triton.jit
def _tone_map(z, grad, out, s: tl.float64, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = widen(tl.load(z + at, mask=at < count, other=0.0))
    steepness = (4.0 * tl.full([1], s, tl.float64)).to(x.dtype)
    depth = (0.8 * tl.full([1], s, tl.float64)).to(x.dtype)
    size = tl.abs(x)
    gate = 1.0 / (1.0 + tl.exp(steepness * (1.0 - size)))
    if grad is None:
        value = x * (1.0 - depth * gate)
    else:
        upstream = widen(tl.load(grad + at, mask=at < count, other=0.0))
        value = upstream * (1.0 - depth * gate * (1.0 + steepness * size * (1.0 - gate)))
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=at < count)


def tone_map(z: Tensor, grad: Tensor | None, compression: float, out: Tensor) -> None:
    """The operator `tone_map` of `latentfast._operators`."""
    count = z.numel()
    if not count:
        return
    with guard(z):
        block = min(pow2(count), _BLOCK[z.element_size()])
        _tone_map[(cdiv(count, block),)](z, grad, out, 0.75 * compression, count, BLOCK=block, **OPTIONS)
