"""What an edit is: parameters as plain data, and a method that applies it. And the registry of all edits."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from latentfast.recipe.parameters import JSON, Kind, OptionalKind, kind_of

if typing.TYPE_CHECKING:
    from latentfast.recipe.tensors import Resolve

__all__ = ["Data", "Edit", "register", "registered"]

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class Data:
    """A frozen dataclass whose fields are parameters of known kinds: checked when made, and written as JSON.

    A subclass is complete once `kinds` is set, which `described` does.
    """

    #: The parameters in the order in which they are written.
    kinds: ClassVar[dict[str, Kind]]

    def __post_init__(self) -> None:
        for name, kind in self._kinds().items():
            value = getattr(self, name)
            try:
                checked = kind.checked(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name} {error}") from None
            if checked is not value:
                object.__setattr__(self, name, checked)
        self.check()

    def check(self) -> None:
        """For parameters that must fit to each other: a ValueError if they don't."""

    @classmethod
    def _kinds(cls) -> dict[str, Kind]:
        try:
            return cls.__dict__["kinds"]
        except KeyError:
            raise TypeError(f"{cls.__name__} is not registered: put @register(name) above it") from None

    def to_data(self) -> dict[str, JSON]:
        """The parameters as JSON; those that are None are left out."""
        values = ((name, kind.written(getattr(self, name))) for name, kind in self._kinds().items())
        return {name: value for name, value in values if value is not None}

    @cached_property
    def canonical(self) -> str:
        """The one JSON text that says the same as `to_data`: names sorted, no spaces, floats by `repr`."""
        return _encode(self.to_data())

    @classmethod
    def from_data(cls, data: Mapping[str, JSON]) -> Any:
        """The inverse of `to_data`; a parameter that is left out has its default."""
        known = cls._kinds()
        if unknown := sorted(set(data) - set(known)):
            raise ValueError(f"{unknown[0]} is not a parameter; there are {', '.join(known) or 'none'}")
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name not in data and field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} is missing")
        return cls(**data)

    def references(self) -> Iterator[str]:
        """The tensors that the parameters name, in their order."""
        for name, kind in self._kinds().items():
            yield from kind.references(getattr(self, name))

    def renamed(self, new: Callable[[str], str]) -> Any:
        """The same with other names of tensors."""
        values = {name: kind.renamed(getattr(self, name), new) for name, kind in self._kinds().items()}
        return dataclasses.replace(self, **values)  # type: ignore[type-var]

    @classmethod
    def schema(cls) -> dict[str, JSON]:
        """The JSON Schema of `to_data`."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        properties = {}
        for name, kind in cls._kinds().items():
            properties[name] = kind.schema()
            if defaults[name] not in (dataclasses.MISSING, None):
                properties[name] |= {"default": kind.written(defaults[name])}
        required = [name for name in properties if defaults[name] is dataclasses.MISSING]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }


_DataType = TypeVar("_DataType", bound=type[Data])


def described(cls: _DataType, names: Mapping[str, Any] | None = None) -> _DataType:
    """Set the `kinds` of a frozen dataclass from its annotations; `names` are those that a function around it has."""
    if not (dataclasses.is_dataclass(cls) and "__dataclass_fields__" in cls.__dict__):
        raise TypeError(f"{cls.__name__} must be a dataclass: put @dataclass(frozen=True) below @register")
    if not cls.__dataclass_params__.frozen:
        raise TypeError(f"{cls.__name__} must be frozen: write @dataclass(frozen=True)")
    hints = typing.get_type_hints(cls, localns=dict(names or {}), include_extras=True)
    kinds = {}
    # what can be given by its name alone, such as every mask, comes last
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.kw_only):
        try:
            kinds[field.name] = kind_of(hints[field.name])
        except TypeError as error:
            raise TypeError(f"{cls.__name__}.{field.name}: {error}") from None
        if field.default_factory is not dataclasses.MISSING:
            raise TypeError(f"{cls.__name__}.{field.name} must have a plain default, got a factory")
        if field.default is None and not isinstance(kinds[field.name], OptionalKind):
            raise TypeError(f"{cls.__name__}.{field.name} must be annotated with `| None` for its default None")
    cls.kinds = kinds
    return cls


class Edit(Data):
    """One step of a recipe. Subclasses are frozen dataclasses under `register`, and have `apply`.

    The parameters are numbers, words and references to tensors; the tensors themselves are elsewhere, so that an edit
    is plain data: two edits that are equal do the same.
    """

    #: Its name in a recipe.
    name: ClassVar[str]
    #: To be raised by whoever changes what an edit of a given name does.
    revision: ClassVar[int]

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        """The edited latents: a new tensor; `latents` and what `resolve` gives stay as they are.

        Must depend on nothing but the parameters, the latents and the tensors, and not on chance: with a cache the
        result stands for the next call as well.

        Args:
            latents: What the edits before made.
            resolve: Called with a reference, gives its tensor.
        """
        raise NotImplementedError

    def to_data(self) -> dict[str, JSON]:
        """The edit as JSON: its name, its revision if that is not 1, and its parameters."""
        data = super().to_data()
        head: dict[str, JSON] = {"edit": self.name}
        return head | ({"revision": self.revision} if self.revision != 1 else {}) | data

    @classmethod
    def schema(cls) -> dict[str, JSON]:
        """The JSON Schema of `to_data`."""
        made = super().schema()
        head: dict[str, JSON] = {"edit": {"const": cls.name}}
        if cls.revision != 1:
            head["revision"] = {"const": cls.revision}
        made |= {"properties": head | made["properties"], "required": [*head, *made["required"]]}
        text = (cls.__doc__ or "").strip().splitlines()
        return ({"description": text[0]} if text else {}) | made


_registry: dict[str, type[Edit]] = {}
_NAME = re.compile(r"[a-z][a-z0-9_]*([./-][a-z0-9_]+)*")
_EditType = TypeVar("_EditType", bound=type[Edit])


def register(name: str, *, revision: int = 1) -> Callable[[_EditType], _EditType]:
    """Makes a frozen dataclass an edit that recipes can hold.

    Args:
        name: In recipes; lower case, with a prefix of your own, `mine/brighten`, it meets no later edit of latentfast.
        revision: To be raised whenever the edit does something else than before, so that neither an old recipe nor a
            cached state is taken for the new one.

    Raises:
        TypeError: it is no frozen dataclass on `Edit`, or a field's annotation does not say what values it takes.
        ValueError: another class has the name, or it is none.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import Annotated
        >>> import torch
        >>> from latentfast.recipe import Edit, Number, Recipe, register
        >>> @register("mine/brighten")
        ... @dataclass(frozen=True)
        ... class Brighten(Edit):
        ...     amount: Annotated[float, Number(-1, 1)] = 0.1
        ...
        ...     def apply(self, latents, resolve):
        ...         return latents + self.amount
        >>> Recipe([Brighten(0.5)]).apply(torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must be lower-case letters, digits and _, such as mine/brighten, got {name!r}")
    if isinstance(revision, bool) or not isinstance(revision, int) or revision < 1:
        raise ValueError(f"revision must be an integer of at least 1, got {revision!r}")

    def add(cls: _EditType) -> _EditType:
        if not (isinstance(cls, type) and issubclass(cls, Edit)):
            raise TypeError(f"register must stand above a class on latentfast.recipe.Edit, got {cls!r}")
        before = _registry.get(name)
        # a notebook's cell that runs again defines the same class anew
        if before is not None and (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"name {name!r} is taken by {before.__module__}.{before.__qualname__}")
        described(cls, sys._getframe(1).f_locals)
        if reserved := {"edit", "revision"} & set(cls.kinds):
            raise ValueError(f"{cls.__name__} must not have a field named {reserved.pop()}: that word is taken")
        cls.name, cls.revision = name, revision
        _registry[name] = cls
        return cls

    return add


def registered() -> dict[str, type[Edit]]:
    """All edits by their names, in the order of these."""
    return dict(sorted(_registry.items()))


def edit_from_data(data: JSON) -> Edit:
    """The inverse of `Edit.to_data`."""
    if not isinstance(data, Mapping):
        raise TypeError(f"must be an object with an edit's name and parameters, got {type(data).__name__}")
    rest = dict(data)
    name = rest.pop("edit", None)
    cls = _registry.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(registered())
        raise ValueError(f"edit must be one of {known}, got {name!r}; an edit of your own is to be imported before")
    if (revision := rest.pop("revision", 1)) != cls.revision:
        raise ValueError(f"revision must be {cls.revision}, which is what {name} is here, got {revision!r}")
    return cls.from_data(rest)
