"""One entry, one file: written whole or not at all, read only if its checksum is right."""

from __future__ import annotations

import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path

from torch import Tensor

from latentfast.cache.digest import by_chunks, bytes_of, checksum_of, submit
from latentfast.cache.layout import CHECKSUM_AT, CorruptError, Header

__all__ = ["Reader", "Unfinished", "sync_folder"]

_FIRST_READ = 16 << 10  # most headers are shorter, so that one call reads them


def _write_all(file: int, data: memoryview | bytes, at: int) -> None:
    """All of it, or an OSError: a write may end early, on a full disk for one."""
    data = memoryview(data)
    while len(data):
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


def _read_all(file: int, into: memoryview, at: int) -> None:
    while len(into):
        count = os.preadv(file, [into], at)
        if count == 0:
            raise CorruptError("it ends too early")
        into, at = into[count:], at + count


@cache
def _syncers() -> ThreadPoolExecutor:
    """Threads that wait for the disk, apart from those that compute."""
    return ThreadPoolExecutor(4, thread_name_prefix="latentfast-cache-sync")


os.register_at_fork(after_in_child=_syncers.cache_clear)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


class Unfinished:
    """A file that is not an entry yet: `fill`, `sync`, then `publish`, or `drop`.

    Args:
        temporary: where it is written, in the folder where it will stand.
        header: of the entry.
    """

    def __init__(self, temporary: Path, header: Header) -> None:
        self.temporary, self.header = temporary, header
        self._file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._synced: Future[None] | None = None

    def fill(self, buffer: Tensor) -> None:
        """Write the tensors' bytes (uint8, on the CPU), hashing them on their way, then the header."""
        start = len(self.header.raw)

        def hash_and_write(chunk: memoryview, at: int) -> bytes:
            digest = checksum_of(chunk)
            _write_all(self._file, chunk, start + at)
            return digest

        chunks = by_chunks(bytes_of(buffer)[: self.header.layout.nbytes], hash_and_write)
        raw = self.header.raw
        found = self.header.sum(chunks).encode()
        _write_all(self._file, raw[:CHECKSUM_AT] + found + raw[CHECKSUM_AT + 64 :], 0)

        # The disk begins at once, while the next file is hashed.
        self._synced = submit(_syncers(), os.fsync, self._file)

    def sync(self) -> None:
        """Wait until the bytes are on the disk."""
        if self._synced is not None:
            self._synced.result()

    def publish(self, path: Path) -> None:
        """Let it appear. The name is durable after `sync_folder`."""
        os.close(self._file)
        self._file = -1
        os.replace(self.temporary, path)

    def drop(self) -> None:
        """Remove what was written, unless it was published."""
        if self._file >= 0:
            if self._synced is not None:
                wait([self._synced])  # the number of a closed file may be another file's
            os.close(self._file)
            self._file = -1
        with suppress(OSError):
            self.temporary.unlink()


class Reader:
    """An open file: the same file to its end, whatever happens to its name.

    Raises:
        OSError: it can't be opened (`FileNotFoundError`: it is not there).
    """

    def __init__(self, path: Path) -> None:
        # without O_NONBLOCK a pipe of that name would be waited for
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def identity(self) -> tuple[int, int]:
        """Device and inode: which file the bytes are from."""
        status = os.fstat(self._file)
        return status.st_dev, status.st_ino

    def header(self) -> Header:
        """The file's header; the tensors are unread and the checksum is unverified.

        Raises:
            CorruptError: it is no entry.
        """
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptError("it is not a regular file")
        start = os.pread(self._file, _FIRST_READ, 0)
        length = Header.length(start, status.st_size)
        raw = start[:length]
        if length > len(start):
            rest = bytearray(length - len(start))
            _read_all(self._file, memoryview(rest), len(start))
            raw += bytes(rest)
        return Header.parse(raw, status.st_size)

    def fill(self, header: Header, buffer: Tensor) -> None:
        """Read the tensors into a buffer (uint8, on the CPU) and check them.

        Raises:
            CorruptError: the checksum is another one; what stands in the buffer is worth nothing.
        """
        start = len(header.raw)

        def read_and_hash(chunk: memoryview, at: int) -> bytes:
            _read_all(self._file, chunk, start + at)
            return checksum_of(chunk)

        chunks = by_chunks(bytes_of(buffer)[: header.layout.nbytes], read_and_hash)
        if header.sum(chunks) != header.checksum:
            raise CorruptError("its checksum is wrong")
