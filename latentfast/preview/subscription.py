"""The newest preview for one consumer, in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any

__all__ = ["PreviewError", "Subscription"]


class PreviewError(RuntimeError):
    """A preview could not be made; `__cause__` says why. The next one may be."""


class Subscription:
    """A place for the newest preview: what its consumer does not fetch in time is replaced, and holds nothing up.

    Fetched with `get`, with ``for preview in subscription`` in a thread, or with ``async for`` in an event loop; by
    one consumer at a time. A context manager; a subscription that is dropped ends too.
    """

    def __init__(self, leave: Callable[[Subscription], None]) -> None:
        self._leave = leave
        self._changed = threading.Condition()
        self._newest: Any = None
        self._closed = False
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    def get(self, timeout: float | None = None) -> Any:
        """Wait for a preview that was not fetched before.

        Args:
            timeout: In seconds; None: without end.

        Returns:
            The newest `Preview`; None after the end.

        Raises:
            TimeoutError: none came in time.
            PreviewError: it could not be made.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._newest is not None or self._closed, timeout):
                raise TimeoutError(f"no preview within {timeout} s")
            return self._take()

    def _take(self) -> Any:
        newest, self._newest = self._newest, None
        if isinstance(newest, PreviewError):
            raise newest
        return newest

    def offer(self, item: Any) -> None:
        """Put a preview, or an error, in the place of the one before. Never waits."""
        with self._changed:
            if not self._closed:
                self._newest = item
            self._wake()

    def close(self) -> None:
        """Take no more previews; the consumer's loop ends."""
        self._leave(self)
        self.end()

    def end(self) -> None:
        """As `close`, when the engine knows of it."""
        with self._changed:
            self._closed, self._newest = True, None
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, set()
        for loop, future in waiting:
            try:
                loop.call_soon_threadsafe(_done, future)
            except RuntimeError:  # that event loop has ended, and with it the consumer
                continue

    def __iter__(self) -> Iterator[Any]:
        while (preview := self.get()) is not None:
            yield preview

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        loop = asyncio.get_running_loop()
        while True:
            future = loop.create_future()
            with self._changed:
                if self._newest is not None:
                    return self._take()
                if self._closed:
                    raise StopAsyncIteration
                self._waiting.add((loop, future))
            try:
                await future
            finally:
                with self._changed:
                    self._waiting.discard((loop, future))

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
