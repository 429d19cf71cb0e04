"""What a scheduler's step costs: diffusers' own and latentfast's in its place, on latents of Wan at 480p.

float32 latents and bfloat16 predictions, as Wan's pipeline has them. Whole samplings are timed, without a model, as the
first and the last steps of a multistep solver are cheaper than the others; `set_timesteps` is not counted.
"""

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from latentfast._launches import launches
from latentfast.benchmarks.harness import percentiles, synchronize
from latentfast.benchmarks.operation import MODELS
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.table import headed, number

#: Steps of a sampling, and rounds of samplings, diffusers' and ours by turns: on a GPU, on a CPU, and to try it out.
EFFORT = {"cuda": (30, 9), "cpu": (8, 3), "quick": (3, 3)}

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
#: As pipelines of videos configure them.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "UniPC, order 2": ("UniPCMultistepScheduler", FLOW),
    "UniPC, order 3": ("UniPCMultistepScheduler", {**FLOW, "solver_order": 3}),
    "flow matching, Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow matching, Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", FLOW),
    "DPM-Solver++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}),
    "Euler, ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM of CogVideoX": ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction"}),
    "DPM-Solver++ of CogVideoX": ("CogVideoXDPMScheduler", {"prediction_type": "v_prediction"}),
    "LCM": ("LCMScheduler", {}),
}


@dataclass(frozen=True)
class Step:
    """One implementation of a scheduler. Microseconds a step, as [p20, p50, p80]."""

    scheduler: str
    ours: bool
    #: Until the call returns, the device not waited for.
    host_us: tuple[float, float, float]
    #: Until the device is done with a sampling, divided by its steps.
    us: tuple[float, float, float]
    #: Kernels a step; on the CPU, operators that compute something.
    launches: float


@dataclass(frozen=True)
class Found:
    """What was measured."""

    steps: list[Step]
    latents: tuple[int, ...]
    sample_dtype: str
    prediction_dtype: str
    environment: Environment
    quick: bool

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def measure(device: str, quick: bool = False) -> Found:
    """Measure every scheduler's step.

    Args:
        device: "cuda" or "cpu".
        quick: Small latents, few steps and rounds: checks that everything runs.
    """
    import diffusers

    from latentfast.integrations.diffusers import schedulers

    where = torch.device(device)
    latents = (1, *MODELS["wan21_1_3b_480p"]) if not quick else (1, 16, 2, 4, 4)
    torch.manual_seed(0)
    found = []
    with torch.inference_mode():
        for label, (name, config) in SCHEDULERS.items():
            plain = getattr(diffusers, name)(**config)
            pair = {False: plain, True: schedulers.accelerated(plain)}
            found += _measured(label, pair, latents, where, quick)
    # no floor is taken from these numbers, so no copy rate is measured
    return Found(found, latents, "float32", "bfloat16", environment(where, 0.0), quick)


def _measured(label: str, pair: dict[bool, Any], shape: tuple[int, ...], device: torch.device, quick: bool):
    steps, rounds = EFFORT["quick" if quick else device.type]
    samplings = {ours: _sampling(scheduler, shape, device, steps) for ours, scheduler in pair.items()}
    times: dict[bool, list[tuple[float, float]]] = {ours: [] for ours in pair}
    for _ in range(2):  # finds coefficients, which depend on whether there was a sampling before
        for prepare, run in samplings.values():
            prepare()
            run()
    for _ in range(rounds):
        for ours, (prepare, run) in samplings.items():
            prepare()
            synchronize(device)
            start = time.perf_counter()
            made = run()
            issued = time.perf_counter()
            synchronize(device)
            done = time.perf_counter()
            times[ours].append(((issued - start) * 1e6 / made, (done - start) * 1e6 / made))
    for ours, (prepare, run) in samplings.items():
        prepare()
        host, whole = (percentiles(list(column)) for column in zip(*times[ours], strict=True))
        yield Step(label, ours, host, whole, _launches(run, device))


def _sampling(
    scheduler: Any, shape: tuple[int, ...], device: torch.device, steps: int
) -> tuple[Callable[[], None], Callable[[], int]]:
    """What comes before a sampling, and the sampling, which says how many steps it made."""
    sample = torch.randn(shape, device=device)
    predictions = [torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(4)]
    generator = torch.Generator(device).manual_seed(0)
    parameters = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in parameters else {}
    times: list[Any] = []

    def prepare() -> None:
        scheduler.set_timesteps(steps, device=device)
        scheduler.is_scale_input_called = True  # some warn where nobody has asked for the model's input
        times[:] = list(scheduler.timesteps)

    def run() -> int:
        x, older, before = sample, None, None
        for i, t in enumerate(times):
            prediction = predictions[i % len(predictions)]
            if "timestep_back" in parameters:
                x, older = scheduler.step(prediction, older, t, before, x, **options, return_dict=False)
            else:
                x = scheduler.step(prediction, t, x, **options, return_dict=False)[0]
            before = t
        return len(times)

    return prepare, run


def _launches(run: Callable[[], int], device: torch.device) -> float:
    """Kernels a step of a sampling."""
    steps: list[int] = []
    return launches(lambda: steps.append(run()), device) / steps[0]


def table(found: Found) -> Table:
    """A line a scheduler."""
    result = headed(("scheduler", "launches", "", "host µs", "", "µs", "", "faster"), 1)
    result.add_row(f"a step, latents {'x'.join(map(str, found.latents))}", *["diffusers", "latentfast"] * 3, "")
    by_label = {(step.scheduler, step.ours): step for step in found.steps}
    for label in SCHEDULERS:
        plain, ours = by_label[label, False], by_label[label, True]
        result.add_row(
            label, f"{plain.launches:.1f}", f"{ours.launches:.1f}", number(plain.host_us[1]), number(ours.host_us[1]),
            number(plain.us[1]), number(ours.us[1]), f"{plain.us[1] / ours.us[1]:.1f}x",
        )  # fmt: skip
    return result
