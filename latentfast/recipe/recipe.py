"""`Recipe`: an immutable stack of edits as plain data."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from latentfast._json import strict_json
from latentfast.recipe.apply import applied
from latentfast.recipe.edit import Edit, edit_from_data, registered
from latentfast.recipe.errors import told
from latentfast.recipe.parameters import JSON
from latentfast.recipe.tensors import reference

if TYPE_CHECKING:
    from latentfast.cache import LatentCache

__all__ = ["FORMAT", "VERSION", "Recipe"]

FORMAT = "latentfast.recipe"
#: Of the form, not of the edits in it.
VERSION = 1
_NOTHING = hashlib.sha256(f"{FORMAT}/{VERSION}".encode()).hexdigest()


class Recipe:
    """An ordered stack of edits, which never changes: methods that change something return another recipe.

    What it says is data alone: names, numbers, and tensors by their digests. So it can be written, compared and kept,
    two recipes that say the same are equal and have the same `digest`, and a result can be made again.

    Args:
        edits: In the order in which they are applied.

    Raises:
        TypeError: an element is no edit.

    Example:
        >>> import torch
        >>> from latentfast.recipe import Recipe, SlerpTowards, Tensors, ToneMap
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> tensors = Tensors(b)
        >>> recipe = Recipe([SlerpTowards(tensors.add(b), 1 / 3)]).then(ToneMap(0.0))
        >>> recipe.apply(a, tensors=tensors)
        tensor([[0.8660, 0.5000]])
        >>> recipe.replace(0, SlerpTowards(tensors.add(b), 1.0)).apply(a, tensors=tensors)
        tensor([[0., 1.]])
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    __slots__ = ("_digests", "edits")

    edits: tuple[Edit, ...]
    _digests: list[str]

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        taken = tuple(edits)
        for i, edit in enumerate(taken):
            _check_edit(edit, i)
        self._set(taken, [_NOTHING])

    def _set(self, edits: tuple[Edit, ...], digests: list[str]) -> None:
        object.__setattr__(self, "edits", edits)
        # of the first 0, 1, 2, … edits, as far as they were asked for
        object.__setattr__(self, "_digests", digests)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a recipe does not change, {name!r} neither: then, replace, without, move make another")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    # --- Its edits ---------------------------------------------------------------------------------------------------

    def then(self, *edits: Edit) -> Recipe:
        """The recipe with these edits at its end."""
        for i, edit in enumerate(edits):
            _check_edit(edit, len(self.edits) + i)
        return self._with((*self.edits, *edits), len(self.edits))

    def replace(self, index: int, edit: Edit) -> Recipe:
        """The recipe with another edit at an index."""
        at = self._index(index)
        _check_edit(edit, at)
        return self._with((*self.edits[:at], edit, *self.edits[at + 1 :]), at)

    def without(self, index: int) -> Recipe:
        """The recipe without the edit at an index."""
        at = self._index(index)
        return self._with((*self.edits[:at], *self.edits[at + 1 :]), at)

    def move(self, index: int, to: int) -> Recipe:
        """The recipe with the edit at an index moved, so that it then stands at `to`."""
        at, to = self._index(index), self._index(to, "to")
        rest = [*self.edits[:at], *self.edits[at + 1 :]]
        rest.insert(to, self.edits[at])
        return self._with(tuple(rest), min(at, to))

    def _with(self, edits: tuple[Edit, ...], same: int) -> Recipe:
        """A recipe of checked edits, of which the first `same` are this one's."""
        self.prefix_digest(same)  # here, where they stay for the next recipe that is made of this one
        made = object.__new__(Recipe)
        made._set(edits, self._digests[: same + 1])
        return made

    def _index(self, index: int, name: str = "index") -> int:
        count = len(self.edits)
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name} must be an int, got {type(index).__name__}")
        if not -count <= index < count:
            raise IndexError(f"{name} must be in [{-count}, {count - 1}] for {count} edits, got {index}")
        return index % count

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> Recipe: ...
    def __getitem__(self, index):
        return Recipe(self.edits[index]) if isinstance(index, slice) else self.edits[index]

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Recipe([{', '.join(map(repr, self.edits))}])"

    def __reduce__(self) -> tuple:
        return Recipe, (self.edits,)

    # --- As data -----------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """SHA-256 of what the recipe says, 64 hexadecimal digits; that of a prefix is part of it."""
        return self.prefix_digest(len(self.edits))

    def prefix_digest(self, count: int) -> str:
        """The digest of the recipe of the first `count` edits."""
        digests = self._digests
        while len(digests) <= count:
            edit = self.edits[len(digests) - 1]
            digests.append(hashlib.sha256(f"{digests[-1]}{edit.canonical}".encode()).hexdigest())
        return digests[count]

    @property
    def references(self) -> tuple[str, ...]:
        """The tensors that it names, each once, in the order of their first use."""
        return tuple(dict.fromkeys(name for edit in self.edits for name in edit.references()))

    def to_data(self) -> dict[str, JSON]:
        """The recipe as what `json` takes."""
        return {"format": FORMAT, "version": VERSION, "edits": [edit.to_data() for edit in self.edits]}

    def to_json(self) -> str:
        """The recipe as JSON, a line a parameter, which `from_json` turns back into an equal one, float by float."""
        return json.dumps(self.to_data(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_data(cls, data: Any) -> Recipe:
        """The inverse of `to_data`.

        Raises:
            TypeError: a value is of a wrong type.
            ValueError: it is no recipe, or of another version, or a step is wrong, which is named.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"a recipe must be a JSON object whose format is {FORMAT!r}, got {_head(data)}")
        if data.get("version") != VERSION:
            raise ValueError(f"version must be {VERSION}, the only one known here, got {data.get('version')!r}")
        if unknown := sorted(set(data) - {"format", "version", "edits"}):
            raise ValueError(f"a recipe must have format, version and edits alone, got {unknown[0]!r}")
        steps = data.get("edits")
        if not isinstance(steps, list):
            raise TypeError(f"edits must be a list, got {type(steps).__name__}")
        edits = []
        for number, step in enumerate(steps, 1):
            try:
                edits.append(edit_from_data(step))
            except (TypeError, ValueError) as error:
                name = step.get("edit") if isinstance(step, Mapping) else None
                raise told(error, number, name if isinstance(name, str) and name in registered() else None) from None
        return cls(edits)

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """The inverse of `to_json`; errors are those of `from_data`."""
        return cls.from_data(strict_json(text, "a recipe", "is not a number that a recipe can hold"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` into a file, which appears whole or not at all."""
        target = Path(path)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            aside = Path(folder) / target.name
            aside.write_text(self.to_json(), encoding="utf-8")
            aside.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read what `save` wrote; a ValueError or TypeError names the file."""
        text = Path(path).read_bytes()
        try:
            return cls.from_json(text)
        except (TypeError, ValueError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from None

    def diff(self, other: Recipe, names: tuple[str, str] = ("before", "after")) -> str:
        """What differs, as a unified diff of both as JSON; nothing if they are equal."""
        before, after = (recipe.to_json().splitlines(keepends=True) for recipe in (self, other))
        return "".join(difflib.unified_diff(before, after, *names))

    @staticmethod
    def schema() -> dict[str, JSON]:
        """The JSON Schema (draft 2020-12) of recipes with the edits that are registered now."""
        edits = {name: cls.schema() for name, cls in registered().items()}
        steps = [{"$ref": f"#/$defs/{_escaped(name)}"} for name in edits]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "A recipe of latentfast",
            "type": "object",
            "properties": {
                "format": {"const": FORMAT},
                "version": {"const": VERSION},
                "edits": {"type": "array", "items": {"oneOf": steps}},
            },
            "required": ["format", "version", "edits"],
            "additionalProperties": False,
            "$defs": edits,
        }

    # --- Its tensors, and applying it --------------------------------------------------------------------------------

    def bind(self, context: Mapping[str, str | Tensor]) -> Recipe:
        """The recipe with digests in the places of names: each "name:x" becomes what `context["x"]` is.

        So one recipe serves many clips, each with a heat map of its own.

        Args:
            context: References "sha256:…", or tensors.
        """
        found = {name: reference(x) if isinstance(x, Tensor) else x for name, x in context.items()}

        def new(name: str) -> str:
            return found.get(name.removeprefix("name:"), name) if name.startswith("name:") else name

        edits: list[Edit] = []
        for number, edit in enumerate(self.edits, 1):
            try:
                edits.append(edit.renamed(new) if any(new(name) != name for name in edit.references()) else edit)
            except (TypeError, ValueError) as error:
                raise told(error, number, edit.name) from None
        return self if all(a is b for a, b in zip(edits, self.edits, strict=True)) else Recipe(edits)

    def apply(
        self,
        latents: Tensor,
        *,
        cache: LatentCache | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        context: Mapping[str, str | Tensor] | None = None,
        source: str | None = None,
        keep_result: bool = False,
    ) -> Tensor:
        """Applies the edits one after another, each by its fused operation.

        With a cache, the latents between two edits are kept in it, so that with the last of ten edits changed one runs.
        A state is found again by what made it, not by where it was made: by the digest of `latents`, the edits, the
        device's type, the backend and the versions of everything that changes bits. It has the same bits as if it were
        computed: nothing is fused across edits.

        Args:
            latents: What the first edit begins with, `(B, C, T, H, W)` for most edits.
            cache: A `latentfast.cache.LatentCache`. Its states have no gradient.
            tensors: Tensors by reference, as a `Tensors` holds them; those that are missing are looked up in the cache
                (see `keep`). On the latents' device.
            context: What the recipe's names mean here, see `bind`; tensors in it need not be in `tensors`.
            source: With a cache: a name for the latents, which stands for their content; so not even the first call
                reads them. Whoever names two different latents alike gets the result of one for the other.
            keep_result: With a cache: keep the result of the last edit too. A slider in motion would fill the cache
                with states that nobody asks for again, so as a rule one is kept when an edit follows it.

        Returns:
            A new tensor; of the latents' kind, unless an edit makes another.

        Raises:
            MissingTensorError: (a ValueError) a step names a tensor that is nowhere.
            TypeError, ValueError: a step can't be applied; the error names it, counted from 1.

        Differentiable without a cache, as far as the edits' operations are.
        """
        recipe = self
        if context:
            recipe = self.bind(context)
            given = {reference(x): x for x in context.values() if isinstance(x, Tensor)}
            tensors = {**(tensors or {}), **given}
        return applied(recipe, latents, cache, {} if tensors is None else tensors, source, keep_result)


def _check_edit(edit: object, index: int) -> None:
    if not isinstance(edit, Edit):
        raise TypeError(f"recipe step {index + 1} must be an edit, got {type(edit).__name__}")


def _head(data: Any) -> str:
    return f"format {data.get('format')!r}" if isinstance(data, Mapping) else type(data).__name__


def _escaped(name: str) -> str:
    """A name in a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
