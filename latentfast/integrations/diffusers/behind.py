"""Work of the host that is done behind the device's, instead of between two pieces of it.

Between two steps of a sampling a GPU waits for the host: schedulers of diffusers read noise levels with a copy that
waits, so nothing is queued when a step ends, and whatever the host does there, or a thread that it wakes, makes the
step longer by as much. When the model's forward is queued it is the host that waits, for longer than most such work
takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

__all__ = ["Behind"]

T = TypeVar("T")


class Behind(Generic[T]):
    """Hands values on, in order, when it is told that their device is busy; on the CPU at once.

    What the receiver queues is in a stream of its own, behind the work that was queued when the value was taken: it
    neither waits for what came later nor is waited for. A value's tensors must not be written into meanwhile.

    Args:
        receive: Gets the values.
    """

    def __init__(self, receive: Callable[[T], None]) -> None:
        self._receive = receive
        self._taken: tuple[T, torch.device, torch.cuda.Event] | None = None
        self._received: tuple[T, torch.device, torch.cuda.Event] | None = None

    def take(self, value: T, device: torch.device) -> None:
        """A value whose tensors the current stream of a device fills. One may wait: another one is handed on first."""
        if device.type != "cuda":
            self._receive(value)
            return
        if self._taken is not None:
            self.hand_on()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        self._taken = value, device, event

    def hand_on(self) -> None:
        """The device has enough to do: let the receiver have what waits."""
        self._let_go()
        if self._taken is None:
            return
        (value, device, event), self._taken = self._taken, None
        stream = _stream(device)
        try:
            with torch.cuda.stream(stream):
                stream.wait_event(event)
                self._receive(value)
        finally:
            read = torch.cuda.Event()
            read.record(stream)
            self._received = value, device, read

    def finish(self) -> None:
        """Hand on what waits, whatever the device does."""
        self.hand_on()
        self._let_go()

    def _let_go(self) -> None:
        """Part with the value that was received: its memory may be used again behind what reads it."""
        if self._received is not None:
            (_, device, read), self._received = self._received, None
            torch.cuda.current_stream(device).wait_event(read)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device and not for each sampling: torch's allocator keeps memory by stream."""
    return torch.cuda.Stream(device)
