"""Tiles: one launch for each tile, which writes the part of the result that is the tile's own.

At most eight tiles meet there: itself and those before it along each of three dimensions. So many pointers a launch
takes as they are, and no table of them has to be brought to the device.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl
from latentfast.kernels.triton._launch import OPTIONS, cdiv, guard, pow2
from latentfast.kernels.triton._math import narrow, widen

#: Elements of a program's block, by the size of one in bytes, and the most of them in a row.
_BLOCK = {2: 2048, 4: 1024, 8: 512}
_COLUMNS = 64


class _Axis(NamedTuple):
    """The tiles along one dimension: sizes, what each shares with the one before, where each begins, and the end."""

    sizes: list[int]
    extents: list[int]
    starts: list[int]


def _axis(sizes: list[int], overlap: int, whole: int) -> _Axis:
    extents, starts = [0], [0]
    for before, size in pairwise(sizes):
        extents.append(min(before, size, overlap))
        starts.append(starts[-1] + before - extents[-1])
    return _Axis(sizes, extents, [min(start, whole) for start in starts] + [whole])


@triton.jit
def _weight(position, extent, ROUND: tl.constexpr):
    """A tile's weight where it is blended: a ramp from 0, or in overlap-add from half a step above. float64."""
    at = position.to(tl.float64)
    if not ROUND:
        at += 0.5
    return tl.where(position < extent, at / tl.maximum(extent, 1).to(tl.float64), 1.0)


@triton.jit
def _mix(before, own, weight, dtype: tl.constexpr, ROUND: tl.constexpr):
    """(1 − weight)·before + weight·own; rounded as two products and a sum of `dtype`, or not at all."""
    x = before * (1.0 - weight).to(before.dtype)
    y = own * weight.to(own.dtype)
    if ROUND:
        return widen(narrow(widen(narrow(x, dtype)) + widen(narrow(y, dtype)), dtype))
    else:
        return x + y


@triton.jit
def _in_clip(
    own, left, above, corner, frame, frame_size, y, x, y_before, x_before, w_left, here, seam_y, seam_x, wy, wx,
    height, width, h_above, Y: tl.constexpr, X: tl.constexpr, dtype: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One temporal tile's rows y and columns x; widened."""
    at = tl.load(own + (frame * height + y)[:, None] * width + x[None, :], mask=here, other=0.0)
    value = widen(at)
    if Y:
        over = here & seam_y[:, None]
        at_above = widen(
            tl.load(above + (frame * h_above + y_before)[:, None] * width + x[None, :], mask=over, other=0.0)
        )
        if X:
            both = over & seam_x[None, :]
            at_corner = widen(
                tl.load(
                    corner + (frame * h_above + y_before)[:, None] * w_left + x_before[None, :], mask=both, other=0.0
                )
            )
            if ROUND:  # the tile above was blended to its own left before
                at_above = tl.where(seam_x[None, :], _mix(at_corner, at_above, wx[None, :], dtype, ROUND), at_above)
        value = tl.where(seam_y[:, None], _mix(at_above, value, wy[:, None], dtype, ROUND), value)
    if X:
        at_left = widen(
            tl.load(
                left + (frame * height + y)[:, None] * w_left + x_before[None, :],
                mask=here & seam_x[None, :],
                other=0.0,
            )
        )
        if Y:
            at_left = tl.where(seam_y[:, None], _mix(at_corner, at_left, wy[:, None], dtype, ROUND), at_left)
        value = tl.where(seam_x[None, :], _mix(at_left, value, wx[None, :], dtype, ROUND), value)
    return value


@triton.jit
def _stitch(
    own, left, above, corner, z_own, z_left, z_above, z_corner, out,
    low: tl.float64, high: tl.float64,
    planes, frames, rows, columns,  # what is written of this tile
    t_size, height, width, t_extent, y_extent, x_extent,
    t_before, h_above, w_left,  # the sizes of the tiles before
    t_start, y_start, x_start, out_frames, out_height, out_width,
    T: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, ROUND: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    across = (columns + COLS - 1) // COLS
    x = (pid % across) * COLS + tl.arange(0, COLS)
    row = (pid // across) * ROWS + tl.arange(0, ROWS)  # of all frames of all planes
    here = (row < planes * frames * rows)[:, None] & (x < columns)[None, :]
    y = row % rows
    row = row // rows
    t, plane = row % frames, row // frames
    dtype: tl.constexpr = out.dtype.element_ty
    wy, wx = _weight(y, y_extent, ROUND), _weight(x, x_extent, ROUND)
    seam_y, seam_x = y < y_extent, x < x_extent
    y_before, x_before = h_above - y_extent + y, w_left - x_extent + x
    value = _in_clip(
        own, left, above, corner, plane * t_size + t, t_size, y, x, y_before, x_before, w_left, here, seam_y, seam_x,
        wy, wx, height, width, h_above, Y, X, dtype, ROUND,
    )  # fmt: skip
    if T:
        seam_t = t < t_extent
        earlier = _in_clip(
            z_own, z_left, z_above, z_corner, plane * t_before + t_before - t_extent + t, t_before, y, x, y_before,
            x_before, w_left, here & seam_t[:, None], seam_y, seam_x, wy, wx, height, width, h_above, Y, X, dtype,
            ROUND,
        )  # fmt: skip
        wt = _weight(t, t_extent, ROUND)[:, None]
        value = tl.where(seam_t[:, None], _mix(earlier, value, wt, dtype, ROUND), value)
    if CLAMP:
        value = widen(narrow(value, dtype))  # as torch does: what is clamped has been rounded; NaN stays
        least = tl.full([1, 1], low, tl.float64).to(value.dtype)
        most = tl.full([1, 1], high, tl.float64).to(value.dtype)
        value = tl.where(value < least, least, value)
        value = tl.where(value > most, most, value)
    to = ((plane * out_frames + t_start + t) * out_height + y_start + y)[:, None] * out_width + (x_start + x)[None, :]
    tl.store(out + to, narrow(value, dtype), mask=here)


def stitch(
    tiles: list[Tensor], grid: Sequence[int], overlap: Sequence[int], kind: int, clamp: Sequence[float], out: Tensor
) -> None:
    """The operator `stitch` of `latentfast._operators`."""
    if not out.numel():
        return
    per_clip = grid[1] * grid[2]
    axes = (
        _axis([tile.shape[2] for tile in tiles[::per_clip]], overlap[0], out.shape[2]),
        _axis([tile.shape[3] for tile in tiles[: per_clip : grid[2]]], overlap[1], out.shape[3]),
        _axis([tile.shape[4] for tile in tiles[: grid[2]]], overlap[2], out.shape[4]),
    )
    with guard(out):
        for number in range(len(tiles)):
            k = (number // per_clip, number // grid[2] % grid[1], number % grid[2])
            _one_tile(tiles, number, k, axes, per_clip, grid[2], kind, clamp, out)


def _one_tile(
    tiles: list[Tensor], number: int, k: tuple[int, int, int], axes: tuple[_Axis, _Axis, _Axis], per_clip: int,
    per_row: int, kind: int, clamp: Sequence[float], out: Tensor,
) -> None:  # fmt: skip
    written = [axis.starts[i + 1] - axis.starts[i] for axis, i in zip(axes, k, strict=True)]
    frames, rows, columns = written
    if min(written) <= 0:
        return
    sizes = [axis.sizes[i] for axis, i in zip(axes, k, strict=True)]
    before = [axis.sizes[max(i - 1, 0)] for axis, i in zip(axes, k, strict=True)]
    extents = [axis.extents[i] for axis, i in zip(axes, k, strict=True)]
    starts = [axis.starts[i] for axis, i in zip(axes, k, strict=True)]
    t, y, x = (extent > 0 for extent in extents)

    def neighbours(at: int) -> list[Tensor]:
        """The tile itself, and those at its left, above and at the corner; itself where it is not blended."""
        left, above = at - x, at - y * per_row
        return [tiles[at], tiles[left], tiles[above], tiles[above - x]]

    cols = min(pow2(columns), _COLUMNS)
    planes = out.shape[0] * out.shape[1]
    every = planes * frames * rows
    block_rows = min(pow2(every), _BLOCK[out.element_size()] // cols)
    programs = cdiv(every, block_rows) * cdiv(columns, cols)
    low, high = clamp or (0.0, 0.0)
    _stitch[(programs,)](
        *neighbours(number), *neighbours(number - t * per_clip), out, low, high, planes, frames, rows, columns, *sizes,
        *extents, *before, *starts, *out.shape[2:], T=t, Y=y, X=x, ROUND=kind == 0, CLAMP=bool(clamp),
        ROWS=block_rows, COLS=cols, **OPTIONS,
    )  # fmt: skip
