"""Guidance: `guide` (two predictions to one) and `guided_step` (guidance and the scheduler's step in one go)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast import _direct
from latentfast._operators import GUIDANCE
from latentfast.backends import implementation
from latentfast.ops import _checks
from latentfast.ops._guidance import Options, guidance_gradients

_MODES = tuple(mode for mode in GUIDANCE if mode != "zero")


class _Guide(torch.autograd.Function):
    """The operator `guide` for inputs that want a gradient. `momentum` and `mask` are constants."""

    @staticmethod
    def forward(ctx, cond, uncond, sample, known, momentum, mask, options, sigma, dt, want_x0):
        ctx.save_for_backward(cond, uncond, mask, None if momentum is None else momentum.clone())
        ctx.rest = options, sigma, dt if sample is not None else 1.0  # without a sample the result is p
        out = torch.empty_like(cond)
        x0 = torch.empty_like(cond) if want_x0 else None
        arguments = (cond, uncond, sample, momentum, mask, known)
        implementation("guide", cond)(*arguments, *options, sigma, dt, out, x0)
        return (out, x0) if want_x0 else out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_x0=None):
        cond, uncond, mask, momentum = ctx.saved_tensors
        options, sigma, by_p = ctx.rest
        want_cond, want_uncond, want_sample, want_known = ctx.needs_input_grad[:4]
        wide = _checks.wide(cond.dtype)
        g = grad.to(wide)
        step = g if mask is None else g * mask
        of_known = (g - step).to(cond.dtype) if want_known else None
        of_sample = step if grad_x0 is None else step + grad_x0
        of_sample = of_sample.to(cond.dtype, copy=True) if want_sample else None
        of_cond = of_uncond = None
        if want_cond or want_uncond:
            upstream = by_p * step if grad_x0 is None else by_p * step - sigma * grad_x0.to(wide)
            made = guidance_gradients(upstream.contiguous(), cond, uncond, momentum, options, (want_cond, want_uncond))
            of_cond, of_uncond = (None if x is None else x.to(cond.dtype) for x in made)
        return of_cond, of_uncond, of_sample, of_known, *[None] * 6


def _options(
    mode: str, scale: float, rescale: float, original: bool, eta: float, norm_threshold: float, momentum: float,
    momentum_buffer: Tensor | None, alpha: float, zero_init: bool, cond: Tensor,
) -> Options:  # fmt: skip
    """The numbers of the operator, checked."""
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    for name, flag in (("original", original), ("zero_init", zero_init)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
    if zero_init and mode != "cfg_zero":
        raise ValueError(f"zero_init belongs to mode cfg_zero, got mode {mode}")
    beta = _checks.number("momentum", momentum)
    if momentum_buffer is not None:
        _check_momentum(mode, momentum_buffer, cond)
    elif beta != 0:
        raise ValueError("momentum needs a momentum_buffer, a tensor like cond that is zero before the first step")
    return Options(
        GUIDANCE["zero" if zero_init else mode],
        int(original),
        _checks.number("scale", scale),
        _checks.number("rescale", rescale, 0.0, 1.0),
        _checks.number("eta", eta),
        _checks.number("norm_threshold", norm_threshold, 0.0),
        beta,
        _checks.number("alpha", alpha, 0.0),
    )


def _check_momentum(mode: str, buffer: Tensor, cond: Tensor) -> None:
    if mode != "apg":
        raise ValueError(f"momentum_buffer belongs to mode apg, got mode {mode}")
    if not isinstance(buffer, Tensor):
        raise TypeError(f"momentum_buffer must be a tensor, got {type(buffer).__name__}")
    if buffer.shape != cond.shape:
        raise ValueError(f"momentum_buffer must have cond's shape {tuple(cond.shape)}, got {tuple(buffer.shape)}")
    if buffer.dtype != torch.float32 or cond.dtype == torch.float64:
        _checks.same_kind("momentum_buffer", buffer, "cond", cond)
    _checks.same_device("momentum_buffer", buffer, "cond", cond)
    if not buffer.is_contiguous():
        raise ValueError(f"momentum_buffer must be contiguous, as it is written into, got strides {buffer.stride()}")
    if buffer.requires_grad:
        raise ValueError("momentum_buffer must not require grad: it is updated in place")


def _check_predictions(cond: object, uncond: object) -> Tensor:
    cond = _checks.latent("cond", cond)
    if cond.ndim < 2:
        raise ValueError(f"cond must have at least 2 dimensions, samples first, got shape {tuple(cond.shape)}")
    if uncond is not None:
        _checks.like("uncond", uncond, "cond", cond)
    return cond


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _run(
    cond: Tensor, uncond: Tensor | None, sample: Tensor | None, momentum: Tensor | None, mask: Tensor | None,
    known: Tensor | None, options: Options, sigma: float, dt: float, want_x0: bool, out,
):  # fmt: skip
    """The operator, by way of autograd if some input wants a gradient: p or the next sample, with x0 if it is wanted.

    `out`: None, or the tensor (with `want_x0` the two) to write into.
    """
    if uncond is None:  # p = cond
        unguided = options.kind != GUIDANCE["zero"]
        options = Options(GUIDANCE["cfg"], 0, 1.0, 0.0, 1.0, 0.0, 0.0, 8.0) if unguided else options
        uncond, momentum = cond, None
    cond, sample, known = (_contiguous(x) for x in (cond, sample, known))  # type: ignore[assignment]
    uncond = _contiguous(uncond)
    inputs = (cond, uncond, sample, known)
    if momentum is not None and not torch.compiler.is_compiling():
        _check_apart("momentum_buffer", momentum, (*inputs, mask))
        torch.autograd.graph.increment_version(momentum)
    x0 = None
    if out is not None:
        named = (("out", out),) if not want_x0 else (("out[0]", out[0]), ("out[1]", out[1]))
        for _, x in named:
            _checks.output(x, tuple(cond.shape), "cond", cond, (*inputs, mask, momentum))
        out, x0 = (out[0], out[1]) if want_x0 else (out, None)
        if x0 is not None and not torch.compiler.is_compiling():
            _check_apart("out[1]", x0, (out,))
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Guide.apply(cond, uncond, sample, known, momentum, mask, options, sigma, dt, want_x0)
    else:
        out = torch.empty_like(cond)
        x0 = torch.empty_like(cond) if want_x0 else None
    implementation("guide", cond)(cond, uncond, sample, momentum, mask, known, *options, sigma, dt, out, x0)
    return (out, x0) if want_x0 else out


def _check_apart(name: str, x: Tensor, others: tuple[Tensor | None, ...]) -> None:
    if _checks.shares_memory(x, others):
        raise ValueError(f"{name} must not share memory with another argument, got one that does")


def guide(
    cond: Tensor,
    uncond: Tensor | None,
    scale: float,
    *,
    mode: str = "cfg",
    rescale: float = 0.0,
    original: bool = False,
    eta: float = 1.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
    momentum_buffer: Tensor | None = None,
    alpha: float = 8.0,
    zero_init: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Guides a prediction: away from the unconditional one, towards the conditional one.

    With c = cond, u = uncond, d = c − u and w = scale, for each sample (an index of dimension 0) by itself:

    - ``"cfg"``: u + w·d (classifier-free guidance, arXiv 2207.12598);
    - ``"apg"``: u + w·(m⊥ + eta·m∥), where m is d, or d + momentum·(the momentum so far), shortened to
      `norm_threshold`, and split at c (adaptive projected guidance, arXiv 2410.02416, algorithm 1);
    - ``"cfg_zero"``: u' + w·(c − u') with u' = ⟨c, u⟩/|u|²·u, or 0 with `zero_init` (CFG-Zero*, arXiv 2503.18886);
    - ``"tcfg"``: the same with u' the projection of u on the first right singular vector of the two predictions
      (tangential damping, arXiv 2503.18137), in closed form from their 2 × 2 Gram matrix;
    - ``"magnitude_aware"``: u + (1 + (w − 1)·exp(−alpha·|d|/|u|))·d (diffusers' MagnitudeAwareGuidance).

    Then `rescale` pulls the standard deviation of the result p towards that of c: p·(φ·std(c)/std(p) + 1 − φ)
    (arXiv 2305.08891, section 3.4). Constant, equal and zero predictions give finite results in every mode. Sums
    are made in float64, in a fixed order; p is rounded once.

    Args:
        cond: The conditional prediction, `(B, …)` of at least 2 dimensions, float32, float16, bfloat16 or float64.
        uncond: The unconditional one, of `cond`'s shape, dtype and device. None: there is no guidance, p = cond.
        scale: w; with 1 the "cfg" result is `cond`.
        mode: One of the above.
        rescale: φ in [0, 1].
        original: Start from c in place of u or u', as the papers before diffusers have it: c + w·…; for
            "magnitude_aware" also w·exp(…) in place of 1 + (w − 1)·exp(…).
        eta: Of "apg": how much of the part along `cond` is kept.
        norm_threshold: Of "apg": the greatest length of the update, 0 for any.
        momentum: Of "apg": the factor of the momentum so far, often negative.
        momentum_buffer: Of "apg": a contiguous tensor of `cond`'s shape and dtype, or float32, zeros before the first
            step; replaced in place by d + momentum·momentum_buffer.
        alpha: Of "magnitude_aware": how fast guidance fades, at least 0.
        zero_init: Of "cfg_zero": p = 0, as its authors do in the first steps.
        out: A contiguous tensor like `cond` to write into; not differentiable.

    Returns:
        A new contiguous tensor like `cond`.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or keyword values do not fit.

    Differentiable in `cond` and `uncond`, once; the momentum counts as a constant. Under `torch.compile` the numbers
    are constants of the graph.

    Example:
        >>> import torch, latentfast
        >>> cond, uncond = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> latentfast.guide(cond, uncond, 3.0)
        tensor([[ 4., -2.]])
        >>> latentfast.guide(cond, uncond, 3.0, mode="apg", eta=0.0)
        tensor([[ 1., -2.]])
    """
    if _direct.enabled and out is None and not torch.compiler.is_dynamo_compiling():
        result = _direct.guide(
            cond, uncond, scale, mode, rescale, original, eta, norm_threshold, momentum, momentum_buffer, alpha,
            zero_init,
        )  # fmt: skip
        if result is not None:
            return result
    _check_predictions(cond, uncond)
    options = _options(
        mode, scale, rescale, original, eta, norm_threshold, momentum, momentum_buffer, alpha, zero_init, cond
    )
    return _run(cond, uncond, None, momentum_buffer, None, None, options, 0.0, 0.0, False, out)


def guided_step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    scale: float,
    *,
    sigma: float,
    sigma_next: float,
    mode: str = "cfg",
    rescale: float = 0.0,
    original: bool = False,
    eta: float = 1.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
    momentum_buffer: Tensor | None = None,
    alpha: float = 8.0,
    zero_init: bool = False,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    return_x0: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A step of a flow-matching sampler in one go: guidance, Euler's step, the blend of inpainting, and x0.

    With p = `guide(cond, uncond, scale, …)`, unrounded: step = sample + (sigma_next − sigma)·p, and the clip that the
    prediction leads to, x0 = sample − sigma·p. With a mask the result is known + mask·(step − known): where the mask is
    exactly 0 it has `known`'s bits, where it is exactly 1 those of the step.

    Args:
        sample: The latents at noise level `sigma`, `(B, …)` of at least 2 dimensions, float32, float16, bfloat16 or
            float64.
        cond: The conditional prediction (velocity) there, of `sample`'s shape, dtype and device.
        uncond: The unconditional one, alike; None: there is no guidance, p = cond.
        scale: The guidance scale.
        sigma: The noise level of `sample`, 1 for pure noise.
        sigma_next: The noise level to go to.
        mode: As for `guide`, with the keywords that follow.
        rescale: φ in [0, 1].
        original: Whether guidance starts from `cond`.
        eta: Of "apg".
        norm_threshold: Of "apg".
        momentum: Of "apg".
        momentum_buffer: Of "apg"; updated in place.
        alpha: Of "magnitude_aware".
        zero_init: Of "cfg_zero".
        mask: Where to take the step (1) and where to keep `known` (0); broadcastable to `sample`'s shape, `(B, 1, T, H,
            W)` for video. bool, `sample`'s dtype or float32. Together with `known`, or not at all.
        known: What is kept, at noise level `sigma_next` already; like `sample`.
        return_x0: Whether x0 is returned too. The mask does not apply to it.
        out: A contiguous tensor like `sample` to write into, or with `return_x0` two of them; not differentiable.

    Returns:
        The next sample, or the pair of it and x0: new contiguous tensors like `sample`.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or keyword values do not fit; or the mask requires grad.

    Differentiable in `sample`, `cond`, `uncond` and `known`, once. Under `torch.compile` the numbers are constants of
    the graph.

    Example:
        >>> import torch, latentfast
        >>> sample, cond, uncond = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]], [[1.0, 1.0]]])
        >>> latentfast.guided_step(sample, cond, uncond, 3.0, sigma=1.0, sigma_next=0.5, return_x0=True)
        (tensor([[-1.,  2.]]), tensor([[-3.,  3.]]))
    """
    if _direct.enabled and out is None and not torch.compiler.is_dynamo_compiling():
        result = _direct.guided_step(
            sample, cond, uncond, scale, sigma, sigma_next, mode, rescale, original, eta, norm_threshold, momentum,
            momentum_buffer, alpha, zero_init, mask, known, return_x0,
        )  # fmt: skip
        if result is not None:
            return result
    _checks.latent("sample", sample)
    _check_predictions(cond, uncond)
    _checks.like("sample", sample, "cond", cond)
    options = _options(
        mode, scale, rescale, original, eta, norm_threshold, momentum, momentum_buffer, alpha, zero_init, cond
    )
    _checks.number("sigma", sigma)
    _checks.number("sigma_next", sigma_next)
    if (mask is None) != (known is None):
        given, missing = ("known", "mask") if mask is None else ("mask", "known")
        raise ValueError(f"{given} needs {missing}: give both, or neither")
    if mask is not None:
        mask = _checks.mask_of("mask", mask, "sample", sample, sample.shape)
        if mask.requires_grad and torch.is_grad_enabled():
            raise ValueError("mask requires grad, but the step is not differentiable in mask; pass mask.detach()")
        _checks.like("known", known, "sample", sample)
    if not isinstance(return_x0, bool):
        raise TypeError(f"return_x0 must be True or False, got {type(return_x0).__name__}")
    if return_x0 and out is not None and (not isinstance(out, tuple | list) or len(out) != 2):
        raise TypeError(f"out must be a pair (next sample, x0), got {type(out).__name__}")
    return _run(cond, uncond, sample, momentum_buffer, mask, known, options, sigma, sigma_next - sigma, return_x0, out)
