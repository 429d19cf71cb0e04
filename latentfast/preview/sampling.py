"""From the steps of a sampling run to the clips that they are on their way to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["estimates"]


def estimates(
    pipe: Any, noise: Tensor | None, show: Callable[[Callable[[], Tensor]], None]
) -> Callable[..., dict[str, Tensor]]:
    """A `callback_on_step_end` that calls `show` with a function that makes the clean estimate of the step.

    Nothing is computed on the sampling thread. `show` may call the function later, on a stream that waits for what is
    on the current one now.
    """
    from latentfast.integrations.diffusers.sampling import clean_between, flow_levels, frame_dim

    before = noise

    def callback(running: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal before
        earlier, after = noise if step == 0 else before, tensors["latents"]
        before = after
        if earlier is not None:
            levels, frames = flow_levels(pipe, step), frame_dim(pipe, after)

            def make() -> Tensor:
                clean = after if levels is None else clean_between(levels, earlier, after)
                return clean if frames == 2 else clean.transpose(1, 2)

            show(make)
        return {}

    return callback
