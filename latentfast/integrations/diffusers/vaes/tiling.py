"""Tiles: how a family of autoencoders cuts a dimension, and coding tile by tile with all seams in one launch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

import latentfast
from latentfast.ops._checks import DTYPES

Code = Callable[[Tensor], Tensor]


class Axis(NamedTuple):
    """How one dimension is cut, and what becomes of it: `up` of the result for `down` of the input."""

    size: int  # of a tile, in the input
    stride: int  # a tile begins at every stride, in the input
    kept: int  # of a tile, in the result
    shared: int  # with the tile before, in the result
    up: int
    down: int

    @classmethod
    def of(cls, size: int, stride: int, kept: int, shared: int, ratio: int, decodes: bool) -> "Axis":
        """Of a coder that compresses by `ratio`."""
        return cls(size, stride, kept, shared, *((ratio, 1) if decodes else (1, ratio)))

    def becomes(self, length: int) -> int:
        """What so much of the input is in the result."""
        return length * self.up // self.down

    def meets(self, length: int) -> bool:
        """Whether tiles of a whole of this length meet in the result where they were cut, as `stitch` puts them.

        With sizes that the compression does not divide, diffusers cuts and puts them by different strides.
        """
        return (
            self.stride * self.up == self.kept * self.down
            and self.size * self.up == (self.kept + self.shared) * self.down
            and length * self.up % self.down == 0
            and 0 <= self.shared <= self.kept != 0
        )


def supported(x: Tensor) -> bool:
    """Whether there are kernels for it."""
    return x.dtype in DTYPES and x.device.type in ("cpu", "cuda")


def coded_in_tiles(
    x: Tensor, axes: Sequence[Axis], code: Code, clamp: tuple[float, float] | None = None
) -> Tensor | None:
    """All tiles of the last two dimensions coded, and put together in one launch.

    Args:
        x: What to encode or decode, `(B, C, T, H, W)` or `(B, C, H, W)`.
        axes: How its height and its width are cut.
        code: Encodes or decodes one tile.
        clamp: The least and the largest value of the result; None: as it comes.

    Returns:
        What diffusers' loops over rows and columns make of it, with their bits; None where tiles do not meet as they
        were cut, or the kernels do not take them: that is left to the loops.
    """
    height, width = axes
    if not (supported(x) and height.meets(x.shape[-2]) and width.meets(x.shape[-1])):
        return None
    rows: list[list[Tensor]] = []
    for i in range(0, x.shape[-2], height.stride):
        rows.append([])
        for j in range(0, x.shape[-1], width.stride):
            tile = x[..., i : i + height.size, j : j + width.size]
            coded = code(tile)
            if coded.shape[-2:] != (height.becomes(tile.shape[-2]), width.becomes(tile.shape[-1])):
                return None  # this coder's compression is not what its autoencoder says
            rows[-1].append(coded)
    return latentfast.stitch(rows, (height.shared, width.shared), clamp=clamp)


def coded_in_clips(x: Tensor, axis: Axis, code: Code, drops_last: bool = False) -> Tensor | None:
    """The same over time: clips that share frames, each coded as a whole, put together in one launch.

    A clip has a frame more than `axis` says, since the first frame stands for itself alone; all clips but the first
    lose one frame of the result again.

    Args:
        x: `(B, C, T, H, W)`.
        axis: How time is cut.
        code: Encodes or decodes one clip.
        drops_last: Whether a later clip loses its last frame rather than its first.
    """
    frames = x.shape[2] - 1
    if not (supported(x) and axis.meets(frames)):
        return None
    clips = []
    for i in range(0, frames + 1, axis.stride):
        part = x[:, :, i : i + axis.size + 1]
        clip = code(part)
        if clip.shape[2] != axis.becomes(part.shape[2] - 1) + 1:
            return None
        if i > 0:  # made contiguous here, so that no whole clip is held for it
            clip = (clip[:, :, :-1] if drops_last else clip[:, :, 1:]).contiguous()
        clips.append([[clip]])
    return latentfast.stitch(clips, (axis.shared, 0, 0), size=(axis.becomes(frames) + 1, *clips[0][0][0].shape[3:]))
