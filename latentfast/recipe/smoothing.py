"""Clips made calmer by gradient steps on the temporal loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import latentfast
from latentfast.ops import _checks
from latentfast.ops._sums import per_sample

__all__ = ["smoothed"]


def smoothed(
    latents: Tensor,
    ref: Tensor | None = None,
    still: Tensor | None = None,
    *,
    steps: int,
    first: float = 1.0,
    second: float = 0.0,
    data: float = 0.05,
    frame_dim: int = 2,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The clip after some steps towards the least of first · Σ w1 d1² + second · Σ w2 d2² + data · Σ (x − latents)².

    d1, d2 are the first and second differences over time of x, or of x − ref, and w1, w2 their weights by the mask
    `still`, as `latentfast.temporal_loss` has them. Accelerated gradient descent (Nesterov 1983, with the momentum of
    Su, Boyd and Candès 2016, section 1), two launches a step without a mask, in float32 at least. Its step is the
    inverse of a bound of the curvature, so that it cannot overshoot.

    Args:
        latents: `(B, C, T, H, W)`, or of any shape with the batch first; float32, float16, bfloat16 or float64.
        ref: Like `latents`: the clip before an edit, whose own motion is to stay.
        still: In [0, 1], broadcastable to `latents`: which cells are to be alike from frame to frame. None: all.
        steps: How many.
        first: Weight of the first differences, not negative.
        second: Weight of the second differences, not negative.
        data: Weight of what was given, not negative: the smaller, the calmer.
        frame_dim: The dimension of time.
        on_step: Called with x after each step.

    Returns:
        A new contiguous tensor like `latents`, rounded once.
    """
    wide = _checks.wide(_checks.latent("latents", latents).dtype)
    if not -latents.ndim <= frame_dim < latents.ndim:
        raise ValueError(f"frame_dim must name a dimension of {latents.ndim}-D latents, got {frame_dim}")
    frames = latents.shape[frame_dim]
    terms = [term for term in (("first", first, 1), ("second", second, 2)) if term[1] and frames > term[2]]
    if not (steps and terms and latents.numel()):
        return latents.clone(memory_format=torch.contiguous_format)
    start, other = latents.to(wide).contiguous(), None if ref is None else ref.to(wide)
    # Squared norms of the first and second differences are at most 4 and 16, a square's curvature is 2.
    curvature = 2 * data + sum(2 * weight * 4**gap for _, weight, gap in terms)
    pull = 2 * data / curvature
    counts = [_count(start, still, gap, frame_dim) for _, _, gap in terms]
    x = ahead = start
    for step in range(steps):
        slope = _slope(ahead, other, still, terms, counts, frame_dim)
        moved = (1 - pull, -1 / curvature, pull, 0.0)
        momentum = step / (step + 3)
        onward = (*((1 + momentum) * weight for weight in moved[:3]), -momentum)
        x, ahead = latentfast.combine([ahead, slope, start, x], [moved, onward])
        if on_step is not None:
            on_step(x.to(latents.dtype))
    return x.to(latents.dtype)


_Term = tuple[str, float, int]


def _count(x: Tensor, still: Tensor | None, gap: int, frame_dim: int) -> Any:
    """What `temporal_loss` divides a sample's sum of differences by: their weights, on the host if that is their
    number."""
    kept = x.shape[frame_dim] - gap
    if still is None:
        return float(x[0].numel() // x.shape[frame_dim] * kept)
    weights = still.to(x.dtype).expand(x.shape)
    both = weights.narrow(frame_dim, 0, kept)
    for later in range(1, gap + 1):
        both = both * weights.narrow(frame_dim, later, kept)
    return per_sample(both).view(-1, *[1] * (x.ndim - 1))


def _slope(
    x: Tensor,
    ref: Tensor | None,
    still: Tensor | None,
    terms: list[_Term],
    counts: list[Any],
    frame_dim: int,
) -> Tensor:
    """The gradient of the weighted sums of differences."""
    if still is None:  # times their numbers, the means of `temporal_loss` are sums
        sums = {name: weight * float(count) for (name, weight, _), count in zip(terms, counts, strict=True)}
        return latentfast.temporal_loss_and_grad(
            x, ref, first=sums.get("first", 0.0), second=sums.get("second", 0.0), frame_dim=frame_dim, reduction="none"
        )[1]
    slope = torch.zeros_like(x)
    for (name, weight, _), count in zip(terms, counts, strict=True):
        first, second = (weight, 0.0) if name == "first" else (0.0, weight)
        mean = latentfast.temporal_loss_and_grad(
            x, ref, still, first=first, second=second, frame_dim=frame_dim, reduction="none"
        )[1]
        slope.addcmul_(mean, count)
    return slope
