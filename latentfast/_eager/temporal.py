"""Temporal losses: the operators' signatures in front of the reference."""

import torch
from torch import Tensor

from latentfast import reference
from latentfast._operators import NORMS

_NORM_NAMES = {code: name for name, code in NORMS.items()}


def _widened(x: Tensor) -> Tensor:
    """Halves as float32: a gradient of them would be rounded before it is scaled."""
    return x if x.dtype == torch.float64 else x.float()


def temporal_loss(z, ref, mask, first, second, norm, eps, grad_scale, frame_dim, loss, grad) -> None:
    options = {"first": first, "second": second, "norm": _NORM_NAMES[norm], "eps": eps, "frame_dim": frame_dim}
    if grad is None:
        loss.view(-1).copy_(reference.temporal.temporal_loss(z, ref, mask, reduction="none", **options))
        return
    z, ref = _widened(z), None if ref is None else _widened(ref)
    value, gradient = reference.temporal.temporal_loss_and_grad(z, ref, mask, reduction="none", **options)
    loss.view(-1).copy_(value)
    grad.copy_(gradient * grad_scale)


def warp_loss(z, flow, mask, grad_scale, frame_dim, loss, grad) -> None:
    with torch.enable_grad():
        leaf = _widened(z.detach()).requires_grad_(grad is not None)
        value = reference.temporal.warp_loss(leaf, flow, mask, frame_dim=frame_dim, reduction="none")
        if grad is not None and value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            grad.copy_(gradient * grad_scale)
        elif grad is not None:
            grad.zero_()
    loss.view(-1).copy_(value.detach())
