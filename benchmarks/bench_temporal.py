"""Temporal losses: what of them is measured, at which sizes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import latentfast
from latentfast.benchmarks import peers
from latentfast.benchmarks.draws import two_clips_and_mask
from latentfast.benchmarks.operation import Baseline, Call, Case, Operation, compiled
from latentfast.reference import temporal as reference

WEIGHTS: dict[str, Any] = {"first": 1.0, "second": 0.5}
reference_loss = partial(reference.temporal_loss, **WEIGHTS)
field_loss = partial(peers.temporal_loss, **WEIGHTS)


def _leaf_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    z, ref, mask = two_clips_and_mask(shape, dtype, device)
    return z.requires_grad_(), ref, mask


def _warp_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    b, _, t, h, w = shape
    z = torch.randn(shape, device=device, dtype=dtype)
    # Two latent pixels are sixteen in the image; drawn in steps of 1/8, which bfloat16 holds exactly.
    flow = torch.randint(-16, 17, (b, 2, t - 1, h, w), device=device).div(8).to(dtype)
    visible = torch.rand((b, 1, t - 1, h, w), device=device) > 0.1
    return z, flow, visible.to(dtype)


def _differentiated(loss: Call) -> Call:
    """(loss, gradient in z) through autograd, where `z` is a leaf."""

    def call(z: Tensor, ref: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(z, ref, mask)
        (grad,) = torch.autograd.grad(value, z)
        return value.detach(), grad

    return call


def _detached(loss: Call) -> Call:
    """(loss, gradient in z) through autograd, for a `z` that nobody differentiates."""
    call = _differentiated(loss)
    return lambda z, ref, mask: call(z.detach().requires_grad_(), ref, mask)


def _functional(z: Tensor, ref: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient in z) by `torch.func`, which `torch.compile` takes whole: no autograd at run time."""
    grad, value = torch.func.grad_and_value(field_loss)(z, ref, mask)
    return value, grad


LOSS = Operation(
    stem="temporal",
    name="temporal_loss",
    variant="",
    inputs=two_clips_and_mask,
    batch_dims=(0, 0, 0),
    outputs=("mean",),
    ours=partial(latentfast.temporal_loss, **WEIGHTS),
    reference=Baseline(reference_loss, "latentfast.reference"),
    field=Baseline(field_loss, "vectorised differences"),
)
LOSS_AND_GRAD = Operation(
    stem="temporal",
    name="temporal_loss_and_grad",
    variant="",
    inputs=two_clips_and_mask,
    batch_dims=(0, 0, 0),
    outputs=("mean", "mean's gradient"),
    ours=partial(latentfast.temporal_loss_and_grad, **WEIGHTS),
    reference=Baseline(_detached(reference_loss), "latentfast.reference", lambda: _detached(compiled(reference_loss))),
    field=Baseline(_functional, "torch.func.grad_and_value"),
)
AUTOGRAD = Operation(
    stem="temporal",
    name="temporal_loss",
    variant="autograd",
    inputs=_leaf_inputs,
    batch_dims=(0, 0, 0),
    outputs=("mean", "mean's gradient"),
    ours=_differentiated(partial(latentfast.temporal_loss, **WEIGHTS)),
    reference=Baseline(
        _differentiated(reference_loss), "latentfast.reference", lambda: _differentiated(compiled(reference_loss))
    ),
    field=Baseline(
        _differentiated(field_loss), "vectorised differences", lambda: _differentiated(compiled(field_loss))
    ),
)
WARP = Operation(
    stem="temporal",
    name="warp_loss",
    variant="",
    inputs=_warp_inputs,
    batch_dims=(0, 0, 0),
    outputs=("mean",),
    ours=latentfast.warp_loss,
    reference=Baseline(reference.warp_loss, "latentfast.reference"),
    field=Baseline(peers.warp_loss, "F.grid_sample"),
)

CASES = [
    Case(LOSS_AND_GRAD, "wan480", 1),
    Case(AUTOGRAD, "wan480", 1),
    Case(LOSS_AND_GRAD, "wan720", 32),
    Case(LOSS, "wan720", 32),
    Case(LOSS, "wan480", 1),
    Case(WARP, "wan480", 1),
]
CPU_CASES = [Case(operation, "wan480", 1, torch.float32) for operation in (LOSS_AND_GRAD, LOSS, AUTOGRAD, WARP)]
