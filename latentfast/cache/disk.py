"""The disk tier: a folder of entries that several processes share and that outlives all of them.

    FOLDER/entries/DIGEST.safetensors   the entries; what is being written has a name that begins with a dot
    FOLDER/quarantine/                  files that were no whole entries, the latest few
    FOLDER/writers/                     a locked file for each process that writes
    FOLDER/index.sqlite                 see `index`

Nothing here raises for what a disk may do: what can't be read is a miss, what can't be written is not there later, and
a warning says so once.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentfast.cache.digest import checksum_of
from latentfast.cache.files import Reader, Unfinished, sync_folder
from latentfast.cache.index import Entry, Index
from latentfast.cache.key import Key
from latentfast.cache.layout import CorruptError, Header
from latentfast.cache.locks import Writer, alone, dead_writers

__all__ = ["Disk", "Verified"]

logger = logging.getLogger("latentfast.cache")

_SUFFIX, _UNFINISHED = ".safetensors", ".tmp"
_KEPT_IN_QUARANTINE = 16
#: How long a file waits for the room that other processes have reserved.
_ROOM_SECONDS = 30.0


@dataclass(frozen=True)
class Verified:
    """What `Disk.verify` found.

    Attributes:
        good: how many entries are whole.
        bad: what the others were, by file name; they are in the quarantine now.
    """

    good: int
    bad: dict[str, str]


def _buffer(header: Header) -> Tensor:
    return torch.empty(header.layout.nbytes, dtype=torch.uint8)


class Disk:
    """A folder of entries.

    Args:
        path: the folder; made if it is not there.
        budget: the most bytes that its entries may have, together with what is being written.
        policy: "lru" or "cost", which entries go when there is no room.

    Raises:
        ImportError: the package that makes checksums is not there.
    """

    def __init__(self, path: Path, budget: int, policy: str) -> None:
        checksum_of(b"")  # says now if it can't be made
        self.path, self.budget, self.policy = path, budget, policy
        self._entries, self._quarantine = path / "entries", path / "quarantine"
        self._writers = path / "writers"
        self._index_path = path / "index.sqlite"
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._condemned: set[tuple[int, int]] = set()  # bad files that could not be moved away
        self._touched: dict[str, int] = {}
        self._process = os.getpid()
        self._numbers = itertools.count()
        self._why = ""  # the latest reason for the quarantine
        self.evictions = self.quarantined = self.failures = 0
        self._writer: Writer | None = None
        self._index: Index | None = None
        try:
            for folder in (self._entries, self._quarantine, self._writers):
                folder.mkdir(parents=True, exist_ok=True)
            self._writer = Writer(self._writers)
            self._index = self._open_index()
            self._sweep()
        except (OSError, sqlite3.Error) as error:
            self._warn("open", f"{path} can't be written ({error}): entries are read from it, none are added")
            self._retire()

    def _retire(self) -> None:
        for part in (self._index, self._writer):
            if part is not None:
                part.close()
        self._index = self._writer = None

    def close(self) -> None:
        """Tell the index what was used, and leave."""
        if os.getpid() != self._process:  # forked: the connection and the lock are the parent's
            return
        self._tell()
        self._retire()

    @property
    def writable(self) -> bool:
        """Whether entries can be added."""
        return self._index is not None

    def _warn(self, kind: str, text: str) -> None:
        """Say something, but each kind once: a full disk is met at every step."""
        with self._lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        logger.warning("latent cache: %s", text)

    def _file(self, digest: str) -> Path:
        return self._entries / f"{digest}{_SUFFIX}"

    # -- reading ---------------------------------------------------------------------------------------------------

    def __contains__(self, digest: str) -> bool:
        return self._file(digest).is_file()

    def load(self, key: Key, room: Callable[[Header], Tensor]) -> tuple[Header, Tensor] | None:
        """An entry's header and its bytes, checked, in the memory that ``room(header)`` gives; None for a miss."""
        found = self._read(key.digest, room)
        if found is None:
            return None
        if found[0].key.canonical != key.canonical:  # no two texts with one SHA-256 are known
            self._warn("collision", f"{key.digest} is the digest of two descriptions")
            return None
        self.touch(key.digest)
        return found

    def touch(self, digest: str) -> None:
        """Note that an entry was found, here or in memory; the index is told with the next write."""
        with self._lock:
            self._touched[digest] = self._touched.pop(digest, 0) + 1  # taken out, so that the latest stands last

    def header(self, digest: str) -> Header | None:
        """An entry's header, the tensors unread and nothing verified; None if there is none."""
        try:
            with Reader(self._file(digest)) as reader:
                return reader.header()
        except (OSError, CorruptError):
            return None

    def _read(self, digest: str, room: Callable[[Header], Tensor]) -> tuple[Header, Tensor] | None:
        path = self._file(digest)
        try:
            with Reader(path) as reader:
                identity = reader.identity()
                if identity in self._condemned:
                    return None
                try:
                    header = reader.header()
                    if header.key.digest != digest:
                        raise CorruptError("its name is another entry's")
                    buffer = room(header)
                    reader.fill(header, buffer)
                except CorruptError as error:
                    self._condemn(path, identity, str(error))
                    return None
                return header, buffer
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", f"{path} can't be read: {error}")
            return None

    def _condemn(self, path: Path, identity: tuple[int, int], why: str) -> None:
        """Put a file into the quarantine, unless another has taken its place."""
        logger.warning("latent cache: %s goes into quarantine: %s", path, why)
        self.quarantined += 1
        self._why = why

        def move(_: str) -> bool:
            try:
                status = os.stat(path)
                if (status.st_dev, status.st_ino) != identity:
                    return False
                os.replace(path, self._quarantine / f"{time.time_ns()}-{path.name}")
            except FileNotFoundError:
                return True
            return True

        try:
            if self._index is None:
                move("")
            else:
                self._index.forget([path.name.removesuffix(_SUFFIX)], move)
            for old in sorted(self._quarantine.iterdir())[:-_KEPT_IN_QUARANTINE]:
                old.unlink(missing_ok=True)
        except (OSError, sqlite3.Error):
            self._condemned.add(identity)

    # -- writing ---------------------------------------------------------------------------------------------------

    def store(self, jobs: Sequence[tuple[Header, Tensor]]) -> list[bool]:
        """Write entries as one group: when this returns, those that say True are on the disk and will stay there.

        Args:
            jobs: each entry's header and its bytes.
        """
        done = [False] * len(jobs)
        waiting = list(range(len(jobs)))
        end = time.monotonic() + _ROOM_SECONDS
        while waiting and self._index is not None:
            try:
                self._tell()
                group, refused = self._begin(self._index, jobs, waiting)
                for i in self._finish(self._index, group):
                    done[i] = True
            except (OSError, sqlite3.Error) as error:
                self._failed(error, len(waiting))
                self._mend(error)
                break
            if refused and not group:
                if time.monotonic() > end:
                    self._failed(TimeoutError("other writers have taken the room"), len(refused))
                    break
                time.sleep(0.02)
                self._sweep_quietly()
            waiting = refused
        return done

    def _failed(self, error: Exception, count: int) -> None:
        self.failures += count
        self._warn("write", f"{self.path} can't take an entry ({error}): it is kept in memory at most")

    def _begin(
        self, index: Index, jobs: Sequence[tuple[Header, Tensor]], waiting: list[int]
    ) -> tuple[list[tuple[int, Unfinished]], list[int]]:
        """Write the files of as many entries as there is room for; (those, the entries for which there was none)."""
        if self._writer is None:
            return [], []
        group: list[tuple[int, Unfinished]] = []
        refused: list[int] = []
        for i in waiting:
            header, buffer = jobs[i]
            if header.file_bytes > self.budget:
                self._warn("large", f"an entry of {header.file_bytes} bytes is larger than disk_bytes={self.budget}")
                self.failures += 1
                continue
            ticket = f".{header.key.digest}.{self._writer.name}.{next(self._numbers)}{_UNFINISHED}"
            fits, gone = index.reserve(
                ticket, header.key.digest, header.file_bytes, self._writer.name, self.budget, self._remove
            )
            self.evictions += gone
            if not fits:
                refused.append(i)
                continue
            file = None
            try:
                file = Unfinished(self._entries / ticket, header)
                file.fill(buffer)
                group.append((i, file))
            except OSError as error:
                self._drop(index, file, ticket, error)
        return group, refused

    def _drop(self, index: Index, file: Unfinished | None, ticket: str, error: Exception) -> None:
        if file is not None:
            file.drop()
        index.release([ticket])
        self._failed(error, 1)

    def _finish(self, index: Index, group: list[tuple[int, Unfinished]]) -> list[int]:
        """Sync a group's files and let them appear; the numbers of those that did."""

        whole: dict[str, tuple[int, Unfinished]] = {}
        try:
            for i, file in group:
                try:
                    file.sync()
                    whole[file.temporary.name] = (i, file)
                except OSError as error:  # of this file alone
                    self._drop(index, file, file.temporary.name, error)
            if not whole:
                return []

            def publish(ticket: str) -> None:
                file = whole[ticket][1]
                file.publish(self._file(file.header.key.digest))

            index.commit([(ticket, file.header) for ticket, (_, file) in whole.items()], publish)
            sync_folder(self._entries)
            return [i for i, _ in whole.values()]
        except BaseException:
            for _, file in group:
                file.drop()
            with suppress(sqlite3.Error):
                index.release([file.temporary.name for _, file in group])
            # Some may have appeared, of which the index has taken back what it knew.
            self._sweep_quietly({file.header.key.digest for _, file in group})
            raise

    def _remove(self, digest: str) -> None:
        with suppress(FileNotFoundError):
            self._file(digest).unlink()

    def _tell(self) -> None:
        """Tell the index which entries were used."""
        with self._lock:
            touched, self._touched = self._touched, {}
        if touched and self._index is not None:
            try:
                self._index.touch(touched)
            except sqlite3.Error as error:
                self._warn("touch", f"the index of {self.path} does not take notes: {error}")

    # -- order in the folder ---------------------------------------------------------------------------------------

    def _open_index(self) -> Index:
        try:
            return Index(self._index_path, self.policy)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            return self._new_index(error)

    def _new_index(self, error: Exception) -> Index:
        """Put a broken index away and make one from the files."""
        self._warn("index", f"the index of {self.path} is broken ({error}) and is made again from its files")
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.replace(f"{self._index_path}{suffix}", self._quarantine / f"{time.time_ns()}-index.sqlite{suffix}")
        return Index(self._index_path, self.policy)

    def _mend(self, error: Exception) -> None:
        """After a failure: a broken index is replaced; a full disk or a busy database may have gone by next time."""
        if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, sqlite3.OperationalError):
            return
        try:
            if self._index is not None:
                self._index.close()
            self._index = self._new_index(error)
            self._sweep()
        except (OSError, sqlite3.Error) as again:
            self._warn("open", f"{self.path} can't be written any more ({again})")
            self._retire()

    def _sweep_quietly(self, unsure: Iterable[str] = ()) -> None:
        with suppress(OSError, sqlite3.Error):
            self._sweep(unsure)

    def _sweep(self, unsure: Iterable[str] = ()) -> None:
        """Remove what dead writers left, and let the index agree with the files. One process at a time does it.

        Of the entries in ``unsure`` the index may know another size than the files have.
        """
        if self._index is None or self._writer is None:
            return
        with alone(self.path / "sweep.lock") as is_alone:
            if not is_alone:
                return
            names = os.listdir(self._entries)
            unfinished = {name: name.split(".")[-3] for name in names if name.endswith(_UNFINISHED)}
            writers = set(unfinished.values()) | self._index.writers()
            dead = dead_writers(self._writers, writers - {self._writer.name})
            for name, writer in unfinished.items():
                if writer in dead:
                    (self._entries / name).unlink(missing_ok=True)
            # A writer may have died between letting a file appear and saying so.
            unsure = set(unsure).union(*(self._index.bury(writer) for writer in dead))
            there = {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)}
            # In this order: what is published in the meantime is in one of the two.
            known = self._index.being_written()
            known |= self._index.digests()
            new = (there - known) | (there & unsure)
            self._index.adopt([header for digest in new if (header := self._adoptable(digest)) is not None])
            self._index.forget(known - there, lambda digest: not self._file(digest).exists())

    def _adoptable(self, digest: str) -> Header | None:
        path = self._file(digest)
        try:
            with Reader(path) as reader:
                identity = reader.identity()
                try:
                    header = reader.header()
                    if header.key.digest != digest:
                        raise CorruptError("its name is another entry's")
                    return header
                except CorruptError as error:
                    self._condemn(path, identity, str(error))
        except OSError as error:
            if error.errno != errno.ENOENT:
                self._warn("read", f"{path} can't be read: {error}")
        return None

    # -- for people ------------------------------------------------------------------------------------------------

    def total(self) -> tuple[int, int]:
        """(entries, their bytes with those of what is being written)."""
        if self._index is not None:
            with suppress(sqlite3.Error):
                return self._index.count(), self._index.total()
        found = self.entries()
        return len(found), sum(entry.bytes for entry in found)

    def entries(self) -> list[Entry]:
        """All entries, the one that would go last first."""
        self._tell()
        if self._index is not None:
            with suppress(sqlite3.Error):
                return self._index.entries()
        found = []
        for path in sorted(self._entries.glob(f"*{_SUFFIX}")) if self._entries.is_dir() else ():
            if (header := self.header(path.name.removesuffix(_SUFFIX))) is not None:
                key = header.key
                found.append(Entry(key.digest, header.file_bytes, header.seconds, header.created, 0, key.canonical))
        return sorted(found, key=lambda entry: -entry.created)

    def verify(self) -> Verified:
        """Read every entry and check it; what is not whole goes into quarantine."""
        self._sweep_quietly()
        good, bad = 0, {}
        for path in sorted(self._entries.glob(f"*{_SUFFIX}")) if self._entries.is_dir() else ():
            before = self.quarantined
            if self._read(path.name.removesuffix(_SUFFIX), _buffer) is not None:
                good += 1
            elif self.quarantined > before:
                bad[path.name] = self._why
            elif path.exists():
                bad[path.name] = "it can't be read"
        return Verified(good, bad)

    def shrink(self, nbytes: int) -> int:
        """Let entries go until the rest has at most ``nbytes``; how many went."""
        if self._index is None:
            return 0
        self._tell()
        self._sweep_quietly()
        gone = self._index.shrink(nbytes, self._remove)
        self.evictions += gone
        return gone

    @property
    def index(self) -> Index | None:
        """The index, if there is one."""
        return self._index
