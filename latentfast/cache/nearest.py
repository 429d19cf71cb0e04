"""The nearest prompt: cosines of all embeddings of a scope by one product of matrix and vector, and one top-k."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from latentfast.cache.index import Index
from latentfast.cache.key import Key
from latentfast.cache.near import Place, unit_vector

__all__ = ["Approximate", "Neighbours"]

_CANDIDATES = 8  # read from the device at once; the second is wanted only if the first's file has gone
_MOST = 100_000  # rows of a scope


@dataclass(frozen=True)
class Approximate:
    """An entry that was not asked for, but is near to what was.

    Attributes:
        key: the entry's own.
        similarity: the cosine between the two embeddings.
        sigma: the entry's noise level.
        tensors: the entry's.
    """

    key: Key
    similarity: float
    sigma: float
    tensors: dict[str, Tensor]


@dataclass
class _Row:
    """An embedding; the entry's digest stands for its key where only the index knows the entry."""

    entry: Key | str
    sigma: float
    vector: Tensor


class _Table:
    """A scope's embeddings by their entries' digests, and all of them as a matrix on the device of the last search."""

    def __init__(self) -> None:
        self.rows: dict[str, _Row] = {}
        self.last_id = 0  # of the index's
        self._digests: list[str] = []  # of the matrix's rows
        self._matrix = torch.empty(0, 0)
        self._levels = torch.empty(0, dtype=torch.float64)

    def add(self, entry: Key | str, sigma: float, embedding: bytes) -> None:
        """Of an entry that is new, or has been put again."""
        digest = entry.digest if isinstance(entry, Key) else entry
        vector = torch.frombuffer(bytearray(embedding), dtype=torch.float32)
        old = self.rows.get(digest)
        if old is not None and old.sigma == sigma and torch.equal(old.vector, vector):
            return
        if old is not None:
            self.remove(digest)
        self.rows[digest] = _Row(entry, sigma, vector)
        if len(self.rows) > _MOST:  # entries that went from memory are not told of
            for oldest in list(self.rows)[: _MOST // 10]:
                self.remove(oldest)

    def remove(self, digest: str) -> None:
        """Of an entry that has gone."""
        if self.rows.pop(digest, None) is not None:
            self._digests = []

    def on(self, device: torch.device, width: int) -> tuple[list[_Row], Tensor, Tensor]:
        """The rows, as a matrix ``(N, width)``, and their noise levels; one of another width has none."""
        if not self._digests or self._matrix.shape[1] != width:
            self._digests = []
            self._matrix, self._levels = torch.empty(0, width), torch.empty(0, dtype=torch.float64)
        self._matrix, self._levels = self._matrix.to(device), self._levels.to(device)
        new = list(itertools.islice(self.rows, len(self._digests), None))
        if new:
            rows = [self.rows[digest] for digest in new]
            vectors = torch.stack([row.vector if len(row.vector) == width else torch.zeros(width) for row in rows])
            sigmas = [row.sigma if len(row.vector) == width else torch.inf for row in rows]
            levels = torch.tensor(sigmas, dtype=torch.float64)
            self._matrix = torch.cat([self._matrix, vectors.to(device)])
            self._levels = torch.cat([self._levels, levels.to(device)])
            self._digests += new
        return [self.rows[digest] for digest in self._digests], self._matrix, self._levels


class Neighbours:
    """The embeddings that this process put, and those that the index knows, by scope."""

    def __init__(self) -> None:
        self._tables: dict[str, _Table] = {}
        self._lock = threading.Lock()

    def add(self, key: Key, place: Place) -> None:
        """An entry has been put."""
        with self._lock:
            self._tables.setdefault(place.scope, _Table()).add(key, place.sigma, place.embedding)

    def remove(self, scope: str, digest: str) -> None:
        """An entry is gone."""
        with self._lock:
            if scope in self._tables:
                self._tables[scope].remove(digest)

    def search(
        self, index: Index | None, scope: str, embedding: Tensor, sigma: float, tolerance: float
    ) -> list[tuple[Key | str, float, float]]:
        """(key or digest, cosine, sigma) of the nearest entries at this noise level, the nearest first."""
        query = unit_vector(embedding)
        with self._lock:
            table = self._tables.setdefault(scope, _Table())
            if index is not None:
                with suppress(sqlite3.Error):
                    for row, digest, level, vector in index.places(scope, table.last_id):
                        if digest not in table.rows:
                            table.add(digest, level, vector)
                        table.last_id = row
            if not table.rows:
                return []
            rows, matrix, levels = table.on(query.device, len(query))
            cosines = torch.mv(matrix, query)
            cosines = cosines.masked_fill((levels - sigma).abs() > tolerance * abs(sigma), -torch.inf)
            best = torch.topk(cosines, min(_CANDIDATES, len(rows)))
            return [
                (rows[i].entry, value, rows[i].sigma)
                for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if value > -torch.inf
            ]
