"""Guidance: the operators' signatures in front of the reference."""

from latentfast import reference
from latentfast._operators import GUIDANCE

_MODES = {kind: mode for mode, kind in GUIDANCE.items()}


def guide(
    cond, uncond, sample, momentum, mask, known, kind, original, scale, rescale, eta, norm_threshold, beta, alpha,
    sigma, dt, out, x0,
) -> None:  # fmt: skip
    mode = _MODES[kind]
    p = reference.guidance.prediction(
        cond, uncond, scale, "cfg_zero" if mode == "zero" else mode, rescale, bool(original), eta, norm_threshold, beta,
        momentum, alpha, zero_init=mode == "zero",
    )  # fmt: skip
    if sample is None:
        out.copy_(p)
        return
    following, clean = reference.guidance.step(sample, p, sigma, dt, mask, known)
    out.copy_(following)
    if x0 is not None:
        x0.copy_(clean)


def combine(tensors, coefficients, precise, *outs) -> None:
    present = [out for out in outs if out is not None]
    n = len(tensors)
    rows = [coefficients[k * n : (k + 1) * n] for k in range(len(present))]
    results = reference.guidance.combine(tensors, rows, [x.dtype for x in present], bool(precise))
    for out, result in zip(present, results, strict=True):
        out.copy_(result)
