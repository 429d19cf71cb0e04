"""Copies between host and device memory, on streams of their own, and the order between them and everybody's work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from latentfast.cache.memory import Slot, device_memory

__all__ = ["Transfers", "as_made", "is_capturing", "on"]


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph: memory that is kept for later can't come from there."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager[None]:
    """Inside, a GPU is the current one: a thread that has used none would set up the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Transfers:
    """The side streams, a pair for each device, one a direction: the hardware copies both ways at once."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def _stream(self, device: torch.device, way: str) -> torch.cuda.Stream:
        with self._lock:
            if (device, way) not in self._streams:
                self._streams[device, way] = torch.cuda.Stream(device)
            return self._streams[device, way]

    def mark(self, slot: Slot, device: torch.device) -> None:
        """The work that fills the slot is what was queued so far in the current stream."""
        slot.stream = torch.cuda.current_stream(device)
        # blocking: who waits for it sleeps, instead of taking a core from the thread that launches kernels
        slot.event = torch.cuda.Event(blocking=True)
        slot.event.record(slot.stream)

    def wait(self, slot: Slot) -> None:
        """Let the host wait until a slot is filled."""
        if slot.event is not None:
            slot.event.synchronize()

    def to_host(self, slot: Slot, buffer: Tensor) -> None:
        """Copy a device's slot into host memory; returns when it is there."""
        source = slot.filled()
        stream = self._stream(source.device, "down")
        with torch.cuda.stream(stream):
            if slot.event is not None:
                stream.wait_event(slot.event)
            buffer.copy_(source, non_blocking=True)
            source.record_stream(stream)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        done.synchronize()

    def to_device(self, slot: Slot, there: Slot, device: torch.device) -> None:
        """Queue the copy of a filled slot, on the host or on another device, into one on this device."""
        stream = self._stream(device, "up")
        with torch.cuda.device(device), torch.cuda.stream(stream):
            if slot.event is not None:
                stream.wait_event(slot.event)
            # From the side stream's own memory: what lies there before is done when the copy's turn comes.
            there.buffer = device_memory(slot.nbytes, device)
            there.buffer.copy_(slot.filled(), non_blocking=True)
            self.mark(there, device)

    def join(self, slot: Slot) -> None:
        """Let the current stream come after what fills a device's slot."""
        buffer = slot.filled()
        current = torch.cuda.current_stream(buffer.device)
        if slot.event is not None and slot.stream != current:
            current.wait_event(slot.event)
            # so that the memory is not given to others while this stream still reads it
            buffer.record_stream(current)


def as_made(make: Callable[[], Mapping[str, Tensor]]) -> tuple[Mapping[str, Tensor], Callable[[], float]]:
    """What ``make()`` gives, and how many seconds it took, to be asked when the device has finished."""
    first = None
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        first = torch.cuda.Event(enable_timing=True)
        first.record()
    start = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - start
    devices = {value.device for value in made.values() if isinstance(value, Tensor)}
    if first is None or not any(device.type == "cuda" for device in devices):
        return made, lambda: seconds
    last = torch.cuda.Event(enable_timing=True, blocking=True)
    last.record()

    def measured() -> float:
        last.synchronize()
        try:
            return max(seconds, first.elapsed_time(last) / 1e3)
        except RuntimeError:  # two devices: between theirs no time is measured
            return seconds

    return made, measured
