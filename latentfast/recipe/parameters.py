"""Kinds of an edit's parameters: what a value may be, how it is written as JSON, and how a JSON Schema says so."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from torch import Tensor

__all__ = ["Flag", "Kind", "Many", "Number", "OneOf", "OptionalKind", "Reference", "TensorRef", "Whole", "kind_of"]

JSON = Any


class Kind:
    """What values a parameter takes."""

    def checked(self, value: Any) -> Any:
        """The value in its one form; a ValueError or TypeError that begins with "must be" if it is none."""
        raise NotImplementedError

    def schema(self) -> dict[str, JSON]:
        """The JSON Schema of `written` values."""
        raise NotImplementedError

    def written(self, value: Any) -> JSON:
        """A checked value as JSON."""
        return value

    def references(self, value: Any) -> Iterator[str]:
        """The tensors that a checked value names."""
        return iter(())

    def renamed(self, value: Any, new: Callable[[str], str]) -> Any:
        """A checked value with other names of tensors."""
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A finite float within bounds.

    Attributes:
        low: The least value.
        high: The greatest value.
        above: A bound that the value must exceed; None: there is none.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float | None = None

    def checked(self, value: Any) -> float:
        if value.__class__ is not float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"must be {self._words()}, got {_found(value)}")
            try:
                value = float(value)
            except OverflowError:
                raise ValueError(f"must be {self._words()}, got an integer beyond every float") from None
        if not (self.low <= value <= self.high and -math.inf < value < math.inf) or (
            self.above is not None and value <= self.above
        ):
            raise ValueError(f"must be {self._words()}, got {value!r}")
        return value

    def _words(self) -> str:
        if self.above is None and self.low > -math.inf and self.high < math.inf:
            return f"a number in [{self.low:g}, {self.high:g}]"
        bounds = [f"above {self.above:g}"] if self.above is not None else []
        bounds += [f"of at least {self.low:g}"] if self.low > -math.inf else []
        bounds += [f"of at most {self.high:g}"] if self.high < math.inf else []
        return f"a number {' and '.join(bounds)}" if bounds else "a finite number"

    def schema(self) -> dict[str, JSON]:
        bounds = {"minimum": self.low, "maximum": self.high, "exclusiveMinimum": self.above}
        return {"type": "number"} | {
            name: bound for name, bound in bounds.items() if bound is not None and math.isfinite(bound)
        }


@dataclass(frozen=True)
class Whole(Kind):
    """An integer within bounds."""

    low: int | None = None
    high: int | None = None

    def checked(self, value: Any) -> int:
        wanted = "an integer"
        if self.low is not None:
            wanted += f" of at least {self.low}"
        if self.high is not None:
            wanted += f"{' and' if self.low is not None else ' of'} at most {self.high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"must be {wanted}, got {_found(value)}")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError(f"must be {wanted}, got {value}")
        return value

    def schema(self) -> dict[str, JSON]:
        bounds = {"minimum": self.low, "maximum": self.high}
        return {"type": "integer"} | {name: bound for name, bound in bounds.items() if bound is not None}


@dataclass(frozen=True)
class Flag(Kind):
    """True or False."""

    def checked(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"must be True or False, got {_found(value)}")
        return value

    def schema(self) -> dict[str, JSON]:
        return {"type": "boolean"}


class OneOf(Kind):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def checked(self, value: Any) -> str:
        if value not in self.words:
            raise ValueError(f"must be {' or '.join(map(repr, self.words))}, got {_found(value)}")
        return value

    def schema(self) -> dict[str, JSON]:
        return {"enum": list(self.words)}


_DIGEST = r"sha256:[0-9a-f]{64}"
_NAME = r"name:[^\s:]+"
_REFERENCE = re.compile(f"({_DIGEST})|({_NAME})")


class Reference(Kind):
    """A tensor, by its digest "sha256:…"; or "name:…", which `Recipe.bind` or `context` makes a digest of."""

    def checked(self, value: Any) -> str:
        if isinstance(value, Tensor):
            raise TypeError("must be a reference to a tensor: what Tensors.add(tensor) or reference(tensor) returns")
        if not isinstance(value, str):
            raise TypeError(f"must be a reference to a tensor, 'sha256:…' or 'name:…', got {_found(value)}")
        if not _REFERENCE.fullmatch(value):
            raise ValueError(f"must be 'sha256:' with 64 hexadecimal digits or 'name:' with a name, got {value!r}")
        return value

    def schema(self) -> dict[str, JSON]:
        return {"type": "string", "pattern": f"^({_DIGEST}|{_NAME})$"}

    def references(self, value: str) -> Iterator[str]:
        yield value

    def renamed(self, value: str, new: Callable[[str], str]) -> str:
        return new(value)


#: The type of a parameter that is a tensor.
TensorRef = Annotated[str, Reference()]


@dataclass(frozen=True)
class OptionalKind(Kind):
    """A value of another kind, or None, which is not written."""

    of: Kind

    def checked(self, value: Any) -> Any:
        return None if value is None else self.of.checked(value)

    def schema(self) -> dict[str, JSON]:
        return self.of.schema()

    def written(self, value: Any) -> JSON:
        return None if value is None else self.of.written(value)

    def references(self, value: Any) -> Iterator[str]:
        return iter(()) if value is None else self.of.references(value)

    def renamed(self, value: Any, new: Callable[[str], str]) -> Any:
        return None if value is None else self.of.renamed(value, new)


@dataclass(frozen=True)
class Many(Kind):
    """A list of values of one kind; a tuple in Python."""

    of: Kind
    least: int = 0

    def checked(self, value: Any) -> tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"must be a list, got {_found(value)}")
        if len(value) < self.least:
            raise ValueError(f"must have at least {self.least} elements, got {len(value)}")
        made = []
        for i, element in enumerate(value):
            try:
                made.append(self.of.checked(element))
            except (TypeError, ValueError) as error:
                raise type(error)(f"must have good elements: number {i + 1} {error}") from None
        return tuple(made)

    def schema(self) -> dict[str, JSON]:
        return {"type": "array", "items": self.of.schema(), "minItems": self.least}

    def written(self, value: tuple) -> JSON:
        return [self.of.written(element) for element in value]

    def references(self, value: tuple) -> Iterator[str]:
        for element in value:
            yield from self.of.references(element)

    def renamed(self, value: tuple, new: Callable[[str], str]) -> tuple:
        return tuple(self.of.renamed(element, new) for element in value)


def _found(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__


_PLAIN: dict[Any, Kind] = {float: Number(), int: Whole(), bool: Flag()}


def kind_of(hint: Any) -> Kind:
    """The kind that a field's annotation stands for; a TypeError if none does.

    A kind in `Annotated[…]` counts; `float`, `int` and `bool`, unions with None and `tuple[…, ...]` of what counts do.
    """
    if get_origin(hint) is Annotated:
        found = [extra for extra in hint.__metadata__ if isinstance(extra, Kind)]
        return found[0] if found else kind_of(get_args(hint)[0])
    if hint in _PLAIN:
        return _PLAIN[hint]
    if get_origin(hint) in (Union, types.UnionType):
        rest = [option for option in get_args(hint) if option is not types.NoneType]
        if len(rest) == 1 and len(get_args(hint)) == 2:
            return OptionalKind(kind_of(rest[0]))
    if get_origin(hint) is tuple and len(get_args(hint)) == 2 and get_args(hint)[1] is Ellipsis:
        return Many(kind_of(get_args(hint)[0]))
    raise TypeError(f"{hint} says not what values it takes: annotate it with a kind of latentfast.recipe")
