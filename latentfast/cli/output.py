"""Outputs that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentfast import _output
from latentfast.cli.errors import UserError

__all__ = ["atomic_outputs", "check_file_target"]


def check_file_target(option: str, path: Path) -> None:
    """Refuse a file name whose place is taken by something that is not a plain file (a folder, a device)."""
    if path.exists() and not path.is_file():
        raise UserError(f"{option}: {path} exists and is not a regular file")


@contextmanager
def atomic_outputs(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """`latentfast._output.atomic_outputs`; what can't be written is the caller's to mend."""
    try:
        with _output.atomic_outputs(*targets) as scratch:
            yield scratch
    except _output.OutputError as error:
        raise UserError(str(error)) from error
