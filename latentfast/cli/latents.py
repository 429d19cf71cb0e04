"""What the commands do with latents: paths between clips, edits confined to a region, mending of a disturbed clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import latentfast
from latentfast.cli.sampler import Sampler
from latentfast.recipe import smoothed

__all__ = [
    "Mended",
    "changed_region",
    "difference",
    "disturb",
    "latent_path",
    "mend",
    "mix_prompts",
    "outside_keeps_bits",
    "still_region",
]


def latent_path(first: Tensor, last: Tensor, count: int) -> Tensor:
    """``count`` latents from ``first`` to ``last``, ends included, on the great circle: ``(count, *sample)``.

    Gaussian noise of n values has a length near sqrt(n); half way on a straight line between two the length is 0.71
    of that, which no denoiser was trained on. Slerp keeps it.
    """
    return latentfast.slerp_path(first, last, _even(count)).flatten(0, 1)


def mix_prompts(sampler: Sampler, prompts: Sequence[str], count: int) -> Tensor:
    """``count`` rows of embeddings from the first of two prompts to the second, on a straight line."""
    first, second = sampler.embed(prompts).chunk(2)
    return latentfast.lerp_path(first, second, _even(count)).flatten(0, 1)


def _even(count: int) -> list[float]:
    return [index / (count - 1) for index in range(count)]


def difference(sampler: Sampler, *, strength: float, observe: float) -> Callable[[int, Tensor, Tensor], Tensor | None]:
    """A mask for `localized_edit` that needs no attention: where the two clips come apart.

    Both prompts run free for the first ``observe`` of the acting steps, and where their latents have come apart is what
    the edit is about (the idea of DiffEdit, Couairon et al. 2022, arXiv:2210.11427, read from the latents instead of
    the predictions).

    Args:
        sampler: whose steps are watched.
        strength: share of the steps, from the end, in which the edit acts.
        observe: share of the acting steps after which the region is fixed.
    """
    follow = min(round((1 - strength) * sampler.steps), sampler.steps - 1)
    decide = follow + max(1, round(observe * (sampler.steps - follow)))
    found: list[Tensor] = []

    def mask(step: int, source: Tensor, edited: Tensor) -> Tensor | None:
        if step < follow:
            return None
        if step + 1 < decide:
            return torch.ones_like(source[:, :1, :1, :1, :1])
        if not found:
            found.append(changed_region(source, edited, frame_dim=sampler.frame_dim(source)))
        return found[0]

    return mask


def changed_region(a: Tensor, b: Tensor, *, frame_dim: int = 2, grow: int = 1) -> Tensor:
    """Where two latents differ: a mask of zeros and ones, one for all channels, for every frame its own.

    The root mean square difference over the channels, smoothed over 3 by 3 cells, is cut by Otsu's threshold and the
    region grown by ``grow`` cells (a cell next to the shape holds its edge).

    Args:
        a, b: latents ``(B, C, T, H, W)``, or ``(B, T, C, H, W)`` with ``frame_dim=1``.
        frame_dim: the frames' dimension.
        grow: cells to add all around.

    Returns:
        ``(B, 1, T, H, W)`` (or ``(B, T, 1, H, W)``), in the dtype of ``a``.
    """
    channel_dim = 3 - frame_dim
    rms = (b - a).float().square().mean(channel_dim).sqrt()
    flat = F.avg_pool2d(rms.flatten(0, 1)[:, None], 3, stride=1, padding=1, count_include_pad=False)
    region = (flat > _otsu(flat)).to(a.dtype)
    region = F.max_pool2d(region, 2 * grow + 1, stride=1, padding=grow)
    return region[:, 0].view(rms.shape).unsqueeze(channel_dim)


def _otsu(values: Tensor) -> Tensor:
    """The threshold that splits values into the two classes with the largest variance between them (Otsu 1979)."""
    ordered = values.double().flatten().sort().values
    count = len(ordered)
    below = torch.arange(1, count, device=ordered.device)
    sums = ordered.cumsum(0)
    gap = (sums[-1] - sums[:-1]) / (count - below) - sums[:-1] / below
    best = (below * (count - below) * gap.square()).argmax()
    return ((ordered[best] + ordered[best + 1]) / 2).to(values.dtype)


def outside_keeps_bits(source: Tensor, edited: Tensor, mask: Tensor) -> tuple[int, int]:
    """(how many values lie outside the mask, how many of them have the source's bits)."""
    outside = (mask == 0).expand_as(source)
    width = source.element_size()
    pairs = [x[outside].contiguous().view(torch.uint8).view(-1, width) for x in (source, edited)]
    return int(outside.sum()), int((pairs[0] == pairs[1]).all(1).sum())


def disturb(latents: Tensor, *, seed: int, flicker: float, jitter: float, frame_dim: int = 2) -> Tensor:
    """Shake a clip frame by frame: an offset for every frame and channel, and noise on every value.

    Args:
        latents: clean latents of one clip, standard deviation about 1.
        seed: of the disturbance.
        flicker: standard deviation of the offsets.
        jitter: standard deviation of the noise.
        frame_dim: the frames' dimension.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    offsets = torch.randn([*latents.shape[:3], 1, 1], generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return latents + (flicker * offsets + jitter * noise).to(latents)


@dataclass(frozen=True)
class Mended:
    """A mended clip and the way there.

    Attributes:
        latents: the mended clip.
        losses: the objective before the first step and after each.
        still: the region whose frames were pulled together.
    """

    latents: Tensor
    losses: list[float]
    still: Tensor


def still_region(latents: Tensor, *, cut: float = 2.5, frame_dim: int = 2) -> Tensor:
    """Where a clip stands still, judged from itself: 1 where a cell of a frame is like that cell at other times.

    A cell's distance from its own median over time is, over the channels, much the same everywhere if only flicker
    moves it; where something passes it is several times larger.

    Args:
        latents: ``(B, C, T, H, W)``.
        cut: largest distance of a still cell, in medians of all cells' distances.
        frame_dim: the frames' dimension.

    Returns:
        Zeros and ones, the shape of ``latents`` with one channel.
    """
    usual = latents.median(frame_dim, keepdim=True).values
    distance = (latents - usual).square().mean(3 - frame_dim, keepdim=True).sqrt()
    return (distance <= cut * distance.median()).to(latents.dtype)


def mend(
    disturbed: Tensor,
    *,
    steps: int = 40,
    data: float = 0.05,
    frame_dim: int = 2,
    on_step: Callable[[], None] = lambda: None,
) -> Mended:
    """Calm a flickering clip by gradient steps on its temporal loss, without freezing what moves.

    Lowers ``temporal_loss(x, mask=still) + data * mean((x - disturbed)²)`` by :func:`latentfast.recipe.smoothed`, where
    ``still`` is :func:`still_region` of the disturbed clip. The mask spares what moves, the data term keeps the rest
    near what was given. No clean clip is used.

    Args:
        disturbed: latents ``(B, C, T, H, W)``.
        steps: gradient steps, each one call of :func:`latentfast.temporal_loss_and_grad`.
        data: weight of the data term.
        frame_dim: the frames' dimension.
        on_step: called after each step.
    """
    still = still_region(disturbed, frame_dim=frame_dim)
    frames = disturbed.shape[frame_dim]
    both_still = still.narrow(frame_dim, 1, frames - 1) * still.narrow(frame_dim, 0, frames - 1)
    terms = float(both_still.sum()) * disturbed.shape[3 - frame_dim]
    losses: list[Tensor] = []

    def objective(x: Tensor) -> Tensor:
        loss = latentfast.temporal_loss(x, mask=still, frame_dim=frame_dim)
        return loss + data * (x - disturbed).square().mean()

    def each(x: Tensor) -> None:
        losses.append(objective(x))
        on_step()

    # smoothed() takes sums where the objective above has means
    weight = data * terms / disturbed.numel()
    made = smoothed(disturbed, None, still, steps=steps, data=weight, frame_dim=frame_dim, on_step=each)
    return Mended(made, torch.stack([objective(disturbed), *losses]).tolist(), still)
