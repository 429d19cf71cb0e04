"""Interpolations, in the forms that matter."""

from torch import Tensor

from tests.helpers import Draw
from tests.operations.operation import Operation, Shape


def _pair(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"a": draw.normal(*shape), "b": draw.normal(*shape)}


def _pair_and_t(kept: tuple[int, ...], lead: tuple[int, ...] = (), name: str = "t"):
    """A pair and a tensor t that differs along the dimensions `kept`."""

    def inputs(draw: Draw, shape: Shape) -> dict[str, Tensor]:
        t_shape = [n if d in kept else 1 for d, n in enumerate(shape)]
        return {**_pair(draw, shape), name: draw.uniform(*lead, *t_shape, low=-0.2, high=1.2)}

    return inputs


def _cluster(draw: Draw, shape: Shape) -> Tensor:
    """Three latents around a common one: with few channels, independent ones may have no unique mean."""
    common, apart = draw.normal(1, *shape), draw.uniform(3, *shape, low=-0.5, high=0.5, dtype=draw.dtype)
    return common + apart


def _interpolation(name: str, function: str, **rest) -> Operation:
    return Operation(name, function, rest.pop("inputs", _pair), rest.pop("samples", {"a": 0, "b": 0}), **rest)


_BOTH = {"a": 0, "b": 0}
_WITH_T = {**_BOTH, "t": 0}

INTERPOLATIONS = [
    _interpolation("lerp", "lerp", options={"t": 0.3}),
    _interpolation("nlerp", "nlerp", options={"t": 0.3}),
    _interpolation("slerp", "slerp", options={"t": 0.3}),
    _interpolation("slerp beyond", "slerp", options={"t": 1.4}),
    *(
        _interpolation(
            f"{mode} {label}", mode, inputs=_pair_and_t(kept), samples=_WITH_T, options={"dim": dim},
            differentiable=("a", "b", "t"),
        )
        for mode, label, kept, dim in (
            ("lerp", "t per position", (0, 2, 3, 4), 1),
            ("nlerp", "frames, t per frame", (0, 2), (1, 3, 4)),
            ("slerp", "t per sample", (0,), None),
            ("slerp", "frames, t per frame", (0, 2), (1, 3, 4)),
            ("slerp", "channels, t per position", (0, 2, 3, 4), 1),
            ("slerp", "rows, t per frame", (0, 2), 4),
            ("slerp", "channels and rows", (0,), (1, 3)),  # alternate more often than kernels know
        )
    ),
    _interpolation("slerp across samples", "slerp", result_samples=None, options={"t": 0.3, "dim": (0, 2)}),
    _interpolation("lerp_path", "lerp_path", result_samples=1, options={"ts": [0.0, 0.25, 1.0]}),
    _interpolation("nlerp_path", "nlerp_path", result_samples=1, options={"ts": [0.25, 0.5]}),
    _interpolation("slerp_path", "slerp_path", result_samples=1, options={"ts": [0.0, 0.25, 0.5, 0.7, 1.0, 1.3]}),
    _interpolation(
        "slerp_path t per sample", "slerp_path", inputs=_pair_and_t((0,), (3,), "ts"), samples={**_BOTH, "ts": 1},
        result_samples=1, differentiable=("a", "b", "ts"),
    ),
    *(
        Operation(
            f"interpolate_keys {mode}", "interpolate_keys", lambda draw, shape: {"keys": draw.normal(4, *shape)},
            {"keys": 1}, 1, {"ts": [2.25, 0.0, 1.5, 3.0, 0.75], "mode": mode}, ("keys",), False,
        )
        for mode in ("slerp", "nlerp", "lerp", "catmull_rom")
    ),
    Operation(
        "spherical_mean", "spherical_mean", lambda draw, shape: {"latents": _cluster(draw, shape)}, {"latents": 1},
        options={"weights": [0.5, 0.2, 0.3]}, differentiable=("latents",), takes_out=False, gradient_parts=3,
    ),
    Operation(
        "spherical_mean channels", "spherical_mean",
        lambda draw, shape: {"latents": _cluster(draw, shape), "weights": draw.uniform(3, low=0.1)},
        {"latents": 1, "weights": None}, options={"dim": 1}, differentiable=("latents", "weights"), takes_out=False,
        gradient_parts=3, heavy=True,
    ),
]  # fmt: skip
