"""Interpolation: the operators' signatures in front of the reference."""

import torch
from torch import Tensor

from latentfast import reference
from latentfast._operators import MODES

_MODE_NAMES = {code: name for name, code in MODES.items()}
_VECTOR = (1, 3)  # the vector dimensions of a tensor viewed as (p, n, q, m)


def _values(a: Tensor, t: Tensor | None, ts: list[float], p: int, q: int) -> list[float] | list[Tensor]:
    return list(ts) if t is None else [row.expand(p * q).view(p, 1, q, 1) for row in t.unbind(0)]


def interpolate(a, b, t, ts, mode, p, n, q, m, out) -> None:
    function = getattr(reference.interpolate, _MODE_NAMES[mode])
    x, y, values = a.reshape(p, n, q, m), b.reshape(p, n, q, m), _values(a, t, ts, p, q)
    for slot, value in zip(out.view(len(values), p, n, q, m), values, strict=True):
        slot.copy_(function(x, y, value, dim=_VECTOR))


def _off_the_ends(t: Tensor) -> Tensor:
    """`t`, where it is exactly 0 or 1 moved inwards by the least: there the reference hands on an end point, which has
    no derivative in t, and ours is defined as the smooth formula's."""
    info = torch.finfo(t.dtype)
    return torch.where(t == 0, info.tiny, torch.where(t == 1, 1 - info.eps / 2, t))


def interpolate_bwd(grad, a, b, t, ts, mode, p, n, q, m, grad_a, grad_b, grad_t) -> None:
    function = getattr(reference.interpolate, _MODE_NAMES[mode])
    k = len(ts) if t is None else t.shape[0]
    if k == 0:
        for slot in (grad_a, grad_b):
            if slot is not None:
                slot.zero_()
        return
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        x = a.detach().reshape(p, n, q, m).to(wide).requires_grad_()
        y = b.detach().reshape(p, n, q, m).to(wide).requires_grad_()
        s = torch.tensor(ts, dtype=wide, device=a.device).view(k, 1) if t is None else t.detach().to(wide)
        s = _off_the_ends(s).expand(k, p * q).contiguous().requires_grad_()
        out = [function(x, y, row.view(p, 1, q, 1), dim=_VECTOR) for row in s.unbind(0)]
        wanted = [(leaf, slot) for leaf, slot in ((x, grad_a), (y, grad_b), (s, grad_t)) if slot is not None]
        upstream = grad.reshape(k, p, n, q, m).to(wide)
        grads = torch.autograd.grad(torch.stack(out), [leaf for leaf, _ in wanted], upstream, allow_unused=True)
    for (_, slot), g in zip(wanted, grads, strict=True):
        slot.copy_(torch.zeros_like(slot) if g is None else g.reshape(slot.shape))


def vector_dots(x, y, p, n, q, m, out) -> None:
    wide = (part.reshape(part.shape[0], p, n, q, m).double() for part in (x, y))
    out.copy_(reference.interpolate.vector_dots(*wide))


def vector_mix(x, coefficients, p, n, q, m, out) -> None:
    k, _, count = coefficients.shape
    c = coefficients.expand(k, p * q, count)
    out.copy_(reference.interpolate.vector_mix(x.reshape(count, p, n, q, m), c).reshape(out.shape))
