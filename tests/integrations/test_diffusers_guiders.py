"""Guiders of modular pipelines against diffusers' own of the same name, and what those get wrong."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers.guiders as parents

from latentfast import reference
from latentfast.integrations.diffusers import guiders
from tests.helpers import DTYPES, GUIDANCE_ULPS, Draw, Target, assert_within, same_bits, working_dtype

#: Each class with configurations that take every branch of its formula.
CONFIGURATIONS = {
    "ClassifierFreeGuidance": [{"guidance_scale": 5.0}],
    "AdaptiveProjectedGuidance": [
        {"guidance_scale": 5.0, "eta": 0.25, "adaptive_projected_guidance_rescale": 4.0},
        {"guidance_scale": 5.0, "eta": 0.0, "adaptive_projected_guidance_momentum": -0.5},
    ],
    "ClassifierFreeZeroStarGuidance": [{"guidance_scale": 5.0, "zero_init_steps": 0}],
    "TangentialClassifierFreeGuidance": [{"guidance_scale": 5.0}],
    "MagnitudeAwareGuidance": [{"guidance_scale": 5.0, "alpha": 1.5}],
}
CASES = [
    pytest.param(name, {**options, **shared}, id=f"{name}-{i}-{'-'.join(map(str, shared.values()))}")
    for name, all_options in CONFIGURATIONS.items()
    for i, options in enumerate(all_options)
    for shared in (
        {"guidance_rescale": 0.0, "use_original_formulation": False},
        {"guidance_rescale": 0.7, "use_original_formulation": False},
        {"guidance_rescale": 0.7, "use_original_formulation": True},
    )
]
every_class = pytest.mark.parametrize("name", CONFIGURATIONS)
STEPS = 4
VIDEO = (2, 3, 4, 5, 7)
#: Of a formula in float32 whose sums diffusers makes in float32 and we in float64, on numbers near 10.
NEAR = {"rtol": 1e-4, "atol": 1e-4}


def _both(name: str, **options):
    return getattr(guiders, name)(**options), getattr(parents, name)(**options)


def _predictions(target: Target, shape=VIDEO, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Predictions that agree in part, as a model's do."""
    draw = Draw(torch.float64, target.device, seed)
    cond, noise = draw.normal(*shape), draw.normal(*shape)
    return [cond.to(dtype), (0.5 * cond + 0.75 * noise).to(dtype)]


def _guided(guider, predictions: list[Tensor], step: int = 0) -> Tensor:
    """One step as a denoising loop makes it."""
    guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(1000.0))
    cond, uncond = predictions
    batches = guider.prepare_inputs({"x": (cond, uncond)})
    for batch, prediction in zip(batches, (cond, uncond), strict=False):
        batch.noise_pred = prediction
    return guider(batches)[0]


def _specified(name: str, options: dict, predictions: list[Tensor]) -> Tensor:
    """latentfast.reference with the keywords of our guider at a first step."""
    guider = getattr(guiders, name)(**options)
    guider.set_state(step=0, num_inference_steps=STEPS, timestep=torch.tensor(1000.0))
    guider.prepare_inputs({"x": tuple(predictions)})
    return reference.guidance.guide(*predictions, **guider.options(*predictions))


# --- The parent's formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_result_is_the_parents(name: str, options: dict, target: Target) -> None:
    """On flat predictions, as the parent of magnitude-aware guidance takes no others."""
    predictions = _predictions(target, (2, 420))
    ours, parent = _both(name, **options)
    for step in range(STEPS):  # momentum
        got, theirs = _guided(ours, predictions, step), _guided(parent, predictions, step)
        torch.testing.assert_close(got, theirs, **NEAR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if "-0.7-False" in case.id])
def test_video_in_every_dtype(name: str, options: dict, dtype: torch.dtype, target: Target) -> None:
    """The same formula in the reference, as the parent computes two of them in float32 whatever comes."""
    cond, uncond = _predictions(target, dtype=dtype)
    got = _guided(getattr(guiders, name)(**options), [cond, uncond])
    assert got.dtype == dtype
    wide = working_dtype(dtype)
    exact, same = (_specified(name, options, [x.to(wider) for x in (cond, uncond)]) for wider in (torch.float64, wide))
    assert_within(got, exact, same, GUIDANCE_ULPS)


@every_class
def test_steps_without_guidance_return_cond(name: str, target: Target) -> None:
    """Before `start`, from `stop` on, at a scale that changes nothing, and disabled."""
    cond, uncond = _predictions(target)
    for options in ({"start": 0.5}, {"stop": 0.0}, {"guidance_scale": 1.0}, {"enabled": False}):
        if name == "ClassifierFreeZeroStarGuidance":
            options = {**options, "zero_init_steps": 0}
        ours, parent = _both(name, guidance_rescale=0.5, **options)
        assert same_bits(_guided(ours, [cond, uncond]), cond)
        _guided(parent, [cond, uncond])
        assert ours.num_conditions == parent.num_conditions == 1
    ours = getattr(guiders, name)(start=0.5)
    assert not same_bits(_guided(ours, [cond, uncond], 2), cond)


@every_class
def test_return_values(name: str, target: Target) -> None:
    """A `GuiderOutput` of the prediction and of both that it was made of."""
    ours, parent = _both(name, **CONFIGURATIONS[name][0])
    cond, uncond = (x.flatten(1) for x in _predictions(target))
    for guider in (ours, parent):
        guider.set_state(step=1, num_inference_steps=STEPS, timestep=torch.tensor(0.0))
    got, theirs = ours.forward(cond, uncond), parent.forward(cond, uncond)
    assert type(got) is type(theirs) and list(got.keys()) == list(theirs.keys())
    assert got["pred_cond"] is cond and got["pred_uncond"] is uncond
    with pytest.raises(ValueError, match="pred_uncond must be given"):
        ours.forward(cond)


# --- What the parents get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 3.0])
@every_class
def test_constant_predictions_give_finite_results(name: str, value: float, target: Target) -> None:
    """Diffusers divides by their deviation, their length or the difference's, and by 0."""
    constant = torch.full(VIDEO, value, device=target.device)
    ours = getattr(guiders, name)(guidance_rescale=0.7)
    for step in range(2):
        assert torch.isfinite(_guided(ours, [constant, constant.clone()], step)).all()


def test_zero_init_with_rescale_is_zero(target: Target) -> None:
    """Where diffusers' prediction is NaN."""
    ours = guiders.ClassifierFreeZeroStarGuidance(guidance_rescale=0.7, zero_init_steps=2)
    for step in range(2):
        assert (_guided(ours, _predictions(target), step) == 0).all()
    assert (_guided(ours, _predictions(target), 2) != 0).any()


@pytest.mark.parametrize("shape", [(2, 420), (2, 3, 140), (2, 3, 20, 7), VIDEO], ids=str)
def test_magnitude_aware_takes_any_number_of_dimensions(shape: tuple[int, ...], target: Target) -> None:
    """Diffusers' takes up to three."""
    ours, parent = _both("MagnitudeAwareGuidance", alpha=1.5)
    predictions = _predictions(target, shape)
    want = _guided(parent, [x.flatten(1) for x in predictions]).view(shape)
    torch.testing.assert_close(_guided(ours, predictions), want, **NEAR)


def test_tangential_knows_which_prediction_it_is_at(target: Target) -> None:
    ours = guiders.TangentialClassifierFreeGuidance()
    ours.set_state(step=0, num_inference_steps=STEPS, timestep=torch.tensor(0.0))
    ours.prepare_models(torch.nn.Identity())
    assert ours.is_conditional and not ours.is_unconditional
    ours.prepare_models(torch.nn.Identity())
    assert ours.is_unconditional


def test_momentum_of_halves_is_kept_in_float32(target: Target) -> None:
    ours = guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.75, eta=0.0)
    total = torch.zeros(VIDEO, dtype=torch.float64, device=target.device)
    for step in range(STEPS):
        cond, uncond = _predictions(target, dtype=torch.bfloat16, seed=step)
        _guided(ours, [cond, uncond], step)
        total = cond.double() - uncond.double() - 0.75 * total
    average = ours.momentum_buffer.running_average
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), total, rtol=1e-6, atol=1e-6)  # two roundings of float32 a step
    _guided(ours, [cond, uncond], 0)  # a new sampling begins with no momentum
    torch.testing.assert_close(ours.momentum_buffer.running_average, cond.float() - uncond.float())


# --- Where the kernels do not reach, the parent does ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("ClassifierFreeGuidance", {"guidance_rescale": 1.5}, VIDEO),
        ("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_norm_dim": (-1, -2)}, VIDEO),
        ("MagnitudeAwareGuidance", {"alpha": -1.0}, (2, 420)),
    ],
)
def test_what_the_kernels_do_not_take_goes_the_parents_way(
    name: str, options: dict, shape: tuple[int, ...], target: Target
) -> None:
    ours, parent = _both(name, **options)
    predictions = _predictions(target, shape)
    assert ours.options(*predictions) is None
    assert same_bits(_guided(ours, predictions), _guided(parent, predictions))


def test_norms_over_all_dimensions_by_their_numbers(target: Target) -> None:
    ours, parent = _both("AdaptiveProjectedGuidance", adaptive_projected_guidance_norm_dim=(-1, 1, -2))
    predictions = _predictions(target, (2, 3, 20, 7))
    assert ours.options(*predictions) is not None
    torch.testing.assert_close(_guided(ours, predictions), _guided(parent, predictions), **NEAR)


# --- Configuration ----------------------------------------------------------------------------------------------------


def _settings(guider) -> dict:
    """The configuration without what diffusers notes in it about itself."""
    return {key: value for key, value in guider.config.items() if not key.startswith("_")}


@every_class
def test_the_configuration_goes_there_and_back(name: str, tmp_path) -> None:
    ours, parent = _both(name, **CONFIGURATIONS[name][0])
    assert _settings(ours) == _settings(parent)
    ours.save_pretrained(tmp_path)
    loaded = getattr(parents, name).from_pretrained(tmp_path)
    assert type(loaded) is type(parent) and _settings(loaded) == _settings(parent)
    again = type(ours).from_config(loaded.config)
    assert type(again) is type(ours) and _settings(again) == _settings(ours)
    assert type(ours.new(guidance_scale=2.0)) is type(ours)


@every_class
def test_replacement(name: str, target: Target) -> None:
    parent = getattr(parents, name)(**CONFIGURATIONS[name][0])
    parent.guidance_scale = 2.5  # changed since it was made
    parent.set_state(step=1, num_inference_steps=STEPS, timestep=torch.tensor(0.0))
    ours = guiders.replacement_for(parent)
    assert type(ours) is getattr(guiders, name) and ours.guidance_scale == 2.5
    assert ours.get_state()["step"] == 1 and _settings(ours) == _settings(parent)
    assert type(parent) is getattr(parents, name)
    assert guiders.why_not(parent) == "" and "already" in guiders.why_not(ours)


def test_what_is_not_replaced_says_why() -> None:
    class Own(parents.ClassifierFreeGuidance):
        pass

    assert guiders.replacement_for(Own()) is None and "of its own" in guiders.why_not(Own())
    other = parents.SkipLayerGuidance(skip_layer_guidance_layers=[0])
    assert guiders.replacement_for(other) is None and "no formula for SkipLayerGuidance" in guiders.why_not(other)
