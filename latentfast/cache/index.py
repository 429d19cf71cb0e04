"""The index of a folder of entries: what is there, how large, how lately and how often used. SQLite in WAL mode.

It is derived data: the files are the truth, and an index that is lost or broken is made again from them. Finding an
entry does not need it (a file's name is the key's digest); the budget, the order of eviction, listings and the search
for the nearest embedding do. Several processes share it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from latentfast.cache.layout import Header
from latentfast.cache.near import Place

__all__ = ["POLICIES", "Entry", "Index"]

#: Which entries go first. "cost" is GreedyDual-Size-Frequency (Cherkasova 1998): uses x seconds / bytes, to which the
#: credit of the last victim is added on each use, so that what was dear once does not stay for ever.
POLICIES = {"lru": "used", "cost": "credit, used"}

_BUSY_SECONDS = 10.0
# `total` counts the bytes of entries and of files that are being written; triggers keep it, so that it need not be
# summed over all rows at each put.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  digest TEXT PRIMARY KEY, bytes INTEGER NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL,
  used INTEGER NOT NULL, uses INTEGER NOT NULL, credit REAL NOT NULL, description TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
CREATE INDEX IF NOT EXISTS by_credit ON entries (credit, used);
CREATE TABLE IF NOT EXISTS writing (
  ticket TEXT PRIMARY KEY, digest TEXT NOT NULL, bytes INTEGER NOT NULL, writer TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS places (
  id INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE, scope TEXT NOT NULL, sigma REAL NOT NULL,
  embedding BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_scope ON places (scope);
CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO numbers VALUES ('total', 0), ('age', 0);
CREATE TRIGGER IF NOT EXISTS entry_in AFTER INSERT ON entries
  BEGIN UPDATE numbers SET value = value + new.bytes WHERE name = 'total'; END;
CREATE TRIGGER IF NOT EXISTS entry_out AFTER DELETE ON entries BEGIN
  UPDATE numbers SET value = value - old.bytes WHERE name = 'total';
  DELETE FROM places WHERE digest = old.digest;
END;
CREATE TRIGGER IF NOT EXISTS writing_in AFTER INSERT ON writing
  BEGIN UPDATE numbers SET value = value + new.bytes WHERE name = 'total'; END;
CREATE TRIGGER IF NOT EXISTS writing_out AFTER DELETE ON writing
  BEGIN UPDATE numbers SET value = value - old.bytes WHERE name = 'total'; END;
"""


@dataclass(frozen=True)
class Entry:
    """What the index says of an entry.

    Attributes:
        digest: the key's.
        bytes: the file's size.
        seconds: what it cost to make.
        created: when, seconds since 1970.
        uses: how often it was put or found, as far as the processes told.
        description: the key's, canonical JSON.
    """

    digest: str
    bytes: int
    seconds: float
    created: float
    uses: int
    description: str


class Index:
    """One process's connection; its methods may be called from any thread. They raise `sqlite3.Error`.

    Args:
        path: the database's file.
        policy: a name in `POLICIES`.
    """

    def __init__(self, path: Path, policy: str) -> None:
        self._order = POLICIES[policy]
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self._patiently("PRAGMA journal_mode=WAL")
            # the files are synced, not the index: what it loses is found again in them
            self._db.execute("PRAGMA synchronous=OFF")
            with self._transaction():
                for statement in _statements(_SCHEMA):
                    self._db.execute(statement)
        except BaseException:
            self._db.close()
            raise

    def _patiently(self, statement: str) -> None:
        # A change of the journal's mode does not wait for a lock of its own accord.
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._db.close()

    def total(self) -> int:
        """Bytes of all files, those that are being written included."""
        with self._lock:
            return self._total()

    def _total(self) -> int:
        return int(self._db.execute("SELECT value FROM numbers WHERE name = 'total'").fetchone()[0])

    def count(self) -> int:
        """How many entries there are."""
        with self._lock:
            return self._db.execute("SELECT count(*) FROM entries").fetchone()[0]

    def entries(self) -> list[Entry]:
        """All entries, the one that would go last first."""
        down = ", ".join(f"{column} DESC" for column in self._order.split(", "))
        with self._lock:
            rows = self._db.execute(
                f"SELECT digest, bytes, seconds, created, uses, description FROM entries ORDER BY {down}"
            ).fetchall()
        return [Entry(*row) for row in rows]

    def digests(self) -> set[str]:
        """The names of all entries."""
        with self._lock:
            return {digest for (digest,) in self._db.execute("SELECT digest FROM entries")}

    def reserve(
        self, ticket: str, digest: str, nbytes: int, writer: str, budget: int, remove: Callable[[str], None]
    ) -> tuple[bool, int]:
        """Count a file that is going to be written, and make room for it.

        Args:
            ticket: names the file until it is an entry.
            digest: of the entry that it will be.
            nbytes: its size.
            writer: who writes it.
            budget: what all files together may have.
            remove: removes the file of an entry that goes.

        Returns:
            (whether there is room, how many entries went). Without room nothing is counted.
        """
        with self._transaction():
            fits, gone = self._evict(budget - nbytes, remove)
            if fits:
                self._db.execute("INSERT INTO writing VALUES (?, ?, ?, ?)", (ticket, digest, nbytes, writer))
            return fits, gone

    def shrink(self, budget: int, remove: Callable[[str], None]) -> int:
        """Let entries go until all files together have at most ``budget`` bytes; how many went."""
        with self._transaction():
            return self._evict(budget, remove)[1]

    def _evict(self, budget: int, remove: Callable[[str], None]) -> tuple[bool, int]:
        gone = 0
        while self._total() > budget:
            victim = self._db.execute(f"SELECT digest, credit FROM entries ORDER BY {self._order} LIMIT 1").fetchone()
            if victim is None:
                return False, gone
            # The file first: a row without a file is put right later, a file without a row would not be counted.
            remove(victim[0])
            self._db.execute("DELETE FROM entries WHERE digest = ?", victim[:1])
            self._db.execute("UPDATE numbers SET value = max(value, ?) WHERE name = 'age'", victim[1:])
            gone += 1
        return True, gone

    def commit(self, finished: Iterable[tuple[str, Header]], publish: Callable[[str], None]) -> None:
        """Let files by their tickets become entries.

        They appear inside the transaction: what removes files does so inside one too, so that a file which appears
        while another process lets its predecessor go is not taken for it.
        """
        with self._transaction():
            for ticket, header in finished:
                publish(ticket)
                self._db.execute("DELETE FROM writing WHERE ticket = ?", (ticket,))
                self._add(header)

    def release(self, tickets: Iterable[str]) -> None:
        """Files by their tickets will not become entries."""
        with self._transaction():
            self._db.executemany("DELETE FROM writing WHERE ticket = ?", [(ticket,) for ticket in tickets])

    def adopt(self, headers: Iterable[Header]) -> None:
        """Entries that were found as files, of which nothing is known or something else."""
        with self._transaction():
            for header in headers:
                row = self._db.execute("SELECT bytes FROM entries WHERE digest = ?", (header.key.digest,)).fetchone()
                if row is None or row[0] != header.file_bytes:
                    self._add(header)

    def forget(self, digests: Iterable[str], is_gone: Callable[[str], bool]) -> None:
        """Entries whose files are gone, or are made to go by ``is_gone``, which says so."""
        with self._transaction():
            gone = [(digest,) for digest in digests if is_gone(digest)]
            self._db.executemany("DELETE FROM entries WHERE digest = ?", gone)

    def _add(self, header: Header) -> None:
        digest = header.key.digest
        self._db.execute("DELETE FROM entries WHERE digest = ?", (digest,))
        self._db.execute(
            "INSERT INTO entries SELECT ?, ?, ?, ?, ifnull(max(used), 0) + 1, 0, 0, ? FROM entries",
            (digest, header.file_bytes, header.seconds, header.created, header.key.canonical),
        )
        self._use(digest, 1)
        if (place := Place.from_notes(header.notes)) is not None:
            self._db.execute(
                "INSERT OR REPLACE INTO places (digest, scope, sigma, embedding) VALUES (?, ?, ?, ?)",
                (digest, place.scope, place.sigma, place.embedding),
            )

    def touch(self, uses: Mapping[str, int]) -> None:
        """Entries that were found and how often, in the order in which they last were."""
        with self._transaction():
            for digest, times in uses.items():
                self._use(digest, times)

    def _use(self, digest: str, times: int) -> None:
        self._db.execute(
            "UPDATE entries SET used = (SELECT max(used) FROM entries) + 1, uses = uses + ?, credit = "
            "(SELECT value FROM numbers WHERE name = 'age') + (uses + ?) * seconds / max(bytes, 1) WHERE digest = ?",
            (times, times, digest),
        )

    def writers(self) -> set[str]:
        """Who has reserved room."""
        with self._lock:
            return {writer for (writer,) in self._db.execute("SELECT DISTINCT writer FROM writing")}

    def bury(self, writer: str) -> set[str]:
        """Give back what a writer that is no more had reserved; the digests of what it was writing."""
        with self._transaction():
            rows = self._db.execute("SELECT digest FROM writing WHERE writer = ?", (writer,)).fetchall()
            self._db.execute("DELETE FROM writing WHERE writer = ?", (writer,))
            return {digest for (digest,) in rows}

    def being_written(self) -> set[str]:
        """Digests of the entries that are being written."""
        with self._lock:
            return {digest for (digest,) in self._db.execute("SELECT digest FROM writing")}

    def places(self, scope: str, after: int) -> list[tuple[int, str, float, bytes]]:
        """(id, digest, sigma, embedding) of a scope's embeddings with larger ids."""
        with self._lock:
            return self._db.execute(
                "SELECT id, digest, sigma, embedding FROM places WHERE scope = ? AND id > ? ORDER BY id", (scope, after)
            ).fetchall()


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
