"""Temporal consistency: differences of neighbouring frames, plain or along an optical flow."""

import torch
from torch import Tensor

from latentfast.reference._common import working


def penalty(d: Tensor, norm: str, eps: float) -> Tensor:
    """ρ(d): d² ("l2"), |d| ("l1"), sqrt(d² + eps²) − eps ("charbonnier", which for eps = 0 is |d|, gradient 0 at 0)."""
    if norm == "l2":
        return d * d
    if norm == "l1" or eps == 0:
        return d.abs()
    return torch.sqrt(d * d + eps * eps) - eps


def _weighted_mean(d: Tensor, weight: Tensor, norm: str = "l2", eps: float = 0.0) -> Tensor:
    """Σ w ρ(d) / Σ w a sample, 0 (with zero gradient) where the weights sum to 0. NaN stays in its own sample."""
    w = weight.expand(d.shape).flatten(1)
    total = w.sum(1)
    kept = torch.where(w == 0, 0, d.flatten(1))  # before ρ: what is left out must not reach the gradient either
    weighted = (w * penalty(kept, norm, eps)).sum(1)
    return torch.where(total == 0, 0, weighted / torch.where(total == 0, 1, total))


def temporal_loss(
    z: Tensor,
    ref: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    first: float = 1.0,
    second: float = 0.0,
    norm: str = "l2",
    eps: float = 1e-3,
    frame_dim: int = 2,
    reduction: str = "mean",
) -> Tensor:
    """first·Σ w1 ρ(d1)/Σ w1 + second·Σ w2 ρ(d2)/Σ w2 a sample.

    d1[t] = z[t+1] − z[t] and d2[t] = z[t+2] − 2z[t+1] + z[t], each minus the same of `ref`; w1[t] = m[t]m[t+1] and
    w2[t] = m[t]m[t+1]m[t+2] with `mask` broadcast to `z`. The loss is float32 (float64 for float64).
    """
    x = working(z).movedim(frame_dim, 1)
    if ref is not None:
        x = x - working(ref).movedim(frame_dim, 1)
    m = x.new_ones(()).expand(x.shape) if mask is None else working(mask).expand(z.shape).movedim(frame_dim, 1)
    loss = x.new_zeros(x.shape[0])
    if first and x.shape[1] > 1:
        d1 = x[:, 1:] - x[:, :-1]
        loss = loss + first * _weighted_mean(d1, m[:, :-1] * m[:, 1:], norm, eps)
    if second and x.shape[1] > 2:
        d2 = x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]
        loss = loss + second * _weighted_mean(d2, m[:, :-2] * m[:, 1:-1] * m[:, 2:], norm, eps)
    return loss.mean() if reduction == "mean" else loss


def temporal_loss_and_grad(
    z: Tensor, ref: Tensor | None = None, mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """(`temporal_loss`, its gradient in `z`): with reduction "none" the gradient of the losses' sum."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        loss = temporal_loss(leaf, ref, mask, **options)
        nothing = leaf.flatten()[:0].sum()  # with too few frames for any term, the loss does not depend on the clip
        (grad,) = torch.autograd.grad(loss.sum() + nothing, leaf)
    return loss.detach(), grad


def warp(frames: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """`frames` (…, C, H, W) sampled bilinearly at x + flow; `flow` (…, 2, H, W) = (dx, dy) in pixels.

    Returns the samples and whether each sampling point lies inside the frame, [0, W−1] × [0, H−1].
    """
    h, w = frames.shape[-2:]
    ys = torch.arange(h, device=frames.device, dtype=frames.dtype).view(h, 1) + flow[..., 1, :, :]
    xs = torch.arange(w, device=frames.device, dtype=frames.dtype) + flow[..., 0, :, :]
    inside = (xs >= 0) & (xs <= w - 1) & (ys >= 0) & (ys <= h - 1)
    xs, ys = torch.where(inside, xs, 0), torch.where(inside, ys, 0)
    x0, y0 = xs.floor(), ys.floor()
    fx, fy = (xs - x0).unsqueeze(-3), (ys - y0).unsqueeze(-3)
    x0, y0 = x0.long(), y0.long()
    x1, y1 = (x0 + 1).clamp_max(w - 1), (y0 + 1).clamp_max(h - 1)
    flat = frames.flatten(-2)

    def tap(y: Tensor, x: Tensor) -> Tensor:
        index = (y * w + x).flatten(-2).unsqueeze(-2).expand(flat.shape)
        return flat.gather(-1, index).unflatten(-1, (h, w))

    top = tap(y0, x0) * (1 - fx) + tap(y0, x1) * fx
    bottom = tap(y1, x0) * (1 - fx) + tap(y1, x1) * fx
    return top * (1 - fy) + bottom * fy, inside


def warp_loss(
    z: Tensor, flow: Tensor, mask: Tensor | None = None, *, frame_dim: int = 2, reduction: str = "mean"
) -> Tensor:
    """Σ w (z[t+1](x + flow[t](x)) − z[t](x))² / Σ w a sample: how much the clip changes along the motion.

    `flow` (B, 2, T−1, H, W) points from frame t to t + 1, (dx, dy) in latent pixels. w is `mask` (broadcastable to
    (B, C, T−1, H, W) in `z`'s layout, frame t's visibility in frame t + 1), 0 where the flow leaves the frame. Lai et
    al., "Learning Blind Video Temporal Consistency", ECCV 2018, section 4 (the short-term loss, squared).
    """
    x = working(z).movedim(frame_dim, 1)  # (B, T, C, H, W)
    if x.shape[1] < 2:
        loss = x.new_zeros(x.shape[0])
        return loss.mean() if reduction == "mean" else loss
    warped, inside = warp(x[:, 1:], working(flow).movedim(2, 1))
    d = warped - x[:, :-1]
    weight = inside.unsqueeze(2).to(x.dtype).expand(d.shape)
    if mask is not None:
        shape = [n - 1 if i == frame_dim else n for i, n in enumerate(z.shape)]
        weight = weight * working(mask).expand(shape).movedim(frame_dim, 1)
    loss = _weighted_mean(d, weight)
    return loss.mean() if reduction == "mean" else loss
