"""A memory tier: flat buffers on one device, or in (pinned) host memory, under a budget of bytes.

A tier only keeps accounts; who copies into and out of its buffers says so by pins. What is pinned is not let go, so a
put waits while everything in the tier is on its way to the tier below. That is what makes the budget hold.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Condition

import torch
from torch import Tensor

from latentfast.cache.key import Key
from latentfast.cache.layout import Layout

__all__ = ["Slot", "Tier", "device_memory", "fresh_memory", "host_memory", "let_others_capture", "release_host_memory"]

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_OWN_PAGES_FROM = 64 << 10  # a smaller buffer is not worth pages of its own


@dataclass(eq=False)
class Slot:
    """One entry's bytes in a tier.

    Attributes:
        key, layout, seconds: the entry's.
        buffer: its bytes, once allocated.
        ready: whether the buffer holds them (on a device: whether `event` says when it does).
        kept: whether the tier goes on holding it when nobody needs it.
        pins: how many need the buffer at the moment.
        uses, credit: for the order of eviction.
        event: on a device, recorded behind the work that fills the buffer.
        stream: the stream in which that work is.
    """

    key: Key
    layout: Layout
    seconds: float
    kept: bool
    buffer: Tensor | None = None
    ready: bool = False
    gone: bool = False
    pins: int = 1
    uses: int = 1
    credit: float = 0.0
    event: torch.cuda.Event | None = None
    stream: torch.cuda.Stream | None = None
    _views: dict[str, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def filled(self) -> Tensor:
        """The buffer of a slot that is ready."""
        if self.buffer is None:
            raise RuntimeError("the slot has no buffer")
        return self.buffer

    def views(self) -> dict[str, Tensor]:
        """The tensors in the buffer."""
        if self._views is None:
            self._views = self.layout.views(self.filled())
        return self._views

    def empty(self) -> Tensor | None:
        """Part with the buffer."""
        buffer, self.buffer, self._views = self.buffer, None, None
        return buffer


class Tier:
    """Slots under a budget. All methods are called with ``changed`` held.

    The bytes held never exceed the budget, but for one slot: an entry larger than the budget that is on its way to a
    lower tier and not kept.

    Args:
        budget: bytes.
        policy: "lru" or "cost" (see `latentfast.cache.index.POLICIES`).
        changed: the condition that all tiers of a cache share; notified when a pin is taken away.
        release: called with a buffer that is given back for good. Without it buffers are not used again: on a device
            work that still reads them may be queued, which only torch's allocator knows.
    """

    def __init__(
        self, budget: int, policy: str, changed: Condition, release: Callable[[Tensor], None] | None = None
    ) -> None:
        self.budget, self.policy, self.changed = budget, policy, changed
        self.slots: OrderedDict[str, Slot] = OrderedDict()
        self.used = 0  # of slots, those included that are out of `slots` and still pinned
        self.evictions = 0
        self._release = release
        self._age = 0.0
        self._passing: Slot | None = None  # the one that is beyond the budget
        self._spare: list[Tensor] = []  # buffers to use again: page-locking memory takes longer than copying to it

    def find(self, key: Key) -> Slot | None:
        """The entry's slot, ready or not."""
        slot = self.slots.get(key.digest)
        return slot if slot is not None and slot.key.canonical == key.canonical else None

    def touch(self, digest: str) -> None:
        """Note a use."""
        if (slot := self.slots.get(digest)) is not None:
            self.slots.move_to_end(digest)
            slot.uses += 1
            self._value(slot)

    def _value(self, slot: Slot) -> None:
        slot.credit = self._age + slot.uses * slot.seconds / max(slot.nbytes, 1)

    def admit(
        self, key: Key, layout: Layout, seconds: float, *, wait: bool, passing: bool = False, keep: bool = True
    ) -> Slot | None:
        """A pinned slot for an entry, in place of the one it had; None if there is no room.

        Args:
            key, layout, seconds: the entry's.
            wait: whether to wait until pins are taken away.
            passing: whether an entry larger than the budget may come in for as long as it is pinned.
            keep: whether it stays when it is pinned no more; else its buffer is there for the next one.
        """
        fits = layout.nbytes <= self.budget
        if not fits and not passing:
            self.drop(key.digest)
            return None
        while True:
            self.drop(key.digest)
            if self._make_room(self.budget - layout.nbytes) if fits else self._passing is None:
                break
            if not wait:
                return None
            self.changed.wait()
        slot = Slot(key, layout, seconds, kept=fits and keep)
        if fits:
            self.used += slot.nbytes
            slot.buffer = self._take_spare(slot.nbytes)
            self._trim()
        else:
            self._passing = slot
        self._value(slot)
        self.slots[key.digest] = slot
        return slot

    def _make_room(self, limit: int) -> bool:
        """Let slots go until those that stay have at most ``limit`` bytes; none, if that can't be reached."""
        free = sum(slot.nbytes for slot in self.slots.values() if not slot.pins) if self.used > limit else 0
        if self.used - free > limit:
            return False
        while self.used > limit:
            idle = (slot for slot in self.slots.values() if not slot.pins)
            victim = next(idle) if self.policy == "lru" else min(idle, key=lambda slot: slot.credit)
            self._age = max(self._age, victim.credit)
            self.evictions += 1
            self.drop(victim.key.digest)
        return True

    def _take_spare(self, nbytes: int) -> Tensor | None:
        found = next((buffer for buffer in self._spare if buffer.nbytes == nbytes), None)
        if found is not None:
            self._spare = [buffer for buffer in self._spare if buffer is not found]
        self._trim()
        return found

    def _trim(self, limit: int | None = None) -> None:
        """Give back spare buffers until everything held is within the budget."""
        limit = self.budget if limit is None else limit
        while self._spare and self._release is not None and self.held > limit:
            self._release(self._spare.pop(0))

    @property
    def held(self) -> int:
        """Bytes of the slots and of the spare buffers, without what only passes through."""
        return self.used + sum(buffer.nbytes for buffer in self._spare)

    @property
    def passing(self) -> int:
        """Bytes of what only passes through."""
        return self._passing.nbytes if self._passing is not None else 0

    def pin(self, slot: Slot) -> None:
        """Someone needs the buffer."""
        slot.pins += 1

    def unpin(self, slot: Slot) -> None:
        """Someone needs it no more."""
        slot.pins -= 1
        if not slot.pins:
            if not slot.kept:
                self._out(slot)
            if slot.gone:
                self._free(slot)
            self.changed.notify_all()

    def drop(self, digest: str) -> None:
        """The entry is found no more; its memory is given back when nobody needs it."""
        if (slot := self.slots.get(digest)) is not None:
            self._out(slot)
            if not slot.pins:
                self._free(slot)

    def fail(self, slot: Slot) -> None:
        """A slot will not be filled; whoever waits for it looks again."""
        self._out(slot)
        self.unpin(slot)
        self.changed.notify_all()

    def _out(self, slot: Slot) -> None:
        slot.gone = True
        if self.slots.get(slot.key.digest) is slot:
            del self.slots[slot.key.digest]

    def _free(self, slot: Slot) -> None:
        buffer = slot.empty()
        if slot is self._passing:
            self._passing = None
        else:
            self.used -= slot.nbytes
        if buffer is not None and self._release is not None:
            self._spare.append(buffer)
            # what passes through is larger than the budget: not to be kept either
            self._trim()

    def clear(self) -> None:
        """Let everything go."""
        for digest in list(self.slots):
            self.drop(digest)
        self._trim(0)


def device_memory(nbytes: int, device: torch.device) -> Tensor:
    """A buffer on a device."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def fresh_memory(nbytes: int) -> Tensor:
    """A buffer of host memory, in huge pages where there are any: touching small ones takes longer than a copy."""
    if nbytes < _OWN_PAGES_FROM:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def host_memory(nbytes: int) -> Tensor:
    """The same, page-locked if this process uses a GPU, so that copies need not wait for the host.

    Not from torch's pinned allocator, which rounds up to a power of two: a 9.7 MB latent would take 16.
    """
    buffer = fresh_memory(nbytes)
    if nbytes >= _OWN_PAGES_FROM and torch.cuda.is_available() and torch.cuda.is_initialized():
        # Pages come into being here, not inside of the call, which keeps other threads from launching kernels.
        buffer[:: mmap.PAGESIZE].zero_()
        with _others_may_capture():
            # portable: for the contexts of all devices; where it fails, copies merely wait
            torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 1)
    return buffer


def release_host_memory(buffer: Tensor) -> None:
    """Before a buffer's memory goes back to the system, it must not be page-locked any more."""
    if buffer.nbytes >= _OWN_PAGES_FROM and torch.cuda.is_available() and buffer.is_pinned():
        with _others_may_capture():
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def let_others_capture() -> ctypes.c_int:
    """What this thread calls from now on does not spoil a CUDA graph that another one captures; the mode until now.

    A capture forbids calls such as page-locking memory to all threads but those that are in relaxed mode.
    """
    return _exchange_capture_mode(ctypes.c_int(_RELAXED))


def _exchange_capture_mode(mode: ctypes.c_int) -> ctypes.c_int:
    with suppress(OSError, AttributeError):  # no driver: nothing to capture
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    return mode


@contextmanager
def _others_may_capture() -> Iterator[None]:
    before = let_others_capture()
    try:
        yield
    finally:
        _exchange_capture_mode(before)
