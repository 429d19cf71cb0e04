"""Previews of latents: a linear map to RGB at every position, enlarged bilinearly."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentfast.reference._common import working


def latent_to_rgb(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """x = bias + Σ_c z[:, c] · weight[c], enlarged to `size`: (B, T, H', W', 3) of z (B, C, T, H, W), without T of an
    image (B, C, H, W).

    `torch.uint8`: round((x + 1)·127.5), ties to even, clamped to 0…255, and 0 for NaN. Otherwise x itself, in the
    working precision.
    """
    x = working(z)
    rgb = torch.einsum("bc...,ck->b...k", x, weight.to(x.dtype)) + bias.to(x.dtype)
    if size is not None and rgb.numel():
        frames = rgb.reshape(-1, *rgb.shape[-3:]).movedim(-1, 1)
        frames = F.interpolate(frames, size=tuple(size), mode="bilinear", align_corners=False)
        rgb = frames.movedim(1, -1).reshape(*rgb.shape[:-3], *size, 3)
    elif size is not None:
        rgb = rgb.new_empty(*rgb.shape[:-3], *size, 3)
    if dtype != torch.uint8:
        return rgb.contiguous()
    return ((rgb + 1) * 127.5).round().clamp(0, 255).nan_to_num(0.0).to(torch.uint8).contiguous()
