"""The table of operations: each public operation in the forms that matter, with its inputs and its specification."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import LOSS_ULPS, ULPS, Draw, Target

Shape = Sequence[int]
_STEMS = {name: stem for stem in (reference.interpolate, reference.edit, reference.temporal) for name in dir(stem)}


@dataclass(frozen=True)
class Operation:
    """One form of a public operation.

    `samples` says along which dimension each input has its samples (None: it is shared by all), `result_samples` the
    same of the result; None there if a vector spans samples, so that the rules about samples do not apply.
    """

    name: str
    function: str
    inputs: Callable[[Draw, Shape], dict[str, Tensor]]
    samples: dict[str, int | None]
    result_samples: int | None = 0
    options: dict = field(default_factory=dict)
    differentiable: tuple[str, ...] = ("a", "b")
    takes_out: bool = True
    #: The formula without the cases that keep bits, where those hide a derivative; None: `spec`.
    smooth: Callable[..., Tensor] | None = None
    #: How many rounded parts of an input's gradient autograd adds up.
    gradient_parts: int = 1
    #: N×N numbers at every position: too slow for large shapes.
    heavy: bool = False

    @property
    def call(self) -> Callable[..., Tensor]:
        """The public operation; takes the inputs by name."""
        return partial(getattr(latentfast, self.function), **self.options)

    @property
    def spec(self) -> Callable[..., Tensor]:
        """The same of the reference."""
        return partial(getattr(_STEMS[self.function], self.function), **self.options)

    @property
    def gradient_spec(self) -> Callable[..., Tensor]:
        """What the gradients are those of."""
        return self.smooth or self.spec

    @property
    def ulps(self) -> dict:
        return LOSS_ULPS if self.function.endswith("loss") else ULPS

    @property
    def latents(self) -> tuple[str, ...]:
        """The inputs that are latents: where a NaN could come from."""
        return tuple(
            n for n in self.samples if n in ("a", "b", "keys", "latents", "z", "directions", "base", "edited", "ref")
        )

    def __str__(self) -> str:
        return self.name


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


def _one_for_all(shape: Shape, *full: int) -> list[int]:
    return [n if d in full else 1 for d, n in enumerate(shape)]


def _edit_inputs(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {
        "z": draw.normal(*shape),
        "directions": draw.normal(3, *shape),
        "strengths": draw.normal(3, shape[0], dtype=draw.parameter_dtype),
        "mask": draw.mask(*_one_for_all(shape, 0, 2, 3, 4)),
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
            "directions": draw.normal(1, *_one_for_all(shape, 1)),
            "strengths": draw.normal(3, dtype=draw.parameter_dtype),
            "mask": draw.mask(3, *_one_for_all(shape, 2, 3, 4), dtype=draw.parameter_dtype),
        },
        {"z": 0, "directions": None, "strengths": None, "mask": None},
        differentiable=("z", "directions", "strengths", "mask"),
    ),
    Operation(
        "blend", "blend",
        lambda draw, shape: {
            "base": draw.normal(*shape), "edited": draw.normal(*shape),
            "mask": draw.mask(*_one_for_all(shape, 0, 2, 3, 4)),
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


def _flow(draw: Draw, shape: Shape, frames: int) -> Tensor:
    """Flow in latent pixels that leaves small frames now and then."""
    return draw.uniform(shape[0], 2, max(frames - 1, 0), *shape[3:], low=-1.6, high=1.6)


def _warp_inputs(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"z": draw.normal(*shape), "flow": _flow(draw, shape, shape[2])}


def _masked_warp_inputs(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    mask = draw.mask(shape[0], max(shape[1] - 1, 0), 1, *shape[3:])
    return {"z": draw.normal(*shape), "flow": _flow(draw, shape, shape[1]), "mask": mask}


def _clip_ref_mask(draw: Draw, shape: Shape) -> dict[str, Tensor]:
    return {"z": draw.normal(*shape), "ref": draw.normal(*shape), "mask": draw.mask(*_one_for_all(shape, 0, 2, 3, 4))}


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

OPERATIONS = [*INTERPOLATIONS, *EDITS, *LOSSES]
BY_NAME = {operation.name: operation for operation in OPERATIONS}
#: Those whose samples are independent of each other.
PER_SAMPLE = [operation for operation in OPERATIONS if operation.result_samples is not None]


def small(target: Target) -> Shape:
    """A shape (B, C, T, H, W) for tests of logic: no power of two, an odd number of elements a sample."""
    return (2, 3, 5, 3, 7) if target.interpreted else (2, 3, 5, 7, 11)


#: Those that large shapes are for.
LIGHT = [operation for operation in OPERATIONS if not operation.heavy]


def large(target: Target) -> Shape:
    """A shape whose samples span several blocks, chunks or threads of every kernel."""
    return (2, 4, 3, 18, 30) if target.interpreted else (2, 16, 5, 60, 52)
