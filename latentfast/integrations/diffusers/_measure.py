"""What a sampling costs outside of the model: launches, and time, counted by running it."""

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentfast._launches import launches
from latentfast.integrations.diffusers.guidance import defer

#: As pipelines guide by default.
_SCALE = 5.0
_ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """Of one step, on average over a sampling: launches (on a CPU, operations that compute) and microseconds."""

    launches: float
    us: float


class _Ready(nn.Module):
    """A model that has its predictions ready, one call after the other."""

    def __init__(self, *predictions: Tensor) -> None:
        super().__init__()
        self._predictions, self._next = predictions, 0

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor]:
        self._next = (self._next + 1) % len(self._predictions)
        return (self._predictions[self._next],)


def _sampling(
    scheduler: Any, latents: Tensor, dtype: torch.dtype, steps: int, deferred: bool
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """What is done once a sampling, and all its steps as pipelines write them, but for a model that does nothing."""
    model = _Ready(*torch.randn((2, *latents.shape), device=latents.device, dtype=dtype))
    if deferred:
        defer(model)
    more = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    parameters = inspect.signature(scheduler.step).parameters

    def prepare() -> None:
        scheduler.set_timesteps(steps, device=latents.device, **more)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def run() -> Tensor:
        x, before, original = latents, None, None
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            cond, uncond = model(model_input)[0], model(model_input)[0]
            prediction = uncond + _SCALE * (cond - uncond)
            if "old_pred_original_sample" in parameters:  # CogVideoX's DPM
                x, original = scheduler.step(prediction, original, t, before, x, return_dict=False)
            else:
                x = scheduler.step(prediction, t, x, return_dict=False)[0]
            before = t
        return x

    return prepare, run


@torch.no_grad()
def costs(schedulers: Sequence[tuple[Any, bool]], latents: Tensor, dtype: torch.dtype, steps: int) -> list[Cost]:
    """What guidance and the scheduler cost in each step of a sampling, of several schedulers by turns.

    Args:
        schedulers: Each with whether guidance waits for it.
        latents: To start from.
        dtype: Of the model's predictions.
        steps: Of the sampling.
    """
    samplings = [_sampling(scheduler, latents, dtype, steps, deferred) for scheduler, deferred in schedulers]
    times: list[list[float]] = [[] for _ in samplings]
    for prepare, run in samplings * 2:  # finds coefficients, which depend on whether there was a sampling before
        prepare()
        run()
    for _ in range(_ROUNDS):
        for (prepare, run), found in zip(samplings, times, strict=True):
            prepare()
            _wait(latents.device)
            start = time.perf_counter()
            run()
            _wait(latents.device)
            found.append((time.perf_counter() - start) * 1e6)
    result = []
    for (prepare, run), found, (scheduler, _) in zip(samplings, times, schedulers, strict=True):
        prepare()
        made = len(scheduler.timesteps)
        result.append(Cost(launches(run, latents.device) / made, statistics.median(found) / made))
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
