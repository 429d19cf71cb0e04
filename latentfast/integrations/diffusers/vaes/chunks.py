"""Chunks: a clip that is coded by groups of frames, each group with what the convolutions kept of the one before."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

#: Codes a group of frames: (group, cache or None for the first) → (result, cache for the next).
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


def coded(step: Step, groups: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each group's result."""
    cache = None
    for group in groups:
        result, cache = step(group, cache)
        yield result


def joined(results: Iterable[Tensor]) -> Tensor:
    """All groups' results after one another, gradients too: one launch, and for a moment everything twice."""
    parts = list(results)
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def in_one_buffer(results: Iterable[Tensor], count: int, clamp: tuple[float, float] | None = None) -> Tensor:
    """All groups' results after one another, each written where it belongs as soon as it is there.

    Beside the whole there is but one group, where `torch.cat` of a list holds everything twice, and growing by
    `torch.cat` moves the frames before once more with every group.

    Args:
        results: `(B, C, t, H, W)` each; all but the first have as many frames. No gradient passes. The first must stay;
            of the others each is read before the next is asked for.
        count: Of results.
        clamp: The least and the largest value.
    """
    remaining = iter(results)
    first = next(remaining)
    if count == 1:
        return first if clamp is None else first.clamp(*clamp)
    second = next(remaining)
    batch, channels, frames, *size = first.shape
    whole = first.new_empty((batch, channels, frames + (count - 1) * second.shape[2], *size))
    at = 0
    for part in chain((first, second), remaining):
        place = whole[:, :, at : at + part.shape[2]]
        at += part.shape[2]
        if clamp is None:
            place.copy_(part)
        else:
            torch.clamp(part, *clamp, out=place)
    return whole
