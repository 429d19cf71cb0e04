"""Guidance: from a conditional and an unconditional prediction to one, the step that follows, and sums of tensors.

Everything is per sample (dimension 0). Written mode by mode as the papers have it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentfast.reference._common import working

#: A standard deviation of less than this share of the root mean squares is what rounding left of a constant: 0.
_CONSTANT = 1e-6


def _sum(x: Tensor) -> Tensor:
    """The sum over each sample, kept broadcastable."""
    return x.sum(dim=tuple(range(1, x.ndim)), keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return _sum(x * y)


def _std(x: Tensor, beside: Tensor) -> Tensor:
    """The unbiased standard deviation of each sample; 0 where there is none that its values or those of `beside`, of
    which it was made, could tell from rounding.
    """
    dims = tuple(range(1, x.ndim))
    variance = x.var(dim=dims, keepdim=True)
    square = x.square().mean(dims, keepdim=True) + beside.square().mean(dims, keepdim=True)
    constant = variance <= _CONSTANT**2 * square
    return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, 0 where y is 0."""
    zero = y == 0
    return torch.where(zero, torch.zeros_like(x), x / torch.where(zero, torch.ones_like(y), y))


def _length(x: Tensor) -> Tensor:
    """|x|, with a gradient of 0 at 0."""
    square = _dot(x, x)
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())


def _cfg_zero(c: Tensor, u: Tensor) -> Tensor:
    """arXiv 2503.18886: the unconditional prediction, scaled to come nearest to the conditional one."""
    return _dot(c, u) / (_dot(u, u) + 1e-8) * u


def _tcfg(c: Tensor, u: Tensor) -> Tensor:
    """arXiv 2503.18137: the unconditional prediction without its part along the smaller singular vector of [c; u]."""
    cc, uu, cu = _dot(c, c), _dot(u, u), _dot(c, u)
    square = (cc - uu).square() + 4 * cu.square()
    equal = square == 0  # no direction is the first
    h = torch.where(equal, torch.ones_like(square), square).sqrt()
    xy = cu / h
    yy = torch.where(cc > uu, 2 * xy * cu / (h + (cc - uu).clamp(min=0)), (1 - (cc - uu) / h) / 2)
    return torch.where(equal, torch.zeros_like(c), xy * c + yy * u)


def _apg_update(c: Tensor, m: Tensor, eta: float, norm_threshold: float) -> Tensor:
    """arXiv 2410.02416, algorithm 1: m, limited in length, its part along c weakened to `eta` of it."""
    if norm_threshold > 0:
        length = _length(m)
        m = m * torch.where(length > norm_threshold, _ratio(torch.full_like(length, norm_threshold), length), 1.0)
    parallel = _ratio(_dot(m, c), _dot(c, c)) * c
    return m - (1 - eta) * parallel


def _damping(d: Tensor, u: Tensor, alpha: float) -> Tensor:
    """exp(−alpha·|d|/|u|): what is left of the scale of a step as long as d."""
    dd, uu = _dot(d, d), _dot(u, u)
    ratio = _ratio(_length(d), _length(u))
    left = torch.exp(-alpha * ratio)
    return torch.where((uu == 0) & (dd != 0), 0.0 if alpha > 0 else 1.0, left)


def prediction(
    cond: Tensor, uncond: Tensor | None, scale: float, mode: str = "cfg", rescale: float = 0.0, original: bool = False,
    eta: float = 1.0, norm_threshold: float = 0.0, momentum: float = 0.0, momentum_buffer: Tensor | None = None,
    alpha: float = 8.0, zero_init: bool = False,
) -> Tensor:  # fmt: skip
    """The guided prediction p in the working precision; `momentum_buffer` is updated."""
    c = working(cond)
    if zero_init:
        return torch.zeros_like(c)
    if uncond is None:
        return c
    u = working(uncond)
    d = c - u
    if mode == "cfg":
        p = (c if original else u) + scale * d
    elif mode == "apg":
        m = d
        if momentum_buffer is not None:
            m = d + momentum * momentum_buffer.to(d.dtype)
            momentum_buffer.copy_(m.detach())
        p = (c if original else u) + scale * _apg_update(c, m, eta, norm_threshold)
    elif mode in ("cfg_zero", "tcfg"):
        part = (_cfg_zero if mode == "cfg_zero" else _tcfg)(c, u)
        p = (c if original else part) + scale * (c - part)
    elif original:
        p = c + scale * _damping(d, u, alpha) * d
    else:
        p = u + (1 + (scale - 1) * _damping(d, u, alpha)) * d
    if rescale > 0 and cond.numel() > cond.shape[0]:  # arXiv 2305.08891, section 3.4; one element has no deviation
        std_p = _std(p, c)
        p = torch.where(std_p == 0, p, p * (rescale * _ratio(_std(c, c), std_p) + 1 - rescale))
    return p


def step(
    sample: Tensor, p: Tensor, sigma: float, dt: float, mask: Tensor | None = None, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sample + dt·p, with `known` where the mask is 0, and the clip that it leads to, sample − sigma·p."""
    x = working(sample)
    following = x + dt * p
    out = following.to(sample.dtype)
    if mask is not None and known is not None:
        m, k = working(mask), working(known)
        mixed = (k + m * (following - k)).to(sample.dtype)
        out = torch.where(m == 0, known, torch.where(m == 1, out, mixed))
    return out, (x - sigma * p).to(sample.dtype)


def guide(cond: Tensor, uncond: Tensor | None, scale: float, **options) -> Tensor:
    """The guided prediction in `cond`'s dtype; options as of `prediction`."""
    return prediction(cond, uncond, scale, **options).to(cond.dtype)


def guided_step(
    sample: Tensor, cond: Tensor, uncond: Tensor | None, scale: float, *, sigma: float, sigma_next: float,
    mask: Tensor | None = None, known: Tensor | None = None, return_x0: bool = False, **options,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Euler's step along the guided prediction from noise level `sigma` to `sigma_next`; options as of `prediction`."""
    p = prediction(cond, uncond, scale, **options)
    out, x0 = step(sample, p, sigma, sigma_next - sigma, mask, known)
    return (out, x0) if return_x0 else out


def combine(
    tensors: Sequence[Tensor], coefficients: Sequence[float] | Sequence[Sequence[float]],
    dtypes: Sequence[torch.dtype] | None = None, precise: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """Σ_i coefficients[i]·tensors[i], summed in the order of i; of a list of rows of coefficients, one such sum a row.

    `dtypes`: of the results, as many as there are rows; None: the first tensor's.
    """
    rows = [c for c in coefficients if isinstance(c, Sequence)]
    dtypes = dtypes or [tensors[0].dtype] * max(len(rows), 1)
    double = precise or torch.float64 in (*dtypes, *(x.dtype for x in tensors))
    wide = [x.double() if double else working(x) for x in tensors]

    def total(row: Sequence[float], dtype: torch.dtype) -> Tensor:
        result = row[0] * wide[0]
        for coefficient, x in zip(row[1:], wide[1:], strict=True):
            result = result + coefficient * x
        return result.to(dtype)

    if rows:
        return tuple(total(row, dtype) for row, dtype in zip(rows, dtypes, strict=True))
    return total(coefficients, dtypes[0])  # type: ignore[arg-type]
