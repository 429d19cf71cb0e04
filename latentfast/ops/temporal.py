"""Temporal consistency of video latents: `temporal_loss`, `temporal_loss_and_grad`, `warp_loss`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast import _direct
from latentfast._operators import NORMS
from latentfast.backends import implementation
from latentfast.ops import _checks


def _loss_dtype(z: Tensor) -> torch.dtype:
    """Losses of half-precision latents are float32: three digits would hide that a loss still falls."""
    return _checks.wide(z.dtype)


def _headroom(z: Tensor) -> float:
    """A mean over many elements has gradients below float16's smallest numbers. They are saved larger by this much, a
    power of two, so that a loss scaled up later finds all their digits; over few elements they would overflow.
    """
    return 1024.0 if z.dtype == torch.float16 and z.numel() >= 1024 * z.shape[0] else 1.0


def _mean_scale(z: Tensor, reduction: str) -> float:
    """What the reduction multiplies each sample's gradient by."""
    return 1.0 / z.shape[0] if reduction == "mean" and z.shape[0] else 1.0


class _Loss(torch.autograd.Function):
    """A reduced loss whose gradient was made, and saved, in its forward pass: backward scales it."""

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        if (headroom := _headroom(grad)) != 1:
            upstream = upstream / headroom
        want_z, want_other = ctx.needs_input_grad[:2]
        return (
            _scaled(grad, upstream) if want_z else None,
            _scaled(grad, -upstream) if want_other else None,
            *[None] * (len(ctx.needs_input_grad) - 2),
        )


class _Temporal(_Loss):
    @staticmethod
    def forward(ctx, z, other, operator, arguments, reduction):
        scale = _mean_scale(z, reduction) * _headroom(z)
        loss, grad = _run(operator, z, arguments, scale, True, _single(z, reduction))
        ctx.save_for_backward(grad)
        return _reduced(loss, reduction)


class _DirectTemporal(_Loss):
    """Through the direct door, which checks the arguments itself; None where it declines."""

    @staticmethod
    def forward(ctx, z, other, mask, options):
        made = _direct.temporal_loss(z, other, mask, *options, True)
        if made is None:
            return None
        loss, grad = made
        ctx.save_for_backward(grad)
        return _reduced(loss, options[-1])


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """Each sample's gradient times its number, or times the one there is, in float32 and rounded once."""
    if _direct.enabled and not torch.compiler.is_dynamo_compiling():
        made = _direct.scaled(grad, upstream)
        if made is not None:
            return made
    out = torch.empty_like(grad)
    samples = upstream.numel()
    width = grad.numel() // samples if samples else 0
    coefficients = upstream.reshape(1, samples, 1).contiguous()
    implementation("vector_mix", grad)(grad.unsqueeze(0), coefficients, samples, 1, 1, width, out)
    return out


def _run(
    operator: str, z: Tensor, arguments: tuple, scale: float, want_grad: bool, single: bool, out=None
) -> tuple[Tensor, Tensor | None]:
    """One operator call: the losses (B,), without dimension if `single`, and `scale` times their gradient in `z`."""
    if out is None:
        # allocated in its final shape: a squeeze() afterwards costs as much as the check of all arguments
        loss = z.new_empty(() if single else z.shape[:1], dtype=_loss_dtype(z))
        grad = torch.empty_like(z) if want_grad else None
    else:
        loss, grad = out
    run = implementation(operator, z)
    if operator == "temporal_loss":
        ref, mask, first, second, norm, eps, frame_dim = arguments
        run(z, ref, mask, first, second, norm, eps, scale, frame_dim, loss, grad)
    else:
        flow, mask, frame_dim = arguments
        run(z, flow, mask, scale, frame_dim, loss, grad)
    return loss, grad


def _checked_frame_dim(z: Tensor, frame_dim: int) -> int:
    if not isinstance(frame_dim, int):
        raise TypeError(f"frame_dim must be an int, got {type(frame_dim).__name__}")
    ndim = z.ndim
    wrapped = frame_dim + ndim if frame_dim < 0 else frame_dim
    if not 1 <= wrapped < ndim:
        raise ValueError(
            f"frame_dim must name a dimension after the batch, 1 to {ndim - 1} for a {ndim}-D z, got {frame_dim}"
        )
    return wrapped


def _wants_gradient(*tensors: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _frozen(name: str, x: Tensor | None) -> None:
    if _wants_gradient(x):
        raise ValueError(f"{name} requires grad, but the loss is not differentiable in {name}; pass {name}.detach()")


def _temporal_arguments(z, ref, mask, first, second, norm, eps, frame_dim, reduction):
    _checks.latent("z", z)
    if norm not in NORMS:
        raise ValueError(f"norm must be l2, l1 or charbonnier, got {norm!r}")
    _checked_reduction(reduction)
    if frame_dim.__class__ is not int or not 0 < frame_dim < z.ndim:
        frame_dim = _checked_frame_dim(z, frame_dim)
    if ref is not None:
        _checks.like("ref", ref, "z", z)
        if not ref.is_contiguous():
            ref = ref.contiguous()
    if mask is not None:
        mask = _checks.mask_of("mask", mask, "z", z, z.shape)
        _frozen("mask", mask)
    if not z.is_contiguous():
        z = z.contiguous()
    first, second = _checks.number("first", first), _checks.number("second", second)
    return z, (ref, mask, first, second, NORMS[norm], _checks.number("eps", eps, 0.0), frame_dim)


def _checked_reduction(reduction: str) -> None:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be mean or none, got {reduction!r}")


def _single(z: Tensor, reduction: str) -> bool:
    return reduction == "mean" and z.shape[0] == 1


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" and loss.ndim else loss


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
    """How much a clip's latents jump from frame to frame; with `ref`, how unevenly an edit acts over time.

    With d1[t] = z[t+1] − z[t] and d2[t] = z[t+2] − 2z[t+1] + z[t], each minus the same of `ref` if it is given, and
    weights w1[t] = m[t]·m[t+1], w2[t] = m[t]·m[t+1]·m[t+2] from the mask m (none: ones), a sample's loss is
    first·Σ w1 ρ(d1)/Σ w1 + second·Σ w2 ρ(d2)/Σ w2. A term without weight or with too few frames is 0, its gradient
    too. The gradient is made in the forward pass, which reads each input once; backward scales it.

    Args:
        z: Video latents `(B, C, T, H, W)` (or any shape with the batch first), float32, float16, bfloat16 or float64.
        ref: The clip before the edit, of `z`'s shape, dtype and device: the loss is then 0 for an edit that is even
            in time, however much the clip itself moves.
        mask: Where it counts; broadcastable to `z`: `(B, 1, T, H, W)`. bool, `z`'s dtype or float32. Not
            differentiable.
        first: Weight of the first differences.
        second: Weight of the second differences.
        norm: ρ: "l2" d², "l1" |d|, "charbonnier" sqrt(d² + eps²) − eps.
        eps: Width of Charbonnier's rounded tip, in the latents' unit, ≥ 0.
        frame_dim: The dimension of time; 2 for `(B, C, T, H, W)`, 1 for `(B, T, C, H, W)`.
        reduction: "mean" over the batch, or "none" for `(B,)`.

    Returns:
        A scalar or `(B,)`, float32 (float64 for float64 latents).

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or keyword values do not fit; or the mask requires grad.

    Differentiable in `z` and `ref`, once.

    Example:
        >>> import torch, latentfast
        >>> z = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 3, 1, 1)
        >>> latentfast.temporal_loss(z)
        tensor(2.5000)
    """
    if _direct.enabled and not torch.compiler.is_dynamo_compiling():
        made = _direct.temporal_loss(z, ref, mask, first, second, norm, eps, frame_dim, reduction, False)
        if made is not None:
            return _reduced(made, reduction)
        plain = isinstance(z, Tensor) and z.dtype != torch.float16
        if plain and _wants_gradient(z, ref) and not _wants_gradient(mask):
            loss = _DirectTemporal.apply(z, ref, mask, (first, second, norm, eps, frame_dim, reduction))
            if loss is not None:
                return loss
    z, arguments = _temporal_arguments(z, ref, mask, first, second, norm, eps, frame_dim, reduction)
    ref = arguments[0]
    if _wants_gradient(z, ref):
        return _Temporal.apply(z, ref, "temporal_loss", arguments, reduction)
    loss, _ = _run("temporal_loss", z, arguments, 1.0, False, _single(z, reduction))
    return _reduced(loss, reduction)


def temporal_loss_and_grad(
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
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`temporal_loss` and its gradient in `z` from one pass, without autograd: for guidance and preview loops.

    Args:
        z: Video latents, as for `temporal_loss`; so are `ref`, `mask` and the keywords.
        ref: See `temporal_loss`.
        mask: See `temporal_loss`.
        first: See `temporal_loss`.
        second: See `temporal_loss`.
        norm: See `temporal_loss`.
        eps: See `temporal_loss`.
        frame_dim: See `temporal_loss`.
        reduction: With "none", the gradient is that of the losses' sum: each sample's own.
        out: `(losses (B,), gradient like z)` to write into, for loops that allocate nothing.

    Returns:
        `(loss, grad)`: the loss as `temporal_loss` returns it, and a contiguous tensor like `z`. Both are detached.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or keyword values do not fit.

    Example:
        >>> import torch, latentfast
        >>> z = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
        >>> loss, grad = latentfast.temporal_loss_and_grad(z)
        >>> loss, grad.flatten()
        (tensor(1.), tensor([-2.,  2.]))
    """
    if _direct.enabled and out is None and not torch.compiler.is_dynamo_compiling():
        made = _direct.temporal_loss(z, ref, mask, first, second, norm, eps, frame_dim, reduction, True)
        if made is not None:
            return _reduced(made[0], reduction), made[1]
    z = _checks.latent("z", z).detach() if isinstance(z, Tensor) and z.requires_grad else z
    ref = ref.detach() if isinstance(ref, Tensor) and ref.requires_grad else ref
    mask = mask.detach() if isinstance(mask, Tensor) and mask.requires_grad else mask
    z, arguments = _temporal_arguments(z, ref, mask, first, second, norm, eps, frame_dim, reduction)
    batch = z.shape[0]
    if out is not None:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"out must be a pair (losses, gradient), got {type(out).__name__}")
        inputs = (z, arguments[0], arguments[1])
        _checks.output(out[0], (batch,), "the loss", z.new_empty(0, dtype=_loss_dtype(z)), inputs)
        _checks.output(out[1], tuple(z.shape), "z", z, inputs)
    loss, grad = _run("temporal_loss", z, arguments, _mean_scale(z, reduction), True, _single(z, reduction), out)
    assert grad is not None  # asked for
    return _reduced(loss, reduction), grad


def warp_loss(
    z: Tensor, flow: Tensor, mask: Tensor | None = None, *, frame_dim: int = 2, reduction: str = "mean"
) -> Tensor:
    """How much a clip's latents change along the motion: neighbouring frames compared through an optical flow.

    A sample's loss is Σ w (z[t+1](x + flow[t](x)) − z[t](x))² / Σ w, sampled bilinearly; w is the mask, and 0 where
    the flow leaves the frame. The squared short-term loss of Lai et al., "Learning Blind Video Temporal Consistency",
    ECCV 2018, section 4. The gradient is made in the forward pass, its scattered part without floating-point atomics.

    Args:
        z: Video latents `(B, C, T, H, W)`, or `(B, T, C, H, W)` with `frame_dim=1`; float32, float16, bfloat16 or
            float64.
        flow: `(B, 2, T − 1, H, W)`, (dx, dy) from frame t to t + 1 in latent pixels (image flow divided by the VAE's
            factor); `z`'s dtype or float32. Not differentiable.
        mask: Visibility of frame t's positions in frame t + 1, 0 where occluded; broadcastable to `z`'s shape with T
            − 1 frames, `(B, 1, T − 1, H, W)`. bool, `z`'s dtype or float32. Not differentiable.
        frame_dim: The dimension of time, 2 or 1.
        reduction: "mean" over the batch, or "none" for `(B,)`.

    Returns:
        A scalar or `(B,)`, float32 (float64 for float64 latents).

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or keyword values do not fit; or `flow` or `mask` requires grad.

    Differentiable in `z`, once.

    Example:
        >>> import torch, latentfast
        >>> z = torch.zeros(1, 1, 2, 1, 4); z[0, 0, 0, 0, 1] = z[0, 0, 1, 0, 2] = 1.0  # a dot that moves right by one
        >>> flow = torch.zeros(1, 2, 1, 1, 4); flow[:, 0] = 1.0
        >>> latentfast.warp_loss(z, flow)
        tensor(0.)
    """
    _checks.latent("z", z)
    _checked_reduction(reduction)
    if z.ndim != 5:
        raise ValueError(f"z must have 5 dimensions (B, C, T, H, W), got shape {tuple(z.shape)}")
    frame_dim = _checked_frame_dim(z, frame_dim)
    if frame_dim not in (1, 2):
        raise ValueError(f"frame_dim must be 1 or 2, got {frame_dim}")
    frames = z.shape[frame_dim]
    if not isinstance(flow, Tensor):
        raise TypeError(f"flow must be a tensor, got {type(flow).__name__}")
    expected = (z.shape[0], 2, max(frames - 1, 0), *z.shape[3:])
    if tuple(flow.shape) != expected:
        raise ValueError(f"flow must have shape (B, 2, T − 1, H, W) = {expected}, got {tuple(flow.shape)}")
    if flow.dtype not in _checks.DTYPES:
        raise TypeError(f"flow must be float32, float16, bfloat16 or float64, got {flow.dtype}")
    _checks.same_device("flow", flow, "z", z)
    _frozen("flow", flow)
    if flow.dtype != z.dtype and (flow.dtype != torch.float32 or z.dtype == torch.float64):
        flow = flow.to(_checks.wide(z.dtype))
    if mask is not None:
        target = tuple(max(frames - 1, 0) if d == frame_dim else n for d, n in enumerate(z.shape))
        mask = _checks.mask_of("mask", mask, "z", z, target)
        _frozen("mask", mask)
    z = z.contiguous()
    arguments = (flow.contiguous(), mask, frame_dim)
    if _wants_gradient(z):
        return _Temporal.apply(z, None, "warp_loss", arguments, reduction)
    loss, _ = _run("warp_loss", z, arguments, 1.0, False, _single(z, reduction))
    return _reduced(loss, reduction)
