"""Guidance on every backend: against diffusers' own guiders and scheduler, the cases that those get wrong, momentum,
masks and x0."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import (
    DTYPES,
    GUIDANCE_ULPS,
    HALVES,
    Draw,
    Target,
    assert_gradient_close,
    assert_matches_spec,
    assert_within,
    gradients,
    same_bits,
)

spec = reference.guidance
MODES = ("cfg", "apg", "cfg_zero", "tcfg", "magnitude_aware")
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = {"flat": (2, 45), "3-D": (2, 3, 35), "image": (2, 3, 5, 7), "video": (2, 3, 4, 5, 7)}
#: Errors beside diffusers' float32: a few roundings, and norms and sums that it makes in float32.
NEAR = {"rtol": 1e-5, "atol": 1e-5}
LEVELS = {"sigma": 0.9375, "sigma_next": 0.8125}


def _pair(target: Target, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Predictions that agree in part, as a model's do."""
    draw = Draw(torch.float64, target.device, seed)
    cond, noise = draw.normal(*shape), draw.normal(*shape)
    return {"cond": cond.to(dtype), "uncond": (0.5 * cond + 0.75 * noise).to(dtype)}


def _matches(inputs: dict[str, Tensor], function: str = "guide", **options) -> Tensor:
    got = getattr(latentfast, function)(**inputs, **options)
    assert_matches_spec(got, partial(getattr(spec, function), **options), inputs, GUIDANCE_ULPS)
    return got


# --- Values: every mode with every option -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("original", [False, True], ids=["", "original"])
@every_mode
def test_modes(mode: str, original: bool, rescale: float, shape: str, target: Target) -> None:
    """Magnitude-aware guidance of diffusers fails beyond 3-D latents."""
    options = {"apg": {"eta": 0.25, "norm_threshold": 4.0}, "magnitude_aware": {"alpha": 1.5}}.get(mode, {})
    inputs = _pair(target, *SHAPES[shape])
    _matches(inputs, scale=5.0, mode=mode, original=original, rescale=rescale, **options)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0, 1e6])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, -0.25])
def test_apg_options(eta: float, threshold: float, target: Target) -> None:
    _matches(_pair(target, 2, 3, 4, 5), scale=7.5, mode="apg", eta=eta, norm_threshold=threshold)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0, 12.0])
@every_mode
def test_scales(mode: str, scale: float, target: Target) -> None:
    _matches(_pair(target, 2, 3, 4, 5), scale=scale, mode=mode, rescale=0.5)


def test_predictions_that_nearly_agree(target: Target) -> None:
    """Late steps: what matters there is the difference, which no sum of squares of cond and uncond still knows."""
    draw = Draw(torch.float64, target.device)
    cond = draw.normal(2, 3, 35)
    inputs = {"cond": cond.float(), "uncond": (cond + 1e-4 * draw.normal(2, 3, 35)).float()}
    for mode in MODES:
        _matches(inputs, scale=5.0, mode=mode, eta=0.0, norm_threshold=5e-4)


# --- Against diffusers ------------------------------------------------------------------------------------------------


@pytest.fixture
def guiders():
    return pytest.importorskip("diffusers.guiders")


def _module(name: str):
    return pytest.importorskip(f"diffusers.guiders.{name}")


@pytest.mark.parametrize("original", [False, True], ids=["", "original"])
@pytest.mark.parametrize("threshold", [0.0, 5.0])
@pytest.mark.parametrize("eta", [0.0, 1.0, 0.3])
def test_apg_is_diffusers(eta: float, threshold: float, original: bool, target: Target) -> None:
    """Its sums are float64; ours need no float64 tensor."""
    theirs = _module("adaptive_projected_guidance").normalized_guidance
    inputs = _pair(target, 2, 3, 4, 5, 7)
    options = {"eta": eta, "norm_threshold": threshold}
    expected = theirs(inputs["cond"], inputs["uncond"], 5.0, None, use_original_formulation=original, **options)
    got = latentfast.guide(**inputs, scale=5.0, mode="apg", original=original, **options)
    torch.testing.assert_close(got, expected, **NEAR)


@pytest.mark.parametrize("beta", [-0.5, 0.75])
def test_apg_with_momentum_is_diffusers_over_several_steps(beta: float, target: Target) -> None:
    module = _module("adaptive_projected_guidance")
    state, buffer = module.MomentumBuffer(beta), torch.zeros(2, 3, 4, 5, device=target.device)
    options = {"eta": 0.5, "norm_threshold": 6.0}
    for step in range(4):
        inputs = _pair(target, 2, 3, 4, 5, seed=step)
        expected = module.normalized_guidance(inputs["cond"], inputs["uncond"], 5.0, state, **options)
        got = latentfast.guide(**inputs, scale=5.0, mode="apg", momentum=beta, momentum_buffer=buffer, **options)
        torch.testing.assert_close(got, expected, **NEAR)
        torch.testing.assert_close(buffer, state.running_average, **NEAR)


def test_the_guiders_of_diffusers(guiders, target: Target) -> None:
    """Through their own forward, rescaling included."""
    for mode, theirs in {
        "cfg": guiders.ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7),
        "apg": guiders.AdaptiveProjectedGuidance(guidance_scale=5.0, guidance_rescale=0.7, eta=0.5),
        "cfg_zero": guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, guidance_rescale=0.7, zero_init_steps=1),
        "tcfg": guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7),
        "magnitude_aware": guiders.MagnitudeAwareGuidance(guidance_scale=5.0, guidance_rescale=0.7, alpha=2.0),
    }.items():
        inputs = _pair(target, 2, 3, 35)  # 3-D: beyond it magnitude-aware guidance fails
        theirs.set_state(step=3, num_inference_steps=10, timestep=torch.tensor(700))
        expected = theirs.forward(inputs["cond"], inputs["uncond"]).pred
        rest = {"apg": {"eta": 0.5, "norm_threshold": 15.0}, "magnitude_aware": {"alpha": 2.0}}.get(mode, {})
        got = latentfast.guide(**inputs, scale=5.0, mode=mode, rescale=0.7, **rest)
        torch.testing.assert_close(got, expected, **NEAR, msg=lambda text, mode=mode: f"{mode}: {text}")


@pytest.mark.parametrize("shape", SHAPES)
def test_cfg_with_rescale_is_diffusers(shape: str, target: Target) -> None:
    theirs = pytest.importorskip("diffusers.guiders.guider_utils").rescale_noise_cfg
    inputs = _pair(target, *SHAPES[shape])
    expected = theirs(inputs["uncond"] + 5.0 * (inputs["cond"] - inputs["uncond"]), inputs["cond"], 0.7)
    torch.testing.assert_close(latentfast.guide(**inputs, scale=5.0, rescale=0.7), expected, **NEAR)


def test_tcfg_is_the_singular_value_decomposition(target: Target) -> None:
    theirs = _module("tangential_classifier_free_guidance").normalized_guidance
    inputs = _pair(target, 3, 4, 35)
    for original in (False, True):
        got = latentfast.guide(**inputs, scale=5.0, mode="tcfg", original=original)
        torch.testing.assert_close(got, theirs(*inputs.values(), 5.0, original), rtol=2e-5, atol=2e-5)
    wide = {name: x.double() for name, x in inputs.items()}
    for factor in (1.0, 3.0, 0.1):  # either of the two may be the longer one
        wide["uncond"] = factor * inputs["uncond"].double()
        flat = torch.stack(list(wide.values()), 1).flatten(2).cpu()
        first = torch.linalg.svd(flat, full_matrices=False)[2][:, :1]
        part = ((flat[:, 1:] * first).sum(-1, keepdim=True) * first).view(3, 4, 35).to(target.device)
        got = latentfast.guide(**wide, scale=5.0, mode="tcfg")
        torch.testing.assert_close(got, part + 5.0 * (wide["cond"] - part), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_step_is_that_of_diffusers_scheduler(dtype: torch.dtype, target: Target) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7, device=target.device)
    sample = Draw(dtype, target.device).normal(2, 3, 4, 5)
    levels = scheduler.sigmas.tolist()
    for i, t in enumerate(scheduler.timesteps):
        prediction = Draw(dtype, target.device, seed=i).normal(2, 3, 4, 5)
        expected = scheduler.step(prediction, t, sample, return_dict=False)[0]
        got = latentfast.guided_step(sample, prediction, None, 5.0, sigma=levels[i], sigma_next=levels[i + 1])
        # one product and one sum, which may be one rounding here
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        sample = expected


# --- What the peers get wrong -----------------------------------------------------------------------------------------


def test_zero_init_with_rescale_is_zero(target: Target) -> None:
    """diffusers divides by the standard deviation of a prediction that is 0 there."""
    inputs = _pair(target, 2, 3, 4, 5)
    inputs["cond"][0, 0, 0, 0] = math.nan  # not looked at
    got = latentfast.guide(**inputs, scale=5.0, mode="cfg_zero", rescale=0.7, zero_init=True)
    assert torch.equal(got, torch.zeros_like(got))
    sample = Draw(device=target.device).normal(2, 3, 4, 5)
    step, x0 = latentfast.guided_step(
        sample, **inputs, scale=5.0, mode="cfg_zero", zero_init=True, rescale=0.7, return_x0=True, **LEVELS
    )
    assert torch.equal(step, sample)
    assert torch.equal(x0, sample)


@pytest.mark.parametrize("size", [1, 7, 8191])
@every_mode
def test_constant_predictions(mode: str, size: int, target: Target) -> None:
    """A standard deviation of 0, above or below the line, is no NaN and no noise."""
    ones = torch.ones(2, size, device=target.device)
    other = _pair(target, 2, size)["uncond"]
    for cond, uncond in ((0.7 * ones, 0.1 * ones), (0.7 * ones, other), (other, 0.1 * ones), (0 * ones, 0 * ones)):
        options = {"mode": mode, "eta": 0.5, "norm_threshold": 3.0}
        got = latentfast.guide(cond, uncond, 5.0, rescale=0.7, **options)
        assert torch.isfinite(got).all()
        plain = latentfast.guide(cond, uncond, 5.0, **options)
        if size == 1 or (plain - plain[:, :1]).abs().max() < 1e-5:  # p is constant: it stays as it is
            torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
        elif (cond == cond[0, 0]).all():  # its own deviation is 0: φ·0 + 1 − φ
            torch.testing.assert_close(got, 0.3 * plain, rtol=2e-5, atol=2e-5)


@every_dtype
@every_mode
def test_equal_and_zero_predictions(mode: str, dtype: torch.dtype, target: Target) -> None:
    """diffusers has NaN for magnitude-aware guidance without an unconditional prediction."""
    cond = _pair(target, 2, 3, 35, dtype=dtype)["cond"]
    zero = torch.zeros_like(cond)
    # eta 0 would leave of a difference along `cond` nothing but roundings, which have nothing to be compared with
    for inputs in ({"cond": cond, "uncond": cond}, {"cond": cond, "uncond": zero}, {"cond": zero, "uncond": cond}):
        for original in (False, True):
            got = _matches(inputs, scale=5.0, mode=mode, original=original, eta=0.5, norm_threshold=2.0)
            assert torch.isfinite(got).all()
            assert torch.isfinite(latentfast.guide(**inputs, scale=5.0, mode=mode, eta=0.0, rescale=1.0)).all()
    equal = latentfast.guide(cond, cond, 5.0, mode=mode, rescale=0.7)
    near = 8 * torch.finfo(dtype).eps + 1e-9  # cfg_zero has 1e-8 beside |u|²
    torch.testing.assert_close(equal, cond, rtol=near, atol=near)
    for inputs in ({"cond": cond, "uncond": cond}, {"cond": cond, "uncond": zero}, {"cond": zero, "uncond": zero}):
        found = gradients(partial(latentfast.guide, scale=5.0, mode=mode, rescale=0.7), inputs, ("cond", "uncond"))[1]
        assert all(torch.isfinite(grad).all() for grad in found.values())


@every_mode
def test_magnitudes_that_float32_squares_cannot_hold(mode: str, target: Target) -> None:
    if target.backend == "eager":
        pytest.skip("the specification sums in the inputs' working precision")
    inputs = _pair(target, 2, 3, 35)
    expected = latentfast.guide(**inputs, scale=5.0, mode=mode, rescale=0.7)
    for exponent in (70, -70) if mode != "cfg_zero" else (70,):  # its 1e-8 beside |u|² is not for tiny latents
        scaled = {name: x * 2.0**exponent for name, x in inputs.items()}
        got = latentfast.guide(**scaled, scale=5.0, mode=mode, rescale=0.7)
        torch.testing.assert_close(got * 2.0**-exponent, expected, **NEAR)


def test_tcfg_without_a_first_direction(target: Target) -> None:
    """Orthogonal predictions of one length: u' is 0."""
    cond, uncond = torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]]], device=target.device)
    assert torch.equal(latentfast.guide(cond, uncond, 2.0, mode="tcfg"), 2 * cond)
    found = gradients(partial(latentfast.guide, scale=2.0, mode="tcfg"), {"cond": cond, "uncond": uncond}, ("cond",))
    assert torch.isfinite(found[1]["cond"]).all()


# --- Momentum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("wide", [False, True], ids=["its dtype", "float32"])
@every_dtype
def test_momentum_goes_on(dtype: torch.dtype, wide: bool, rescale: float, target: Target) -> None:
    """Over steps, in the latents' dtype or float32; where it is rounded, the step goes by what it was before."""
    buffer_dtype = torch.float32 if wide and dtype != torch.float64 else dtype
    shape = (2, 3, 4, 5, 7)
    buffer = torch.zeros(shape, dtype=buffer_dtype, device=target.device)
    options = {"mode": "apg", "momentum": -0.5, "eta": 0.25, "norm_threshold": 6.0, "rescale": rescale}
    for step in range(3):
        inputs = {**_pair(target, *shape, dtype=dtype, seed=step), "momentum_buffer": buffer}
        exact, same = (
            spec.guide(**{n: x.to(kind, copy=True) for n, x in inputs.items()}, scale=5.0, **options)
            for kind in (torch.float64, torch.float64 if dtype == torch.float64 else torch.float32)
        )
        expected = inputs["cond"].double() - inputs["uncond"].double() - 0.5 * buffer.double()
        got = latentfast.guide(**inputs, scale=5.0, **options)
        assert_within(got, exact, same, GUIDANCE_ULPS)
        assert_within(buffer, expected, expected.float() if dtype != torch.float64 else expected)


def test_momentum_is_independent_of_the_batch_and_the_way(target: Target) -> None:
    inputs = _pair(target, 5, 3, 4, 5)
    options = {"mode": "apg", "momentum": 0.5, "norm_threshold": 3.0, "rescale": 0.7}
    start = Draw(device=target.device, seed=5).normal(5, 3, 4, 5)
    whole = start.clone()
    batched = latentfast.guide(**inputs, scale=5.0, momentum_buffer=whole, **options)
    for i in (0, 3):
        own = start[i : i + 1].clone()
        alone = latentfast.guide(
            inputs["cond"][i : i + 1], inputs["uncond"][i : i + 1], 5.0, momentum_buffer=own, **options
        )
        if target.backend != "eager" or target.device == "cpu":
            assert same_bits(alone, batched[i : i + 1])
        assert same_bits(own, whole[i : i + 1])
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    other = start.clone()
    assert same_bits(latentfast.guide(**leaves, scale=5.0, momentum_buffer=other, **options).detach(), batched)
    assert same_bits(other, whole)
    before = start._version
    latentfast.guide(**inputs, scale=5.0, momentum_buffer=start, **options)
    assert start._version > before


# --- The step: mask, x0 -----------------------------------------------------------------------------------------------


def _step_inputs(target: Target, dtype: torch.dtype, *shape: int) -> dict[str, Tensor]:
    draw = Draw(dtype, target.device, seed=3)
    return {"sample": draw.normal(*shape), **_pair(target, *shape, dtype=dtype), "known": draw.normal(*shape)}


@pytest.mark.parametrize("mode", ["cfg", "tcfg"])
@every_dtype
def test_a_hard_mask_keeps_bits(mode: str, dtype: torch.dtype, target: Target) -> None:
    inputs = _step_inputs(target, dtype, 2, 3, 4, 5, 7)
    known = inputs.pop("known")
    options = {"scale": 5.0, "mode": mode, "rescale": 0.7, **LEVELS}
    step = latentfast.guided_step(**inputs, **options)
    mask = (Draw(device=target.device).uniform(2, 1, 4, 5, 7) < 0.5).to(dtype)
    inside = mask.expand(step.shape) == 1
    known = known.masked_fill(inside, math.nan)  # and nothing of it gets in
    got = latentfast.guided_step(**inputs, **options, mask=mask, known=known)
    assert same_bits(got, torch.where(inside, step, known))
    assert same_bits(latentfast.guided_step(**inputs, **options, mask=mask.bool(), known=known), got)


@pytest.mark.parametrize(
    "mask_shape", [(2, 1, 4, 5, 7), (7,), (), (2, 3, 4, 5, 7), (1, 3, 1, 5, 1), (4, 1, 1), (2, 1, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("mode", ["cfg", "apg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_every_shape(dtype: torch.dtype, mode: str, mask_shape: tuple, target: Target) -> None:
    inputs = _step_inputs(target, dtype, 2, 3, 4, 5, 7)
    inputs["mask"] = Draw(device=target.device).mask(*mask_shape)
    options = {"scale": 5.0, "mode": mode, **LEVELS}
    _matches(inputs, "guided_step", **options)
    step, x0 = latentfast.guided_step(**inputs, **options, return_x0=True)
    assert same_bits(step, latentfast.guided_step(**inputs, **options))
    bare = {name: x for name, x in inputs.items() if name not in ("mask", "known")}
    assert same_bits(x0, latentfast.guided_step(**bare, **options, return_x0=True)[1])  # not masked


@every_dtype
@every_mode
def test_x0(mode: str, dtype: torch.dtype, target: Target) -> None:
    inputs = _step_inputs(target, dtype, 2, 3, 4, 5)
    del inputs["known"]
    options = {"scale": 5.0, "mode": mode, "rescale": 0.7, **LEVELS}
    step, x0 = latentfast.guided_step(**inputs, **options, return_x0=True)
    assert same_bits(step, latentfast.guided_step(**inputs, **options))
    assert_matches_spec(x0, lambda **i: spec.guided_step(**i, **options, return_x0=True)[1], inputs, GUIDANCE_ULPS)
    buffers = torch.empty_like(step), torch.empty_like(x0)
    got = latentfast.guided_step(**inputs, **options, return_x0=True, out=buffers)
    assert got[0] is buffers[0]
    assert got[1] is buffers[1]
    assert same_bits(buffers[0], step)
    assert same_bits(buffers[1], x0)


def test_without_an_unconditional_prediction_nothing_is_guided(target: Target) -> None:
    cond = _pair(target, 2, 3, 5)["cond"]
    buffer = torch.ones_like(cond)
    for mode in MODES:
        assert same_bits(latentfast.guide(cond, None, 5.0, mode=mode, rescale=0.7), cond)
    assert same_bits(latentfast.guide(cond, None, 5.0, mode="apg", momentum=0.5, momentum_buffer=buffer), cond)
    assert torch.equal(buffer, torch.ones_like(cond))
    found = gradients(lambda cond: latentfast.guide(cond, None, 5.0), {"cond": cond}, ("cond",), torch.ones_like(cond))
    assert torch.equal(found[1]["cond"], torch.ones_like(cond))


# --- Gradients --------------------------------------------------------------------------------------------------------

GRADIENTS = {
    "cfg": {}, "cfg original": {"mode": "cfg", "original": True}, "apg": {"eta": 0.25}, "apg limited": {
        "mode": "apg", "eta": 0.5, "norm_threshold": 1.5}, "apg momentum": {
        "mode": "apg", "eta": 0.5, "norm_threshold": 1.5, "momentum": -0.5},
    "cfg_zero": {}, "cfg_zero original": {"mode": "cfg_zero", "original": True}, "tcfg": {}, "tcfg original": {
        "mode": "tcfg", "original": True}, "magnitude_aware": {"alpha": 0.5}, "magnitude_aware original": {
        "mode": "magnitude_aware", "alpha": 0.5, "original": True},
}  # fmt: skip


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_a_step_with_everything(name: str, rescale: float, target: Target) -> None:
    """By cond, uncond, sample and known, of the next sample and x0 together."""
    inputs = _step_inputs(target, torch.float64, 2, 3, 5)
    mask = Draw(torch.float64, target.device).uniform(2, 1, 5)
    buffer = Draw(torch.float64, target.device, seed=8).normal(2, 3, 5)
    options = {"mode": name, "scale": 3.0, "rescale": rescale, **GRADIENTS[name], **LEVELS}

    def both(function, **leaves):
        more = {"momentum_buffer": buffer.clone()} if "momentum" in options else {}
        step, x0 = function(**leaves, **options, **more, mask=mask, return_x0=True)
        return torch.stack((step, x0))

    wanted = tuple(inputs)
    out, got = gradients(partial(both, latentfast.guided_step), inputs, wanted)
    exact_out, exact = gradients(partial(both, spec.guided_step), inputs, wanted)
    assert_within(out, exact_out, exact_out, GUIDANCE_ULPS)
    for leaf in wanted:
        assert_gradient_close(got[leaf], exact[leaf], exact[leaf])
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *x: both(latentfast.guided_step, **dict(zip(wanted, x, strict=True))), leaves, fast_mode=True
    )


def test_a_gradient_that_is_not_wanted_is_not_made(target: Target) -> None:
    inputs = _step_inputs(target, torch.float32, 2, 3, 5)
    mask = Draw(device=target.device).uniform(2, 1, 5)
    function = partial(latentfast.guided_step, scale=3.0, mode="tcfg", rescale=0.5, mask=mask, **LEVELS)
    everything = gradients(function, inputs, tuple(inputs))[1]
    for name in inputs:
        assert same_bits(gradients(function, inputs, (name,))[1][name], everything[name])
