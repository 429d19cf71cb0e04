"""The seams of tiled VAE decoding: `stitch` puts overlapping tiles together."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast._operators import SEAMS
from latentfast.backends import implementation
from latentfast.ops import _checks

Rows = Sequence[Sequence[Tensor]]
_AXES = ("frames", "rows", "columns")


class _Axis(NamedTuple):
    """The tiles along one dimension: where each begins, and what it shares with the one before."""

    sizes: list[int]
    extents: list[int]
    starts: list[int]

    @property
    def whole(self) -> int:
        return self.starts[-1] + self.sizes[-1]

    def windows(self, k: int, kind: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of tile k along this dimension; the second where the tile is under the next row's seam.

        In sequential order the corners are no product of ramps: the tile above was blended to its left already when it
        is blended in, and so was the one at the left to its above.
        """
        size, before = self.sizes[k], self.extents[k]
        after = self.extents[k + 1] if k + 1 < len(self.sizes) else 0
        middle = like.new_ones(size - before - after)
        up, down = (_ramp(n, kind, like) for n in (before, after))
        plain = torch.cat((up, middle, 1 - down))
        return plain, plain if kind else torch.cat((up * up, middle, 1 - down * down))


def _ramp(extent: int, kind: int, like: Tensor) -> Tensor:
    return (torch.arange(extent, dtype=like.dtype, device=like.device) + 0.5 * kind) / max(extent, 1)


class _Stitch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axes, overlap, kind, size, clamp, *tiles):
        out = tiles[0].new_empty((*tiles[0].shape[:2], *size))
        implementation("stitch", out)(list(tiles), [len(a.sizes) for a in axes], overlap, kind, clamp, out)
        ctx.axes, ctx.kind, ctx.clamp = axes, kind, clamp
        ctx.save_for_backward(*([out] if clamp else []))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.clamp:
            (out,) = ctx.saved_tensors
            low, high = ctx.clamp
            grad = torch.where((out > low) & (out < high), grad, 0)
        dtype = grad.dtype
        wide = grad.to(_checks.wide(dtype))
        t, h, w = ctx.axes
        wanted = iter(ctx.needs_input_grad[5:])
        grads: list[Tensor | None] = []
        for k in range(len(t.sizes)):
            over_time, _ = t.windows(k, ctx.kind, wide)
            for i in range(len(h.sizes)):
                down, _ = h.windows(i, ctx.kind, wide)
                under = h.extents[i + 1] if i + 1 < len(h.sizes) else 0
                for j in range(len(w.sizes)):
                    if not next(wanted):
                        grads.append(None)
                        continue
                    part = _part(wide, (t, h, w), (k, i, j))
                    across, across_under = w.windows(j, ctx.kind, wide)
                    weights = down[:, None] * across
                    edge = h.sizes[i] - under
                    weights = torch.cat((weights[:edge], down[edge:, None] * across_under))
                    grads.append((part * (over_time[:, None, None] * weights)).to(dtype))
        return None, None, None, None, None, *grads


def _part(x: Tensor, axes: Sequence[_Axis], tile: Sequence[int]) -> Tensor:
    """Where a tile lies in the result; zeros beyond a crop."""
    missing: list[int] = []
    for dim, (axis, k) in enumerate(zip(axes, tile, strict=True), 2):
        begin, size = min(axis.starts[k], x.shape[dim]), axis.sizes[k]
        present = min(size, x.shape[dim] - begin)
        x = x.narrow(dim, begin, present)
        missing = [0, size - present, *missing]
    return torch.nn.functional.pad(x, missing)


def stitch(
    tiles: Rows | Sequence[Rows],
    overlap: Sequence[int],
    *,
    mode: str = "sequential",
    size: Sequence[int] | None = None,
    clamp: tuple[float, float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Puts the overlapping tiles of a tiled VAE decoder together: all seams in one pass.

    Neighbours share `extent = min(both sizes, overlap)` frames, rows or columns, and a tile begins where the part that
    it shares with the one before begins. So are the tiles cut that the `tiled_decode` of diffusers' autoencoders
    decodes: its stride is the tile's size minus the overlap, and tiles at the right and lower edge may be smaller.
    Unlike there, the tiles stay as they are.

    Args:
        tiles: Rows of tiles, `tiles[i][j]`, of shape `(B, C, T, h, w)` or `(B, C, h, w)`, float32, float16, bfloat16 or
            float64. Tiles of one row have the same height, those of one column the same width. With temporal tiles,
            a list of such rows: `tiles[k][i][j]`, of 5 dimensions.
        overlap: What neighbours share, `(rows, columns)` in pixels, or `(frames, rows, columns)` for temporal tiles.
            diffusers' `tile_sample_min_height - tile_sample_stride_height` and its like.
        mode: "sequential" has the bits of diffusers' `blend_v` and `blend_h` one after the other (with temporal tiles,
            then `blend_t`): weights 1 − y/extent and y/extent, each product and sum rounded to the tiles' dtype.
            "overlap_add" is Σ w·tile / Σ w with w a product of ramps (y + ½)/extent that are never 0, in float32
            (float64 for float64) and rounded once: it depends on no order, and has no seams at the corners, where
            four tiles meet.
        size: Crops the result, to `(height, width)` or `(frames, height, width)`.
        clamp: The least and the largest value of the result, such as `(-1, 1)`. None: as it comes.
        out: A contiguous tensor like the result to write into; not differentiable.

    Returns:
        A new contiguous tensor `(B, C, T, H, W)` or `(B, C, H, W)` in the tiles' dtype. Where tiles do not meet it has
        their bits.

    Raises:
        TypeError: `tiles` is no list of rows of tensors, or dtypes are unknown or differ.
        ValueError: shapes or devices do not fit together; a tile shares more with its two neighbours than it has;
            `size` is larger than what there is; `mode` is unknown.

    Differentiable in the tiles, once; the gradient of a clamped value is 0.

    Source: diffusers 0.42, `models/autoencoders/autoencoder_kl_wan.py`, `AutoencoderKLWan.tiled_decode`.

    Example:
        >>> import torch, latentfast
        >>> left, right = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
        >>> latentfast.stitch([[left, right]], (0, 2))
        tensor([[[[0.0000, 0.0000, 0.0000, 0.5000, 1.0000, 1.0000]]]])
    """
    if mode not in SEAMS:
        raise ValueError(f"mode must be 'sequential' or 'overlap_add', got {mode!r}")
    clips, temporal = _grid(tiles)
    first = clips[0][0][0]
    image = first.ndim == 4
    shared = _integers("overlap", overlap, temporal, "(frames, rows, columns)" if temporal else "(rows, columns)")
    axes = (
        _axis(0, [1 if image else rows[0][0].shape[2] for rows in clips], shared),
        _axis(1, [row[0].shape[-2] for row in clips[0]], shared),
        _axis(2, [tile.shape[-1] for tile in clips[0][0]], shared),
    )
    _check_shapes(clips, axes, temporal)
    whole = tuple(axis.whole for axis in axes)
    wanted = _cropped(size, whole, image, temporal)
    bounds = _bounds(clamp)
    parts = [tile if tile.is_contiguous() else tile.contiguous() for rows in clips for row in rows for tile in row]
    if image:
        parts = [tile.unsqueeze(2) for tile in parts]
    shape = (*first.shape[:2], *wanted)
    if out is None and torch.is_grad_enabled() and any(tile.requires_grad for tile in parts):
        result = _Stitch.apply(axes, shared, SEAMS[mode], wanted, bounds, *parts)
        return result.squeeze(2) if image else result
    if out is None:
        result = first.new_empty(shape)
    else:
        flat = (*shape[:2], *wanted[1:]) if image else shape
        out = _checks.output(out, flat, "tiles[0][0]", first, tuple(parts))
        result = out.unsqueeze(2) if image else out
    implementation("stitch", first)(parts, [len(axis.sizes) for axis in axes], shared, SEAMS[mode], bounds, result)
    return out if out is not None else result.squeeze(2) if image else result


def _is_list(x: object) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _grid(tiles: Rows | Sequence[Rows]) -> tuple[list[Rows], bool]:
    """Temporal tiles of rows of tensors, and whether there were temporal ones."""
    inner: object = tiles
    depth = 0
    while _is_list(inner):
        if not inner:
            raise ValueError("tiles must hold at least one tile in every list, got an empty one")
        inner = inner[0]  # type: ignore[index]
        depth += 1
    if depth not in (2, 3):
        raise TypeError(
            "tiles must be a list of rows of tensors, or a list of such lists for temporal tiles, got "
            + (type(tiles).__name__ if depth == 0 else f"lists within lists {depth} deep")
        )
    clips: list[Rows] = list(tiles) if depth == 3 else [tiles]  # type: ignore[arg-type, list-item]
    rows, columns = len(clips[0]), len(clips[0][0])
    for lines in clips:
        if not _is_list(lines) or len(lines) != rows:
            raise ValueError(f"tiles must hold {rows} rows in each temporal tile, as the first does")
        for row in lines:
            if not _is_list(row) or len(row) != columns:
                raise ValueError(f"tiles must hold {columns} tiles in every row, as the first does")
    temporal = depth == 3
    first = _checks.latent(_name(temporal, 0, 0, 0), clips[0][0][0])
    if first.ndim != 5 and (temporal or first.ndim != 4):
        expected = "5 dimensions (B, C, T, h, w)" if temporal else "4 or 5 dimensions (B, C, h, w) or (B, C, T, h, w)"
        raise ValueError(f"{_name(temporal, 0, 0, 0)} must have {expected}, got shape {tuple(first.shape)}")
    for k, lines in enumerate(clips):
        for i, row in enumerate(lines):
            for j, tile in enumerate(row):
                _checks.latent(_name(temporal, k, i, j), tile)
                if tile.ndim != first.ndim:
                    raise ValueError(
                        f"{_name(temporal, k, i, j)} must have {first.ndim} dimensions, as the first tile, got shape "
                        f"{tuple(tile.shape)}"
                    )
    return clips, temporal


def _axis(number: int, sizes: list[int], overlap: Sequence[int]) -> _Axis:
    """The tiles along a dimension; an error if one of them meets more than its neighbours."""
    extents = [0, *(min(a, b, overlap[number]) for a, b in pairwise(sizes))]
    for k in range(1, len(sizes) - 1):
        if extents[k] + extents[k + 1] > sizes[k]:
            raise ValueError(
                f"overlap must be at most half a tile: a tile of {sizes[k]} {_AXES[number]} would share {extents[k]} "
                f"with the one before and {extents[k + 1]} with the one after it"
            )
    starts = [0]
    for size, after in zip(sizes, extents[1:], strict=False):
        starts.append(starts[-1] + size - after)
    return _Axis(sizes, extents, starts)


def _check_shapes(clips: Sequence[Rows], axes: Sequence[_Axis], temporal: bool) -> None:
    """An error unless each tile fits to its row, its column and the first tile."""
    first = clips[0][0][0]
    batch, dtype, device = first.shape[:2], first.dtype, first.device
    for k, rows in enumerate(clips):
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                own = (axes[0].sizes[k], axes[1].sizes[i], axes[2].sizes[j])
                expected = (*batch, *own[5 - first.ndim :])
                if tile.shape != expected:
                    raise ValueError(
                        f"{_name(temporal, k, i, j)} must have shape {tuple(expected)}, as high as its row's and as "
                        f"wide as its column's first tile, got {tuple(tile.shape)}"
                    )
                if tile.dtype != dtype or tile.device != device:
                    _checks.same_kind(_name(temporal, k, i, j), tile, "the first tile", first)


def _name(temporal: bool, k: int, i: int, j: int) -> str:
    return f"tiles[{k}][{i}][{j}]" if temporal else f"tiles[{i}][{j}]"


def _integers(name: str, values: Sequence[int], temporal: bool, expected: str) -> list[int]:
    """Two or three integers ≥ 0, as (frames, rows, columns)."""
    if not _is_list(values) or len(values) != 2 + temporal:
        raise ValueError(f"{name} must be {expected}, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be {expected} as integers, got {values!r}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {values!r}")
    return [0] * (1 - temporal) + list(values)


def _cropped(size: Sequence[int] | None, whole: tuple[int, ...], image: bool, temporal: bool) -> tuple[int, ...]:
    """The result's (frames, height, width)."""
    if size is None:
        return whole
    with_frames = not image and _is_list(size) and len(size) == 3
    expected = "(height, width)" if image else "(height, width) or (frames, height, width)"
    wanted = _integers("size", size, with_frames, expected)
    if not with_frames:
        wanted[0] = whole[0]
    if any(n > most for n, most in zip(wanted, whole, strict=True)):
        raise ValueError(f"size must be at most {whole[0 if with_frames else 1 :]}, what the tiles cover, got {size!r}")
    return tuple(wanted)


def _bounds(clamp: tuple[float, float] | None) -> list[float]:
    if clamp is None:
        return []
    try:
        low, high = (float(bound) for bound in clamp)
    except (TypeError, ValueError):
        raise TypeError(f"clamp must be two floats, got {clamp!r}") from None
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ValueError(f"clamp must be (least, largest), got {clamp!r}")
    return [low, high]
