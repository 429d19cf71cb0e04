"""The three tiers as one: the way down of what is put, and the way up of what is found.

A put fills a slot in the tensors' own memory and returns; from a GPU the entry goes on to the host, and from the host
to the disk, on threads of their own and on side streams. A slot is pinned until the tier below has its copy: what goes
from a tier is below already, nothing is copied when room is made, and a producer that is faster than the disk waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from latentfast.cache.digest import submit
from latentfast.cache.disk import Disk
from latentfast.cache.key import Key
from latentfast.cache.layout import Header, Layout, aligned
from latentfast.cache.memory import (
    Slot,
    Tier,
    device_memory,
    fresh_memory,
    host_memory,
    let_others_capture,
    release_host_memory,
)
from latentfast.cache.near import Place
from latentfast.cache.transfer import Transfers, on

__all__ = ["Found", "Tiers"]

logger = logging.getLogger("latentfast.cache")

CPU = torch.device("cpu")
#: Entries that are synced together; more would hold more host memory while the disk is waited for.
_GROUP_BYTES = 256 << 20
#: How many entries are known to have been read once.
_REMEMBERED = 4096


class Found:
    """An entry's slot on the device that was asked for, pinned until `done`.

    Attributes:
        slot: holds the bytes.
        tier: whose slot it is; None if it is nobody else's.
        where: "device", "host" or "disk", which had the entry.
    """

    def __init__(self, slot: Slot, tier: Tier | None, where: str) -> None:
        self.slot, self.tier, self.where = slot, tier, where

    def done(self) -> None:
        """The slot is needed no more."""
        if self.tier is not None:
            with self.tier.changed:
                self.tier.unpin(self.slot)


class Tiers:
    """See the module.

    Args:
        device_bytes, host_bytes: budgets.
        disk: the folder, if there is one.
        policy: what goes first.
    """

    def __init__(self, device_bytes: int, host_bytes: int, disk: Disk | None, policy: str) -> None:
        self.changed = threading.Condition()
        self.device_bytes, self.policy, self.disk = device_bytes, policy, disk
        self.host = Tier(host_bytes, policy, self.changed, release_host_memory)
        self.devices: dict[torch.device, Tier] = {}
        self.pending = 0
        self._all_stored = True  # since the last flush
        self._read_once: dict[str, bool] = {}
        self._transfers = Transfers()
        self._unwritten: deque[tuple[Header, Slot]] = deque()
        # One thread each: they are started when there is work, end with the cache, and finish what they have at the
        # interpreter's end. What waits for nothing but a device has a thread of its own, as others may wait for it.
        self._down, self._writer, self._ahead, self._after = (
            ThreadPoolExecutor(1, f"latentfast-cache-{name}", initializer=let_others_capture)
            for name in ("down", "write", "ahead", "after")
        )

    def everywhere(self) -> list[Tier]:
        """All memory tiers; called with the condition held."""
        return [self.host, *self.devices.values()]

    def _tier(self, device: torch.device) -> Tier:
        """A device's tier; called with the condition held."""
        if device not in self.devices:
            self.devices[device] = Tier(self.device_bytes, self.policy, self.changed)
        return self.devices[device]

    @property
    def _stores(self) -> bool:
        return self.disk is not None and self.disk.writable

    # -- down ------------------------------------------------------------------------------------------------------

    def put(
        self,
        key: Key,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        seconds: Callable[[], float],
        place: Place | None = None,
    ) -> None:
        """Take a copy of tensors; ``seconds()`` is asked for when their device has made them."""
        with self.changed:
            # an older value must not be found while the new one is on its way
            for tier in self.everywhere():
                tier.drop(key.digest)
        devices = {tensor.device for tensor in tensors.values()}
        device = devices.pop() if len(devices) == 1 else CPU
        slot = self._fill(key, layout, tensors, device) if device.type == "cuda" else None
        with self.changed:
            if slot is not None and not (self.host.budget or self._stores):
                self.devices[device].unpin(slot)
                return
            self.pending += 1
        if slot is None:
            self._lower(key, layout, tensors, seconds, place, None)
        else:
            submit(self._down, self._lower, key, layout, {}, seconds, place, slot)

    def _fill(self, key: Key, layout: Layout, tensors: Mapping[str, Tensor], device: torch.device) -> Slot | None:
        """A copy in the tensors' own device, in the current stream; None if the device has no memory left."""
        with self.changed:
            tier = self._tier(device)
            slot = tier.admit(key, layout, 0.0, wait=True, passing=True)
        if slot is None:
            return None
        try:
            slot.buffer = device_memory(layout.nbytes, device)
            layout.pack(tensors, slot.buffer)
            self._transfers.mark(slot, device)
        except BaseException as error:
            with self.changed:
                tier.fail(slot)
            if isinstance(error, torch.OutOfMemoryError):
                return None
            raise
        self._ready(slot)
        return slot

    def _ready(self, slot: Slot) -> None:
        with self.changed:
            slot.ready = True
            self.changed.notify_all()

    def _lower(
        self,
        key: Key,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        seconds: Callable[[], float],
        place: Place | None,
        above: Slot | None,
    ) -> None:
        """Copy an entry to the host, from a device's slot or from tensors, and pass it on to the disk."""
        slot = None
        handed_on = stored = False
        try:
            if above is not None:
                self._transfers.wait(above)
            cost = seconds()
            with self.changed:
                if above is not None and above.gone:  # another value was put in the meantime
                    stored = True
                    return
                if above is not None:
                    above.seconds = cost
                slot = self.host.admit(key, layout, cost, wait=True, passing=self._stores)
            if slot is None:  # larger than the host's budget, and no disk
                stored = self.disk is None and above is not None and above.kept
                return
            if slot.buffer is None:
                with on(CPU if above is None else above.filled().device):
                    slot.buffer = host_memory(layout.nbytes)
            if above is None:
                layout.pack(tensors, slot.buffer)
            else:
                self._transfers.to_host(above, slot.buffer)
            self._ready(slot)
            stored = self.disk is None
            if self._stores:
                notes = {} if place is None else place.to_notes()
                header = Header.make(key, layout, seconds=cost, created=time.time(), notes=notes)
                self._unwritten.append((header, slot))
                handed_on = True
                submit(self._writer, self._write)
        except Exception as error:  # a put that fails is a miss later, whatever the reason
            logger.warning("latent cache: an entry could not be kept: %s: %s", type(error).__name__, error)
        finally:
            with self.changed:
                if above is not None:
                    self.devices[above.filled().device].unpin(above)
                if slot is not None and not slot.ready:
                    self.host.fail(slot)
                elif slot is not None and not handed_on:
                    self.host.unpin(slot)
            if not handed_on:
                self._end(stored)

    def _write(self) -> None:
        """Write what waits to be written, in groups that are synced together."""
        group: list[tuple[Header, Slot]] = []
        while self._unwritten and sum(slot.nbytes for _, slot in group) < _GROUP_BYTES:
            group.append(self._unwritten.popleft())
        done = [False] * len(group)
        try:
            if group and self.disk is not None:
                done = self.disk.store([(header, slot.filled()) for header, slot in group])
        except Exception as error:
            logger.warning("latent cache: entries could not be written: %s: %s", type(error).__name__, error)
        finally:
            for (_, slot), stored in zip(group, done, strict=True):
                with self.changed:
                    self.host.unpin(slot)
                self._end(stored)

    def _end(self, stored: bool) -> None:
        with self.changed:
            self.pending -= 1
            self._all_stored &= stored
            self.changed.notify_all()

    def flush(self) -> bool:
        """Wait until nothing is on its way; whether all of it arrived since the last time."""
        with self.changed:
            while self.pending:
                self.changed.wait()
            stored, self._all_stored = self._all_stored, True
            return stored

    # -- up --------------------------------------------------------------------------------------------------------

    def find(self, key: Key, device: torch.device, keep: bool = False) -> Found | None:
        """The entry on a device, brought there and into that tier if it was elsewhere; None for a miss.

        What is read from the disk stays in the host's tier from the second time on, or with ``keep``: a long trajectory
        that is looked at once pushes nothing out, on the CPU its buffers are the caller's own without another copy, and
        on the way to a GPU a few page-locked ones serve all of it.
        """
        with self.changed:
            tiers = self.everywhere()
            if device.type == "cuda":
                own = self._tier(device)
                tiers = [own, *(tier for tier in tiers if tier is not own)]
            found = self._pinned(key, tiers)
        if found is not None:
            if self.disk is not None:
                self.disk.touch(key.digest)
        elif self.disk is not None:
            keep = self._read_once.pop(key.digest, False) or keep
            found = self._load(self.disk, key, device, keep)
            if found is not None and not keep:
                self._read_once[key.digest] = True
                while len(self._read_once) > _REMEMBERED:
                    with suppress(KeyError, StopIteration):  # other threads do the same
                        del self._read_once[next(iter(self._read_once))]
        if found is None or found.slot.filled().device == device:
            return found
        return self._to_device(found, device) if device.type == "cuda" else self._fetch(found)

    def _pinned(self, key: Key, tiers: Iterable[Tier]) -> Found | None:
        """The first tier's ready slot of a key; waits for one that is being filled."""
        while True:
            slots = [(slot, tier) for tier in tiers if (slot := tier.find(key)) is not None]
            for slot, tier in slots:
                if slot.ready:
                    tier.pin(slot)
                    for each in tiers:
                        each.touch(key.digest)
                    return Found(slot, tier, "host" if tier is self.host else "device")
            if not slots:
                return None
            self.changed.wait()

    def _load(self, disk: Disk, key: Key, device: torch.device, keep: bool) -> Found | None:
        """Read an entry from the disk into the host's tier, if it may stay or goes on, and there is room at once."""
        slot: Slot | None = None

        def room(header: Header) -> Tensor:
            nonlocal slot
            with self.changed:
                # what is there now was put or read by somebody in the meantime
                if (keep or device.type == "cuda") and self.host.find(key) is None:
                    slot = self.host.admit(header.key, header.layout, header.seconds, wait=False, keep=keep)
            nbytes = header.layout.nbytes
            if slot is None:
                return fresh_memory(nbytes)
            if slot.buffer is None:
                slot.buffer = host_memory(nbytes)
            return slot.buffer

        found = None
        try:
            found = disk.load(key, room)
        finally:
            if slot is not None and found is None:
                with self.changed:
                    self.host.fail(slot)
        if found is None:
            return None
        header, buffer = found
        if slot is None:
            return Found(_own(key, header.layout, header.seconds, buffer), None, "disk")
        self._ready(slot)
        return Found(slot, self.host, "disk")

    def _to_device(self, found: Found, device: torch.device) -> Found:
        """The same on a GPU. The old slot's pin goes when the copy is done, which nobody waits for here."""
        slot = found.slot
        with self.changed:
            tier: Tier | None = self._tier(device)
            there = None
            if found.tier is None or not slot.gone:
                there = self._tier(device).admit(slot.key, slot.layout, slot.seconds, wait=False)
        if there is None:
            tier, there = None, _own(slot.key, slot.layout, slot.seconds, None)
        try:
            self._transfers.to_device(slot, there, device)
        except BaseException:
            if tier is not None:
                with self.changed:
                    tier.fail(there)
            found.done()
            raise
        self._ready(there)
        submit(self._after, self._done_after, found, there)
        return Found(there, tier, found.where)

    def _done_after(self, found: Found, there: Slot) -> None:
        self._transfers.wait(there)
        found.done()

    def _fetch(self, found: Found) -> Found:
        """A device's entry in host memory of its own, waited for."""
        slot = found.slot
        buffer = fresh_memory(slot.nbytes)
        try:
            self._transfers.to_host(slot, buffer)
        finally:
            found.done()
        return Found(_own(slot.key, slot.layout, slot.seconds, buffer), None, found.where)

    def tensors(self, found: Found, copy: bool) -> dict[str, Tensor]:
        """The tensors of what was found: the caller's own, or the tier's if they may be and lie on a device."""
        slot = found.slot
        views = slot.views()
        if slot.event is not None:
            self._transfers.join(slot)
        else:
            copy = True  # host buffers are used again
        if found.tier is None or not copy:
            return {name: aligned(view) for name, view in views.items()}
        return {name: view.clone() for name, view in views.items()}

    def prefetch(self, keys: list[Key], device: torch.device) -> None:
        """See `LatentCache.prefetch`."""
        submit(self._ahead, self._bring, keys, device)

    def _bring(self, keys: list[Key], device: torch.device) -> None:
        brought = 0
        for key in keys:
            try:
                with on(device):
                    found = self.find(key, device, keep=True)
            except Exception as error:
                logger.warning("latent cache: read-ahead stopped: %s: %s", type(error).__name__, error)
                return
            if found is None:
                continue
            found.done()
            nbytes = found.slot.nbytes
            brought += nbytes
            if found.tier is None or brought + nbytes > found.tier.budget:
                return

    def close(self) -> None:
        """Finish what is on its way, give the memory back."""
        self.flush()
        for thread in (self._down, self._writer, self._ahead, self._after):
            thread.shutdown(wait=True)
        with self.changed:
            for tier in self.everywhere():
                tier.clear()


def _own(key: Key, layout: Layout, seconds: float, buffer: Tensor | None) -> Slot:
    """A slot that is in no tier."""
    return Slot(key, layout, seconds, kept=False, buffer=buffer, ready=buffer is not None)
