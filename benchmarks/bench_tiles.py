"""Tiles: what of them is measured, at which sizes.

The shapes are the results', (B, 3, T, H, W). Every pixel of every tile is in the result, so the floor is each tile read
once and the result written once.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import latentfast
from latentfast.benchmarks import peers
from latentfast.benchmarks.operation import Baseline, Call, Case, Operation
from latentfast.reference import tiles as reference

#: Results (C, T, H, W): videos as a VAE decodes them.
SIZES = {
    "wan720": (3, 81, 720, 1280),
    "hunyuan720": (3, 129, 720, 1280),
    "small": (3, 9, 192, 192),  # a graph that torch.compile can still make of the loops, in a minute
}


class Cut(NamedTuple):
    """How diffusers cuts a dimension: a tile begins at every stride and shares `overlap` with the next."""

    count: int
    stride: int
    overlap: int

    def sizes(self, whole: int) -> list[int]:
        """The tiles' sizes; for a smoke run's few pixels as many tiles, that share one if there is one for each."""
        overlap = self.overlap
        begins = [k * self.stride for k in range(self.count)]
        if -(-whole // self.stride) != self.count:
            begins = [k * whole // self.count for k in range(self.count)]
            overlap = min(overlap, 1) if whole >= self.count else 0
        ends = [min(begin + overlap, whole) for begin in begins[1:]] + [whole]
        return [end - begin for begin, end in zip(begins, ends, strict=True)]

    def shared(self, sizes: Sequence[int]) -> int:
        """The overlap of tiles of these sizes."""
        if max(sizes) > self.stride:
            return self.overlap
        return min(self.overlap, 1) if min(sizes) > 0 else 0


WHOLE = Cut(1, 1 << 30, 0)
#: (frames, rows, columns). Wan: tiles of 256 and a stride of 192 pixels, 28 of them. HunyuanVideo: those in each of 11
#: temporal tiles of 16 frames with a stride of 12 (its first has one frame more, which changes no seam).
WAN = (WHOLE, Cut(4, 192, 64), Cut(7, 192, 64))
HUNYUAN = (Cut(11, 12, 4), Cut(4, 192, 64), Cut(7, 192, 64))
SMALL = (WHOLE, Cut(2, 96, 16), Cut(2, 96, 16))


def _not_compiled(*tiles: Tensor) -> Tensor:
    raise RuntimeError("a graph of a node for each row and column of the seams takes the compiler too long")


def _stitch(variant: str, cuts: Sequence[Cut], mode: str = "sequential", compile_loops: bool = False) -> Operation:
    frames, rows, columns = (cut.count for cut in cuts)
    temporal = frames > 1

    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        sizes = [cut.sizes(n) for cut, n in zip(cuts, shape[2:], strict=True)]
        return tuple(
            torch.randn((*shape[:2], t, h, w), device=device, dtype=dtype)
            for t in sizes[0] for h in sizes[1] for w in sizes[2]
        )  # fmt: skip

    def on_grid(function: Call) -> Call:
        def call(*tiles: Tensor) -> Tensor:
            lines = [list(tiles[k : k + columns]) for k in range(0, len(tiles), columns)]
            clips = [lines[k : k + rows] for k in range(0, len(lines), rows)]
            sizes = (
                [rows_of[0][0].shape[2] for rows_of in clips],
                [row[0].shape[3] for row in clips[0]],
                [tile.shape[4] for tile in clips[0][0]],
            )
            shared = [cut.shared(n) for cut, n in zip(cuts, sizes, strict=True)]
            return function(clips if temporal else clips[0], shared if temporal else shared[1:])

        return call

    loops = on_grid(partial(reference.stitch, mode=mode))
    return Operation(
        stem="tiles",
        name="stitch",
        variant=variant,
        inputs=inputs,
        batch_dims=(0,) * (frames * rows * columns),
        outputs=(0,),
        ours=on_grid(partial(latentfast.stitch, mode=mode)),
        reference=Baseline(loops, "latentfast.reference", None if compile_loops else lambda: _not_compiled),
        field=Baseline(
            on_grid(peers.stitch if mode == "sequential" else peers.overlap_add), "a seam at a time, on copies"
        ),
        peer=Baseline(on_grid(peers.diffusers_stitch), "diffusers' blend_v, blend_h, blend_t on copies of the tiles")
        if mode == "sequential"
        else None,
        sizes=SIZES,
    )


STITCH, TEMPORAL = _stitch("", WAN), _stitch("temporal", HUNYUAN)
OVERLAP_ADD = _stitch("overlap_add", WAN, "overlap_add")
SMALL_STITCH = _stitch("", SMALL, compile_loops=True)
SMALL_OVERLAP_ADD = _stitch("overlap_add", SMALL, "overlap_add", compile_loops=True)

CASES = [Case(STITCH, "wan720", 1), Case(OVERLAP_ADD, "wan720", 1), Case(TEMPORAL, "hunyuan720", 1)]
CPU_CASES = [Case(operation, "small", 1, torch.float32) for operation in (SMALL_STITCH, SMALL_OVERLAP_ADD)]
