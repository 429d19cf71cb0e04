"""CogVideoX's own forms of DDIM and of DPM-Solver++."""

from typing import ClassVar

import diffusers

from latentfast.integrations.diffusers.schedulers._linear import LinearStep


class CogVideoXDDIMScheduler(LinearStep, diffusers.CogVideoXDDIMScheduler):
    """diffusers' CogVideoXDDIMScheduler with steps of one launch."""

    _times = ("timestep",)
    _reasons: ClassVar[dict[str, str]] = {}  # it ignores clip_sample


class CogVideoXDPMScheduler(LinearStep, diffusers.CogVideoXDPMScheduler):
    """diffusers' CogVideoXDPMScheduler with steps of one launch, besides the drawing of noise.

    diffusers draws noise twice in most steps and throws the first away; so does this, for the generator's sake.
    """

    _times = ("timestep", "timestep_back")
    _reasons: ClassVar[dict[str, str]] = {}  # it ignores clip_sample
