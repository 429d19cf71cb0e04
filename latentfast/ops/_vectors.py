"""Inner products and linear combinations of vectors: what the curves through many latents are made of.

Each is the other's derivative, so both are differentiable any number of times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentfast._operators import MODES
from latentfast.backends import implementation


def on_device(values: Sequence[float], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Host numbers as a tensor on `x`'s device. They travel as a kernel's arguments (0 lerped to 1 by each of them): a
    copy from pageable memory would wait on the host, and a captured CUDA graph would copy from memory long freed.
    """
    if x.device.type == "cpu" or not len(values):
        return torch.tensor(values, dtype=dtype, device=x.device)
    out = torch.empty(len(values), dtype=dtype, device=x.device)
    zero, one = out.new_zeros(1), out.new_ones(1)
    implementation("interpolate", x)(zero, one, None, list(values), MODES["lerp"], 1, 1, 1, 1, out)
    return out


class VectorMix(torch.autograd.Function):
    """out[k] = Σ_n coefficients[k, v, n] · x[n] on tensors (N, P, A, Q, M): see `_operators`."""

    @staticmethod
    def forward(ctx, x, coefficients):
        ctx.save_for_backward(x, coefficients)
        out = x.new_empty((coefficients.shape[0], *x.shape[1:]))
        implementation("vector_mix", x)(x, coefficients, *x.shape[1:], out)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, coefficients = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_c = None
        if ctx.needs_input_grad[0]:
            grad_x = VectorMix.apply(grad, coefficients.permute(2, 1, 0).contiguous())
        if ctx.needs_input_grad[1]:
            grad_c = VectorDots.apply(x, grad)
            if coefficients.shape[1] == 1:
                grad_c = grad_c.sum(1, keepdim=True)
            grad_c = grad_c.to(coefficients.dtype)
        return grad_x, grad_c


class VectorDots(torch.autograd.Function):
    """Inner products of x (N, P, A, Q, M) with y (K, P, A, Q, M): (K, P·Q, N) float64. See `_operators`."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        out = x.new_empty((y.shape[0], x.shape[1] * x.shape[3], x.shape[0]), dtype=torch.float64)
        implementation("vector_dots", x)(x, y, *x.shape[1:], out)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad_x = VectorMix.apply(y, grad.permute(2, 1, 0).contiguous()) if ctx.needs_input_grad[0] else None
        grad_y = VectorMix.apply(x, grad.contiguous()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y
