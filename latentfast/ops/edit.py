"""Edits of latents: `edit` (directions with strengths and masks) and `blend` (two latents by a mask)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast import _direct
from latentfast.backends import implementation
from latentfast.ops import _checks
from latentfast.ops._sums import per_sample, summed_to, total
from latentfast.ops._vectors import on_device


class _Edit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, directions, strengths, host, mask):
        ctx.save_for_backward(directions, strengths, mask)
        ctx.host = host
        out = torch.empty_like(z)
        implementation("edit", z)(z, directions, strengths, host, mask, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        directions, strengths, mask = ctx.saved_tensors
        want_z, want_d, want_s, _, want_m = ctx.needs_input_grad
        wide = _checks.wide(grad.dtype)
        s = on_device(ctx.host, grad, wide) if strengths is None else strengths.to(wide)
        n = s.shape[0]
        g = grad.to(wide)
        grad_d = torch.zeros(directions.shape, dtype=wide, device=g.device) if want_d else None
        grad_s = torch.empty_like(s) if want_s else None
        grad_m = torch.zeros(mask.shape, dtype=wide, device=g.device) if want_m else None
        for i in range(n):  # one direction at a time, so that no (N, *z.shape) intermediate is made
            d_index = i if directions.shape[0] > 1 else 0
            d = directions[d_index].to(wide)
            si = s[i] if s.ndim == 1 else s[i].reshape(-1, *([1] * (g.ndim - 1)))
            m_index = i if mask is not None and mask.ndim > g.ndim and mask.shape[0] > 1 else 0
            m = None if mask is None else (mask[m_index] if mask.ndim > g.ndim else mask).to(wide)
            masked = g if m is None else g * m
            if grad_d is not None:
                grad_d[d_index] += summed_to(masked * si, d)
            if grad_s is not None:
                grad_s[i] = per_sample(masked * d) if s.ndim == 2 else total(masked * d)
            if grad_m is not None and m is not None:
                slot = grad_m[m_index] if mask.ndim > g.ndim else grad_m
                slot += summed_to(g * d * si, m)
        return (
            grad if want_z else None,
            None if grad_d is None else grad_d.to(directions.dtype),
            None if grad_s is None else grad_s.to(strengths.dtype),
            None,
            None if grad_m is None else grad_m.to(mask.dtype),
        )


def edit(
    z: Tensor,
    directions: Tensor,
    strengths: Sequence[float] | Tensor,
    mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Moves latents along directions: z + Σ_n strengths[n] · mask[n] · directions[n].

    One read of each input and one write, however many directions there are; the sum runs in the order of n.

    Args:
        z: Latents of any shape `(B, …)`, float32, float16, bfloat16 or float64.
        directions: N directions of `z`'s dtype, `z.ndim + 1` dimensions, broadcastable to `(N, *z.shape)`: `(N, 1, C,
            T, H, W)` moves every sample alike, `(N, 1, C, 1, 1, 1)` is one colour for all positions.
        strengths: N floats, a tensor `(N,)`, or a tensor `(N, B)` with a strength for each sample.
        mask: Where to edit, usually in [0, 1]; broadcastable to `(N, *z.shape)` by the usual rules, so that `(B, 1,
            T, H, W)` is one mask for all directions. bool, `z`'s dtype or float32. None: everywhere.
        out: A contiguous tensor like `z` to write into; not differentiable.

    Returns:
        A new contiguous tensor like `z`.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes or devices do not fit.

    Differentiable in `z`, `directions`, a tensor `strengths` and `mask`, once.

    Example:
        >>> import torch, latentfast
        >>> z, d = torch.zeros(1, 2), torch.tensor([[[1.0, 2.0]]])
        >>> latentfast.edit(z, d, [0.5])
        tensor([[0.5000, 1.0000]])
    """
    if _direct.enabled and out is None and not torch.compiler.is_dynamo_compiling():
        result = _direct.edit(z, directions, strengths, mask)
        if result is not None:
            return result
    _checks.latent("z", z)
    if not isinstance(directions, Tensor):
        raise TypeError(f"directions must be a tensor, got {type(directions).__name__}")
    _checks.same_kind("directions", directions, "z", z)
    if directions.ndim != z.ndim + 1:
        raise ValueError(
            f"directions must have {z.ndim + 1} dimensions (N, *z.shape), got shape {tuple(directions.shape)}"
        )
    host: list[float] = []
    device: Tensor | None = None
    if isinstance(strengths, Tensor):
        device = _device_strengths(strengths, z)
        n = device.shape[0]
    else:
        try:
            host = [float(s) for s in strengths]
        except (TypeError, ValueError):
            raise TypeError(
                f"strengths must be a sequence of floats or a tensor, got {type(strengths).__name__}"
            ) from None
        n = len(host)
    target = (n, *z.shape)
    shape = directions.shape
    if shape[0] != n and shape[0] != 1:
        raise ValueError(f"directions must hold {n} directions, one for each strength, got {shape[0]}")
    if shape != target:
        _checks.broadcasts("directions", shape, target)
    if mask is not None:
        mask = _checks.mask_of("mask", mask, "z", z, target)
    if not z.is_contiguous():
        z = z.contiguous()
    if not directions.is_contiguous():
        directions = directions.contiguous()
    if out is not None:
        out = _checks.output(out, tuple(z.shape), "z", z, (z, directions, device, mask))
    elif torch.is_grad_enabled() and (
        z.requires_grad
        or directions.requires_grad
        or (device is not None and device.requires_grad)
        or (mask is not None and mask.requires_grad)
    ):
        return _Edit.apply(z, directions, device, host, mask)
    else:
        out = torch.empty_like(z)
    implementation("edit", z)(z, directions, device, host, mask, out)
    return out


def _device_strengths(strengths: Tensor, z: Tensor) -> Tensor:
    if strengths.dtype not in _checks.DTYPES:
        raise TypeError(f"strengths must be floats, got a tensor of {strengths.dtype}")
    batch = z.shape[0] if z.ndim else 1
    if strengths.ndim not in (1, 2) or (strengths.ndim == 2 and strengths.shape[1] != batch):
        raise ValueError(f"strengths must have shape (N,) or (N, {batch}), got {tuple(strengths.shape)}")
    _checks.same_device("strengths", strengths, "z", z)
    return strengths.to(_checks.wide(z.dtype)).contiguous()


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, edited, mask):
        ctx.save_for_backward(*((base, edited) if ctx.needs_input_grad[2] else (None, None)), mask)
        out = torch.empty_like(base)
        implementation("blend", base)(base, edited, mask, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        base, edited, mask = ctx.saved_tensors
        want_base, want_edited, want_mask = ctx.needs_input_grad
        share = (grad * mask).to(grad.dtype) if want_base or want_edited else None
        grad_mask = None
        if want_mask:
            wide = _checks.wide(grad.dtype)
            grad_mask = summed_to(grad.to(wide) * (edited.to(wide) - base.to(wide)), mask).to(mask.dtype)
        return grad - share if want_base else None, share if want_edited else None, grad_mask


def blend(base: Tensor, edited: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Confines an edit to a mask: base + mask·(edited − base).

    Where the mask is exactly 0 the result has `base`'s bits, whatever `edited` holds there (NaN included); where it is
    exactly 1, `edited`'s. So an edit cannot creep out of its mask, not even by a rounding.

    Args:
        base: Latents of any shape, float32, float16, bfloat16 or float64.
        edited: Latents of `base`'s shape, dtype and device.
        mask: Usually in [0, 1]; broadcastable to `base`'s shape, `(B, 1, T, H, W)` for video. bool, `base`'s dtype or
            float32.
        out: A contiguous tensor like `base` to write into; not differentiable.

    Returns:
        A new contiguous tensor like `base`.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes or devices do not fit.

    Differentiable in `base`, `edited` and `mask`, once.

    Example:
        >>> import torch, latentfast
        >>> latentfast.blend(torch.zeros(3), torch.ones(3), torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if _direct.enabled and out is None and not torch.compiler.is_dynamo_compiling():
        result = _direct.blend(base, edited, mask)
        if result is not None:
            return result
    _checks.latent("base", base)
    _checks.like("edited", edited, "base", base)
    mask = _checks.mask_of("mask", mask, "base", base, base.shape)
    if not base.is_contiguous():
        base = base.contiguous()
    if not edited.is_contiguous():
        edited = edited.contiguous()
    if out is not None:
        out = _checks.output(out, tuple(base.shape), "base", base, (base, edited, mask))
    elif torch.is_grad_enabled() and (base.requires_grad or edited.requires_grad or mask.requires_grad):
        return _Blend.apply(base, edited, mask)
    else:
        out = torch.empty_like(base)
    implementation("blend", base)(base, edited, mask, out)
    return out
