"""The expressions that the field uses for these operations: what a reader would otherwise paste into a pipeline."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def slerp_acos(a: Tensor, b: Tensor, t: Tensor, dim: Sequence[int] = (1, 2, 3, 4), threshold: float = 0.9995) -> Tensor:
    """Slerp by a bare arc cosine, with a switch to lerp near parallel vectors.

    After the function `slerp` that diffusers' community pipelines and many scripts copy from one another, with one
    angle a vector and without their wait for the device. `t` () gives one result, (K,) gives K in front.
    """
    x, y = a.float(), b.float()
    na = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    nb = torch.linalg.vector_norm(y, dim=dim, keepdim=True)
    dot = ((x / na) * (y / nb)).sum(dim, keepdim=True).clamp(-1, 1)
    theta = torch.acos(dot)
    sine = torch.sin(theta)
    t = t.reshape(*t.shape, *([1] * a.ndim))
    curved = torch.sin((1 - t) * theta) / sine * x + torch.sin(t * theta) / sine * y
    mixed = torch.where(dot.abs() > threshold, (1 - t) * x + t * y, curved)
    return mixed.to(a.dtype).reshape(*t.shape[: -a.ndim], *a.shape)


def nlerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The normalised straight line, with the length interpolated too."""
    x, y = a.float().flatten(1), b.float().flatten(1)
    length = (1 - t) * x.norm(dim=1, keepdim=True) + t * y.norm(dim=1, keepdim=True)
    return (F.normalize((1 - t) * x + t * y, dim=1) * length).to(a.dtype).view_as(a)


def edit(z: Tensor, directions: Tensor, strengths: Tensor, mask: Tensor) -> Tensor:
    """z + Σ s·m·d in the latents' own precision."""
    s = strengths.to(z.dtype).view(-1, *([1] * z.ndim))
    return z + (s * mask * directions).sum(0)


def blend(base: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """The blend of diffusers' inpainting pipelines."""
    return (1 - mask) * base + mask * edited


def temporal_loss(z: Tensor, ref: Tensor, mask: Tensor, first: float, second: float) -> Tensor:
    """First and second differences over the frames against a reference clip, masked, in float32."""
    x, m = z.float() - ref.float(), mask.float()
    over = (1, 2, 3, 4)
    d1, w1 = x[:, :, 1:] - x[:, :, :-1], m[:, :, 1:] * m[:, :, :-1]
    d2, w2 = x[:, :, 2:] - 2 * x[:, :, 1:-1] + x[:, :, :-2], m[:, :, 2:] * m[:, :, 1:-1] * m[:, :, :-2]
    tiny, channels = 1e-12, z.shape[1]
    loss = first * (w1 * d1.square()).sum(over) / (w1.sum(over) * channels).clamp_min(tiny)
    loss = loss + second * (w2 * d2.square()).sum(over) / (w2.sum(over) * channels).clamp_min(tiny)
    return loss.mean()


def warp_loss(z: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """The next frame pulled back along the flow by `grid_sample`, compared where the mask and the frame allow it."""
    b, c, _, h, w = z.shape
    x = z.float().transpose(1, 2)
    following, frames = x[:, 1:].reshape(-1, c, h, w), x[:, :-1].reshape(-1, c, h, w)
    offsets = flow.float().transpose(1, 2).reshape(-1, 2, h, w)
    xs = torch.arange(w, device=z.device) + offsets[:, 0]
    ys = torch.arange(h, device=z.device).view(h, 1) + offsets[:, 1]
    grid = torch.stack((2 * xs / (w - 1) - 1, 2 * ys / (h - 1) - 1), -1)
    warped = F.grid_sample(following, grid, mode="bilinear", align_corners=True)
    inside = (xs >= 0) & (xs <= w - 1) & (ys >= 0) & (ys <= h - 1)
    weight = (inside * mask.float().transpose(1, 2).reshape(-1, h, w)).unsqueeze(1)
    total = (weight.reshape(b, -1).sum(1) * c).clamp_min(1e-12)
    return ((weight * (warped - frames).square()).reshape(b, -1).sum(1) / total).mean()
