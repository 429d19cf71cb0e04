"""Flow matching: Euler's and Heun's method."""

import diffusers

from latentfast.integrations.diffusers.schedulers._linear import LinearStep


class FlowMatchEulerDiscreteScheduler(LinearStep, diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEulerDiscreteScheduler with steps of one launch.

    Steps with timesteps for each token are left to diffusers. Without `stochastic_sampling` float32 latents have
    diffusers' bits on a CPU; on a GPU they are rounded once a step less.
    """

    _precise = False
    _on_device = ("timesteps", "sigmas")

    def scale_noise(self, sample, timestep, noise=None):
        """As diffusers', in one launch where all samples get as much noise."""
        return self._noised("scale_noise", "timestep", {"sample": sample, "timestep": timestep, "noise": noise})

    @staticmethod
    def _x0_of(scheduler, sample, model_output):
        return sample - scheduler.sigmas[scheduler.step_index] * model_output


class FlowMatchHeunDiscreteScheduler(LinearStep, diffusers.FlowMatchHeunDiscreteScheduler):
    """diffusers' FlowMatchHeunDiscreteScheduler with steps of one launch."""

    _history = ("prev_derivative", "sample")
    _settings = ("dt",)
    _stale = ("sample",)
    _on_device = ("timesteps", "sigmas")

    @staticmethod
    def _x0_of(scheduler, sample, model_output):
        return sample - scheduler.sigmas[scheduler.step_index] * model_output
