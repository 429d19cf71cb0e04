"""Guidance, in the forms that matter. The momentum changes with every call: tests/test_guidance.py has it."""

from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import Draw
from tests.operations.operation import Operation, Shape, one_for_all


def _predictions(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    """Two predictions that agree in part, as a model's do."""
    cond, noise = draw.normal(*shape), draw.normal(*shape)
    return {"cond": cond, "uncond": (0.5 * cond.double() + 0.75 * noise.double()).to(cond.dtype)}


def _step(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"sample": draw.normal(*shape), **_predictions(draw, shape)}


def _inpainting(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {
        **_step(draw, shape), "known": draw.normal(*shape), "mask": draw.mask(*one_for_all(shape, 0, 2, 3, 4)),
    }  # fmt: skip


def _tensors(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {name: draw.normal(*shape) for name in "abc"}


def _guidance(name: str, function: str = "guide", inputs=_predictions, **options) -> Operation:
    names = tuple(inputs(Draw(), (1, 1, 1, 1, 1)))
    if function == "guided_step":
        options = {"sigma": 0.875, "sigma_next": 0.625, **options}
    latents = tuple(n for n in names if n != "mask")
    return Operation(
        name, function, inputs, dict.fromkeys(names, 0), options={"scale": 5.0, **options}, differentiable=latents,
        latent_names=latents,
    )  # fmt: skip


class _Combine(Operation):
    """`combine` takes its tensors in a list; here they come by name."""

    @property
    def call(self):
        return lambda a, b, c, **rest: latentfast.combine([a, b, c], [0.75, -1.25, 0.3], **rest)

    @property
    def spec(self):
        return lambda a, b, c: reference.guidance.combine([a, b, c], [0.75, -1.25, 0.3])


class _CombineRows(Operation):
    """The second of two results that are made in one go, in float64."""

    rows = ((1.0, 0.5, -0.25), (0.75, -1.25, 0.3))

    @property
    def call(self):
        return lambda a, b, c: latentfast.combine([a, b, c], self.rows, precise=True)[1]

    @property
    def spec(self):
        return lambda a, b, c: reference.guidance.combine([a, b, c], self.rows, precise=True)[1]


GUIDANCE = [
    _guidance("guide cfg", mode="cfg"),
    _guidance("guide cfg rescaled", mode="cfg", rescale=0.7),
    _guidance("guide apg", mode="apg", eta=0.25, norm_threshold=2.5),
    _guidance("guide apg rescaled, original", mode="apg", eta=0.0, rescale=0.5, original=True),
    _guidance("guide cfg_zero", mode="cfg_zero", rescale=0.7),
    _guidance("guide tcfg", mode="tcfg"),
    _guidance("guide tcfg rescaled", mode="tcfg", rescale=0.3, original=True),
    _guidance("guide magnitude_aware", mode="magnitude_aware", alpha=0.75, rescale=0.7),
    _guidance("guided_step cfg", "guided_step", _step),
    _guidance("guided_step cfg rescaled", "guided_step", _step, rescale=0.7),
    _guidance("guided_step cfg_zero masked", "guided_step", _inpainting, mode="cfg_zero"),
    _guidance("guided_step cfg masked", "guided_step", _inpainting),
    _Combine(
        "combine", "combine", _tensors, dict.fromkeys("abc", 0), differentiable=("a", "b", "c"),
        latent_names=("a", "b", "c"),
    ),
    _CombineRows(
        "combine rows", "combine", _tensors, dict.fromkeys("abc", 0), differentiable=("a", "b", "c"),
        latent_names=("a", "b", "c"), takes_out=False,
    ),
]  # fmt: skip
