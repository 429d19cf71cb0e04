"""Edits of latents: directions with strengths and masks, and the blend of two latents by a mask."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentfast.reference._common import working


def edit(z: Tensor, directions: Tensor, strengths: Tensor | Sequence[float], mask: Tensor | None = None) -> Tensor:
    """z + Σ_n strengths[n] · mask[n] · directions[n], summed in the order of n.

    `directions` broadcasts to (N, *z.shape), `strengths` is (N,) or (N, B), `mask` broadcasts to (N, *z.shape).
    """
    x = working(z)
    s = torch.as_tensor(strengths, dtype=x.dtype, device=x.device)
    n = s.shape[0]
    s = s.reshape(n, *s.shape[1:], *([1] * (z.ndim + 1 - s.ndim)))
    d = directions.expand(n, *directions.shape[1:])
    m = None if mask is None else working(mask).expand(n, *z.shape)
    out = x
    for i in range(n):
        step = s[i] * working(d[i])
        out = out + (step if m is None else m[i] * step)
    return out.to(z.dtype)


def blend(base: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """base + mask·(edited − base); `base`'s bits where the mask is exactly 0, `edited`'s where it is exactly 1."""
    m = working(mask)
    x, y = working(base), working(edited)
    mixed = (x + m * (y - x)).to(base.dtype)
    return torch.where(m == 0, base, torch.where(m == 1, edited, mixed))
