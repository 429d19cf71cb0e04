"""The seams of tiled VAE decoding: overlapping tiles put together to one image or clip."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from latentfast.reference._common import working

Rows = Sequence[Sequence[Tensor]]


def stitch(
    tiles: Rows | Sequence[Rows],
    overlap: Sequence[int],
    *,
    mode: str = "sequential",
    size: Sequence[int] | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """Rows of tiles `(B, C, T, h, w)` or `(B, C, h, w)`, or a list of such rows for each temporal tile, as one tensor.

    Neighbours share `extent = min(both sizes, overlap)` frames, rows or columns; a tile begins where the shared part
    of the one before begins. `overlap` is (H, W) or (T, H, W), `size` crops the result alike. "sequential" is the order
    of diffusers' `blend_v`, `blend_h` and `blend_t`, each product and sum rounded in the tiles' dtype; "overlap_add"
    is Σ w·tile / Σ w.
    """
    clips: list[Rows] = [tiles] if isinstance(tiles[0][0], Tensor) else list(tiles)  # type: ignore[list-item, arg-type]
    image = clips[0][0][0].ndim == 4
    if image:
        clips = [[[tile.unsqueeze(2) for tile in row] for row in clips[0]]]
    frames, height, width = (0, *overlap)[-3:]
    if mode == "sequential":
        out = _joined([_sequential(rows, height, width) for rows in clips], frames, 2)
    else:
        out = _overlap_add(clips, (frames, height, width))
    if size is not None:
        out = _region(out, [0] * len(size), size)
    if clamp is not None:
        out = out.clamp(*clamp)
    return (out.squeeze(2) if image else out).contiguous()


def _blended(a: Tensor, b: Tensor, overlap: int, dim: int) -> None:
    """`b` with its beginning faded in from the end of `a`, in place: diffusers' blend_v, blend_h and blend_t."""
    extent = min(a.shape[dim], b.shape[dim], overlap)
    for y in range(extent):
        before, own = a.select(dim, a.shape[dim] - extent + y), b.select(dim, y)
        own.copy_(before * (1 - y / extent) + own * (y / extent))


def _sequential(rows: Rows, height: int, width: int) -> Tensor:
    """A row after the other, left to right; each tile is blended into those before it as they have become by then."""
    rows = [[tile.clone() for tile in row] for row in rows]
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                _blended(rows[i - 1][j], tile, height, 3)
            if j > 0:
                _blended(row[j - 1], tile, width, 4)
    return _kept([_kept(row, width, 4) for row in rows], height, 3)


def _joined(parts: Sequence[Tensor], overlap: int, dim: int) -> Tensor:
    """One dimension alone: every part blended into the one before."""
    parts = [part.clone() for part in parts]
    for a, b in pairwise(parts):
        _blended(a, b, overlap, dim)
    return _kept(parts, overlap, dim)


def _kept(parts: Sequence[Tensor], overlap: int, dim: int) -> Tensor:
    """Each part up to where the next one begins."""
    sizes = [part.shape[dim] for part in parts]
    extents = _extents(sizes, overlap)
    kept = [n - shared for n, shared in zip(sizes, [*extents[1:], 0], strict=True)]
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, kept, strict=True)], dim)


def _extents(sizes: Sequence[int], overlap: int) -> list[int]:
    """What each tile shares with the one before it."""
    return [0, *(min(a, b, overlap) for a, b in pairwise(sizes))]


def _overlap_add(clips: Sequence[Rows], overlap: Sequence[int]) -> Tensor:
    first = clips[0][0][0]
    sizes = (
        [rows[0][0].shape[2] for rows in clips],
        [row[0].shape[3] for row in clips[0]],
        [tile.shape[4] for tile in clips[0][0]],
    )
    extents = [_extents(n, shared) for n, shared in zip(sizes, overlap, strict=True)]
    starts = [
        [sum(n[:k]) - sum(shared[: k + 1]) for k in range(len(n))] for n, shared in zip(sizes, extents, strict=True)
    ]
    whole = [sum(n) - sum(shared) for n, shared in zip(sizes, extents, strict=True)]
    total = working(first.new_zeros(first.shape[0], first.shape[1], *whole))
    weights = torch.zeros_like(total)
    for t, rows in enumerate(clips):
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                w = torch.ones((), dtype=total.dtype, device=total.device)
                for axis, k in enumerate((t, i, j)):
                    after = [*extents[axis], 0][k + 1]
                    w = w.unsqueeze(-1) * _window(sizes[axis][k], extents[axis][k], after, total)
                begins = [begin[k] for begin, k in zip(starts, (t, i, j), strict=True)]
                _region(total, begins, tile.shape[2:]).add_(w * working(tile))
                _region(weights, begins, tile.shape[2:]).add_(w)
    return (total / weights).to(first.dtype)


def _region(x: Tensor, begins: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A view of the last dimensions of `x`."""
    for dim, (begin, n) in enumerate(zip(begins, sizes, strict=True), x.ndim - len(sizes)):
        x = x.narrow(dim, begin, n)
    return x


def _window(size: int, before: int, after: int, like: Tensor) -> Tensor:
    """1, with ramps over what is shared at both ends: (y + ½)/extent up and the same down, so that neighbours' sum is
    1 and no weight is 0."""
    up, down = ((torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) / max(n, 1) for n in (before, after))
    return torch.cat((up, like.new_ones(size - before - after), 1 - down))
