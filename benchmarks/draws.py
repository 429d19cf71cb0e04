"""Random arguments that several stems' operations take."""

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[tuple[int, ...], torch.dtype, torch.device], tuple[Tensor, ...]]


def clips(count: int) -> Draw:
    """So many latents of normal noise."""
    return lambda shape, dtype, device: tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(count))


def soft_mask(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, 1, T, H, W) in [0, 1]: a third exactly 0 or 1, as a thresholded attention map is."""
    noise = torch.rand((shape[0], 1, *shape[2:]), device=device, dtype=torch.float32)
    return (1.5 * noise - 0.25).clamp(0, 1).to(dtype)


def two_clips_and_mask(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Two latents of normal noise and a soft mask."""
    return *clips(2)(shape, dtype, device), soft_mask(shape, dtype, device)
