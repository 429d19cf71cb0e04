"""Errors of recipes, which name the step."""

from __future__ import annotations

__all__ = ["MissingTensorError", "told"]


class MissingTensorError(ValueError):
    """A recipe names a tensor that is in none of the places where it was looked for.

    Attributes:
        reference: Its name in the recipe.
    """

    def __init__(self, message: str, reference: str) -> None:
        super().__init__(message)
        self.reference = reference


def told(error: Exception, number: int, name: str | None) -> Exception:
    """The error with the step in front: its number, counted from 1, and its edit's name if that is known."""
    text = f"recipe step {number}{f' ({name})' if name else ''}: {error}"
    if isinstance(error, MissingTensorError):
        return MissingTensorError(text, error.reference)
    return TypeError(text) if isinstance(error, TypeError) else ValueError(text)
