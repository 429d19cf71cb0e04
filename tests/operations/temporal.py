"""Temporal losses, in the forms that matter."""

from torch import Tensor

from tests.helpers import Draw
from tests.operations.operation import Operation, Shape, one_for_all


def _flow(draw: Draw, shape: Shape, frames: int) -> Tensor:
    """Flow in latent pixels that leaves small frames now and then."""
    return draw.uniform(shape[0], 2, max(frames - 1, 0), *shape[3:], low=-1.6, high=1.6)


def _warp_inputs(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"z": draw.normal(*shape), "flow": _flow(draw, shape, shape[2])}


def _masked_warp_inputs(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    mask = draw.mask(shape[0], max(shape[1] - 1, 0), 1, *shape[3:])
    return {"z": draw.normal(*shape), "flow": _flow(draw, shape, shape[1]), "mask": mask}


def _clip_ref_mask(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"z": draw.normal(*shape), "ref": draw.normal(*shape), "mask": draw.mask(*one_for_all(shape, 0, 2, 3, 4))}


def _clip(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"z": draw.normal(*shape)}


def _loss(name: str, inputs, function: str = "temporal_loss", differentiable=("z",), **options) -> Operation:
    names = inputs(Draw(), (1, 1, 1, 1, 1))
    return Operation(
        name, function, inputs, dict.fromkeys(names, 0), options={"reduction": "none", **options},
        differentiable=differentiable, takes_out=False,
    )  # fmt: skip


LOSSES = [
    _loss("temporal_loss l2", _clip),
    _loss(
        "temporal_loss l2 first and second, ref, mask",
        _clip_ref_mask,
        differentiable=("z", "ref"),
        first=0.7,
        second=0.4,
    ),
    _loss("temporal_loss l1 mask", _clip_ref_mask, differentiable=("z", "ref"), norm="l1", second=0.5),
    _loss(
        "temporal_loss charbonnier frames first", _clip, norm="charbonnier", first=0.0, second=1.0, eps=0.1, frame_dim=1
    ),
    _loss("warp_loss", _warp_inputs, "warp_loss"),
    _loss("warp_loss mask, frames first", _masked_warp_inputs, "warp_loss", frame_dim=1),
]
