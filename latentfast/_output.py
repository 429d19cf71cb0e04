"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["OutputError", "atomic_outputs"]


class OutputError(OSError):
    """An output that can't be written: its text names the target and the system's reason."""


@contextmanager
def atomic_outputs(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Give a scratch path for each target; rename all of them into place on success, remove them otherwise.

    What is created at a scratch path may be a file or a folder. Nothing shows at a target before the whole block has
    succeeded, and nothing stays after a failure, Ctrl-C included. An existing target is replaced by one of the same
    kind (a file by a file, a folder by a folder).

    Args:
        targets: where the outputs are to be. Missing parent folders are made, at the end.

    Yields:
        A path for each target, with the target's name, on the same file system.

    Raises:
        OutputError: a target can't be written; it names the target and the system's reason.
    """
    resolved = [Path(os.path.realpath(target)) for target in targets]
    with ExitStack() as stack:
        stages = []
        for target in resolved:
            try:
                stage = tempfile.mkdtemp(prefix=f".{target.name}.", dir=_nearest_existing(target))
            except OSError as error:
                raise OutputError(f"cannot write {target}: {error.strerror}") from error
            stack.callback(shutil.rmtree, stage, ignore_errors=True)
            stages.append(Path(stage))
        scratch = tuple(stage / target.name for stage, target in zip(stages, resolved, strict=True))
        try:
            yield scratch
            for path, target in zip(scratch, resolved, strict=True):
                _move_into_place(path, target)
        except OSError as error:
            # A write that fails halfway (a full disk) names no file; one that fails on opening names the scratch path.
            name = str(error.filename or "")
            ours = any(name.startswith(str(stage)) for stage in stages) if name else error.errno is not None
            if not ours:
                raise
            names = ", ".join(str(target) for target in targets)
            raise OutputError(f"cannot write {names}: {error.strerror or error}; nothing was left behind") from error


def _nearest_existing(path: Path) -> Path:
    # lexists: a dangling link is an obstacle too, not a folder still to be made
    return next(parent for parent in path.parents if os.path.lexists(parent))


def _move_into_place(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (path.is_dir() and target.is_dir()):
        os.replace(path, target)
        return
    # A folder can't be renamed onto a full one: step the old one aside, and back if the new one does not arrive.
    old = path.with_name(f"{path.name}.old")
    os.rename(target, old)
    try:
        os.rename(path, target)
    except BaseException:
        os.rename(old, target)
        raise
