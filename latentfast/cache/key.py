"""What an entry is found by: a description of how it was made, in one canonical form, and that form's SHA-256."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Key"]


@dataclass(frozen=True, slots=True)
class Key:
    """The content address of an entry. Made by :meth:`of`; two keys are equal if their descriptions are.

    Attributes:
        canonical: the description as JSON in its one canonical form.
        digest: SHA-256 of that text, 64 hexadecimal digits: the entry's name.
    """

    canonical: str
    digest: str

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Key:
        """The key of a description.

        Canonical means: names sorted, no spaces, ASCII, floats by ``repr`` (so 1 and 1.0 differ, and each float64 has a
        text of its own). What would be written alike though it differs is refused: names that are not text, NaN and
        infinities, and everything that JSON does not have. A tuple is a list.

        Args:
            description: everything that the value depends on, as JSON has it: text, numbers, true, false, None, lists
                and mappings. Tensors and modules enter by :func:`latentfast.cache.digest_tensor` and
                :func:`latentfast.cache.digest_module`, the surroundings by :func:`latentfast.cache.environment`.

        Raises:
            TypeError: something in it is not JSON; the message says where.
            ValueError: a number is NaN or infinite.

        Example:
            >>> from latentfast.cache import Key
            >>> key = Key.of({"prompt": "a red circle", "seed": 3, "guidance": 5.0})
            >>> key.canonical
            '{"guidance":5.0,"prompt":"a red circle","seed":3}'
            >>> key.digest[:16]
            '7b565331e6b11219'
        """
        if not isinstance(description, Mapping):
            raise TypeError(f"description: expected a mapping of JSON values, got {type(description).__name__}")
        canonical = json.dumps(
            _plain(description, "description"),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=True,
            allow_nan=False,
        )
        return cls.of_canonical(canonical)

    @classmethod
    def of_canonical(cls, canonical: str) -> Key:
        """The key of a description that is in its canonical form already, as entries store it."""
        return cls(canonical, hashlib.sha256(canonical.encode("ascii")).hexdigest())

    @property
    def description(self) -> dict[str, Any]:
        """The description, a copy."""
        return json.loads(self.canonical)

    def __repr__(self) -> str:
        return f"Key({self.digest[:12]}…)"


def _plain(value: Any, where: str) -> Any:
    """The value with mappings as dicts and sequences as lists; refuses what has no JSON of its own."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: a key takes finite numbers, got {value!r}")
        return float(value)
    if isinstance(value, Mapping):
        for name in value:
            # json would turn the number 1 into the text "1": two descriptions, one key
            if not isinstance(name, str):
                raise TypeError(f"{where}: names must be text, got {name!r} ({type(name).__name__})")
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{where}: a key takes text, numbers, booleans, None, lists and mappings, got {type(value).__name__}; "
        "tensors enter by digest_tensor, modules by digest_module"
    )
