"""Who is alive: each process that writes holds a lock on a file of its own, and the kernel opens it when it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Writer", "alone", "dead_writers", "is_dead"]

_SUFFIX = ".lock"


def _try_lock(path: Path, flags: int) -> int | None:
    """The file, locked; None if somebody else holds it."""
    file = os.open(path, flags, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return file


class Writer:
    """A writer's name, which counts as alive until `close` or the end of the process, however it comes.

    Args:
        folder: where the writers' locks are.
    """

    def __init__(self, folder: Path) -> None:
        while True:
            self.name = uuid.uuid4().hex
            self._path = folder / f"{self.name}{_SUFFIX}"
            file = _try_lock(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            # Between making and locking the file somebody may have taken it for a dead writer's.
            if file is None:
                continue
            with suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(file).st_ino:
                    self._file = file
                    return
            os.close(file)

    def close(self) -> None:
        """The writer is no more."""
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)


def is_dead(folder: Path, name: str) -> bool:
    """Whether nobody holds this writer's lock; its file is removed then."""
    path = folder / f"{name}{_SUFFIX}"
    try:
        file = _try_lock(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    if file is None:
        return False
    with suppress(FileNotFoundError):
        path.unlink()
    os.close(file)
    return True


def dead_writers(folder: Path, names: Iterator[str] | set[str]) -> set[str]:
    """Of these writers and those that have left a lock's file, the dead ones."""
    left = {path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}")}
    return {name for name in left | set(names) if is_dead(folder, name)}


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether this process is the only one inside, for as long as it is."""
    file = _try_lock(path, os.O_RDWR | os.O_CREAT)
    try:
        yield file is not None
    finally:
        if file is not None:
            os.close(file)
