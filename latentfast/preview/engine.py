"""`PreviewEngine`: latents in, frames out, the newest state wins."""

from __future__ import annotations

import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from latentfast.preview.quality import Budget, Quality, qualities
from latentfast.preview.render import Renderer
from latentfast.preview.screen import Screen, Source
from latentfast.preview.subscription import PreviewError, Subscription

__all__ = ["Decode", "Preview", "PreviewEngine", "Stats"]

#: (edited latents, is it out of date?) -> uint8 frames (B, T', H', W', 3); it may raise once it is out of date
Decode = Callable[[Tensor, Callable[[], bool]], Tensor]
#: frames (B, T', H', W', 3) -> what `Preview.encoded` is to hold
Encode = Callable[[Tensor], Any]


class _Kept:
    """Stands for an argument that leaves what is there."""

    def __repr__(self) -> str:
        return "KEPT"


KEPT: Any = _Kept()


@dataclass(frozen=True)
class Preview:
    """A clip as it looks now.

    Attributes:
        number: Of the update that it shows, as `PreviewEngine.update` returned it.
        parameters: Of that update.
        frames: uint8 `(B, T', H', W', 3)` on the host, its consumers' own: it is never written again.
        exact: Decoded by the model, not projected by RGB factors; then there may be more frames than latent ones.
        every: Frames that are not exact are each so many-th latent frame.
        encoded: What the engine's `encode` made of the frames; None without.
        seconds: From the update to this preview's publication.
    """

    number: int
    parameters: Any
    frames: Tensor
    exact: bool
    every: int
    encoded: Any
    seconds: float


@dataclass(frozen=True)
class Stats:
    """What an engine did so far, and how fast the last previews came.

    Attributes:
        updates: How often something changed.
        previews: How many previews were made; fewer than updates, where these came faster.
        exact: How many true decodes.
        failures: Previews that could not be made.
        median: Of the seconds from an update to its preview, over the last 512.
        p99: The same, what 99% of them stay below.
        rate: Previews a second, over the last two seconds.
        quality: Of the last preview.
    """

    updates: int
    previews: int
    exact: int
    failures: int
    median: float
    p99: float
    rate: float
    quality: Quality | None


@dataclass
class _State:
    """What is to be shown."""

    number: int
    source: Source
    parameters: Any
    final: bool
    asked: float


class PreviewEngine:
    """Shows latents as they are edited: whole clips, the newest state, within a budget of time.

    A thread of its own renders. What changes while it does is rendered next, and only the last of it: ten moves of a
    slider give the tenth state, never a queue. On a GPU it renders on a stream of its own, and the frames come to the
    host by asynchronous copies into pinned buffers, which torch's pool hands out anew once nobody reads them (two of
    them circulate), so that work on other streams is never waited for, nor held up.

    If previews take longer than the budget, they get smaller, then have fewer frames; when nothing has changed for
    `idle` seconds, one of full size follows, then the true decode, if `decode` is given.

    Args:
        source: Latents `(B, C, T, H, W)` that the edits begin with; None: nothing is shown before an update.
        renderer: How they are shown, see `Renderer` and `RGBRenderer`.
        parameters: Of the edit at the beginning.
        scale: Pixels of a full-size preview for each latent cell, in H and in W.
        budget: Seconds from an update to its preview.
        idle: Seconds without an update before a preview is refined.
        decode: From edited latents to frames, on another thread; its second argument, called, tells whether what it
            decodes is out of date already.
        encode: What else is made of the frames while they are hot, such as `latentfast.preview.encode_jpeg`.

    Raises:
        ValueError: a shape or a number does not fit.

    All methods may be called from any thread. A context manager.

    Example:
        >>> import torch
        >>> from latentfast import tiny
        >>> from latentfast.preview import PreviewEngine, RGBRenderer
        >>> renderer = RGBRenderer(*tiny.rgb_factors(), edit=lambda latents, strength: strength * latents)
        >>> with PreviewEngine(torch.randn(1, 16, 7, 16, 16), renderer, 1.0) as engine:
        ...     previews = engine.subscribe()
        ...     number = [engine.update(strength / 10) for strength in range(10)][-1]
        ...     while (preview := previews.get(timeout=10)).number < number:
        ...         pass
        >>> preview.parameters, preview.frames.shape
        (0.9, torch.Size([1, 7, 128, 128, 3]))
    """

    def __init__(
        self,
        source: Tensor | None,
        renderer: Renderer,
        parameters: Any = None,
        *,
        scale: int = 8,
        budget: float = 0.1,
        idle: float = 0.15,
        decode: Decode | None = None,
        encode: Encode | None = None,
    ) -> None:
        for name, number in (("scale", scale), ("budget", budget), ("idle", idle)):
            if not number > 0:
                raise ValueError(f"{name} must be above 0, got {number}")
        self._renderer, self._scale, self._seconds, self._idle = renderer, scale, budget, idle
        self._decode, self._encode = decode, encode
        self._changed = threading.Condition()
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._state: _State | None = None
        self._parameters = parameters
        self._latest: Preview | None = None
        self._drawn = self._refined = self._decoded = 0  # numbers of updates
        self._numbers = self._previews = self._failures = self._exact = 0
        self._times: deque[tuple[float, float]] = deque(maxlen=512)  # of publication, and seconds from the update
        self._quality: Quality | None = None
        self._budgets: dict[tuple[int, ...], Budget] = {}
        self._screen, self._decode_screen = Screen(), Screen()
        self._closed = False
        if source is not None:
            self.update(source=source)
        self._threads = [threading.Thread(target=self._draw_all, name="latentfast-preview", daemon=True)]
        if decode is not None:
            self._threads.append(threading.Thread(target=self._decode_all, name="latentfast-decode", daemon=True))
        for thread in self._threads:
            thread.start()

    # --- What changes ------------------------------------------------------------------------------------------------

    def update(
        self, parameters: Any = KEPT, *, source: Tensor | Callable[[], Tensor] | Source = KEPT, final: bool = True
    ) -> int:
        """Show something else from now on. Returns at once.

        Args:
            parameters: Of the edit; without, they stay. They must not be changed afterwards.
            source: Other latents, complete on the caller's current stream, not written into afterwards; or a function
                that makes them, which is called on the engine's thread if they are still wanted then; or either as a
                `Source`, which notes the stream where it is made. Without, they stay.
            final: They are worth a true decode; False for what a sampling run passes through.

        Returns:
            The number of this update, counted up from 1.

        Raises:
            ValueError: `source` is not `(B, C, T, H, W)`, or there is none yet.
            RuntimeError: the engine is closed.
        """
        given = None if source is KEPT else source if isinstance(source, Source) else Source(source)
        with self._changed:
            if self._closed:
                raise RuntimeError("this engine is closed")
            if given is None and self._state is None:
                raise ValueError("source must be given with the first update, there is nothing to show yet")
            if parameters is not KEPT:
                self._parameters = parameters
            self._numbers += 1
            state = self._state
            held = given or state.source  # type: ignore[union-attr]
            self._state = _State(self._numbers, held, self._parameters, final, time.perf_counter())
            self._changed.notify_all()
            return self._numbers

    def attach(
        self, pipe: Any, *, noise: Tensor | None = None, parameters: Any = KEPT
    ) -> Callable[..., dict[str, Tensor]]:
        """A `callback_on_step_end` for a pipeline of diffusers: shows, after each step, the clip it is on its way to.

        That is x0, not the noisy latents: see `latentfast.integrations.diffusers.sampling.clean_estimate`. The sampling
        thread only hands the latents over; it launches nothing and waits for nothing.

        Args:
            pipe: A flow-matching text-to-video pipeline whose latents have frames (Wan, HunyuanVideo, Mochi); of other
                samplers the latents of the step are shown, noise included.
            noise: What the pipeline is called with as `latents`; without, the first step is not shown.
            parameters: Of the edit on the way; without, they stay.

        Returns:
            A function that changes nothing of the sampling.
        """
        from latentfast.preview.sampling import estimates

        def show(make: Callable[[], Tensor]) -> None:
            self.update(parameters, source=make, final=False)

        return estimates(pipe, noise, show)

    # --- Who looks ---------------------------------------------------------------------------------------------------

    def subscribe(self) -> Subscription:
        """A place for the newest preview, for one consumer; nothing is rendered while there is none.

        If the newest state was rendered already, its preview is there at once.

        Raises:
            RuntimeError: the engine is closed.
        """
        subscription = Subscription(self._leave)
        with self._changed:
            if self._closed:
                raise RuntimeError("this engine is closed")
            self._subscriptions.add(subscription)
            if self._latest is not None:
                subscription.offer(self._latest)
            if self._state is not None and self._state.number != self._drawn:
                self._state.asked = time.perf_counter()  # nobody waited for it before
            self._changed.notify_all()
        return subscription

    def _leave(self, subscription: Subscription) -> None:
        with self._changed:
            self._subscriptions.discard(subscription)

    def stats(self) -> Stats:
        """What was done so far, and how fast."""
        with self._changed:
            times = list(self._times)
            counts = (self._numbers, self._previews, self._exact, self._failures)
            quality = self._quality
        latencies = sorted(seconds for _, seconds in times)
        since = time.perf_counter() - 2
        return Stats(
            *counts,
            median=statistics.median(latencies) if latencies else 0.0,
            p99=latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))] if latencies else 0.0,
            rate=sum(at > since for at, _ in times) / 2,
            quality=quality,
        )

    def close(self) -> None:
        """End the threads and all subscriptions. A render, or decode, that runs is waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for subscription in list(self._subscriptions):
            subscription.end()
        self._state = self._latest = None

    def __enter__(self) -> PreviewEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- The thread that renders -------------------------------------------------------------------------------------

    def _draw_all(self) -> None:
        while (task := self._next_to_draw()) is not None:
            state, full = task
            try:
                preview = self._draw(state, full)
            except Exception as error:  # the caller's edit may raise anything, and the thread must live
                self._fail(state, error)
            else:
                self._publish(preview, state)

    def _next_to_draw(self) -> tuple[_State, bool] | None:
        """Waits for a state to render, and says whether it is to be of full size."""
        with self._changed:
            while not self._closed:
                state, pause = self._state, None
                if state is not None and self._subscriptions:
                    if state.number != self._drawn:
                        self._drawn = state.number
                        return state, False
                    if state.number != self._refined:
                        pause = state.asked + self._idle - time.perf_counter()
                        if pause <= 0:
                            self._refined = state.number
                            return state, True
                self._changed.wait(pause)
            return None

    def _draw(self, state: _State, full: bool) -> Preview:
        begin = time.perf_counter()
        screen = self._screen
        with screen.on(state.source.device):
            latents = state.source.latents()
            budget = self._budget(latents)
            quality = budget.choices[0] if full else budget.choose()
            frames = screen.blank(
                (latents.shape[0], quality.frames(latents.shape[2]), *quality.size, 3), latents.device
            )
            self._renderer.render(latents, state.parameters, every=quality.every, out=frames)
            frames = screen.to_host(frames)
        encoded = None if self._encode is None else self._encode(frames)
        end = time.perf_counter()
        budget.took(quality, end - begin)
        with self._changed:
            self._quality = quality
            if quality == budget.choices[0]:
                self._refined = state.number
        return Preview(state.number, state.parameters, frames, False, quality.every, encoded, end - state.asked)

    def _budget(self, latents: Tensor) -> Budget:
        shape = tuple(latents.shape)
        if shape not in self._budgets:
            size = (shape[3] * self._scale, shape[4] * self._scale)
            self._budgets = {shape: Budget(self._seconds, qualities(size, shape[2]), shape[2])}
        return self._budgets[shape]

    # --- The thread that decodes -------------------------------------------------------------------------------------

    def _decode_all(self) -> None:
        while (state := self._next_to_decode()) is not None:
            try:
                preview = self._decode_one(state)
            except Exception as error:
                if not self._outdated(state):
                    self._fail(state, error)
            else:
                self._publish(preview, state)

    def _next_to_decode(self) -> _State | None:
        with self._changed:
            while not self._closed:
                state, pause = self._state, None
                shown = state is not None and state.number == self._refined
                if state is not None and shown and state.final and state.number != self._decoded:
                    pause = state.asked + 2 * self._idle - time.perf_counter()
                    if pause <= 0 and self._subscriptions:
                        self._decoded = state.number
                        return state
                self._changed.wait(pause if pause is None or pause > 0 else None)
            return None

    @torch.no_grad()
    def _decode_one(self, state: _State) -> Preview:
        assert self._decode is not None  # or this thread would not run
        with self._decode_screen.on(state.source.device):
            edited = self._renderer.edited(state.source.latents(), state.parameters)
            frames = self._decode_screen.to_host(self._decode(edited, lambda: self._outdated(state)))
        encoded = None if self._encode is None else self._encode(frames)
        return Preview(state.number, state.parameters, frames, True, 1, encoded, time.perf_counter() - state.asked)

    def _outdated(self, state: _State) -> bool:
        return self._closed or self._state is not state

    # --- Both --------------------------------------------------------------------------------------------------------

    def _publish(self, preview: Preview, state: _State) -> None:
        with self._changed:
            latest = self._latest
            if self._closed or (latest is not None and (preview.number, preview.exact) < (latest.number, latest.exact)):
                return
            if preview.exact:
                if self._outdated(state):
                    return
                self._exact += 1
            else:
                self._previews += 1
                if latest is None or latest.number != preview.number:  # a refinement is not what a move waits for
                    self._times.append((time.perf_counter(), preview.seconds))
            self._latest = preview
            self._offer(preview)

    def _fail(self, state: _State, cause: Exception) -> None:
        error = PreviewError(f"update {state.number} can't be shown: {cause}")
        error.__cause__ = cause
        with self._changed:
            self._failures += 1
            self._refined = self._decoded = state.number  # it would fail again
            self._offer(error)

    def _offer(self, item: Any) -> None:
        for subscription in list(self._subscriptions):
            subscription.offer(item)
        self._changed.notify_all()
