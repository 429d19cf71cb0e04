"""Schedulers of diffusers whose step is one launch: the same names, configurations and noise levels.

    >>> import diffusers
    >>> from latentfast.integrations.diffusers import schedulers
    >>> plain = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    >>> fast = schedulers.accelerated(plain)
    >>> isinstance(fast, diffusers.UniPCMultistepScheduler), fast.config == plain.config
    (True, True)

Each has two attributes more than diffusers': `x0`, the clip that the last step's prediction leads to, and `keep_x0`,
whether to make it where the solver itself does not need it; and `why_not_fast()`, which says why steps are left to
diffusers, '' if they are not.
"""

from typing import Any

from latentfast.integrations.diffusers.schedulers.cogvideox import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from latentfast.integrations.diffusers.schedulers.flow_match import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from latentfast.integrations.diffusers.schedulers.multistep import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from latentfast.integrations.diffusers.schedulers.singlestep import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

__all__ = [
    "ACCELERATED",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
    "accelerated",
]

#: By diffusers' name: the schedulers of this module.
ACCELERATED: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler, DEISMultistepScheduler,
        DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, LCMScheduler, UniPCMultistepScheduler,
    )
}  # fmt: skip


def accelerated(scheduler):
    """The scheduler of this module that takes the place of one of diffusers.

    Args:
        scheduler: A scheduler of diffusers, of one of the classes in `ACCELERATED` itself: a subclass may step
            differently.

    Returns:
        A new scheduler with the same configuration, for which `set_timesteps` has not been called.

    Raises:
        ValueError: There is none that takes its place.
    """
    cls = ACCELERATED.get(type(scheduler).__name__)
    if cls is None or type(scheduler) not in (cls, cls._parent):
        raise ValueError(f"scheduler must be one of {', '.join(ACCELERATED)}, got {type(scheduler).__name__}")
    fast = cls.from_config(scheduler.config)
    if hasattr(scheduler, "set_shift"):
        fast.set_shift(scheduler.shift)  # it may have been set after the configuration was made
    return fast
