"""What the tests of the schedulers share: the configurations, a stand-in for a model, and a sampling loop."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentfast.integrations.diffusers import schedulers
from latentfast.integrations.diffusers.schedulers import _linear

SHAPE = (2, 3, 2, 4, 5)
#: The noise levels' shapes, in the words of the sigma-based schedulers.
SHAPES_OF_SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})


@dataclass(frozen=True)
class Case:
    """A scheduler in one configuration."""

    name: str
    config: tuple[tuple[str, Any], ...]
    #: Of `set_timesteps`.
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in (*self.config, *self.arguments)]
        return " ".join([self.name.removesuffix("Scheduler"), *words])

    @property
    def settings(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.config}

    def plain(self):
        return getattr(diffusers, self.name)(**self.settings)

    def fast(self):
        return schedulers.ACCELERATED[self.name](**self.settings)


def _case(name: str, arguments: dict | None = None, **config) -> Case:
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return Case(name, tuple(frozen.items()), tuple((arguments or {}).items()))


def _cases() -> Iterator[Case]:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    euler = "FlowMatchEulerDiscreteScheduler"
    yield _case(euler)
    yield _case(euler, {"mu": 0.7}, use_dynamic_shifting=True)
    yield _case(euler, {"mu": 0.7}, use_dynamic_shifting=True, time_shift_type="linear", shift_terminal=0.1)
    yield _case(euler, shift=3.0, invert_sigmas=True)
    yield _case(euler, shift=3.0, stochastic_sampling=True)
    for sigmas in SHAPES_OF_SIGMAS[1:]:
        yield _case(euler, shift=3.0, **sigmas)
    yield _case("FlowMatchHeunDiscreteScheduler", shift=3.0)

    unipc = "UniPCMultistepScheduler"
    last = {
        "final_sigmas_type": "sigma_min"
    }  # with a last sigma of 0 diffusers' bh1 and its prediction of noise are NaN
    for order, solver in itertools.product((1, 2, 3), ("bh1", "bh2")):
        yield _case(unipc, solver_order=order, solver_type=solver, **flow, **(last if solver == "bh1" else {}))
        for kind in ("epsilon", "sample", "v_prediction"):
            yield _case(unipc, solver_order=order, solver_type=solver, prediction_type=kind, **last)
            yield _case(unipc, solver_order=order, solver_type=solver, prediction_type=kind, predict_x0=False, **last)
    for sigmas in SHAPES_OF_SIGMAS:
        yield _case(unipc, prediction_type="v_prediction", **sigmas)
    yield _case(unipc, {"mu": 0.6}, **flow, use_dynamic_shifting=True)
    yield _case(unipc, **flow, disable_corrector=[0, 2])
    yield _case(unipc, solver_order=2, **last, lower_order_final=False)
    yield _case(unipc, solver_order=3, **flow, timestep_spacing="trailing")

    dpm = "DPMSolverMultistepScheduler"
    for order, solver in itertools.product((1, 2, 3), ("midpoint", "heun")):
        for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"):
            if algorithm == "sde-dpmsolver" and order == 3:
                continue  # diffusers has none
            for kind in ("epsilon", "sample", "v_prediction"):
                yield _case(
                    dpm, solver_order=order, solver_type=solver, algorithm_type=algorithm, prediction_type=kind,
                    **({} if algorithm.endswith("++") else last),
                )  # fmt: skip
    for sigmas in (*SHAPES_OF_SIGMAS[1:], {"use_lu_lambdas": True}):
        yield _case(dpm, algorithm_type="sde-dpmsolver++", prediction_type="v_prediction", **sigmas)
    yield _case(dpm, **flow, solver_order=2)
    yield _case(dpm, **flow, solver_order=3, euler_at_final=True)

    deis = "DEISMultistepScheduler"
    for order, kind in itertools.product((1, 2, 3), ("epsilon", "sample", "v_prediction")):
        yield _case(deis, solver_order=order, prediction_type=kind)
    yield _case(deis, **flow)
    for sigmas in SHAPES_OF_SIGMAS[1:]:
        yield _case(deis, prediction_type="v_prediction", **sigmas)

    for kind in ("epsilon", "v_prediction", "sample"):
        for sigmas in SHAPES_OF_SIGMAS:
            yield _case("EulerDiscreteScheduler", prediction_type=kind, **sigmas)
        if kind != "sample":
            for spacing in ("linspace", "leading", "trailing"):
                yield _case("EulerAncestralDiscreteScheduler", prediction_type=kind, timestep_spacing=spacing)
        for name in ("DDIMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
            off = {"clip_sample": False} if name == "DDIMScheduler" else {}
            yield _case(name, prediction_type=kind, **off)
            yield _case(name, prediction_type=kind, timestep_spacing="trailing", set_alpha_to_one=False, **off)
        yield _case("LCMScheduler", prediction_type=kind)
    yield _case(
        "EulerDiscreteScheduler",
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )  # fmt: skip  (Stable Video Diffusion's)
    yield _case(
        "CogVideoXDDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip
    yield _case("DDIMScheduler", prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True)


CASES = list(_cases())
#: One of each scheduler, as pipelines of videos have it.
TYPICAL = [
    _case("FlowMatchEulerDiscreteScheduler", shift=3.0),
    _case("FlowMatchHeunDiscreteScheduler", shift=3.0),
    _case("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    _case("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    _case("DEISMultistepScheduler"),
    _case("EulerDiscreteScheduler", prediction_type="v_prediction", use_karras_sigmas=True),
    _case("EulerAncestralDiscreteScheduler"),
    _case("DDIMScheduler", clip_sample=False),
    _case("CogVideoXDDIMScheduler", prediction_type="v_prediction"),
    _case("CogVideoXDPMScheduler", prediction_type="v_prediction"),
    _case("LCMScheduler"),
]


def model(x: Tensor, t: float) -> Tensor:
    """A stand-in for a transformer: smooth, bounded, of the sample and the time; in float64, rounded once."""
    wide = x.double()
    return (0.6 * torch.tanh(0.5 * wide + t / 1000) + 0.3 * torch.sin(wide + t / 300)).to(x.dtype)


def accepts(scheduler, name: str) -> bool:
    return name in inspect.signature(scheduler.step).parameters


def latents(scheduler, shape: tuple[int, ...] = SHAPE, device: str = "cpu", seed: int = 0) -> Tensor:
    """Noise as pipelines begin with; after `set_timesteps`."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (noise * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(device)


def sample(
    scheduler, x: Tensor, *, begin: int = 0, predict: Callable = model, dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None, watch: Callable | None = None,
    stepping: Callable | None = None, **step,
) -> Tensor:  # fmt: skip
    """The loop of a pipeline from `begin` on; `watch(scheduler, i, given, prediction, x)` after each step, and
    `stepping` in the place of the scheduler's step.
    """
    take = stepping or scheduler.step
    times = [float(t) for t in scheduler.timesteps]
    if accepts(scheduler, "generator"):
        step["generator"] = generator
    older = None
    for i, t in list(enumerate(scheduler.timesteps))[begin:]:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        prediction = predict(scaled, times[i])
        prediction = prediction if dtype is None else prediction.to(dtype)
        given = x
        if accepts(scheduler, "timestep_back"):  # as CogVideoX's pipeline
            back = scheduler.timesteps[i - 1] if i > begin else None
            x, older = take(prediction, older, t, back, x, **step, return_dict=False)
        else:
            x = take(prediction, t, x, **step, return_dict=False)[0]
        if watch is not None:
            watch(scheduler, i, given, prediction, x)
    return x


def generator(device: str, seed: int = 3) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def ready(case: Case, scheduler, steps: int, device: str):
    scheduler.set_timesteps(steps, device=device, **dict(case.arguments))
    return scheduler


def ulp(value: float, dtype: torch.dtype = torch.float32) -> float:
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value))


class Largest:
    """The largest value over all steps: of the latents, and of what the solver keeps from one step to the next."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self, scheduler, i: int, given: Tensor, prediction: Tensor, x: Tensor) -> None:
        kept = [value if isinstance(value, list) else [value] for value in vars(scheduler).values()]
        tensors = [given, x, *(v for values in kept for v in values if isinstance(v, Tensor) and v.shape == x.shape)]
        self.value = max(self.value, *(float(v.abs().max()) for v in tensors))


@contextmanager
def float32_noise() -> Iterator[None]:
    """Noise as it is drawn in float32 also where it is wanted in float64."""

    def draw(shape, generator=None, device=None, dtype=None):
        return draw_plain(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    draw_plain = _linear.randn_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "randn_tensor", draw)
        yield


def exact(case: Case, steps: int, x: Tensor, **options) -> Tensor:
    """The trajectory in float64, with the coefficients that diffusers works out."""
    with float32_noise():
        return sample(ready(case, case.fast(), steps, x.device.type), x.double(), **options)
