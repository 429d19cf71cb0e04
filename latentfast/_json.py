"""JSON from outside, without what Python's own reader lets through."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["strict_json"]


def strict_json(text: str | bytes, what: str, no_number: str) -> Any:
    """Read JSON in which no name of an object stands twice and all numbers are finite.

    Args:
        text: the JSON.
        what: it must be, for errors: "a recipe".
        no_number: what is said of NaN and the infinities: "is no number".

    Raises:
        ValueError: it is no such JSON, in one sentence.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} {no_number}")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError(f"{what} must be JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} must be JSON: {error}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name!r} stands there twice")
        made[name] = value
    return made
