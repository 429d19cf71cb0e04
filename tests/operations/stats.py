"""Statistics and what is done with them, in the forms that matter."""

from torch import Tensor

from tests.helpers import Draw
from tests.operations.operation import Operation, Shape


def _styled(draw: Draw, shape: Shape, samples: int | None = None) -> dict[str, Tensor]:
    """A clip, and a shorter and smaller one of another style."""
    b, c, t, h, w = shape
    smaller = (b if samples is None else samples, c, (t + 1) // 2, h, (w + 2) // 3)
    return {"z": draw.normal(*shape), "ref": draw.normal(*smaller) * 3 + 2}


def _packed_styled(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {name: x.flatten(2).transpose(1, 2).contiguous() for name, x in _styled(draw, shape).items()}


def _middle_styled(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    """Channels between frames and places."""
    return {name: x.transpose(1, 2).contiguous() for name, x in _styled(draw, shape).items()}


def _clip(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"z": draw.normal(*shape) * 2}


def _shifted(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    """A mean beside which the deviation is small."""
    return {"z": draw.normal(*shape) + 40}


def _affine(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {**_clip(draw, shape), "mean": draw.uniform(shape[1], low=-1.0), "std": draw.uniform(shape[1], low=0.5)}


def _packed_affine(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    inputs = _affine(draw, shape)
    return {**inputs, "z": inputs["z"].flatten(2).transpose(1, 2).contiguous()}


_OF_TABLE = {"z": 0, "mean": None, "std": None}
_STYLED = {"z": 0, "ref": 0}

STATISTICS = [
    *(
        Operation(
            f"channel_stats {name}", "channel_stats", _shifted, {"z": 0}, differentiable=("z",), takes_out=False,
            part=part, options=options,
        )
        for part, name, options in ((0, "mean", {}), (1, "std", {}), (1, "std of rows", {"channel_dim": -2}))
    ),
    Operation("adain", "adain", _styled, _STYLED, differentiable=("z", "ref")),
    Operation(
        "adain one style, part way", "adain", lambda draw, shape: _styled(draw, shape, 1), {"z": 0, "ref": None},
        options={"factor": 0.6}, differentiable=("z", "ref"),
    ),
    Operation(
        "adain packed", "adain", _packed_styled, _STYLED, options={"channel_dim": -1}, differentiable=("z", "ref"),
    ),
    Operation(
        "adain channels third", "adain", _middle_styled, _STYLED, options={"channel_dim": 2, "factor": 1.3},
        differentiable=("z", "ref"),
    ),
    Operation("standardize", "standardize", _affine, _OF_TABLE, options={"scale": 0.7}, differentiable=("z",)),
    Operation(
        "standardize packed", "standardize", _packed_affine, _OF_TABLE, options={"channel_dim": -1},
        differentiable=("z",),
    ),
    Operation(
        "standardize to tokens", "standardize", _affine, _OF_TABLE, options={"patch": (1, 1, 1)}, differentiable=("z",),
    ),
    Operation("unstandardize", "unstandardize", _affine, _OF_TABLE, options={"scale": 0.7}, differentiable=("z",)),
    Operation("tone_map", "tone_map", _clip, {"z": 0}, options={"compression": 0.8}, differentiable=("z",)),
]  # fmt: skip
