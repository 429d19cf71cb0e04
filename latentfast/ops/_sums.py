"""Sums by torch with the same bits for any number of threads."""

import torch
from torch import Tensor


def total(x: Tensor) -> Tensor:
    """The sum of all elements: torch divides a sum into parts only where it has a single result, so first to 1024
    results.
    """
    flat = x.flatten()
    if flat.numel() <= 1024:
        return flat.sum()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024).sum(0).sum()


def summed_to(x: Tensor, like: Tensor) -> Tensor:
    """`x` summed over the dimensions along which `like` was broadcast to it, in `x`'s dtype."""
    return total(x).reshape(like.shape) if like.numel() == 1 else x.sum_to_size(like.shape)


def per_sample(x: Tensor) -> Tensor:
    """The sum of each sample, the same alone or in a batch."""
    return torch.stack([total(sample) for sample in x.unbind(0)]) if x.shape[0] else x.new_zeros(0)
