"""Plans: a stack of edits, one operation after another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentfast.reference._common import scalar, working
from latentfast.reference.edit import blend, edit
from latentfast.reference.interpolate import lerp, nlerp, slerp
from latentfast.reference.stats import adain, standardize, tone_map, unstandardize

_TOWARDS = {"lerp": lerp, "nlerp": nlerp, "slerp": slerp}
_AFFINE = {"standardize": standardize, "unstandardize": unstandardize}


class Step(NamedTuple):
    """One operation: the name of the public one (or "direction", an `edit` along one; "confine", a `blend` of a base
    with what came before), its operand, its number, and a mask that confines it.

    `operand` and `mask` are tensors, or None where the operation has none. `number` is t, a strength, a factor or a
    compression, as a float or a tensor; for (un)standardize mean and std of the channels and, if need be, the scale.
    """

    operation: str
    operand: Any = None
    number: Any = 0.0
    mask: Any = None


def run(z: Tensor, steps: Sequence[Step]) -> Tensor:
    """The latents after all steps, in the working precision throughout and rounded once."""
    wide = working(z).dtype
    steps = [step._replace(operand=None if step.operand is None else step.operand.to(wide)) for step in steps]
    return sequence(working(z), steps).to(z.dtype).contiguous()


def sequence(z: Tensor, steps: Sequence[Step]) -> Tensor:
    """The operations one after another, each with its rounding to the latents' dtype."""
    for operation, operand, number, mask in steps:
        if operation == "direction":
            rows = operand[(None,) * (z.ndim + 1 - operand.ndim)]
            z = edit(z, rows, scalar(number, torch.float64, z.device).reshape(1), mask)
        elif operation == "blend":
            z = blend(z, operand, mask)
        elif operation == "confine":
            z = blend(operand, z, mask)
        else:
            made = _made(z, operation, operand, number)
            z = made if mask is None else blend(z, made, mask)
    return z


def _made(z: Tensor, operation: str, operand: Any, number: Any) -> Tensor:
    if operation in _TOWARDS:
        return _TOWARDS[operation](z, operand, number)
    if operation == "adain":
        return adain(z, operand, number)
    if operation in _AFFINE:
        return _AFFINE[operation](z, *number)
    return tone_map(z, number)
