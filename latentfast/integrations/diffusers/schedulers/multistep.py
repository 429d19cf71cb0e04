"""Multistep solvers: UniPC, DPM-Solver and DEIS."""

import diffusers

from latentfast.integrations.diffusers.schedulers._linear import LinearStep


def _clean_of_noise(scheduler, sample, epsilon):
    """x0 from the noise in a sample of a variance-preserving schedule."""
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
    return (sample - sigma * epsilon) / alpha


class UniPCMultistepScheduler(LinearStep, diffusers.UniPCMultistepScheduler):
    """diffusers' UniPCMultistepScheduler with steps of one launch: corrector, prediction of x0 and predictor.

    A separate predictor (`solver_p`) and dynamic thresholding are left to diffusers.
    """

    _history = ("model_outputs", "last_sample")
    _settings = ("lower_order_nums", "this_order", "disable_corrector", "predict_x0")
    _stale = ("this_order",)
    _past_times = "timestep_list"
    _reasons = LinearStep._reasons | {"solver_p": "solver_p is a scheduler of its own"}

    @staticmethod
    def _x0_of(scheduler, sample, model_output):
        converted = scheduler.convert_model_output(model_output, sample=sample)
        return converted if scheduler.predict_x0 else _clean_of_noise(scheduler, sample, converted)


class DPMSolverMultistepScheduler(LinearStep, diffusers.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler with steps of one launch, besides the drawing of noise.

    Dynamic thresholding and models that predict a variance too are left to diffusers.
    """

    _history = ("model_outputs",)
    _settings = ("lower_order_nums",)
    _reasons = LinearStep._reasons | {"variance_type": "the model predicts a variance beside the noise"}

    @staticmethod
    def _x0_of(scheduler, sample, model_output):
        converted = scheduler.convert_model_output(model_output, sample=sample)
        data = scheduler.config.algorithm_type in ("dpmsolver++", "sde-dpmsolver++")
        return converted if data else _clean_of_noise(scheduler, sample, converted)


class DEISMultistepScheduler(LinearStep, diffusers.DEISMultistepScheduler):
    """diffusers' DEISMultistepScheduler with steps of one launch.

    Dynamic thresholding is left to diffusers.
    """

    _history = ("model_outputs",)
    _settings = ("lower_order_nums",)

    @staticmethod
    def _x0_of(scheduler, sample, model_output):
        return _clean_of_noise(scheduler, sample, scheduler.convert_model_output(model_output, sample=sample))
