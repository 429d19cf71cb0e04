"""How long the operations take on this machine, against plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import latentfast
from latentfast import reference

__all__ = ["WAN_480P", "Timing", "time_operations"]

WAN_480P = (1, 16, 21, 60, 104)  # latents of 81 frames of 832x480

PATH_VALUES = 8
DIRECTIONS = 4


@dataclass(frozen=True)
class Timing:
    """One operation at one shape: the least time of a call in microseconds, ours and the eager reference's."""

    operation: str
    shape: tuple[int, ...]
    ours_us: float
    eager_us: float
    difference: float  # largest absolute difference of the two results

    @property
    def ratio(self) -> float:
        """How many times longer the eager reference takes."""
        return self.eager_us / self.ours_us


def time_operations(
    shape: tuple[int, ...], device: torch.device, *, frame_dim: int = 2, seconds: float = 0.25
) -> list[Timing]:
    """Time the public operations and their eager references on float32 latents of one shape.

    Args:
        shape: of the latents, 5-D.
        device: where they are.
        frame_dim: the frames' dimension.
        seconds: to spend on each operation.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    a, b, directions = draw(*shape), draw(*shape), draw(DIRECTIONS, *shape)
    one_channel = [1 if i == 3 - frame_dim else n for i, n in enumerate(shape)]
    mask = (draw(*one_channel) > 0).float()
    strengths = draw(DIRECTIONS)
    ts = torch.linspace(0, 1, PATH_VALUES, device=device)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "slerp": (
            lambda: latentfast.slerp(a, b, 0.3),
            lambda: reference.interpolate.slerp(a, b, 0.3),
        ),
        f"slerp_path, {PATH_VALUES} values": (
            lambda: latentfast.slerp_path(a, b, ts),
            lambda: reference.interpolate.slerp_path(a, b, ts),
        ),
        f"edit, {DIRECTIONS} directions and mask": (
            lambda: latentfast.edit(a, directions, strengths, mask),
            lambda: reference.edit.edit(a, directions, strengths, mask),
        ),
        "blend": (
            lambda: latentfast.blend(a, b, mask),
            lambda: reference.edit.blend(a, b, mask),
        ),
        "temporal_loss_and_grad": (
            lambda: latentfast.temporal_loss_and_grad(a, frame_dim=frame_dim),
            lambda: reference.temporal.temporal_loss_and_grad(a, frame_dim=frame_dim),
        ),
    }
    return [_time(name, shape, ours, eager, device, seconds) for name, (ours, eager) in calls.items()]


def _time(
    name: str,
    shape: tuple[int, ...],
    ours: Callable[[], object],
    eager: Callable[[], object],
    device: torch.device,
    seconds: float,
) -> Timing:
    difference = max(float((x - y).abs().max()) for x, y in zip(_tensors(ours()), _tensors(eager()), strict=True))
    least = [float("inf"), float("inf")]
    stop = time.perf_counter() + seconds
    # The two take turns, so that a busy spell of the machine falls on both.
    while time.perf_counter() < stop:
        for index, function in enumerate((ours, eager)):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            least[index] = min(least[index], time.perf_counter() - start)
    return Timing(name, shape, least[0] * 1e6, least[1] * 1e6, difference)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
