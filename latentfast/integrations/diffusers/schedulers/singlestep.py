"""Solvers that look at one prediction: Euler's method, DDIM and LCM. Their second result is x0."""

import diffusers

from latentfast.integrations.diffusers.schedulers._linear import LinearStep


class EulerDiscreteScheduler(LinearStep, diffusers.EulerDiscreteScheduler):
    """diffusers' EulerDiscreteScheduler with steps of one launch; `s_churn` draws noise before it."""


class EulerAncestralDiscreteScheduler(LinearStep, diffusers.EulerAncestralDiscreteScheduler):
    """diffusers' EulerAncestralDiscreteScheduler with steps of one launch, besides the drawing of noise."""


class DDIMScheduler(LinearStep, diffusers.DDIMScheduler):
    """diffusers' DDIMScheduler with steps of one launch.

    With `clip_sample` (diffusers' default; pipelines of latents have it off) or dynamic thresholding steps are left to
    diffusers.
    """

    _times = ("timestep",)


class LCMScheduler(LinearStep, diffusers.LCMScheduler):
    """diffusers' LCMScheduler with steps of one launch, besides the drawing of noise.

    With `clip_sample` or dynamic thresholding steps are left to diffusers.
    """

    _times = ("timestep",)
