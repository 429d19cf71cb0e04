"""The instructions of a plan. Each is one operation of latentfast, with its numbers, and its tensors by name."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from latentfast.ops import _checks
from latentfast.ops.preview import Factors

__all__ = [
    "Adain", "Blend", "Confine", "Direction", "Instruction", "Lerp", "Nlerp", "Slerp", "Standardize", "ToRGB",
    "ToneMap", "Unstandardize",
]  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One step of a plan; what it does is said by its subclasses."""

    #: The name of the operation in PLAN_OPERATIONS.
    operation: ClassVar[str]
    #: The field with the name of its tensor, if it has one, and the tensor's role: like the latents, a direction that
    #: broadcasts to them, or a reference of channel statistics.
    operand: ClassVar[tuple[str, str] | None] = None
    #: The field that `Plan.set` changes, if there is one, with its least and its greatest value.
    slider: ClassVar[tuple[str, float, float] | None] = None
    #: Whether it needs sums over the value that it changes.
    reduces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.name == "mask" and field.default is None
            if field.type in (str, str | None) and not (isinstance(value, str) or (optional and value is None)):
                raise TypeError(f"{field.name} must be the name of a tensor, got {type(value).__name__}")
        if self.slider is not None:
            name, low, high = self.slider
            object.__setattr__(self, name, float(_checks.number(name, getattr(self, name), low, high)))

    @property
    def number(self) -> float | None:
        """The slider's value."""
        return None if self.slider is None else getattr(self, self.slider[0])

    def moved(self, value: float) -> "Instruction":
        """The same with another value of its slider; ValueError if it has none."""
        if self.slider is None:
            raise ValueError(f"{type(self).__name__} has no slider")
        return replace(self, **{self.slider[0]: value})


_ANY = (float("-inf"), float("inf"))


@dataclass(frozen=True)
class _Towards(Instruction):
    operand = ("towards", "latents")
    slider = ("t", *_ANY)

    towards: str
    t: float
    mask: str | None = None


@dataclass(frozen=True)
class Lerp(_Towards):
    """`latentfast.lerp(x, towards, t)`, confined by `latentfast.blend` where there is a mask."""

    operation = "lerp"


@dataclass(frozen=True)
class Nlerp(_Towards):
    """`latentfast.nlerp(x, towards, t)`, likewise."""

    operation = "nlerp"
    reduces = True


@dataclass(frozen=True)
class Slerp(_Towards):
    """`latentfast.slerp(x, towards, t)`, likewise."""

    operation = "slerp"
    reduces = True


@dataclass(frozen=True)
class Direction(Instruction):
    """`latentfast.edit(x, direction[None], [strength], mask)`: the direction broadcasts to the latents."""

    operation = "direction"
    operand = ("direction", "direction")
    slider = ("strength", *_ANY)

    direction: str
    strength: float
    mask: str | None = None


@dataclass(frozen=True)
class Blend(Instruction):
    """`latentfast.blend(x, edited, mask)`."""

    operation = "blend"
    operand = ("edited", "latents")

    edited: str
    mask: str


@dataclass(frozen=True)
class Confine(Instruction):
    """`latentfast.blend(base, x, mask)`: outside the mask `base` again, which may be "source"."""

    operation = "confine"
    operand = ("base", "latents")

    base: str
    mask: str


@dataclass(frozen=True)
class Adain(Instruction):
    """`latentfast.adain(x, ref, factor)`, confined by `latentfast.blend` where there is a mask."""

    operation = "adain"
    operand = ("ref", "ref")
    slider = ("factor", *_ANY)
    reduces = True

    ref: str
    factor: float = 1.0
    mask: str | None = None


@dataclass(frozen=True)
class ToneMap(Instruction):
    """`latentfast.tone_map(x, compression)`, likewise."""

    operation = "tone_map"
    slider = ("compression", 0.0, 1.0)

    compression: float
    mask: str | None = None


@dataclass(frozen=True)
class _Affine(Instruction):
    mean: Sequence[float]
    std: Sequence[float]
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            try:
                object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
            except (TypeError, ValueError):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"{name} must be a sequence of floats, one for each channel, got {got}") from None
        if len(self.mean) != len(self.std):
            raise ValueError(f"std must hold as many numbers as mean, {len(self.mean)}, got {len(self.std)}")
        if not all(x > 0 for x in self.std):
            raise ValueError(f"std must be positive, got {min(self.std)}")
        if _checks.number("scale", self.scale) == 0:
            raise ValueError("scale must not be 0")


@dataclass(frozen=True)
class Standardize(_Affine):
    """`latentfast.standardize(x, mean, std, scale)`."""

    operation = "standardize"


@dataclass(frozen=True)
class Unstandardize(_Affine):
    """`latentfast.unstandardize(x, mean, std, scale)`."""

    operation = "unstandardize"


@dataclass(frozen=True, eq=False)
class ToRGB:
    """`latentfast.latent_to_rgb(x, weight, bias, size=size)` as bytes; the last instruction of a plan."""

    weight: Factors
    bias: Factors
    size: tuple[int, int] | None = None
