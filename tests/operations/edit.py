"""Edits, in the forms that matter."""

from torch import Tensor

from tests.helpers import Draw
from tests.operations.operation import Operation, Shape, one_for_all


def _edit_inputs(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {
        "z": draw.normal(*shape),
        "directions": draw.normal(3, *shape),
        "strengths": draw.normal(3, shape[0], dtype=draw.parameter_dtype),
        "mask": draw.mask(*one_for_all(shape, 0, 2, 3, 4)),
    }


def _smooth_blend(base: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    return base + mask * (edited - base)


EDITS = [
    Operation(
        "edit", "edit", lambda draw, shape: {"z": draw.normal(*shape), "directions": draw.normal(2, *shape)},
        {"z": 0, "directions": 1}, options={"strengths": [0.75, -1.3]}, differentiable=("z", "directions"),
    ),
    Operation(
        "edit masked, strengths per sample", "edit", _edit_inputs, {"z": 0, "directions": 1, "strengths": 1, "mask": 0},
        differentiable=("z", "directions", "strengths", "mask"),
    ),
    Operation(
        "edit broadcast, mask per direction", "edit",
        lambda draw, shape: {
            "z": draw.normal(*shape),
            "directions": draw.normal(1, *one_for_all(shape, 1)),
            "strengths": draw.normal(3, dtype=draw.parameter_dtype),
            "mask": draw.mask(3, *one_for_all(shape, 2, 3, 4), dtype=draw.parameter_dtype),
        },
        {"z": 0, "directions": None, "strengths": None, "mask": None},
        differentiable=("z", "directions", "strengths", "mask"),
    ),
    Operation(
        "blend", "blend",
        lambda draw, shape: {
            "base": draw.normal(*shape), "edited": draw.normal(*shape),
            "mask": draw.mask(*one_for_all(shape, 0, 2, 3, 4)),
        },
        {"base": 0, "edited": 0, "mask": 0}, differentiable=("base", "edited", "mask"), smooth=_smooth_blend,
    ),
    Operation(
        "blend float32 mask for all", "blend",
        lambda draw, shape: {
            "base": draw.normal(*shape), "edited": draw.normal(*shape),
            "mask": draw.mask(*shape[2:], dtype=draw.parameter_dtype),
        },
        {"base": 0, "edited": 0, "mask": None}, differentiable=("base", "edited", "mask"), smooth=_smooth_blend,
    ),
]  # fmt: skip
