"""RMS norm over channels, times gamma, then SiLU: one Triton kernel each way on a GPU, plain torch elsewhere.

Half of the autoencoder's training time goes there when it is four eager kernels on large activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

EPS = 1e-6
_ROWS = 64
_enabled = True

if triton is not None:

    @triton.jit
    def _forward(X, G, Y, N, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, E: tl.constexpr):
        r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        c = tl.arange(0, CP)
        mask = (r[:, None] < N) & (c[None, :] < C)
        at = r[:, None] * C + c[None, :]
        x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(G + c, mask=c < C, other=0.0).to(tl.float32)
        h = x * tl.rsqrt(tl.sum(x * x, 1) / C + E)[:, None] * g[None, :]
        tl.store(Y + at, (h * tl.sigmoid(h)).to(Y.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward(X, G, DY, DX, DG, N, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, E: tl.constexpr):
        i = tl.program_id(0)
        r = i.to(tl.int64) * R + tl.arange(0, R)
        c = tl.arange(0, CP)
        mask = (r[:, None] < N) & (c[None, :] < C)
        at = r[:, None] * C + c[None, :]
        x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(G + c, mask=c < C, other=0.0).to(tl.float32)
        q = tl.rsqrt(tl.sum(x * x, 1) / C + E)[:, None]
        n = x * q
        h = n * g[None, :]
        s = tl.sigmoid(h)
        dh = dy * s * (1 + h * (1 - s))
        dn = dh * g[None, :]
        dx = q * (dn - n * (tl.sum(dn * n, 1) / C)[:, None])
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        tl.store(DG + i * C + c, tl.sum(dh * n, 0), mask=c < C)  # one row a program, summed afterwards: no atomics


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor) -> Tensor:
        x = x.contiguous()
        channels = x.shape[-1]
        rows = x.numel() // channels
        y = torch.empty_like(x)
        ctx.save_for_backward(x, gamma)
        _forward[(triton.cdiv(rows, _ROWS),)](x, gamma, y, rows, channels, triton.next_power_of_2(channels), _ROWS, EPS)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, gamma = ctx.saved_tensors
        dy = dy.contiguous()
        channels = x.shape[-1]
        rows = x.numel() // channels
        programs = triton.cdiv(rows, _ROWS)
        dx = torch.empty_like(x)
        dgamma = torch.empty(programs, channels, device=x.device)
        _backward[(programs,)](x, gamma, dy, dx, dgamma, rows, channels, triton.next_power_of_2(channels), _ROWS, EPS)
        return dx, dgamma.sum(0)


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """``silu(rms_norm(x) * gamma)`` over the last dimension of ``x`` (..., C); ``gamma`` (C,)."""
    if x.is_cuda and _enabled and triton is not None:
        return _NormSilu.apply(x, gamma)
    return reference(x, gamma)


def reference(x: Tensor, gamma: Tensor) -> Tensor:
    """The same in plain torch."""
    with torch.autocast(x.device.type, enabled=False):
        return F.silu(F.rms_norm(x, (x.shape[-1],), gamma.to(x.dtype), EPS))


def kernel_error(device: str) -> float:
    """Largest difference of value and gradients between kernel and reference on a random input, relative to
    each one's size.
    """
    x = torch.randn(700, 48, device=device, requires_grad=True)
    gamma = (torch.rand(48, device=device) + 0.5).requires_grad_()
    dy = torch.randn(700, 48, device=device)
    expected, got = reference(x, gamma), _NormSilu.apply(x, gamma)
    pairs = [(got, expected)]
    pairs += zip(torch.autograd.grad(got, (x, gamma), dy), torch.autograd.grad(expected, (x, gamma), dy), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def check(device: str) -> str:
    """Tries the kernel once; falls back to plain torch if it fails or is wrong. Says which in one line."""
    global _enabled
    if not device.startswith("cuda"):
        return "norm_silu: plain torch"
    try:
        error = kernel_error(device)
        _enabled = error < 1e-3
        reason = f"relative error {error:.1e}"
    except Exception as e:
        _enabled, reason = False, repr(e)[:300]
    return f"norm_silu: {'Triton kernel' if _enabled else 'plain torch'} ({reason})"
