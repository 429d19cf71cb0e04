"""What is edited: a clip and a list of layers, as values that never change, with undo and redo."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from latentfast.studio.kinds import KINDS

__all__ = ["Document", "History", "Layer", "Shot", "Word"]

#: A word of a prompt, and which of its occurrences.
Word = tuple[str, int]


@dataclass(frozen=True)
class Shot:
    """What a clip is made of; the same makes the same clip."""

    prompt: str
    seed: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Layer:
    """One edit of the stack.

    Attributes:
        id: Its own as long as the studio runs.
        kind: A name in `KINDS`.
        amount: Where its slider stands.
        on: False: it is left out.
        words: Of the clip's prompt, which confine it; none: it acts everywhere.
        shot: The other clip, for kinds that need one.
    """

    id: int
    kind: str
    amount: float
    on: bool = True
    words: tuple[Word, ...] = ()
    shot: Shot | None = None

    @property
    def label(self) -> str:
        return KINDS[self.kind].label


@dataclass(frozen=True)
class Document:
    """A clip, if there is one yet, and the layers over it, in the order in which they act."""

    shot: Shot | None = None
    layers: tuple[Layer, ...] = ()

    def shots(self) -> list[Shot]:
        """The clips that it is made of, its own first."""
        used = [self.shot, *(layer.shot for layer in self.layers if layer.on)]
        return list(dict.fromkeys(shot for shot in used if shot is not None))

    def index(self, id: int) -> int:
        """Where a layer is; a ValueError if there is none of that id, as when another tab has removed it."""
        for index, layer in enumerate(self.layers):
            if layer.id == id:
                return index
        raise ValueError("that edit is not there any more")

    def with_layer(self, id: int, **changes: object) -> Document:
        """The document with something else about a layer."""
        at = self.index(id)
        changed = replace(self.layers[at], **changes)  # type: ignore[arg-type]
        return replace(self, layers=(*self.layers[:at], changed, *self.layers[at + 1 :]))

    def without(self, id: int) -> Document:
        at = self.index(id)
        return replace(self, layers=(*self.layers[:at], *self.layers[at + 1 :]))

    def moved(self, id: int, to: int) -> Document:
        """The document with a layer at another place; beyond the ends, at the end."""
        rest = list(self.without(id).layers)
        rest.insert(to, self.layers[self.index(id)])
        return replace(self, layers=tuple(rest))

    def only(self, shots: Iterable[Shot]) -> Document:
        """The document without the layers whose clip is none of these."""
        known = set(shots)
        return replace(self, layers=tuple(layer for layer in self.layers if layer.shot is None or layer.shot in known))


class History:
    """The document as it is, was, and was before it was undone."""

    #: States that can be gone back to.
    MOST = 200

    def __init__(self, document: Document) -> None:
        self.document = document
        self._past: list[Document] = []
        self._future: list[Document] = []
        self._moving: object = None
        self._ids = itertools.count(1)

    def new_id(self) -> int:
        return next(self._ids)

    def change(self, document: Document, *, moving: object = None) -> bool:
        """Go on with another document.

        Args:
            document: The new one.
            moving: What is in motion, such as a slider: all changes of one motion are undone together.

        Returns:
            Whether it is another.
        """
        goes_on = moving is not None and moving == self._moving
        self._moving = moving
        if document == self.document:
            return False
        if not goes_on:
            self._past = [*self._past, self.document][-self.MOST :]
        self._future = []
        self.document = document
        return True

    def rest(self) -> None:
        """What was in motion has come to rest."""
        self._moving = None

    @property
    def can_undo(self) -> bool:
        return bool(self._past)

    @property
    def can_redo(self) -> bool:
        return bool(self._future)

    def undo(self) -> bool:
        return self._step(self._past, self._future)

    def redo(self) -> bool:
        return self._step(self._future, self._past)

    def _step(self, come: list[Document], go: list[Document]) -> bool:
        self._moving = None
        if not come:
            return False
        go.append(self.document)
        self.document = come.pop()
        return True
