"""Guidance of long samples, for which the GPU has kernels of its own: values, masks, x0, batches, alignment."""

from functools import partial

import pytest
import torch
from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import DTYPES, GUIDANCE_ULPS, Draw, Target, assert_matches_spec, offset, same_bits

#: Short of a whole number of 2 KB; several to a block of threads; more than the chip holds at once (float32).
SHAPES = [(3, 4, 5, 32, 41), (2, 16, 21, 60, 104), (1, 16, 31, 90, 160)]
OPTIONS = {
    "cfg": {"mode": "cfg", "rescale": 0.7},
    "apg": {"mode": "apg", "eta": 0.25, "norm_threshold": 4.0},
    "tcfg": {"mode": "tcfg", "rescale": 1.0, "original": True},
}
LEVELS = {"scale": 5.0, "sigma": 0.9375, "sigma_next": 0.8125}
every_mode = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def _inputs(target: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Tensor]:
    if target.interpreted or (target.device == "cpu" and shape is not SHAPES[0]):
        pytest.skip("too large for this device")
    draw = Draw(dtype, target.device)
    cond, noise = draw.normal(*shape), draw.normal(*shape)
    uncond = (0.5 * cond.double() + 0.75 * noise.double()).to(dtype)
    return {"sample": draw.normal(*shape), "cond": cond, "uncond": uncond}


def _matches(inputs: dict[str, Tensor], function: str, **options) -> None:
    got = getattr(latentfast, function)(**inputs, **options)
    assert_matches_spec(got, partial(getattr(reference.guidance, function), **options), inputs, GUIDANCE_ULPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_mode
def test_values(options: dict, dtype: torch.dtype, shape: tuple[int, ...], target: Target) -> None:
    inputs = _inputs(target, dtype, shape)
    _matches(inputs, "guided_step", **options, **LEVELS)
    _matches({name: inputs[name] for name in ("cond", "uncond")}, "guide", scale=5.0, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
def test_mask_and_x0(options: dict, dtype: torch.dtype, target: Target) -> None:
    inputs = _inputs(target, dtype, SHAPES[0])
    draw = Draw(dtype, target.device, seed=7)
    known = draw.normal(*SHAPES[0])
    step, x0 = latentfast.guided_step(**inputs, **options, **LEVELS, return_x0=True)
    assert same_bits(step, latentfast.guided_step(**inputs, **options, **LEVELS))
    exact = partial(reference.guidance.guided_step, **options, **LEVELS, return_x0=True)
    assert_matches_spec(x0, lambda **tensors: exact(**tensors)[1], inputs, GUIDANCE_ULPS)
    for shape in ((3, 1, 5, 32, 41), (5, 1, 1), (41,), (3, 4, 1, 1, 1)):
        _matches({**inputs, "known": known, "mask": draw.mask(*shape)}, "guided_step", **options, **LEVELS)
    hard = (draw.uniform(3, 1, 5, 32, 41) < 0.5).to(dtype)
    got = latentfast.guided_step(**inputs, **options, **LEVELS, mask=hard, known=known)
    assert same_bits(got, torch.where(hard == 1, step, known))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
def test_alone_in_a_batch_and_off_alignment(options: dict, dtype: torch.dtype, target: Target) -> None:
    inputs = _inputs(target, dtype, SHAPES[0])
    batched = latentfast.guided_step(**inputs, **options, **LEVELS)
    if target.backend != "eager":
        for i in (0, 2):
            alone = {name: x[i : i + 1].clone() for name, x in inputs.items()}
            assert same_bits(latentfast.guided_step(**alone, **options, **LEVELS), batched[i : i + 1])
    _matches({name: offset(x) for name, x in inputs.items()}, "guided_step", **options, **LEVELS)


def test_constants_have_no_deviation(target: Target) -> None:
    """Rounding in the sums must not be taken for one."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        random = _inputs(target, dtype, SHAPES[0])["cond"]
        one, other = torch.full_like(random, 1.7), torch.full_like(random, -0.3)
        _matches({"cond": one, "uncond": other}, "guide", scale=5.0, rescale=0.7)
        _matches({"cond": random, "uncond": other}, "guide", scale=0.0, rescale=0.7)  # p = uncond
