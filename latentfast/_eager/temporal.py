"""Temporal losses: the operators' signatures in front of the reference."""

import torch

from latentfast import reference
from latentfast._operators import NORMS
from latentfast.reference._common import working

_NORM_NAMES = {code: name for name, code in NORMS.items()}


def temporal_loss(z, ref, mask, first, second, norm, eps, grad_scale, frame_dim, loss, grad) -> None:
    options = {"first": first, "second": second, "norm": _NORM_NAMES[norm], "eps": eps, "frame_dim": frame_dim}
    if grad is None:
        loss.view(-1).copy_(reference.temporal.temporal_loss(z, ref, mask, reduction="none", **options))
        return
    # a gradient of halves would be rounded before it is scaled
    z, ref = working(z), None if ref is None else working(ref)
    value, gradient = reference.temporal.temporal_loss_and_grad(z, ref, mask, reduction="none", **options)
    loss.view(-1).copy_(value)
    grad.copy_(gradient * grad_scale)


def warp_loss(z, flow, mask, grad_scale, frame_dim, loss, grad) -> None:
    with torch.enable_grad():
        leaf = working(z.detach()).requires_grad_(grad is not None)
        value = reference.temporal.warp_loss(leaf, flow, mask, frame_dim=frame_dim, reduction="none")
        if grad is not None and value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            grad.copy_(gradient * grad_scale)
        elif grad is not None:
            grad.zero_()
    loss.view(-1).copy_(value.detach())
