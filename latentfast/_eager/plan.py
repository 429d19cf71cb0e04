"""Plans: the operators' signatures in front of the reference, which takes its sums as it goes."""

import torch

from latentfast import reference
from latentfast._operators import PLAN_OPERATIONS
from latentfast.reference.plan import Step

_NUMBERS = 5  # of an instruction
_NAMES = {number: name for name, number in PLAN_OPERATIONS.items()}


def plan_moments(inputs, program, start, values, coefficients, moments) -> None:
    pass


def plan_coefficients(program, start, stop, values, elements, given, statistics, moments, sliders, coefficients):
    if given:
        sliders.copy_(torch.tensor(given, dtype=sliders.dtype))


def _step(instruction, inputs, sliders, statistics) -> Step:
    operation, operand, mask, slider, row = instruction
    name = _NAMES[operation]
    number = sliders[slider] if slider >= 0 else 0.0
    if name in ("standardize", "unstandardize"):
        number = statistics[row, 0].unbind(-1)
    return Step(name, inputs[operand] if operand >= 0 else None, number, inputs[mask] if mask >= 0 else None)


def plan_run(inputs, program, sliders, statistics, coefficients, weight, bias, latents, rgb) -> None:
    source = inputs[0]
    instructions = zip(*[iter(program)] * _NUMBERS, strict=True) if source.numel() else ()
    steps = [_step(instruction, inputs, sliders, statistics) for instruction in instructions]
    if latents is None:  # pixels are made of what was not rounded
        source = reference.plan.working(source)
    z = reference.plan.run(source, steps)
    if latents is not None:
        latents.copy_(z)
    if rgb is not None:
        size = None if rgb.shape[2:4] == source.shape[3:] else rgb.shape[2:4]
        rgb.copy_(reference.preview.latent_to_rgb(z, weight, bias, size=size, dtype=rgb.dtype))
