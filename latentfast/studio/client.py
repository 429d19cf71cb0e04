"""One tab: what waits to be sent to it, where the newest of a kind replaces the one before."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from latentfast.studio.document import Word

__all__ = ["Client"]


class Client:
    """A tab's outbox. However slow the tab is, it holds one message of each kind.

    Pictures that move are sent as fast as the tab shows them: at most `AHEAD` that it has not acknowledged.
    """

    AHEAD = 2
    #: Seconds after which a tab that acknowledges nothing (it may be in the background) gets another picture.
    PATIENCE = 1.0
    #: Complaints that wait; what comes beyond says nothing new.
    MOST_PROBLEMS = 4
    #: Malformed messages after which the connection ends.
    MOST_REFUSED = 100

    def __init__(self, number: int) -> None:
        self.number = number
        self.words: tuple[Word, ...] = ()  # that it looks at
        self.refused = 0
        self._mail: dict[str, str | bytes] = {}
        self._changed = asyncio.Event()
        self._problems = itertools.count()
        self._unseen: dict[int, float] = {}  # numbers of pictures that were sent, and when

    def post(self, kind: str, message: Mapping[str, Any] | str | bytes) -> None:
        """Send a message when its turn comes, in the place of one of the same kind that was not sent yet."""
        self._mail[kind] = message if isinstance(message, str | bytes) else json.dumps(message, allow_nan=False)
        self._changed.set()

    def complain(self, text: str) -> None:
        """Show a sentence to its user."""
        if sum(kind.startswith("problem") for kind in self._mail) < self.MOST_PROBLEMS:
            self.post(f"problem {next(self._problems)}", {"type": "problem", "text": text})

    def shown(self, number: int) -> None:
        """It has shown a picture, and so has all before it."""
        self._unseen = {sent: at for sent, at in self._unseen.items() if sent > number}
        self._changed.set()

    async def send_all(self, send: Callable[[str | bytes], Awaitable[None]]) -> None:
        """Send what is posted, without end."""
        while True:
            kind = self._next()
            if kind is None:
                self._changed.clear()
                # A picture may wait for an acknowledgement that never comes.
                with anyio.move_on_after(self.PATIENCE if self._mail else None) as waiting:
                    await self._changed.wait()
                if waiting.cancelled_caught:
                    self._unseen.clear()
                continue
            message = self._mail.pop(kind)
            if kind.startswith("edited"):
                self._unseen[int(kind.partition(" ")[2] or 0)] = time.monotonic()
            await send(message)

    def picture(self, number: int, message: bytes) -> None:
        """Send a picture of the edited clip."""
        for kind in [kind for kind in self._mail if kind.startswith("edited")]:
            del self._mail[kind]
        self.post(f"edited {number}", message)

    def _next(self) -> str | None:
        ahead = len(self._unseen) >= self.AHEAD
        return next((kind for kind in self._mail if not (ahead and kind.startswith("edited"))), None)
