"""How much of a clip a preview shows, chosen so that a move of a slider is on screen within a budget of time."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Budget", "Quality", "qualities"]

#: Shares of the full height and width, and each how many-th latent frame: first pixels go, then frames.
_LADDER = ((1.0, 1), (0.75, 1), (0.5, 1), (0.5, 2), (0.375, 2), (0.25, 2), (0.25, 4), (0.125, 4))


@dataclass(frozen=True)
class Quality:
    """How much of a clip a preview shows.

    Attributes:
        size: Height and width of its frames in pixels.
        every: It has each so many-th latent frame: 1 is all of them.
    """

    size: tuple[int, int]
    every: int = 1

    def frames(self, count: int) -> int:
        """How many of `count` latent frames are shown."""
        return -(-count // self.every)


def qualities(size: tuple[int, int], frames: int) -> list[Quality]:
    """The qualities for clips of `frames` latent frames whose full size is `size`, best first."""
    made = [
        Quality((max(1, round(size[0] * share)), max(1, round(size[1] * share))), min(every, max(1, frames)))
        for share, every in _LADDER
    ]
    return list(dict.fromkeys(made))


class Budget:
    """Chooses the best quality whose previews are made in time.

    A move waits for the preview that is being made, and then for its own: so one may take half of the budget. What a
    quality takes is the running mean of what it took; of one that was never tried, what the nearest better one took,
    by its pixels.

    Args:
        seconds: From a move to its picture.
        choices: The qualities, best first.
        frames: Latent frames of a clip.
    """

    #: Weight of the newest preview in the running mean.
    NEWEST = 0.3

    def __init__(self, seconds: float, choices: list[Quality], frames: int) -> None:
        self._seconds = seconds
        self.choices = choices
        self._pixels = [quality.size[0] * quality.size[1] * quality.frames(frames) for quality in choices]
        self._took: dict[int, float] = {}

    def choose(self) -> Quality:
        """The quality for the next preview; the best one as long as nothing is known."""
        for index in range(len(self.choices)):
            expected = self._expected(index)
            if expected is None or 2 * expected <= self._seconds:
                return self.choices[index]
        return self.choices[-1]

    def took(self, quality: Quality, seconds: float) -> None:
        """A preview of this quality took so long."""
        index = self.choices.index(quality)
        before = self._took.get(index, seconds)
        self._took[index] = before + self.NEWEST * (seconds - before)

    def _expected(self, index: int) -> float | None:
        for known in range(index, -1, -1):
            if known in self._took:
                return self._took[known] * self._pixels[index] / self._pixels[known]
        return None
