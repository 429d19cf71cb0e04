"""Tiles of a decoder: the names t00, t01, … of one another's neighbours."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import Draw
from tests.operations.operation import Operation, Shape


@dataclass(frozen=True)
class Stitch(Operation):
    """`stitch` with its tiles as arguments of their own: `grid` (T, H, W) of them."""

    grid: tuple[int, int, int] = (1, 2, 2)

    def _taking_tiles(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(**arguments) -> Tensor:
            frames, rows, columns = self.grid
            tiles = [
                [[arguments.pop(f"t{k}{i}{j}") for j in range(columns)] for i in range(rows)] for k in range(frames)
            ]
            return function(tiles if frames > 1 else tiles[0], **self.options, **arguments)

        return call

    @property
    def call(self) -> Callable[..., Tensor]:
        return self._taking_tiles(latentfast.stitch)

    @property
    def spec(self) -> Callable[..., Tensor]:
        return self._taking_tiles(reference.tiles.stitch)


def _tiles(grid: tuple[int, int, int], draw: Draw, shape: Shape) -> dict[str, Tensor]:
    """Full tiles, the last row and column of them half as large."""

    def size(d: int, at: int) -> int:
        return (shape[2 + d] + 1) // 2 if at == grid[d] - 1 > 0 else shape[2 + d]

    return {
        f"t{k}{i}{j}": draw.normal(*shape[:2], size(0, k), size(1, i), size(2, j))
        for k in range(grid[0])
        for i in range(grid[1])
        for j in range(grid[2])
    }


def _stitch(name: str, grid: tuple[int, int, int], mode: str, **options) -> Stitch:
    names = tuple(_tiles(grid, Draw(), (1, 1, 1, 1, 1)))
    return Stitch(
        name, "stitch", partial(_tiles, grid), dict.fromkeys(names, 0), options={"mode": mode, **options},
        differentiable=names, latent_names=names, grid=grid, rounds_once=mode == "overlap_add",
    )  # fmt: skip


STITCHES = [
    _stitch("stitch", (1, 2, 2), "sequential", overlap=(2, 3)),
    _stitch("stitch temporal", (2, 2, 2), "sequential", overlap=(1, 2, 2)),
    _stitch("stitch overlap_add", (1, 2, 2), "overlap_add", overlap=(2, 3)),
    _stitch("stitch overlap_add temporal", (2, 1, 2), "overlap_add", overlap=(2, 0, 4)),
]
