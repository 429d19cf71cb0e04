"""`Studio`: the document, who looks at it, and what is made for it. All of it on one event loop, but for the threads
that render (`PreviewEngine`) and sample (`Workshop`)."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentfast.preview import Preview, PreviewEngine, PreviewError, RecipeRenderer
from latentfast.preview.screen import Source
from latentfast.studio import protocol
from latentfast.studio.client import Client
from latentfast.studio.document import Document, History, Layer, Shot, Word
from latentfast.studio.kinds import KINDS
from latentfast.studio.library import Built, Library
from latentfast.studio.model import Clip, Model, OutdatedError
from latentfast.studio.pictures import NO_MASK, Timing, clip_packet, edited_packet, mask_packet, payload, projected
from latentfast.studio.protocol import RefusedError
from latentfast.studio.workshop import Workshop

__all__ = ["Studio", "View"]


@dataclass(frozen=True)
class View:
    """What the preview engine is to show: the parameters of its renderer.

    Attributes:
        built: The edits.
        shot: Whose clip it is.
        sampling: "step 3 of 20" while it is a clean estimate on the way.
        mover: The tab whose move it is.
        stamp: That tab's time of the move.
    """

    built: Built
    shot: Shot | None = None
    sampling: str = ""
    mover: int | None = None
    stamp: float | None = None


class Studio:
    """One document, for all tabs that are open.

    Args:
        load: Gives the model, on the thread that uses it.
        start: The document at the beginning.
        budget: Seconds from a move to its preview.

    Use as an async context manager; all methods are called on its event loop.
    """

    MOST_CLIENTS = 32

    def __init__(
        self, load: Callable[[], AbstractContextManager[Model]], start: Document | None = None, *, budget: float = 0.06
    ) -> None:
        self._library = Library()
        self._history = History(start or Document())
        self._budget = budget
        self._clients: dict[int, Client] = {}
        self._numbers = itertools.count(1)
        self._engine: PreviewEngine | None = None
        self._source: Shot | None = None  # whose latents the engine has
        self._view = View(self._library.build(Document()))
        self._sources: dict[str, bytes] = {}  # packets of the clip before its edits
        self._decoded: Shot | None = None  # whose frames are among them
        self._last: tuple[int, bytes] | None = None  # the last picture, and its number
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(1, "latentfast-masks")
        self._exports = asyncio.Lock()
        self._workshop = Workshop(
            load,
            self._library,
            changed=lambda: self._from_thread(self._made),
            failed=lambda text: self._from_thread(self._complain, text),
            show=self._show_sampling,
        )

    async def __aenter__(self) -> Studio:
        self._loop = asyncio.get_running_loop()
        self._workshop.want(self._history.document.shots())
        self._workshop.start()
        self._spawn(self._tell_stats())
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._workshop.close)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        self._pool.shutdown(cancel_futures=True)

    # --- Tabs --------------------------------------------------------------------------------------------------------

    def enter(self) -> Client:
        """A tab that comes.

        Raises:
            RefusedError: there are too many.
        """
        if len(self._clients) >= self.MOST_CLIENTS:
            raise RefusedError(f"the studio has {self.MOST_CLIENTS} tabs open already: close one")
        client = Client(next(self._numbers))
        self._clients[client.number] = client
        client.post(
            "hello",
            {
                "type": "hello",
                "client": client.number,
                "kinds": [
                    {"kind": name, "label": k.label, "about": k.about, "clip": k.clip} for name, k in KINDS.items()
                ],
            },
        )
        client.post("state", self._state())
        for name, message in self._sources.items():
            client.post(name, message)
        if self._last is not None:
            client.picture(*self._last)
        return client

    def leave(self, client: Client) -> None:
        """A tab that goes."""
        self._clients.pop(client.number, None)

    def receive(self, client: Client, text: str) -> bool:
        """A tab's message; what is wrong with it the tab is told.

        Returns:
            False when it has sent so much nonsense that the connection should end.
        """
        try:
            message = protocol.parse(text)
            handle = getattr(self, f"_on_{type(message).__name__.lower()}")
            handle(client, message)
        except ValueError as error:  # RefusedError, or an edit that is not there any more
            client.refused += isinstance(error, RefusedError)
            client.complain(str(error))
        return client.refused < Client.MOST_REFUSED

    def _post(self, kind: str, message: dict[str, Any] | bytes) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message, allow_nan=False)
        for client in self._clients.values():
            client.post(kind, data)

    def _complain(self, text: str) -> None:
        for client in self._clients.values():
            client.complain(text)

    # --- What tabs say -----------------------------------------------------------------------------------------------

    def _on_generate(self, client: Client, message: Any) -> None:
        shot = Shot(message.prompt, message.seed, message.steps, message.guidance)
        self._history.change(replace(self._history.document, shot=shot))
        self._changed(again=True)

    def _on_cancel(self, client: Client, message: Any) -> None:
        document = self._history.document
        known = [shot for shot in document.shots() if self._library.clip(shot) is not None]
        shot = document.shot if document.shot in known else self._source
        self._history.change(replace(document.only(known), shot=shot))
        self._changed()

    def _on_add(self, client: Client, message: Any) -> None:
        document = self._history.document
        if document.shot is None:
            raise ValueError("make a clip first, then there is something to edit")
        if len(document.layers) >= protocol.MOST_LAYERS:
            raise ValueError(f"there are {protocol.MOST_LAYERS} edits already, as many as there can be")
        shot = None if message.prompt is None else replace(document.shot, prompt=message.prompt, seed=message.seed)
        layer = Layer(self._history.new_id(), message.kind, KINDS[message.kind].start, shot=shot)
        self._history.change(replace(document, layers=(*document.layers, layer)))
        self._changed()

    def _on_amount(self, client: Client, message: Any) -> None:
        document = self._history.document
        kind = KINDS[document.layers[document.index(message.id)].kind]
        amount = min(kind.high, max(kind.low, message.amount))
        self._history.change(document.with_layer(message.id, amount=amount), moving=message.id)
        if not message.live:
            self._history.rest()
        self._changed(client.number, message.stamp)

    def _on_switch(self, client: Client, message: Any) -> None:
        self._history.change(self._history.document.with_layer(message.id, on=message.on))
        self._changed()

    def _on_confine(self, client: Client, message: Any) -> None:
        document = self._history.document
        clip = self._library.clip(document.shot)
        order = {word: i for i, word in enumerate(() if clip is None else clip.words)}
        words = tuple(sorted(set(message.words), key=lambda word: (order.get(word, len(order)), word)))
        self._history.change(document.with_layer(message.id, words=words))
        self._changed()

    def _on_move(self, client: Client, message: Any) -> None:
        self._history.change(self._history.document.moved(message.id, message.to))
        self._changed()

    def _on_remove(self, client: Client, message: Any) -> None:
        self._history.change(self._history.document.without(message.id))
        self._changed()

    def _on_undo(self, client: Client, message: Any) -> None:
        if self._history.undo():
            self._changed()

    def _on_redo(self, client: Client, message: Any) -> None:
        if self._history.redo():
            self._changed()

    def _on_look(self, client: Client, message: Any) -> None:
        client.words = message.words
        self._send_mask(client)

    def _on_shown(self, client: Client, message: Any) -> None:
        client.shown(message.number)

    def _on_open(self, client: Client, message: Any) -> None:
        self._history.change(protocol.read_run(message.run, self._history.new_id))
        self._changed(again=True)

    # --- What follows from a change ----------------------------------------------------------------------------------

    def _changed(self, mover: int | None = None, stamp: float | None = None, *, again: bool = False) -> None:
        """The document is another: make what is missing, show what is there, and tell everybody."""
        document = self._history.document
        self._workshop.want(document.shots(), again=again)
        self._show(mover, stamp)
        self._tell()

    def _made(self) -> None:
        """Something was made, begun or ended on the model's thread."""
        model = self._workshop.model
        if self._engine is None and model is not None and model.factors is not None:
            self._open_engine(model, model.factors)
        self._show()
        self._tell()

    def _open_engine(self, model: Model, factors: tuple[Tensor, Tensor]) -> None:
        renderer = RecipeRenderer(*factors, told=lambda view: (view.built.recipe, view.built.tensors))
        self._engine = PreviewEngine(
            None, renderer, self._view, scale=model.scale, budget=self._budget, decode=self._decode, encode=payload
        )
        self._spawn(self._pass_on(self._engine))

    def _show(self, mover: int | None = None, stamp: float | None = None) -> None:
        document, engine = self._history.document, self._engine
        clip = self._library.clip(document.shot)
        built = self._library.build(document)
        for shot, words in built.masks:
            self._spawn(self._make_mask(shot, words))
        view = View(built, document.shot, "", mover, stamp)
        if engine is None:
            return
        if clip is None:  # it is being made: what is shown on the way has no words yet
            if self._view.sampling:
                self._view = replace(view, sampling=self._view.sampling)
                engine.update(self._view)
            return
        if document.shot != self._source or (clip.frames is not None and self._decoded != document.shot):
            self._send_source(document.shot, clip)  # type: ignore[arg-type]
        same = document.shot == self._source and not self._view.sampling
        if not same or view.built.recipe != self._view.built.recipe or stamp is not None:
            self._view, self._source = view, document.shot
            engine.update(view) if same else engine.update(view, source=clip.latents)

    def _show_sampling(self, make: Callable[[], Tensor], shot: Shot, step: int) -> None:
        """On the model's thread: a step is done, this is where it leads to."""
        self._from_thread(self._sampled, Source(make), shot, f"{step} of {shot.steps}")

    def _sampled(self, source: Source, shot: Shot, sampling: str) -> None:
        document = self._history.document
        if self._engine is None or document.shot != shot or self._library.clip(shot) is not None:
            return
        # Masks of the clip before mean nothing here.
        layers = tuple(layer for layer in document.layers if not layer.words)
        self._view = View(self._library.build(replace(document, layers=layers)), shot, sampling)
        self._engine.update(self._view, source=source, final=False)

    async def _make_mask(self, shot: Shot, words: tuple[Word, ...]) -> None:
        await self._loop.run_in_executor(self._pool, self._library.make_mask, shot, words)
        self._show()
        self._tell()

    def _send_mask(self, client: Client) -> None:
        shot, words = self._history.document.shot, client.words
        if not words or self._library.clip(shot) is None:
            client.post("mask", NO_MASK)
            return
        self._spawn(self._send_made_mask(client, shot, words))  # type: ignore[arg-type]

    async def _send_made_mask(self, client: Client, shot: Shot, words: tuple[Word, ...]) -> None:
        mask = await self._loop.run_in_executor(self._pool, self._library.make_mask, shot, words)
        model = self._workshop.model
        if mask is None or client.words != words or model is None:
            return
        client.post("mask", mask_packet(mask, Timing.of(model)))

    # --- Pictures ----------------------------------------------------------------------------------------------------

    async def _pass_on(self, engine: PreviewEngine) -> None:
        with engine.subscribe() as previews:
            while True:
                try:
                    preview = await anext(previews)
                except PreviewError as error:
                    self._complain(str(error.__cause__ or error))
                except StopAsyncIteration:
                    return
                else:
                    self._last = preview.number, self._picture(preview)
                    for client in self._clients.values():
                        client.picture(*self._last)

    def _picture(self, preview: Preview) -> bytes:
        view: View = preview.parameters
        assert self._workshop.model is not None  # what is previewed, it made
        return edited_packet(
            preview,
            Timing.of(self._workshop.model),
            sampling=view.sampling,
            digest=_digest(view.built),
            mover=view.mover,
            stamp=view.stamp,
        )

    def _send_source(self, shot: Shot, clip: Clip) -> None:
        """The clip before its edits, projected, and decoded if it was."""
        model = self._workshop.model
        if model is None or model.factors is None:
            return
        timing = Timing.of(model)
        if self._source != shot or "source" not in self._sources:
            frames = projected(clip.latents, model, model.factors)
            self._sources = {"source": clip_packet("source", frames, timing.places(), timing)}
            self._decoded = None
            self._post("source", self._sources["source"])
            for client in self._clients.values():
                self._send_mask(client)
        if clip.frames is not None and self._decoded != shot:
            self._decoded = shot
            name = "source exact"
            self._sources[name] = clip_packet(name, clip.frames[None], range(len(clip.frames)), timing)
            self._post(name, self._sources[name])

    def _decode(self, latents: Tensor, outdated: Callable[[], bool]) -> Tensor:
        """On the engine's thread: the true decode, which waits while the model is at work."""
        model, clip = self._workshop.model, self._library.clip(self._source)
        if model is None:
            raise OutdatedError
        if clip is not None and clip.latents.data_ptr() == latents.data_ptr():  # nothing is edited
            while clip.frames is None and self._workshop.busy:
                if outdated():
                    raise OutdatedError
                time.sleep(0.02)
            if clip.frames is not None:
                return clip.frames[None]
        return model.decode(latents, outdated)

    # --- What is told ------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._post("state", self._state())

    def _state(self) -> dict[str, Any]:
        document, job, model = self._history.document, self._workshop.job, self._workshop.model
        clip = self._library.clip(document.shot)
        built = self._library.build(document)
        return {
            "type": "state",
            "clip": None if document.shot is None else {"revision": repr(document.shot), **vars(document.shot)},
            "words": [] if clip is None else [list(word) for word in clip.words],
            "note": "" if clip is None else clip.note,
            "layers": [self._layer(layer, built) for layer in document.layers],
            "digest": _digest(built),
            "undo": self._history.can_undo,
            "redo": self._history.can_redo,
            "ready": clip is not None,
            "waits": bool(built.masks),
            "defaults": None if model is None else model.defaults(),
            "device": "" if model is None else str(model.device),
            "model": "" if model is None else model.name,
            "job": None if job is None else vars(job),
        }

    def _layer(self, layer: Layer, built: Built) -> dict[str, Any]:
        kind = KINDS[layer.kind]
        where = "everywhere"
        if layer.words:
            where = f"where the model sees “{' '.join(word for word, _ in layer.words)}”"
        towards = "" if layer.shot is None else f" · “{layer.shot.prompt}”, seed {layer.shot.seed}"
        return {
            "id": layer.id,
            "kind": layer.kind,
            "label": kind.label,
            "amount": layer.amount,
            "low": kind.low,
            "high": kind.high,
            "step": 0.01,
            "on": layer.on,
            "words": [list(word) for word in layer.words],
            "where": where + towards,
            "problem": built.problems.get(layer.id),
        }

    async def _tell_stats(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._engine is None:
                continue
            stats = self._engine.stats()
            numbers = {"rate": stats.rate, "median": stats.median, "p99": stats.p99}
            self._post("stats", {"type": "stats", "clients": len(self._clients), **numbers})

    # --- Files -------------------------------------------------------------------------------------------------------

    async def frames(self) -> Tensor:
        """The edited clip, decoded: uint8 `(N, H', W', 3)`.

        Raises:
            RefusedError: there is none yet.
        """
        document, model = self._history.document, self._workshop.model
        clip = self._library.clip(document.shot)
        if clip is None or model is None:
            raise RefusedError("there is no clip to save yet")
        built = self._library.build(document)
        async with self._exports:
            return await asyncio.to_thread(_decoded, model, clip, built)

    def run(self) -> dict[str, Any]:
        """What the edited clip is made of, as JSON.

        Raises:
            RefusedError: there is no clip.
        """
        from latentfast.cache import environment

        document, model = self._history.document, self._workshop.model
        if document.shot is None or model is None:
            raise RefusedError("there is no run to save yet")
        return {
            **protocol.run_data(document),
            "recipe": self._library.build(document).recipe.to_data(),
            "model": model.name,
            "environment": environment(),
        }

    # --- Threads and tasks -------------------------------------------------------------------------------------------

    def _from_thread(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop has ended: nobody is left to be told
            return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _digest(built: Built) -> str:
    """Enough of a recipe's digest to tell it from others."""
    return built.recipe.digest[:12]


@torch.no_grad()
def _decoded(model: Model, clip: Clip, built: Built) -> Tensor:
    if not built.recipe.edits and clip.frames is not None:
        return clip.frames
    return model.decode(built.apply(clip.latents), lambda: False)[0]
