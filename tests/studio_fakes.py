"""A model for the studio that makes its clips at once, a studio that is served on a thread, and a tab of its page."""

import asyncio
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from torch import Tensor
from websockets.sync.client import ClientConnection, connect

from latentfast.integrations.diffusers.words import numbered_words
from latentfast.studio import Access, Document, Shot, Studio, running
from latentfast.studio.model import Clip, OutdatedError

PATIENCE = 60.0
SHOT = Shot("a red circle and a blue star", 1, 3, 1.5)


class FakeModel:
    """What `latentfast.studio.Model` is to the studio. The words' masks are columns, from left to right."""

    name, device = "FakePipeline", torch.device("cpu")
    size, scale, latent_frames, frames = (32, 48), 8, 3, 9

    def __init__(self) -> None:
        self.factors = torch.eye(4)[:, :3].contiguous(), torch.zeros(3)
        self.made: list[Shot] = []
        self.keys: list[Shot] = []  # that were asked for
        self.remembered: list[tuple[Shot, bool]] = []  # the keys, and whether there were frames
        self.gate = threading.Event()  # a step waits for it
        self.gate.set()
        self.pause = 0.0  # of each step

    def defaults(self) -> dict[str, float]:
        return {"steps": 3, "guidance": 1.5}

    def make(self, shot: Shot, *, outdated, on_step, show=None) -> Clip:
        if shot.prompt == "impossible":
            raise ValueError("no clip of that")
        latents = 0.3 * torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(shot.seed))
        for step in range(shot.steps):
            while not self.gate.wait(0.01):
                if outdated():
                    raise OutdatedError
            time.sleep(self.pause)
            if outdated():
                raise OutdatedError
            if show is not None:
                show(lambda step=step: latents * (step + 1) / shot.steps)
            on_step(step + 1)
        words = tuple(numbered_words(shot.prompt))
        heat = torch.zeros(1, len(words), 3, 2, 3)
        for i in range(len(words)):
            heat[:, i, :, :, i % 3] = 1.0
        self.made.append(shot)
        return Clip(latents, heat, words)

    def decode(self, latents: Tensor, outdated: Callable[[], bool]) -> Tensor:
        shades = (latents[:, :3].clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8).permute(0, 2, 3, 4, 1)
        return shades.repeat_interleave(3, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def fit(self, clip: Clip) -> None: ...

    def key(self, shot: Shot) -> Shot:
        self.keys.append(shot)
        return shot

    def recall(self, key: Shot) -> None: ...

    def remember(self, key: Shot, clip: Clip) -> None:
        self.remembered.append((key, clip.frames is not None))


@dataclass
class Served:
    """A studio that runs: its page's address, and itself."""

    address: str
    model: FakeModel
    studio: Studio
    loop: asyncio.AbstractEventLoop
    token: str = field(init=False)

    def __post_init__(self) -> None:
        self.token = parse_qs(urlsplit(self.address).query)["token"][0]

    def drop_connections(self) -> None:
        """End every tab's connection, as a network does."""

        def drop() -> None:
            for task in asyncio.all_tasks(self.loop):
                if "_read" in str(task.get_coro()):
                    task.cancel()

        self.loop.call_soon_threadsafe(drop)

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{urlsplit(self.address).netloc}{path}?token={self.token}"


@contextmanager
def served(load=None, document: Document | None = None, token: str = "a token of the tests") -> Iterator[Served]:
    """A studio on a thread of its own, with a `FakeModel` if nothing else is given."""
    model = FakeModel()
    studio = Studio(load or (lambda: nullcontext(model)), Document(SHOT) if document is None else document)
    ready: list[tuple[str, asyncio.AbstractEventLoop]] = []
    stop: list[asyncio.Event] = []
    errors: list[BaseException] = []

    async def main() -> None:
        ended = asyncio.Event()
        stop.append(ended)
        async with running(studio, Access(token.replace(" ", "-")), 0) as address:
            ready.append((address, asyncio.get_running_loop()))
            await ended.wait()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready and thread.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if errors:
            raise errors[0]
        address, loop = ready[0]
        yield Served(address, model, studio, loop)
        loop.call_soon_threadsafe(stop[0].set)
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the studio does not end"
        if errors:
            raise errors[0]
    finally:
        if thread.is_alive() and ready:
            ready[0][1].call_soon_threadsafe(stop[0].set)


class Tab:
    """A page that is open, as far as the studio sees it; of a studio, or at a WebSocket's address."""

    def __init__(self, studio: Served | str, **options: Any) -> None:
        address = studio if isinstance(studio, str) else studio.url("/ws", "ws")
        self._stack = ExitStack()
        self.socket: ClientConnection = self._stack.enter_context(
            connect(address, max_size=None, compression=None, open_timeout=PATIENCE, **options)
        )
        self.state: dict[str, Any] = {}
        self.hello: dict[str, Any] = {}
        self.problems: list[str] = []
        self.clips: dict[str, tuple[dict[str, Any], bytes]] = {}

    def __enter__(self) -> "Tab":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def until(self, right: Callable[[], Any]) -> Any:
        """Takes what comes until something is right."""
        deadline = time.monotonic() + PATIENCE
        while not (found := right()):
            self.take(self.socket.recv(timeout=max(0.001, deadline - time.monotonic())))
        return found

    def take(self, message: str | bytes) -> None:
        if isinstance(message, str):
            data = json.loads(message)
            if data["type"] == "problem":
                self.problems.append(data["text"])
            elif data["type"] in ("state", "hello"):
                setattr(self, data["type"], data)
            return
        (length,) = struct.unpack_from("<I", message)
        header = json.loads(message[4 : 4 + length])
        self.clips[header["clip"]] = header, message[4 + length :]
        if header["clip"] == "edited":
            self.send("shown", number=header["number"])

    def ready(self) -> "Tab":
        self.until(lambda: self.state.get("ready") and self.state["job"] is None and "source exact" in self.clips)
        return self

    def layer(self, index: int = -1) -> dict[str, Any]:
        return self.state["layers"][index]

    def pixels(self, name: str = "edited") -> Tensor:
        header, payload = self.clips[name]
        colours = 1 if header["codec"] == "gray" else 3
        shape = (len(header["places"]), header["height"], header["width"], colours)
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(shape)

    def edited(self, **wanted: Any) -> dict[str, Any]:
        """The header of a picture like this."""

        def right() -> Any:
            header = self.clips.get("edited", ({}, b""))[0]
            return header if header and all(header[name] == value for name, value in wanted.items()) else None

        return self.until(right)
