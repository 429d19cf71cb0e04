"""What a text-to-video pipeline tells about its sampling through its public interface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "clean_between",
    "clean_estimate",
    "flow_levels",
    "frame_dim",
    "latent_channels",
    "setting",
    "starting_noise",
]


def setting(pipe: Any, call: Mapping[str, Any], name: str) -> Any:
    """The value in force for an argument of a pipeline's call: that of `call`, else the pipeline's default."""
    if name in call:
        return call[name]
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def latent_channels(pipe: Any) -> int:
    """Channels of a pipeline's latents."""
    return int(pipe.transformer.config.in_channels)


def frame_dim(pipe: Any, latents: Tensor) -> int:
    """The frames' dimension: 2 for latents `(B, C, T, H, W)`, 1 for `(B, T, C, H, W)`.

    Raises:
        ValueError: the pipeline packs its latents into tokens, where no region or frame can be named.
    """
    if latents.ndim != 5:
        name = type(pipe).__name__
        raise ValueError(f"{name} packs its latents into tokens: no region or frame can be named in them")
    return 2 if latents.shape[1] == latent_channels(pipe) else 1


def clean_estimate(pipe: Any, step: int, before: Tensor, after: Tensor) -> Tensor:
    """The clean latents that a step of a flow-matching sampler was on its way to.

    Latents at noise level s are (1 − s) x + s n for clean x and noise n. A step that leaves both as they are takes them
    from `before` at s to `after` at s′, so x = (s · after − s′ · before) / (s − s′): exactly the model's prediction for
    a step of Euler's, nearly that for others'.

    Args:
        pipe: Its scheduler has the noise levels.
        step: The number of the step, from 0.
        before, after: The latents around it.

    Returns:
        A new tensor; `after` itself where the scheduler's noise levels are no flow's.
    """
    levels = flow_levels(pipe, step)
    return after if levels is None else clean_between(levels, before, after)


def flow_levels(pipe: Any, step: int) -> tuple[Tensor, Tensor] | None:
    """A flow-matching sampler's noise levels before and after a step; None of other samplers."""
    scheduler = pipe.scheduler
    if scheduler.config.get("prediction_type") != "flow_prediction" and "FlowMatch" not in type(scheduler).__name__:
        return None
    return scheduler.sigmas[step], scheduler.sigmas[step + 1]


def clean_between(levels: tuple[Tensor, Tensor], before: Tensor, after: Tensor) -> Tensor:
    """`clean_estimate` for the noise levels of `before` and `after`."""
    level, following = (x.to(after.device) for x in levels)
    return ((level * after - following * before) / (level - following)).to(after.dtype)


def starting_noise(pipe: Any, call: Mapping[str, Any], generator: torch.Generator | None) -> Tensor:
    """The starting noise of one clip, as a pipeline's call with these arguments would draw it."""
    known = {
        "batch_size": 1,
        "num_channels_latents": latent_channels(pipe),
        "height": setting(pipe, call, "height"),
        "width": setting(pipe, call, "width"),
        "num_frames": setting(pipe, call, "num_frames"),
        "dtype": torch.float32,
        "device": pipe.device,
        "generator": generator,
    }
    names = inspect.signature(pipe.prepare_latents).parameters
    return pipe.prepare_latents(**{name: value for name, value in known.items() if name in names})
