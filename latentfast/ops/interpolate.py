"""Interpolation between latents: `lerp`, `nlerp`, `slerp`, their paths, keyframes, and the mean on the sphere."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast import _direct
from latentfast._operators import MODES
from latentfast.backends import implementation
from latentfast.ops import _checks
from latentfast.ops._vectors import VectorDots, VectorMix, on_device
from latentfast.reference._common import kept_shape, vector_dims
from latentfast.reference.interpolate import catmull_rom_weights, spherical_mean_coefficients

_Dim = int | Sequence[int] | None
_Layout = tuple[int, int, int, int]


def _dims(ndim: int, dim: int | Sequence[int]) -> tuple[int, ...]:
    given = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, Iterable) else ()
    if not given or not all(isinstance(d, int) and -ndim <= d < ndim for d in given):
        raise ValueError(f"dim must name dimensions of a {ndim}-D tensor, from {-ndim} to {ndim - 1}, got {dim}")
    dims = vector_dims(ndim, given)
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim must name each dimension once, got {dim}")
    return dims


def _layout(shape: Sequence[int], dims: tuple[int, ...]) -> _Layout | None:
    """`shape` as (p, n, q, m), where n and m are vector dimensions; None if the dimensions alternate more than
    that."""
    sizes = [1, 1, 1, 1]
    stage = 0
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if (stage % 2 == 1) != (d in dims):
            stage += 1
        if stage > 3:
            return None
        sizes[stage] *= size
    if stage < 2:  # the vectors end the shape: one run of elements each
        sizes[1], sizes[3] = 1, sizes[1]
    p, n, q, m = sizes
    return p, n, q, m


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, t, ts, mode, layout, shape):
        ctx.save_for_backward(a, b, t)
        ctx.rest = ts, mode, layout
        out = torch.empty(shape, dtype=a.dtype, device=a.device)
        implementation("interpolate", a)(a, b, t, ts, mode, *layout, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, t = ctx.saved_tensors
        ts, mode, layout = ctx.rest
        want_a, want_b, want_t = ctx.needs_input_grad[:3]
        grad_a = torch.empty_like(a) if want_a else None
        grad_b = torch.empty_like(b) if want_b else None
        grad_t = t.new_empty((t.shape[0], layout[0] * layout[2])) if want_t else None
        implementation("interpolate_bwd", a)(grad.contiguous(), a, b, t, ts, mode, *layout, grad_a, grad_b, grad_t)
        if grad_t is not None and t.shape[1] == 1:
            grad_t = grad_t.sum(1, keepdim=True)
        return grad_a, grad_b, grad_t, None, None, None, None


def _device_values(name: str, t: Tensor, a: Tensor, lead: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """A tensor of t as (K, vectors or 1), in the precision that the weights are computed in."""
    if t.dtype not in _checks.DTYPES:
        raise TypeError(f"{name} must be a float or a floating tensor, got {t.dtype}")
    _checks.same_device(name, t, "a", a)
    t = t.to(_checks.wide(a.dtype))
    k = lead[0] if lead else 1
    if t.ndim <= len(lead) or t.numel() == k:
        return t.reshape(k, 1).contiguous()
    if lead:
        _checks.broadcasts(f"{name}[k]", tuple(t.shape[1:]), kept)
        t = t.reshape(k, *([1] * (len(kept) + 1 - t.ndim)), *t.shape[1:])
    else:
        _checks.broadcasts(name, tuple(t.shape), kept)
    return t.expand(*lead, *kept).reshape(k, -1).contiguous()


def _host_values(name: str, ts: object) -> list[float]:
    try:
        values = [float(t) for t in ts]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of floats or a tensor, got {type(ts).__name__}") from None
    return values


def _interpolate(mode: str, a: Tensor, b: Tensor, t, dim: _Dim, out: Tensor | None, path: bool) -> Tensor:
    """All of lerp, nlerp and slerp: one value of t (`path` False) or K of them."""
    if _direct.enabled and dim is None and out is None and not torch.compiler.is_dynamo_compiling():
        result = _direct.interpolate(a, b, t, MODES[mode], path)
        if result is not None:
            return result
    _checks.latent("a", a)
    _checks.like("b", b, "a", a)
    shape = a.shape
    ndim = len(shape)
    name = "ts" if path else "t"
    dims: tuple[int, ...] | None = None
    if dim is None and ndim > 0:
        count = shape[0] if ndim > 1 else 1
        layout: _Layout | None = (count, 1, 1, a.numel() // count if count else math.prod(shape[1:]))
    elif ndim == 0:
        layout = (1, 1, 1, 1)
    else:
        dims = _dims(ndim, dim)  # type: ignore[arg-type]
        layout = _layout(shape, dims)

    host: list[float] = []
    device: Tensor | None = None
    if isinstance(t, Tensor) and t.device.type == "cpu" and a.is_cuda and t.ndim <= path and not t.requires_grad:
        t = t.tolist()  # already on the host: no copy, and nothing to wait for
    if isinstance(t, Tensor):
        dims = dims or vector_dims(ndim, dim) if ndim else ()
        if path and t.ndim == 0:
            raise ValueError("ts must have at least one dimension, its values of t, got a tensor without dimensions")
        device = _device_values(name, t, a, tuple(t.shape[:1]) if path else (), kept_shape(shape, dims))
        k = device.shape[0]
    elif path:
        host = _host_values(name, t)
        k = len(host)
    elif isinstance(t, int | float | torch.SymFloat | torch.SymInt):
        k = 1
        if torch.compiler.is_compiling():
            # An opaque operator fixes the value of a float, which would mean a compilation for every t; a product of a
            # tensor does not.
            wide = _checks.wide(a.dtype)
            device = torch.ones((1, 1), dtype=wide, device=a.device) * t  # type: ignore[operator, assignment]
        else:
            host = [t]  # type: ignore[list-item]
    else:
        raise TypeError(f"t must be a float or a tensor, got {type(t).__name__}")

    if layout is None:  # vector and other dimensions alternate too often: bring the vector's to the end, and back
        return _moved(mode, a, b, device if device is not None else host, dims or (), path, out)
    if not a.is_contiguous():
        a = a.contiguous()
    if not b.is_contiguous():
        b = b.contiguous()
    if out is not None:
        target = (k, *shape) if path else tuple(shape)
        out = _checks.output(out, target, "a", a, (a, b, device))
    elif torch.is_grad_enabled() and (
        a.requires_grad or b.requires_grad or (device is not None and device.requires_grad)
    ):
        return _Interpolate.apply(a, b, device, host, MODES[mode], layout, (k, *shape) if path else tuple(shape))
    elif path:
        out = torch.empty((k, *shape), dtype=a.dtype, device=a.device)
    else:
        out = torch.empty_like(a)
    implementation("interpolate", a)(a, b, device, host, MODES[mode], *layout, out)
    return out


def _moved(mode: str, a: Tensor, b: Tensor, values, dims: tuple[int, ...], path: bool, out: Tensor | None) -> Tensor:
    kept = [d for d in range(a.ndim) if d not in dims]
    order = [*kept, *dims]
    rows = math.prod([a.shape[d] for d in kept])
    moved = a.permute(order)
    flat_shape = (rows, math.prod(moved.shape[len(kept) :]))
    if isinstance(values, Tensor):
        values = values.expand(values.shape[0], rows).unsqueeze(2)
    flat = _interpolate(mode, moved.reshape(flat_shape), b.permute(order).reshape(flat_shape), values, 1, None, True)
    back = [order.index(d) for d in range(a.ndim)]
    result = flat.reshape(flat.shape[0], *moved.shape).permute(0, *(d + 1 for d in back))
    result = (result if path else result[0]).contiguous()
    if out is None:
        return result
    return _checks.output(out, tuple(result.shape), "a", a, (a, b)).copy_(result)


def lerp(a: Tensor, b: Tensor, t: float | Tensor, *, dim: _Dim = None, out: Tensor | None = None) -> Tensor:
    """Straight interpolation, (1 − t)·a + t·b.

    Args:
        a: Latents of any shape, float32, float16, bfloat16 or float64; `(B, C, T, H, W)` for video.
        b: The other end, of `a`'s shape, dtype and device.
        t: A float, or a floating tensor broadcastable to `a`'s shape with the vector dimensions reduced to 1: with
            `dim=None` a tensor `(B, 1, 1, 1, 1)` gives each sample its own t. Values outside [0, 1] extrapolate.
        dim: The dimensions that form one vector; None for all but the first. For lerp it only says what `t` may be.
        out: A contiguous tensor like the result to write into, for loops that allocate nothing; not differentiable.

    Returns:
        A new contiguous tensor like `a`. At t = 0 it has `a`'s bits, at t = 1 those of `b`.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes, devices or `dim` do not fit.

    Differentiable in `a`, `b` and a tensor `t`, once.

    Example:
        >>> import torch, latentfast
        >>> a, b = torch.zeros(1, 4), torch.ones(1, 4)
        >>> latentfast.lerp(a, b, 0.25)
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return _interpolate("lerp", a, b, t, dim, out, False)


def nlerp(a: Tensor, b: Tensor, t: float | Tensor, *, dim: _Dim = None, out: Tensor | None = None) -> Tensor:
    """Normalised lerp: the direction of lerp(a, b, t), with the length (1 − t)|a| + t|b|.

    Cheaper in arithmetic than slerp and close to it for small angles, but with uneven speed along the arc. Where a
    and b cancel out (opposite vectors, half-way), the quarter-turned `a` gives the direction, as in `slerp`.

    Args, returns, errors and differentiability are those of `lerp`; a vector's length is taken over `dim`.

    Example:
        >>> import torch, latentfast
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> latentfast.nlerp(a, b, 0.5)
        tensor([[0.7071, 0.7071]])
    """
    return _interpolate("nlerp", a, b, t, dim, out, False)


def slerp(a: Tensor, b: Tensor, t: float | Tensor, *, dim: _Dim = None, out: Tensor | None = None) -> Tensor:
    """Spherical interpolation: sin((1 − t)θ)/sin θ · a + sin(tθ)/sin θ · b, θ being the angle between a and b.

    The natural path between two Gaussian noises: a straight line between them loses length, which a diffusion model
    shows as washed-out clips. One angle a vector, never a batch's mean. Accurate from parallel to nearly opposite
    vectors; for opposite ones the path turns through the vector made by turning each pair of elements of `a` a
    quarter; if either vector is zero, the result is lerp's. Formula: Shoemake, SIGGRAPH 1985, section 3.3.

    Args:
        a: Latents of any shape, float32, float16, bfloat16 or float64; `(B, C, T, H, W)` for video.
        b: The other end, of `a`'s shape, dtype and device.
        t: A float, or a floating tensor broadcastable to `a`'s shape with the vector dimensions reduced to 1. Values
            outside [0, 1] go on along the great circle.
        dim: The dimensions that form one vector. None: all but the first, one vector a sample; a 1-D input is one
            vector. `dim=1` turns every position's channels by themselves, `dim=(1, 3, 4)` every frame.
        out: A contiguous tensor like the result to write into, for loops that allocate nothing; not differentiable.

    Returns:
        A new contiguous tensor like `a`. At t = 0 it has `a`'s bits, at t = 1 those of `b`.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes, devices or `dim` do not fit.

    Differentiable in `a`, `b` and a tensor `t`, once.

    Example:
        >>> import torch, latentfast
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> latentfast.slerp(a, b, 1 / 3)
        tensor([[0.8660, 0.5000]])
    """
    return _interpolate("slerp", a, b, t, dim, out, False)


def lerp_path(
    a: Tensor, b: Tensor, ts: Sequence[float] | Tensor, *, dim: _Dim = None, out: Tensor | None = None
) -> Tensor:
    """`lerp` at K values of t in one call, the inputs read once: (K, *a.shape).

    Args, errors and differentiability are those of `slerp_path`.

    Example:
        >>> import torch, latentfast
        >>> latentfast.lerp_path(torch.zeros(1, 2), torch.ones(1, 2), [0.0, 0.5, 1.0]).shape
        torch.Size([3, 1, 2])
    """
    return _interpolate("lerp", a, b, ts, dim, out, True)


def nlerp_path(
    a: Tensor, b: Tensor, ts: Sequence[float] | Tensor, *, dim: _Dim = None, out: Tensor | None = None
) -> Tensor:
    """`nlerp` at K values of t in one call, the inputs read once: (K, *a.shape).

    Args, errors and differentiability are those of `slerp_path`.

    Example:
        >>> import torch, latentfast
        >>> latentfast.nlerp_path(torch.randn(1, 2), torch.randn(1, 2), [0.0, 0.5, 1.0]).shape
        torch.Size([3, 1, 2])
    """
    return _interpolate("nlerp", a, b, ts, dim, out, True)


def slerp_path(
    a: Tensor, b: Tensor, ts: Sequence[float] | Tensor, *, dim: _Dim = None, out: Tensor | None = None
) -> Tensor:
    """`slerp` at K values of t in one call, the inputs read once: (K, *a.shape).

    Args:
        a: Latents of any shape, as for `slerp`.
        b: The other end, of `a`'s shape, dtype and device.
        ts: K floats, or a floating tensor (K,) or (K, …) whose rest broadcasts as `t` of `slerp`.
        dim: The dimensions that form one vector; None for all but the first.
        out: A contiguous tensor (K, *a.shape) to write into; not differentiable.

    Returns:
        A new contiguous tensor (K, *a.shape); element k has the bits of `slerp(a, b, ts[k])`.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or `dim` do not fit.

    Differentiable in `a`, `b` and a tensor `ts`, once.

    Example:
        >>> import torch, latentfast
        >>> latentfast.slerp_path(torch.randn(1, 8), torch.randn(1, 8), [0.25, 0.5, 0.75]).shape
        torch.Size([3, 1, 8])
    """
    return _interpolate("slerp", a, b, ts, dim, out, True)


def interpolate_keys(keys: Tensor, ts: Sequence[float], *, mode: str = "slerp", dim: _Dim = None) -> Tensor:
    """A curve through N keyframes, at K real positions.

    Position i + s lies between the keys i and i + 1; "slerp", "lerp" and "nlerp" go from key to key as the function of
    that name, "catmull_rom" passes through all of them smoothly (Catmull & Rom 1974: uniform, the end keys doubled).

    Args:
        keys: N latents, (N, …), N ≥ 1; float32, float16, bfloat16 or float64.
        ts: K real numbers in [0, N − 1], in any order; a CPU tensor is taken too.
        mode: "slerp", "lerp", "nlerp" or "catmull_rom".
        dim: The dimensions of `keys[0]` that form one vector; None for all but the first.

    Returns:
        A new contiguous tensor (K, *keys.shape[1:]). At a whole number it has that key's bits.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: `ts` leaves [0, N − 1], or `mode` or `dim` is unknown.

    Differentiable in `keys`, once.

    Example:
        >>> import torch, latentfast
        >>> latentfast.interpolate_keys(torch.randn(3, 1, 8), [0.0, 0.5, 1.5, 2.0]).shape
        torch.Size([4, 1, 8])
    """
    _checks.latent("keys", keys)
    n = keys.shape[0] if keys.ndim else 0
    if n < 1:
        raise ValueError(f"keys must have shape (N, …) with N ≥ 1, got {tuple(keys.shape)}")
    if mode not in (*MODES, "catmull_rom"):
        raise ValueError(f"mode must be slerp, lerp, nlerp or catmull_rom, got '{mode}'")
    if isinstance(ts, Tensor) and ts.device.type != "cpu":
        raise ValueError(f"ts must be numbers on the host (reading a tensor on {ts.device} would wait for it)")
    values = _host_values("ts", ts)
    for t in values:
        if not 0 <= t <= n - 1:
            raise ValueError(f"ts must lie in [0, {n - 1}] for {n} keys, got {t}")
    keys = keys.contiguous()
    if not values:
        return keys.new_empty((0, *keys.shape[1:]))
    if mode == "catmull_rom":
        return _mix_keys(keys, [catmull_rom_weights(t, n) for t in values])
    pieces, order = [], []
    segments = [min(int(t), n - 2) if n > 1 else 0 for t in values]
    for i in sorted(set(segments)):
        members = [k for k, segment in enumerate(segments) if segment == i]
        local = [values[k] - i for k in members]
        pieces.append(_interpolate(mode, keys[i], keys[min(i + 1, n - 1)], local, dim, None, True))
        order += members
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if order == sorted(order):
        return joined
    return torch.stack([joined[order.index(k)] for k in range(len(values))])


def _mix_keys(keys: Tensor, weights: list[dict[int, float]]) -> Tensor:
    n, k = keys.shape[0], len(weights)
    wide = _checks.wide(keys.dtype)
    rows = [row.get(i, 0.0) for row in weights for i in range(n)]
    coefficients = on_device(rows, keys, wide).view(k, 1, n)
    mixed = VectorMix.apply(keys.reshape(n, 1, 1, 1, math.prod(keys.shape[1:])), coefficients)
    mixed = mixed.reshape(k, *keys.shape[1:])
    if all(len(row) > 1 for row in weights):
        return mixed
    # At a whole number the key itself: 0 + 1·x would make +0 of −0.
    return torch.stack([keys[next(iter(row))] if len(row) == 1 else mixed[i] for i, row in enumerate(weights)])


def spherical_mean(latents: Tensor, weights: Sequence[float] | Tensor, *, dim: _Dim = None) -> Tensor:
    """The weighted mean of N latents on the sphere: slerp for more than two.

    The point that minimises Σ w_n·angle², found in a fixed number of steps (Buss & Fillmore, ACM TOG 2001, algorithm
    A1). It lies in the span of its inputs, so one pass takes their inner products, the iteration runs on N×N numbers
    a vector in float64, and one pass mixes. For two latents it is `slerp(a, b, w_1)` on the directions; the length is
    Σ w_n |x_n|.

    Args:
        latents: N latents, (N, …), N ≥ 1; float32, float16, bfloat16 or float64.
        weights: N numbers with a positive sum (they are divided by it); a tensor (N,) keeps its gradient.
        dim: The dimensions of `latents[0]` that form one vector; None for all but the first.

    Returns:
        A new contiguous tensor like `latents[0]`. Inputs that do not fit into one hemisphere may have several means;
        the one nearest to the straight mean's direction is sought.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, `weights` or `dim` do not fit.

    Differentiable in `latents` and a tensor `weights`.

    Example:
        >>> import torch, latentfast
        >>> latentfast.spherical_mean(torch.eye(3).unsqueeze(1), [1, 1, 1])
        tensor([[0.5774, 0.5774, 0.5774]])
    """
    _checks.latent("latents", latents)
    n = latents.shape[0] if latents.ndim else 0
    if n < 1:
        raise ValueError(f"latents must have shape (N, …) with N ≥ 1, got {tuple(latents.shape)}")
    if isinstance(weights, Tensor):
        _checks.latent("weights", weights)
        _checks.same_device("weights", weights, "latents", latents)
        w = weights.double()
    else:
        values = _host_values("weights", weights)
        if not sum(values) > 0:
            raise ValueError(f"weights must have a positive sum, got {values}")
        w = on_device(values, latents, torch.float64)
    if w.shape != (n,):
        raise ValueError(f"weights must have shape ({n},), one for each of the latents, got {tuple(w.shape)}")

    shape = latents.shape[1:]
    dims = vector_dims(len(shape), None) if dim is None else _dims(len(shape), dim)
    layout = _layout(shape, dims) if shape else (1, 1, 1, 1)
    if layout is None:
        kept = [d for d in range(len(shape)) if d not in dims]
        order = [*kept, *dims]
        moved = latents.permute(0, *(d + 1 for d in order))
        mean = spherical_mean(moved, weights, dim=tuple(range(len(kept), len(shape))))
        return mean.permute([order.index(d) for d in range(len(shape))]).contiguous()
    x = latents.contiguous().reshape(n, *layout)
    gram = VectorDots.apply(x, x.view_as(x)).transpose(0, 1)  # Dynamo takes no tensor twice
    coefficients = spherical_mean_coefficients(gram, (w / w.sum()).expand(gram.shape[0], n))
    return VectorMix.apply(x, coefficients.unsqueeze(0).contiguous()).reshape(shape)
