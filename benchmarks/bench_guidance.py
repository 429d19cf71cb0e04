"""Guidance: what of it is measured, at which sizes."""

import functools
from typing import Any

import torch
from torch import Tensor

import latentfast
from latentfast.benchmarks.draws import clips
from latentfast.benchmarks.operation import Baseline, Call, Case, Operation
from latentfast.reference import guidance as reference

SCALE, RESCALE = 5.0, 0.7
#: diffusers' threshold; its eta of 1 would leave nothing to project.
APG = {"eta": 0.0, "norm_threshold": 15.0}
# Exact in bfloat16 and float32, so that a host's number and a scheduler's tensor mean the same.
SIGMA, SIGMA_NEXT = 0.9375, 0.8125
#: A third-order multistep corrector: the sample, three predictions, two earlier differences.
WEIGHTS = (0.875, -0.40625, 0.15625, -0.046875, 0.3125, -0.09375)


# --- What people write: per sample, in float32, vectorised ------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    return x.float().flatten(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1, keepdim=True)


def _field_rescaled(p: Tensor, c: Tensor) -> Tensor:
    return p * (RESCALE * c.std(1, keepdim=True) / p.std(1, keepdim=True) + 1 - RESCALE)


def _field_cfg(cond: Tensor, uncond: Tensor) -> Tensor:
    c, u = _flat(cond), _flat(uncond)
    return _field_rescaled(u + SCALE * (c - u), c)


def _field_apg(cond: Tensor, uncond: Tensor) -> Tensor:
    c, u = _flat(cond), _flat(uncond)
    d = c - u
    d = d * (APG["norm_threshold"] / d.norm(dim=1, keepdim=True)).clamp(max=1.0)
    return u + SCALE * (d - _dot(d, c) / _dot(c, c) * c)


def _field_cfg_zero(cond: Tensor, uncond: Tensor) -> Tensor:
    c, u = _flat(cond), _flat(uncond)
    u = _dot(c, u) / (_dot(u, u) + 1e-8) * u
    return u + SCALE * (c - u)


def _field_magnitude_aware(cond: Tensor, uncond: Tensor) -> Tensor:
    c, u = _flat(cond), _flat(uncond)
    d = c - u
    ratio = d.norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True)
    return u + (1 + (SCALE - 1) * torch.exp(-8.0 * ratio)) * d


def _field_guide(predict: Call) -> Call:
    return lambda cond, uncond: predict(cond, uncond).to(cond.dtype).view_as(cond)


def _field_step(predict: Call) -> Call:
    def step(sample: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        following = _flat(sample) + (SIGMA_NEXT - SIGMA) * predict(cond, uncond)
        return following.to(sample.dtype).view_as(sample)

    return step


def _field_sum(tensors: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
    return sum(w * x.float() for w, x in zip(weights, tensors, strict=True)).to(tensors[0].dtype)


def _field_combine(*tensors: Tensor) -> Tensor:
    return _field_sum(tensors, WEIGHTS)


# --- diffusers' own -----------------------------------------------------------------------------------------------


@functools.cache
def _scheduler(device: torch.device) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[SIGMA, SIGMA_NEXT], device=device)
    return scheduler


def _peer_step(predict: Call) -> Call:
    def step(sample: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        scheduler = _scheduler(sample.device)
        scheduler._step_index = 0  # as in a pipeline, which counts on from here
        return scheduler.step(predict(cond, uncond), scheduler.timesteps[0], sample, return_dict=False)[0]

    return step


def _peer_cfg(cond: Tensor, uncond: Tensor) -> Tensor:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    return rescale_noise_cfg(uncond + SCALE * (cond - uncond), cond, guidance_rescale=RESCALE)


def _peer_apg(cond: Tensor, uncond: Tensor) -> Tensor:
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    return normalized_guidance(cond, uncond, SCALE, None, APG["eta"], APG["norm_threshold"])


def _peer_cfg_zero(cond: Tensor, uncond: Tensor) -> Tensor:
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    alpha = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).view(-1, *[1] * (cond.ndim - 1))
    uncond = uncond * alpha
    return uncond + SCALE * (cond - uncond)


def _peer_magnitude_aware(cond: Tensor, uncond: Tensor) -> Tensor:
    from diffusers.guiders.magnitude_aware_guidance import mambo_guidance

    flat = mambo_guidance(cond.flatten(2), uncond.flatten(2), SCALE)  # it fails on more than three dimensions
    return flat.view_as(cond)


def _peer_combine(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """The chain of expressions that a solver's step is in diffusers' schedulers: an operation at a time."""
    return WEIGHTS[0] * a + WEIGHTS[1] * b + WEIGHTS[2] * c + WEIGHTS[3] * d + WEIGHTS[4] * e + WEIGHTS[5] * f


# --- The operations ---------------------------------------------------------------------------------------------------


def _predictions(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Two predictions that agree in part, as a model's do."""
    cond = torch.randn(shape, device=device, dtype=dtype)
    return cond, cond + torch.randn_like(cond) / 8


def _step_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return torch.randn(shape, device=device, dtype=dtype), *_predictions(shape, dtype, device)


def _step(variant: str, predict: Call, peer: Call, note: str, **options: Any) -> Operation:
    options = {"sigma": SIGMA, "sigma_next": SIGMA_NEXT, **options}
    return Operation(
        stem="guidance",
        name="guided_step",
        variant=variant,
        inputs=_step_inputs,
        batch_dims=(0, 0, 0),
        outputs=(0,),
        ours=lambda x, c, u: latentfast.guided_step(x, c, u, SCALE, **options),
        reference=Baseline(lambda x, c, u: reference.guided_step(x, c, u, SCALE, **options), "latentfast.reference"),
        field=Baseline(_field_step(predict), "vectorised, float32"),
        peer=Baseline(_peer_step(peer), f"diffusers: {note}, FlowMatchEulerDiscreteScheduler.step"),
    )


def _guide(variant: str, predict: Call, peer: Call, note: str) -> Operation:
    return Operation(
        stem="guidance",
        name="guide",
        variant=variant,
        inputs=_predictions,
        batch_dims=(0, 0),
        outputs=(0,),
        ours=lambda c, u: latentfast.guide(c, u, SCALE, mode=variant),
        reference=Baseline(lambda c, u: reference.guide(c, u, SCALE, mode=variant), "latentfast.reference"),
        field=Baseline(_field_guide(predict), "vectorised, float32"),
        peer=Baseline(peer, f"diffusers: {note}"),
    )


STEP_CFG = _step("cfg,rescale", _field_cfg, _peer_cfg, "rescale_noise_cfg", rescale=RESCALE)
STEP_APG = _step("apg", _field_apg, _peer_apg, "AdaptiveProjectedGuidance", mode="apg", **APG)
GUIDE_CFG_ZERO = _guide("cfg_zero", _field_cfg_zero, _peer_cfg_zero, "ClassifierFreeZeroStarGuidance")
GUIDE_MAGNITUDE = _guide("magnitude_aware", _field_magnitude_aware, _peer_magnitude_aware, "MagnitudeAwareGuidance")
COMBINE = Operation(
    stem="guidance",
    name="combine",
    variant="N=6",
    inputs=clips(len(WEIGHTS)),
    batch_dims=(0,) * len(WEIGHTS),
    outputs=(0,),
    ours=lambda *tensors: latentfast.combine(tensors, WEIGHTS),
    reference=Baseline(lambda *tensors: reference.combine(tensors, WEIGHTS), "latentfast.reference"),
    field=Baseline(_field_combine, "Σ w·x in float32"),
    peer=Baseline(_peer_combine, "diffusers' schedulers: w0·x0 + w1·x1 + …"),
)

#: As UniPC's step: the corrected sample, x0 and the next sample.
ROWS = tuple(tuple((k + 1) * w for w in WEIGHTS) for k in range(3))
COMBINE_ROWS = Operation(
    stem="guidance",
    name="combine",
    variant="N=6 K=3 precise",
    inputs=COMBINE.inputs,
    batch_dims=COMBINE.batch_dims,
    outputs=(0, 0, 0),
    ours=lambda *tensors: latentfast.combine(tensors, ROWS, precise=True),
    reference=Baseline(lambda *tensors: reference.combine(tensors, ROWS, precise=True), "latentfast.reference"),
    field=Baseline(lambda *tensors: tuple(_field_sum(tensors, row) for row in ROWS), "Σ w·x in float32, three times"),
)

OPERATIONS = (STEP_CFG, STEP_APG, COMBINE, COMBINE_ROWS, GUIDE_CFG_ZERO, GUIDE_MAGNITUDE)
CASES = [Case(operation, *size) for operation in OPERATIONS for size in (("wan720", 32), ("wan480", 1))]
CPU_CASES = [Case(operation, "wan480", 1, torch.float32) for operation in OPERATIONS]
