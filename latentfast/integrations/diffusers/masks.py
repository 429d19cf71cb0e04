"""Masks at the latents' size from attention on a model's coarser grid of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from latentfast.ops.mask import heatmap_to_mask

__all__ = ["attention_mask", "dilated", "sharpen"]


def attention_mask(
    heat: Tensor, latents: Tensor, *, background: float = 0.7, dilate: int = 0, smooth_time: float = 0.0
) -> Tensor:
    """Where words are, cell by cell of the latents, of the attention paid to them.

    The maps are enlarged to the latents' size, each is weighted by its share of all maps (objects compete for a cell),
    and `sharpen` finds the outlines of all objects together in the latents themselves. Whose a cell is, the weighted
    maps alone decide: in the latents two objects of like colours may be one.

    Args:
        heat: Maps `(B, G, t, h, w)` of `AttentionCapture.maps`; the first is what is looked for, the others are what
            it must not be taken for.
        latents: `(B, C, T, H, W)`, of the same clips.
        background: See `sharpen`.
        dilate: Cells to add all around, in h and w, where no other object is: a cell beside the object's may hold its
            edge.
        smooth_time: Standard deviation, in frames of the tokens' grid, of a smoothing of the maps over time.

    Returns:
        A new tensor `(B, 1, T, H, W)` of zeros and ones, in the dtype of `latents`.

    Raises:
        ValueError: shapes or numbers do not fit.

    Example:
        >>> import torch
        >>> heat = torch.zeros(1, 1, 1, 2, 2)
        >>> heat[..., 0, 0] = 1.0
        >>> latents = torch.zeros(1, 1, 1, 4, 4)
        >>> latents[..., 0, :2] = 5.0  # the object: half of that token's four cells
        >>> attention_mask(heat, latents)[0, 0, 0]
        tensor([[1., 1., 0., 0.],
                [0., 0., 0., 0.],
                [0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    if heat.ndim != 5 or latents.ndim != 5 or heat.shape[0] != latents.shape[0] or heat.shape[1] < 1:
        raise ValueError(
            f"heat (B, G, t, h, w) and latents (B, C, T, H, W) must be of the same clips, got {tuple(heat.shape)} and "
            f"{tuple(latents.shape)}"
        )
    if dilate < 0:
        raise ValueError(f"dilate must not be negative, got {dilate}")
    flat, tiny = heat.flatten(2), torch.finfo(heat.dtype).tiny
    maps = heatmap_to_mask(flat, heat.shape[2:], latents.shape[2:], smooth_time=smooth_time)
    if heat.shape[1] > 1:
        # Shares are of the attention itself: maps that were stretched to [0, 1] can't be compared.
        low, high = (x[:, :, None, None, None] for x in flat.aminmax(dim=2))
        attention = low + (high - low) * maps
        maps = maps * attention / attention.sum(1, keepdim=True).clamp_min(tiny)
        maps = maps / maps.amax((2, 3, 4), keepdim=True).clamp_min(tiny)
    anything = sharpen(maps, latents, background=background).sum(1, keepdim=True) > 0.5
    owner = torch.zeros_like(maps).scatter_(1, maps.argmax(1, keepdim=True), 1.0)
    objects = (anything * owner).to(latents.dtype)
    found = dilated(objects[:, :1], dilate)
    if heat.shape[1] == 1:
        return found
    return found * (1 - objects[:, 1:].amax(1, keepdim=True))  # also where the margin reaches into another object


def dilated(mask: Tensor, cells: int) -> Tensor:
    """The largest value of a mask `(B, 1, T, H, W)` within `cells` elements in h and in w."""
    if not cells:
        return mask
    side = 2 * cells + 1
    return F.max_pool3d(mask, (1, side, side), stride=1, padding=(0, cells, cells))


def sharpen(maps: Tensor, latents: Tensor, *, background: float = 0.7, iterations: int = 2) -> Tensor:
    """Objects' outlines, found in the latents, of maps that say roughly where the objects are.

    A token is several cells of the latents wide, and a map's value at an object's edge is a mixture. So each object
    and the background becomes a normal distribution of the cells' channels (one covariance for all), the squared map
    the prior of a cell's membership, and expectation-maximisation finds both (Bishop 2006, Pattern Recognition and
    Machine Learning, section 9.2; in pictures the idea is GrabCut's, Rother et al. 2004).

    Args:
        maps: In [0, 1], `(B, G, T, H, W)`, one for each object.
        latents: `(B, C, T, H, W)`.
        background: The background's weight in (0, 1] on the maps' scale: the larger, the smaller the objects.
        iterations: Rounds of expectation-maximisation: with more of them the maps are forgotten.

    Returns:
        A new tensor `(B, G, T, H, W)`, float32: how likely a cell is of the object.

    Raises:
        ValueError: shapes or numbers do not fit.

    A composition of PyTorch's own operations that never waits for the device: it runs once for a mask.
    """
    if maps.ndim != 5 or latents.ndim != 5 or maps.shape[0] != latents.shape[0] or maps.shape[2:] != latents.shape[2:]:
        raise ValueError(
            f"maps (B, G, T, H, W) and latents (B, C, T, H, W) must be of the same clips and size, got "
            f"{tuple(maps.shape)} and {tuple(latents.shape)}"
        )
    if not 0 < background <= 1:
        raise ValueError(f"background must be above 0 and up to 1, got {background}")
    cells = latents.flatten(2).float()
    cells = cells - cells.mean(2, keepdim=True)
    prior = torch.cat([maps.flatten(2).float(), maps.new_full((), background).expand_as(maps[:, :1]).flatten(2)], 1)
    prior = 2 * prior.clamp_min(1e-3).log()
    member = prior.softmax(1)
    eye = torch.eye(cells.shape[1], device=cells.device)
    for _ in range(iterations):
        count = member.sum(2, keepdim=True).clamp_min(1e-6)
        mean = member @ cells.mT / count
        covariance = (cells @ cells.mT - mean.mT @ (count * mean)) / cells.shape[2]
        # Half way to a multiple of the identity: an object of few cells says little about 16 channels.
        variance = covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-12)
        # _ex, because solve() waits for the device to ask whether the matrix was regular
        slope = torch.linalg.solve_ex(covariance + variance * eye, mean.mT)[0].mT
        member = (slope @ cells - 0.5 * (slope * mean).sum(2, keepdim=True) + prior).softmax(1)
    return member[:, :-1].unflatten(2, maps.shape[2:]).contiguous()
