"""The cache: memory of the GPUs, memory of the host and a folder, one above the other."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentfast.cache.disk import Disk, Verified
from latentfast.cache.index import POLICIES, Entry
from latentfast.cache.key import Key
from latentfast.cache.layout import Layout
from latentfast.cache.memory import Tier
from latentfast.cache.near import Place
from latentfast.cache.nearest import Approximate, Neighbours
from latentfast.cache.stats import Stats, TierStats
from latentfast.cache.tiers import CPU, Tiers
from latentfast.cache.transfer import as_made, is_capturing

__all__ = ["LatentCache"]


_open: weakref.WeakSet[LatentCache] = weakref.WeakSet()


class LatentCache:
    """Tensors by what they were made from, in up to three tiers: GPU memory, (pinned) host memory, a folder.

    `put` returns when the tensors are copied: in their device's memory, on its stream, without waiting for it. The way
    down, to the host and to the disk, is taken in the background, and `flush` waits for its end. Each tier keeps what
    came through it for as long as its budget allows; a hit in a lower tier brings the entry up again.

    `get` gives tensors of the caller's own, with the bits that were put. What is damaged, foreign or gone is a miss;
    what can't be written is a warning (logger ``latentfast.cache``). Neither ends a run.

    Several processes may use one folder on one machine at once (the index is SQLite in WAL mode, which network file
    systems do not carry). Methods may be called from any thread; a process that forks opens its own cache.

    Args:
        path: the folder, made if it is not there (which needs the extra ``latentfast[cache]``); None: memory only.
        device_bytes: budget of each GPU's memory. 0: nothing stays there; an entry passes through on its way down.
        host_bytes: budget of host memory.
        disk_bytes: budget of the folder, all processes together.
        policy: what goes first when there is no room. "lru": what was not used for longest. "cost": what saves least
            for its bytes: GreedyDual-Size-Frequency on ``seconds``.

    Raises:
        ValueError: a budget is negative, or the policy unknown.
        ImportError: there is a `path`, and no package blake3.

    Example:
        >>> import torch
        >>> from latentfast.cache import Key, LatentCache
        >>> with LatentCache(host_bytes=1 << 20) as cache:
        ...     key = Key.of({"prompt": "a red circle", "seed": 3})
        ...     made = cache.get_or_make(key, lambda: {"latents": torch.ones(4)})
        ...     again = cache.get(key)
        >>> torch.equal(made["latents"], again["latents"])
        True
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        *,
        device_bytes: int = 0,
        host_bytes: int = 4 << 30,
        disk_bytes: int = 64 << 30,
        policy: str = "lru",
    ) -> None:
        for name, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected a number of bytes of at least 0, got {value!r}")
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        self._disk = None if path is None else Disk(Path(path), disk_bytes, policy)
        self._tiers = Tiers(device_bytes, host_bytes, self._disk, policy)
        self._lock = threading.Lock()
        self._making: dict[str, threading.Event] = {}
        self._neighbours = Neighbours()
        self._hits = {"device": 0, "host": 0, "disk": 0}
        self._misses = self._approximate = 0
        self._saved = 0.0
        self._process = os.getpid()
        self._closed = False
        self._finalizer = weakref.finalize(self, _finish, self._tiers, self._disk, self._process)
        self._finalizer.atexit = False
        _open.add(self)

    @property
    def _shut(self) -> bool:
        """Closed, or in a forked child, which has none of the threads and must not use the connection to the index."""
        return self._closed or os.getpid() != self._process

    def __enter__(self) -> LatentCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: Key) -> bool:
        """Whether `get` would very likely find it: in memory, or a file of its name on the disk, unread."""
        if self._shut:
            return False
        with self._tiers.changed:
            if any(tier.find(key) for tier in self._tiers.everywhere()):
                return True
        return self._disk is not None and key.digest in self._disk

    # -- put ---------------------------------------------------------------------------------------------------------

    def put(
        self,
        key: Key,
        tensors: Mapping[str, Tensor],
        *,
        seconds: float = 0.0,
        scope: Key | None = None,
        sigma: float | None = None,
        embedding: Tensor | None = None,
    ) -> None:
        """Keep tensors under a key, in place of those it had.

        They are copied before this returns (on a GPU: in the current stream), so they may be written into afterwards.
        It waits only if what was put before takes up the budgets and is still on its way down. While a CUDA graph is
        captured nothing is kept.

        Args:
            key: describes everything that the tensors depend on.
            tensors: by name, of any shape and of the dtypes that safetensors has; those on one GPU take the way that
                does not stop it, others are copied to the host at once.
            seconds: what it cost to make them: for ``policy="cost"`` and `stats`.
            scope, sigma, embedding: let `nearest` find the entry: see there. All three or none.

        Raises:
            TypeError, ValueError: an argument is not what it must be. Nothing else: what can't be kept is left out.
        """
        _check_key(key)
        layout = Layout.of(tensors)
        if (scope is None, sigma is None, embedding is None) not in ((True,) * 3, (False,) * 3):
            raise ValueError("scope, sigma, embedding: expected all three or none")
        place = None
        if scope is not None and sigma is not None and embedding is not None:
            place = Place.of(_check_key(scope).digest, sigma, embedding)
        seconds = float(seconds)
        self._put(key, layout, tensors, lambda: seconds, place)

    def _put(
        self,
        key: Key,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        seconds: Callable[[], float],
        place: Place | None = None,
    ) -> None:
        if self._shut or is_capturing():
            return
        if place is not None:
            self._neighbours.add(key, place)
        # Buffers outlive the caller's modes: one that was made in inference mode could not be written into later.
        with torch.inference_mode(False), torch.no_grad():
            self._tiers.put(key, layout, tensors, seconds, place)

    # -- get ---------------------------------------------------------------------------------------------------------

    def get(self, key: Key, *, device: str | torch.device | None = None, copy: bool = True) -> dict[str, Tensor] | None:
        """The tensors of a key, with the bits that were put; None if they are not there, or a CUDA graph is captured.

        Args:
            key: what is asked for; the entry's description must be the same, not only its digest.
            device: where the tensors are wanted; None: on the CPU. On a GPU they are ready in the current stream's
                order, and the host does not wait for them.
            copy: False may give the cache's own tensors where they lie on that device already: nobody may write into
                them.

        Returns:
            Contiguous tensors by name, in alphabetical order.
        """
        found = self._get(_check_key(key), _device(device), copy)
        if found is None:
            with self._lock:
                self._misses += 1
        return found

    def _get(self, key: Key, device: torch.device, copy: bool = True, exact: bool = True) -> dict[str, Tensor] | None:
        if self._shut or is_capturing():
            return None
        with torch.inference_mode(False), torch.no_grad():
            found = self._tiers.find(key, device)
            if found is None:
                return None
            try:
                tensors = self._tiers.tensors(found, copy)
            finally:
                found.done()
        with self._lock:
            if exact:
                self._hits[found.where] += 1
                self._saved += found.slot.seconds
            else:
                self._approximate += 1
        return tensors

    def get_or_make(
        self, key: Key, make: Callable[[], Mapping[str, Tensor]], *, device: str | torch.device | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a key; those that ``make()`` gives, which are kept, if they are not there.

        Threads of this process that ask for the same key at the same time make it once; processes may make it twice.
        What making takes is measured (on a GPU to the end of its work, without waiting for that).

        Args:
            key: describes everything that the tensors depend on.
            make: gives the tensors by name; what it raises, this raises.
            device: where they are wanted, as in `get`: also what was made is moved there.
        """
        _check_key(key)
        where = _device(device)
        while True:
            if (found := self._get(key, where)) is not None:
                return found
            with self._lock:
                others = self._making.get(key.digest)
                if others is None:
                    mine = self._making[key.digest] = threading.Event()
                    self._misses += 1
                    break
            others.wait()
        try:
            made, seconds = as_made(make)
            layout = Layout.of(made)
            self._put(key, layout, made, seconds)
        finally:
            with self._lock:
                del self._making[key.digest]
            mine.set()
        return {name: made[name].detach().to(where).contiguous() for name in sorted(made)}

    def prefetch(self, keys: Iterable[Key], *, device: str | torch.device | None = None) -> None:
        """Bring entries up in the background, in this order, into the host's tier, or into a GPU's.

        It stops when what it has brought fills the tier: more would push out what was brought first.
        """
        wanted, where = [_check_key(key) for key in keys], _device(device)
        if not self._shut:
            self._tiers.prefetch(wanted, where)

    # -- approximate -------------------------------------------------------------------------------------------------

    def nearest(
        self,
        embedding: Tensor,
        *,
        scope: Key,
        sigma: float,
        threshold: float,
        sigma_tolerance: float = 1e-3,
        device: str | torch.device | None = None,
    ) -> Approximate | None:
        """The entry of the most similar prompt, if it is similar enough: something else than what was asked for.

        Only entries that were put with a scope, a sigma and an embedding can be found, and `get` never gives them for
        another key. Similarity is the cosine of the embeddings; noise levels are compared, not step numbers. See
        NIRVANA (Agarwal et al. 2024, arXiv:2312.04429) for what such a state can stand in for.

        Args:
            embedding: the prompt's, a vector ``(D,)`` of a floating dtype (pool those of tokens).
            scope: the key of all that must be equal: model, scheduler, shape, dtype, guidance, …
            sigma: the noise level that is wanted.
            threshold: the least cosine, in [-1, 1].
            sigma_tolerance: how far the noise level may be off, as a share of ``sigma``.
            device: where the tensors are wanted, as in `get`.
        """
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold: expected a cosine in [-1, 1], got {threshold!r}")
        if sigma_tolerance < 0:
            raise ValueError(f"sigma_tolerance: expected at least 0, got {sigma_tolerance!r}")
        digest = _check_key(scope).digest
        index = None if self._disk is None else self._disk.index
        while candidates := self._neighbours.search(index, digest, embedding, float(sigma), sigma_tolerance):
            for found, similarity, at in candidates:
                if similarity < threshold:
                    return None
                key = found if isinstance(found, Key) else self._key_of(found)
                tensors = None if key is None else self._get(key, _device(device), exact=False)
                if key is not None and tensors is not None:
                    return Approximate(key, similarity, at, tensors)
                # the entry has gone since
                self._neighbours.remove(digest, found.digest if isinstance(found, Key) else found)
        return None

    def _key_of(self, digest: str) -> Key | None:
        header = None if self._disk is None else self._disk.header(digest)
        return None if header is None else header.key

    # -- keeping house -----------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Wait until everything that was put is where it will stay; whether all of it was kept since the last flush.

        With a folder, True means that every entry is on the disk: synced, under its name.
        """
        return True if self._shut else self._tiers.flush()

    def close(self) -> None:
        """Finish what is on its way and give the memory back; the folder stays. Gets are misses afterwards."""
        if self._shut:
            return
        self._closed = True
        self._finalizer.detach()
        _close(self._tiers, self._disk)

    def stats(self) -> Stats:
        """What was found, missed, held and let go so far, in this process."""
        disk, tiers = self._disk, self._tiers
        on_disk = TierStats(self._hits["disk"], 0, 0, 0, 0)
        if disk is not None:
            on_disk = TierStats(self._hits["disk"], *disk.total(), disk.budget, disk.evictions)
        with tiers.changed, self._lock:
            return Stats(
                hits=sum(self._hits.values()),
                approximate=self._approximate,
                misses=self._misses,
                seconds_saved=self._saved,
                device=_of(list(tiers.devices.values()), self._hits["device"], tiers.device_bytes),
                host=_of([tiers.host], self._hits["host"], tiers.host.budget),
                disk=on_disk,
                pending=tiers.pending,
                quarantined=disk.quarantined if disk else 0,
                failures=disk.failures if disk else 0,
            )

    def entries(self) -> list[Entry]:
        """What the folder holds, the entry that would go last first; nothing without a folder."""
        return [] if self._disk is None else self._disk.entries()

    def verify(self) -> Verified:
        """Read and check every entry of the folder; those that are not whole go into quarantine."""
        return Verified(0, {}) if self._disk is None else self._disk.verify()

    def prune(self, nbytes: int) -> int:
        """Let entries of the folder go, by the policy, until at most ``nbytes`` are left; how many went."""
        if nbytes < 0:
            raise ValueError(f"nbytes: expected at least 0, got {nbytes!r}")
        return 0 if self._disk is None else self._disk.shrink(nbytes)


def _of(tiers: list[Tier], hits: int, budget: int) -> TierStats:
    return TierStats(
        hits,
        sum(len(tier.slots) for tier in tiers),
        sum(tier.used + tier.passing for tier in tiers),
        budget * max(len(tiers), 1),
        sum(tier.evictions for tier in tiers),
    )


def _close(tiers: Tiers, disk: Disk | None) -> None:
    tiers.close()
    if disk is not None:
        disk.close()


def _finish(tiers: Tiers, disk: Disk | None, process: int) -> None:
    """Close the parts of a cache that nobody has any more."""
    if os.getpid() == process:
        # Garbage is collected anywhere: where a lock is held, or in one of the threads that this waits for.
        threading.Thread(target=_close, args=(tiers, disk), name="latentfast-cache-close").start()


@atexit.register
def _close_all() -> None:
    """At the interpreter's end, when it is too late for a thread."""
    for cache in list(_open):
        cache.close()


def _check_key(key: Any) -> Key:
    if not isinstance(key, Key):
        raise TypeError(f"key: expected a Key (see Key.of), got {type(key).__name__}")
    return key


def _device(device: str | torch.device | None) -> torch.device:
    """The device with its number: "cuda" is the current one."""
    found = CPU if device is None else torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected the CPU or a CUDA device, got '{found}'")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return CPU if found.type == "cpu" else found
