"""Tiles: the operator's signature in front of the reference."""

from latentfast import reference
from latentfast._operators import SEAMS

_NAMES = {number: name for name, number in SEAMS.items()}


def stitch(tiles, grid, overlap, kind, clamp, out) -> None:
    _, rows, columns = grid
    lines = [tiles[begin : begin + columns] for begin in range(0, len(tiles), columns)]
    clips = [lines[begin : begin + rows] for begin in range(0, len(lines), rows)]
    size = out.shape[2:]
    out.copy_(reference.tiles.stitch(clips, overlap, mode=_NAMES[kind], size=size, clamp=tuple(clamp) or None))
