"""Previews in their float form, which has gradients; bytes have tests of their own in test_preview.py."""

import torch
from torch import Tensor

from tests.helpers import Draw
from tests.operations.operation import Operation, Shape


def _preview(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    weight, bias = draw.uniform(shape[1], 3, low=-0.5, high=0.5), draw.uniform(3, low=-0.2, high=0.2)
    # without channels a preview is all bias, where the rules of this table want the zeros of an empty sum
    return {"z": draw.normal(*shape), "weight": weight, "bias": bias if shape[1] else torch.zeros_like(bias)}


def _enlarged(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    if 0 in shape[3:]:  # no frames then: frames without pixels cannot be enlarged, see test_preview.py
        shape = (*shape[:2], 0, *(max(n, 1) for n in shape[3:]))
    return _preview(draw, shape)


def _operation(name: str, inputs=_enlarged, **options) -> Operation:
    return Operation(
        name, "latent_to_rgb", inputs, {"z": 0, "weight": None, "bias": None},
        options={"dtype": torch.float32, **options}, differentiable=("z", "weight", "bias"),
    )  # fmt: skip


PREVIEWS = [
    _operation("latent_to_rgb", _preview),
    _operation("latent_to_rgb enlarged", size=(20, 37)),
    _operation("latent_to_rgb wider, fewer rows", size=(2, 56)),
]
