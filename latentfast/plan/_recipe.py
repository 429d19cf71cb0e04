"""From a recipe's edits to a plan's instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from latentfast.plan import instructions
from latentfast.plan.instructions import Instruction
from latentfast.recipe import AttentionMask, Edit, Recipe, Resolve, edits, reference
from latentfast.recipe.errors import told

_Mask = str | AttentionMask | None


def translated(
    recipe: Recipe,
    source: Tensor,
    tensors: Mapping[str, Tensor] | None,
    cache: Any,
    context: Mapping[str, str | Tensor] | None,
) -> tuple[list[Instruction], dict[str, Tensor]]:
    """The instructions that do what the recipe does, and their tensors; an error names the step."""
    given = dict(tensors or {})
    if context:
        recipe = recipe.bind(context)
        given |= {reference(x): x for x in context.values() if isinstance(x, Tensor)}
    into = _Translation(source, Resolve(given, cache))
    stack: list[Instruction] = []
    for number, edit in enumerate(recipe, 1):
        try:
            stack += into.instructions(edit)
        except (TypeError, ValueError) as error:
            raise told(error, number, edit.name) from None
    return stack, into.tensors


class _Translation:
    """The tensors that were met so far; a name is the reference, and what is made of one has a name of its own."""

    def __init__(self, source: Tensor, resolve: Resolve) -> None:
        self._source, self._resolve = source, resolve
        self.tensors: dict[str, Tensor] = {}

    def instructions(self, edit: Edit) -> Iterator[Instruction]:
        """Those of one edit."""
        known = _KNOWN.get(type(edit))
        if known is None:
            names = ", ".join(cls.name for cls in _KNOWN)
            raise ValueError(
                f"no instruction of a plan does this (there are those of {names}): apply the recipe up to here, and "
                f"make a plan of what follows"
            )
        return known(self, edit)

    def tensor(self, name: str) -> str:
        """The name of a reference's tensor."""
        self.tensors[name] = self._resolve(name, self._source.device)
        return name

    def mask(self, mask: _Mask) -> str | None:
        """The name of a mask's tensor."""
        if mask is None:
            return None
        name = mask if isinstance(mask, str) else f"mask:{mask.canonical}"
        self.tensors[name] = self._resolve.mask(mask, self._source)
        return name

    def whole_vectors(self, dim: tuple[int, ...] | None) -> None:
        """An error unless `dim` makes each sample one vector, as None does."""
        ndim = self._source.ndim
        if dim is not None and sorted(d % ndim for d in dim) != list(range(1, ndim)):
            raise ValueError(f"dim must be None, one vector a sample, in a plan, got {dim}")

    def channels(self, dim: int) -> None:
        """An error unless `dim` is where a plan has the channels."""
        if dim % self._source.ndim != 1:
            raise ValueError(f"channel_dim must be 1 in a plan, got {dim}")


def _lerp(into: _Translation, edit: edits.LerpTowards) -> Iterator[Instruction]:
    yield instructions.Lerp(into.tensor(edit.target), edit.t, into.mask(edit.mask))  # for a number, dim says nothing


def _nlerp(into: _Translation, edit: edits.NlerpTowards) -> Iterator[Instruction]:
    into.whole_vectors(edit.dim)
    yield instructions.Nlerp(into.tensor(edit.target), edit.t, into.mask(edit.mask))


def _slerp(into: _Translation, edit: edits.SlerpTowards) -> Iterator[Instruction]:
    into.whole_vectors(edit.dim)
    yield instructions.Slerp(into.tensor(edit.target), edit.t, into.mask(edit.mask))


def _scale_noise(into: _Translation, edit: edits.ScaleNoise) -> Iterator[Instruction]:
    yield instructions.Lerp(into.tensor(edit.noise), edit.sigma, into.mask(edit.mask))


def _direction(into: _Translation, edit: edits.Direction) -> Iterator[Instruction]:
    yield instructions.Direction(into.tensor(edit.direction), edit.strength, into.mask(edit.mask))


def _directions(into: _Translation, edit: edits.Directions) -> Iterator[Instruction]:
    """One after another, which is the order in which they are added."""
    ndim, count = into._source.ndim, len(edit.strengths)
    rows, mask = into.tensor(edit.directions), into.mask(edit.mask)
    if into.tensors[rows].ndim != ndim + 1 or into.tensors[rows].shape[0] not in (1, count):
        shape = tuple(into.tensors[rows].shape)
        raise ValueError(f"directions must have {ndim + 1} dimensions, {count} or 1 the first, got shape {shape}")

    def part(name: str, n: int) -> str:
        x = into.tensors[name]
        if x.ndim <= ndim:
            return name
        n = n if x.shape[0] > 1 else 0
        into.tensors[f"{name}[{n}]"] = x[n]
        return f"{name}[{n}]"

    for n, strength in enumerate(edit.strengths):
        yield instructions.Direction(part(rows, n), strength, None if mask is None else part(mask, n))


def _blend(into: _Translation, edit: edits.Blend) -> Iterator[Instruction]:
    yield instructions.Blend(into.tensor(edit.edited), str(into.mask(edit.mask)))


def _confine(into: _Translation, edit: edits.Confine) -> Iterator[Instruction]:
    yield instructions.Confine(into.tensor(edit.base), str(into.mask(edit.mask)))


def _adain(into: _Translation, edit: edits.Adain) -> Iterator[Instruction]:
    into.channels(edit.channel_dim)
    yield instructions.Adain(into.tensor(edit.ref), edit.factor, into.mask(edit.mask))


def _tone_map(into: _Translation, edit: edits.ToneMap) -> Iterator[Instruction]:
    yield instructions.ToneMap(edit.compression, into.mask(edit.mask))


def _standardize(into: _Translation, edit: edits.Standardize) -> Iterator[Instruction]:
    into.channels(edit.channel_dim)
    yield instructions.Standardize(edit.mean, edit.std, edit.scale)


def _unstandardize(into: _Translation, edit: edits.Unstandardize) -> Iterator[Instruction]:
    into.channels(edit.channel_dim)
    yield instructions.Unstandardize(edit.mean, edit.std, edit.scale)


#: By the class itself: a subclass may do something else.
_KNOWN: dict[type[Edit], Callable[[_Translation, Any], Iterator[Instruction]]] = {
    edits.LerpTowards: _lerp,
    edits.NlerpTowards: _nlerp,
    edits.SlerpTowards: _slerp,
    edits.ScaleNoise: _scale_noise,
    edits.Direction: _direction,
    edits.Directions: _directions,
    edits.Blend: _blend,
    edits.Confine: _confine,
    edits.Adain: _adain,
    edits.ToneMap: _tone_map,
    edits.Standardize: _standardize,
    edits.Unstandardize: _unstandardize,
}
