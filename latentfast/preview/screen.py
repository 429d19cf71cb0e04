"""Latents as they come from other streams, and frames on their way to the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Screen", "Source"]


class Source:
    """Latents `(B, C, T, H, W)`, or a function that makes them when they are first wanted.

    They are complete, or what the function needs is, on the stream that is current where this is made.
    """

    def __init__(self, given: Tensor | Callable[[], Tensor]) -> None:
        self._lock = threading.Lock()
        self._made: Tensor | None = None
        # Kept as long as the source: what it refers to may be read by kernels that have not run yet.
        self._make: Callable[[], Tensor] | None = None
        if isinstance(given, Tensor):
            self._made = _checked(given)
        elif callable(given):
            self._make = given
        else:
            raise TypeError(f"source must be a tensor or a function, got {type(given).__name__}")
        self._ready: Any = None
        #: Where a function's kernels will run, if it launches any.
        self.device = torch.device("cpu")
        if self._made is not None:
            self.device = self._made.device
        elif torch.cuda.is_available() and torch.cuda.is_initialized():
            self.device = torch.device("cuda", torch.cuda.current_device())
        if self.device.type == "cuda":
            self._ready = torch.cuda.current_stream(self.device).record_event()

    def latents(self) -> Tensor:
        """The latents, complete on the current stream. A function is called once, and after an error again."""
        with self._lock:
            if self._ready is not None:
                torch.cuda.current_stream(self.device).wait_event(self._ready)
            if self._made is None:
                assert self._make is not None
                self._made = _checked(self._make())
                if self._ready is not None:
                    self._ready = torch.cuda.current_stream(self.device).record_event()
            return self._made


def _checked(latents: Tensor) -> Tensor:
    if latents.ndim != 5 or not latents.is_floating_point():
        raise ValueError(
            f"source must be latents (B, C, T, H, W) of a floating dtype, got {tuple(latents.shape)} {latents.dtype}"
        )
    return latents.detach()


class Screen:
    """Where one thread's frames are made, and how they come to the host."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._buffers: dict[torch.device, Tensor] = {}

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """On a GPU: what is launched inside runs on this screen's stream there."""
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            # A preview is short and somebody waits for it: its kernels go first where both have some to launch.
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(self._streams[device]):
            yield

    def blank(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """A uint8 tensor to draw frames into. On a GPU the memory is that of the last one, which is on the host."""
        if device.type != "cuda":
            return torch.empty(shape, dtype=torch.uint8, device=device)
        count = torch.Size(shape).numel()
        if device not in self._buffers or self._buffers[device].numel() < count:
            self._buffers[device] = torch.empty(count, dtype=torch.uint8, device=device)
        return self._buffers[device][:count].view(shape)

    def to_host(self, frames: Tensor) -> Tensor:
        """Frames on the host once they are there. They must be complete on the current stream."""
        if not frames.is_cuda:
            return frames.cpu()
        # From torch's pool of pinned memory, which gives a buffer away again when no tensor refers to it.
        host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        host.copy_(frames, non_blocking=True)
        torch.cuda.current_stream(frames.device).record_event().synchronize()
        return host
