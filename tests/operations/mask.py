"""Masks, in the forms that matter."""

import math

from torch import Tensor

from tests.helpers import Draw, skip_where_lacking
from tests.operations.operation import Operation, Shape

#: Queries' heads are the shape's channels, their number is T·H; W elements each.
_GRID, _SIZE = (3, 4, 5), (5, 6, 9)


def _attention(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    skip_where_lacking("token_heatmap", draw.device)
    b, heads, t, h, width = shape
    return {"q": draw.normal(b, heads, t * h, width), "k": draw.normal(b, heads, t + width + 2, width)}


def _weighted(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    inputs = _attention(draw, shape)
    return {**inputs, "tokens": draw.uniform(2, inputs["k"].shape[2], low=-0.5)}


def _heat(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    groups = shape[1] if math.prod(shape[2:]) else 0
    return {"heat": draw.uniform(shape[0], groups, math.prod(_GRID), dtype=draw.dtype)}


def _mask(name: str, **options) -> Operation:
    return Operation(
        f"heatmap_to_mask {name}", "heatmap_to_mask", _heat, {"heat": 0}, differentiable=(), takes_out=False,
        latent_names=("heat",), options={"grid": _GRID, "size": _SIZE, **options},
    )  # fmt: skip


MASKS = [
    Operation(
        "token_heatmap", "token_heatmap", _attention, {"q": 0, "k": 0}, options={"tokens": [[0, 2], [1]]},
        differentiable=(), takes_out=False, latent_names=("q", "k"),
    ),
    Operation(
        "token_heatmap weights, scale", "token_heatmap", _weighted, {"q": 0, "k": 0, "tokens": None},
        options={"scale": 0.7}, differentiable=(), takes_out=False, latent_names=("q", "k"),
    ),
    _mask("soft", quantile=0.7, softness=0.5, dilate=1, smooth_time=0.8),
    _mask("threshold", threshold=0.4, softness=0.3),
    _mask("map", smooth_time=0.6),
]  # fmt: skip
