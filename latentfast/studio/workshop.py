"""The thread that the model runs on: it makes the clips that are wanted, and drops what is not wanted any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentfast.studio.document import Shot
from latentfast.studio.library import Library
from latentfast.studio.model import Model, OutdatedError

__all__ = ["Job", "Workshop"]

_log = logging.getLogger("latentfast")


@dataclass(frozen=True)
class Job:
    """What runs now: a sentence, how far it is, and whether it can be stopped."""

    text: str
    done: int = 0
    of: int = 0
    stoppable: bool = False


class Workshop:
    """Makes what is wanted, one thing at a time, the first first.

    There is no queue of requests: there is a list of the clips that the document needs now. What is missing of it is
    made; what was begun and is not on it any more ends after its step.

    Args:
        load: Gives the model, for as long as the workshop runs.
        library: Gets the clips.
        changed: Called from this thread when something was made or begun; must not wait.
        failed: Called with a sentence when something could not be made.
        show: Given clean estimates of the first clip on the list while it is made (see `Model.make`), and their step.
    """

    def __init__(
        self,
        load: Callable[[], AbstractContextManager[Model]],
        library: Library,
        *,
        changed: Callable[[], None],
        failed: Callable[[str], None],
        show: Callable[[Callable[[], Tensor], Shot, int], None],
    ) -> None:
        self._load, self._library = load, library
        self._tell, self._complain, self._show = changed, failed, show
        self._changed = threading.Condition()
        self._wanted: list[Shot] = []
        self._failed: set[Shot] = set()
        self._closed = False
        self.model: Model | None = None
        self.job: Job | None = Job("Loading the model …")
        self._thread = threading.Thread(target=self._run, name="latentfast-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def want(self, shots: list[Shot], *, again: bool = False) -> None:
        """These clips are needed, the first of them decoded too; `again`: also those that could not be made before."""
        with self._changed:
            self._wanted = list(shots)
            self._failed = set() if again else self._failed & set(shots)
            self._library.want(shots)
            self._changed.notify_all()

    def close(self) -> None:
        """End after the step that runs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def busy(self) -> bool:
        return self.job is not None

    def _run(self) -> None:
        try:
            with self._load() as model:
                self.model = model
                self._library.factors = model.factors
                self._say(None)
                while (shot := self._next()) is not None:
                    self._make(model, shot)
        except Exception as error:
            said = f"The model can't be loaded: {_line(error)}"
            _log.error("%s", said)  # for whoever started it
            self._say(Job(said))

    def _next(self) -> Shot | None:
        """Waits for something that is wanted and not there."""
        with self._changed:
            while not self._closed:
                for index, shot in enumerate(self._wanted):
                    clip = self._library.clip(shot)
                    if shot not in self._failed and (clip is None or (index == 0 and clip.frames is None)):
                        return shot
                self._changed.wait()
            return None

    def _make(self, model: Model, shot: Shot) -> None:
        def outdated() -> bool:
            return self._closed or shot not in self._wanted

        def on_step(step: int) -> None:
            what = "the clip" if first else "the other clip"
            self._say(Job(f"Making {what}: step {step} of {shot.steps}", step, shot.steps, True))

        with self._changed:
            first = self._wanted[:1] == [shot]

        def show(make: Callable[[], Tensor]) -> None:
            self._show(make, shot, 1 + (0 if self.job is None else self.job.done))

        try:
            clip, key = self._library.clip(shot), model.key(shot)
            if clip is None:
                clip = model.recall(key)
                if clip is None:
                    on_step(0)
                    clip = model.make(shot, outdated=outdated, on_step=on_step, show=show if first else None)
                    model.remember(key, clip)
                self._library.keep(shot, clip)
                self._tell()
            if first:
                if clip.frames is None:
                    self._say(Job("Decoding the clip …"))
                    clip.frames = model.decode(clip.latents, outdated)[0]
                    model.remember(key, clip)
                model.fit(clip)
                self._library.factors = model.factors
        except OutdatedError:
            pass
        except Exception as error:  # whatever a model raises, the studio goes on
            with self._changed:
                self._failed.add(shot)
            self._complain(f"That clip can't be made: {_line(error)}")
        self._say(None)

    def _say(self, job: Job | None) -> None:
        self.job = job
        self._tell()


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
