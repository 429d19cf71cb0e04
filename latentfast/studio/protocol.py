"""What browser and studio say to each other: messages, checked to the last field, and packets of frames."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from latentfast._json import strict_json
from latentfast.recipe.edit import Data, described
from latentfast.recipe.parameters import Kind, Many, Number, OneOf, OptionalKind, Whole
from latentfast.studio.document import Document, Layer, Shot, Word
from latentfast.studio.kinds import KINDS

__all__ = ["LARGEST", "Message", "RefusedError", "packet", "parse", "read_run", "run_data"]

#: Bytes of a message; none needs more, a run with a hundred layers has a fifth of it.
LARGEST = 256 * 1024
MOST_LAYERS = 64
MOST_WORDS = 64
FORMAT, VERSION = "latentfast.studio", 1


class RefusedError(ValueError):
    """A message that is not as it must be; its text says in one sentence what is wrong."""


class Text(Kind):
    """A text that is not empty, without what no keyboard types."""

    def __init__(self, most: int) -> None:
        self.most = most

    def checked(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"must be a text, got {type(value).__name__}")
        text = value.strip()
        if not 0 < len(text) <= self.most:
            raise ValueError(f"must have 1 to {self.most} characters, got {len(text)}")
        if not all(character.isprintable() or character in "\n\t" for character in text):
            raise ValueError("must have no control characters")
        return text


class WordKind(Kind):
    """A word of a prompt and the number of its occurrence."""

    _text, _number = Text(100), Whole(0, 999)

    def checked(self, value: Any) -> Word:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise TypeError("must be a word and the number of its occurrence")
        return self._text.checked(value[0]), self._number.checked(value[1])


class Anything(Kind):
    """Any JSON; what is in it is checked elsewhere."""

    def checked(self, value: Any) -> Any:
        return value


class Message(Data):
    """What a browser may say. Each kind is a subclass, named after its `type`."""

    kinds_of: ClassVar[dict[str, type[Message]]] = {}


def _message(cls: type[Any]) -> type[Any]:
    made = described(dataclass(frozen=True)(cls))
    Message.kinds_of[cls.__name__.lower()] = made
    return made


_Prompt = Annotated[str, Text(500)]
_Seed = Annotated[int, Whole(0, 2**32 - 1)]
_Steps = Annotated[int, Whole(1, 200)]
_Guidance = Annotated[float, Number(0, 30)]
_Amount = Annotated[float, Number(-1, 1)]
_Id = Annotated[int, Whole(1, 2**53)]
_EditKind = Annotated[str, OneOf(*KINDS)]
_Words = Annotated[tuple[Word, ...], Many(WordKind())]


def _few(words: tuple[Word, ...]) -> None:
    if len(words) > MOST_WORDS:
        raise ValueError(f"words must be at most {MOST_WORDS}, got {len(words)}")


@_message
class Generate(Message):
    """Make the clip."""

    prompt: _Prompt
    seed: _Seed
    steps: _Steps
    guidance: _Guidance


@_message
class Cancel(Message):
    """Make no more of what is not ready."""


@_message
class Add(Message):
    """A layer on top; with the prompt and seed of another clip, if its kind needs one."""

    kind: _EditKind
    prompt: _Prompt | None = None
    seed: _Seed | None = None

    def check(self) -> None:
        needed = KINDS[self.kind].clip
        if needed != (self.prompt is not None) or needed != (self.seed is not None):
            raise ValueError(f"{self.kind} must {'come with' if needed else 'have no'} prompt and seed")


@_message
class Amount(Message):
    """A slider has moved; `live`: it is still held. `stamp` comes back with the picture."""

    id: _Id
    amount: _Amount
    live: bool = False
    stamp: Annotated[float, Number()] | None = None


@_message
class Switch(Message):
    """A layer is on or off."""

    id: _Id
    on: bool


@_message
class Confine(Message):
    """A layer acts where these words are."""

    id: _Id
    words: _Words

    def check(self) -> None:
        _few(self.words)


@_message
class Move(Message):
    """A layer to another place."""

    id: _Id
    to: Annotated[int, Whole(0, MOST_LAYERS)]


@_message
class Remove(Message):
    """A layer less."""

    id: _Id


@_message
class Undo(Message):
    """Back."""


@_message
class Redo(Message):
    """Forth."""


@_message
class Look(Message):
    """Show this tab where these words are."""

    words: _Words

    def check(self) -> None:
        _few(self.words)


@_message
class Shown(Message):
    """A picture is on the screen."""

    number: Annotated[int, Whole(0, 2**53)]


@_message
class Open(Message):
    """Another document, from a run's file."""

    run: Annotated[Any, Anything()]


def parse(text: str) -> Message:
    """A message from outside.

    Raises:
        RefusedError: it is none, in any respect.
    """
    if len(text) > LARGEST:
        raise RefusedError(f"a message must have at most {LARGEST} bytes, got {len(text)}")
    try:
        data = strict_json(text, "a message", "is no number")
    except ValueError as error:
        raise RefusedError(_short(str(error))) from None
    if not isinstance(data, dict):
        raise RefusedError(f"a message must be an object, got {type(data).__name__}")
    name = data.pop("type", None)
    cls = Message.kinds_of.get(name) if isinstance(name, str) else None
    if cls is None:
        raise RefusedError(f"type must be one of {', '.join(Message.kinds_of)}, got {_short(repr(name))}")
    try:
        return cls.from_data(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedError(_short(f"{name}: {error}")) from None


def _short(text: str) -> str:
    """One line that a page can show, whatever came."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"


# --- A run's file ----------------------------------------------------------------------------------------------------


@described
@dataclass(frozen=True)
class _Clip(Data):
    prompt: _Prompt
    seed: _Seed
    steps: _Steps
    guidance: _Guidance

    def shot(self) -> Shot:
        return Shot(self.prompt, self.seed, self.steps, self.guidance)


@described
@dataclass(frozen=True)
class _Layer(Data):
    kind: _EditKind
    amount: _Amount
    on: bool = True
    words: _Words = ()
    clip: Annotated[Any, OptionalKind(Anything())] = None

    def check(self) -> None:
        _few(self.words)
        kind = KINDS[self.kind]
        if not kind.low <= self.amount <= kind.high:
            raise ValueError(f"amount must be in [{kind.low:g}, {kind.high:g}], got {self.amount:g}")
        if kind.clip != (self.clip is not None):
            raise ValueError(f"{self.kind} must {'have a' if kind.clip else 'have no'} clip")


def run_data(document: Document) -> dict[str, Any]:
    """What a run's file says of a document; `read_run` is the inverse."""
    layers = []
    for layer in document.layers:
        data: dict[str, Any] = {"kind": layer.kind, "amount": layer.amount, "on": layer.on}
        if layer.words:
            data["words"] = [list(word) for word in layer.words]
        if layer.shot is not None:
            data["clip"] = vars(layer.shot)
        layers.append(data)
    assert document.shot is not None
    return {"format": FORMAT, "version": VERSION, "clip": vars(document.shot), "layers": layers}


def read_run(data: Any, new_id: Any) -> Document:
    """The document of a run's file. What else the file tells (the recipe, the machine) is for people.

    Raises:
        RefusedError: it is none, or something in it is wrong.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise RefusedError(f"a run must be a JSON object of format {FORMAT!r} and version {VERSION}")
    layers = data.get("layers")
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
        raise RefusedError(f"layers must be a list of at most {MOST_LAYERS}")
    where = "clip"
    try:
        shot = _of(_Clip, data.get("clip")).shot()
        made = []
        for number, layer in enumerate(layers, 1):
            where = f"layer {number}"
            read = _of(_Layer, layer)
            other = None if read.clip is None else _of(_Clip, read.clip).shot()
            made.append(Layer(new_id(), read.kind, read.amount, read.on, read.words, other))
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedError(_short(f"{where}: {error}")) from None
    return Document(shot, tuple(made))


def _of(cls: type[Any], data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"must be an object, got {type(data).__name__}")
    return cls.from_data(data)


# --- Frames ----------------------------------------------------------------------------------------------------------


def packet(header: Mapping[str, Any], payload: bytes) -> bytes:
    """A header as JSON, its length before it in four bytes, little-endian, and what it describes behind it."""
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    return struct.pack("<I", len(text)) + text + payload
