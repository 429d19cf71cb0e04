"""The nearest prompt: cosines of all embeddings of a scope by one product of matrix and vector, and one top-k."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentfast.cache.index import Index
from latentfast.cache.key import Key
from latentfast.cache.near import Place, unit_vector

__all__ = ["Approximate", "Neighbours"]

_CANDIDATES = 8  # read from the device at once; the second is wanted only if the first's file has gone


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
class _Table:
    """A scope's embeddings, row by row, on the device of the last search."""

    entries: list[Key | str] = field(default_factory=list)  # the digest, where only the index knows the entry
    sigmas: list[float] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)  # rows that are not in `matrix` yet
    matrix: Tensor | None = None
    levels: Tensor | None = None
    last_id: int = 0

    def digests(self) -> set[str]:
        return {entry.digest if isinstance(entry, Key) else entry for entry in self.entries}

    def append(self, entry: Key | str, sigma: float, embedding: bytes) -> None:
        self.entries.append(entry)
        self.sigmas.append(sigma)
        self.vectors.append(torch.frombuffer(bytearray(embedding), dtype=torch.float32))

    def on(self, device: torch.device, width: int) -> tuple[Tensor, Tensor]:
        """All rows as a matrix and their noise levels. Rows of another width are zero: similar to nothing."""
        if self.matrix is None or self.levels is None or self.matrix.shape[1] != width:
            self.matrix, self.levels = torch.empty(0, width), torch.empty(0, dtype=torch.float64)
            # the rows are kept on the host as well, which a change of the width needs
        if self.matrix.device != device:
            self.matrix, self.levels = self.matrix.to(device), self.levels.to(device)
        have = len(self.matrix)
        if have < len(self.vectors):
            rows = [row if len(row) == width else torch.zeros(width) for row in self.vectors[have:]]
            self.matrix = torch.cat([self.matrix, torch.stack(rows).to(device)])
            new = torch.tensor(self.sigmas[have:], dtype=torch.float64)
            self.levels = torch.cat([self.levels, new.to(device)])
        return self.matrix, self.levels

    def remove(self, digest: str) -> None:
        for i, entry in enumerate(self.entries):
            if (entry.digest if isinstance(entry, Key) else entry) == digest:
                del self.entries[i], self.sigmas[i], self.vectors[i]
                self.matrix = self.levels = None
                return


class Neighbours:
    """The embeddings that this process put, and those that the index knows, by scope."""

    def __init__(self) -> None:
        self._tables: dict[str, _Table] = {}
        self._lock = threading.Lock()

    def add(self, key: Key, place: Place) -> None:
        """An entry has been put."""
        with self._lock:
            table = self._tables.setdefault(place.scope, _Table())
            table.remove(key.digest)
            table.append(key, place.sigma, place.embedding)

    def remove(self, scope: str, digest: str) -> None:
        """An entry is gone."""
        with self._lock:
            if scope in self._tables:
                self._tables[scope].remove(digest)

    def search(
        self, index: Index | None, scope: str, embedding: Tensor, sigma: float, tolerance: float
    ) -> Iterator[tuple[Key | str, float, float]]:
        """(key or digest, cosine, sigma) of the nearest entries at this noise level, the nearest first."""
        query = unit_vector(embedding)
        with self._lock:
            table = self._tables.setdefault(scope, _Table())
            if index is not None:
                with suppress(sqlite3.Error):
                    known = table.digests()
                    for row, digest, level, vector in index.places(scope, table.last_id):
                        if digest not in known:
                            table.append(digest, level, vector)
                        table.last_id = row
            if not table.entries:
                return
            matrix, levels = table.on(query.device, len(query))
            cosines = torch.mv(matrix, query)
            cosines = cosines.masked_fill((levels - sigma).abs() > tolerance * abs(sigma), -torch.inf)
            best = torch.topk(cosines, min(_CANDIDATES, len(table.entries)))
            found = [
                (table.entries[i], value, table.sigmas[i])
                for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if value > -torch.inf
            ]
        yield from found
