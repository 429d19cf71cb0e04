"""Which states of a trajectory are kept, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from latentfast.cache import Key, LatentCache
from latentfast.integrations.diffusers.steps import State
from latentfast.session import states
from latentfast.session.trajectory import Request

__all__ = ["Budget", "Keep", "Shelf", "check_keep"]


@dataclass(frozen=True)
class Budget:
    """As many states, evenly spread, as take no more than so many bytes. The last one is kept in any case."""

    nbytes: int

    def __post_init__(self) -> None:
        if self.nbytes <= 0:
            raise ValueError(f"nbytes must be above 0, got {self.nbytes}")


#: Every state, every n-th, or those for which there is room.
Keep = Literal["all"] | int | Budget


def check_keep(keep: object) -> None:
    """Refuse what is no policy with a ValueError."""
    if isinstance(keep, Budget) or keep == "all":
        return
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be 'all', a number of steps from 1, or a Budget, got {keep!r}")


class Shelf:
    """The states of one request: in a cache by their keys, or here.

    Args:
        request: What they are of.
        cache: Where they are; None: here, as long as the shelf is.
        keep: Which ones.
    """

    def __init__(self, request: Request, cache: LatentCache | None, keep: Keep) -> None:
        check_keep(keep)
        self._request = request
        self._cache = None if request.data is None else cache
        self._stride = keep if isinstance(keep, int) else 1
        self._budget = keep.nbytes if isinstance(keep, Budget) else None
        self._keys: dict[int, Key] = {}  # each is asked for when a request is looked up, kept, and at its end
        self._here: dict[int, State] = {}
        self._put: dict[int, int] = {}  # bytes of what is in the cache, by step

    def key(self, step: int) -> Key:
        """What a state is found by."""
        if step not in self._keys:
            self._keys[step] = Key.of({"kind": "state", "request": self._request.digest, "step": step})
        return self._keys[step]

    def wants(self, step: int, steps: int) -> bool:
        """Whether the state after a step is to be kept."""
        return step % self._stride == 0 or step == steps

    def add(self, state: State, seconds: float = 0.0) -> None:
        """Keep a state that took so long to make; where there is a budget, every second one goes when it is passed.

        What a cache was given stays there as long as it has room: it is only given fewer from then on.
        """
        if self._cache is None:
            self._here[state.step] = state
        else:
            packed = states.pack(state)
            self._cache.put(self.key(state.step), packed, seconds=seconds)
            self._put[state.step] = sum(x.nbytes for x in packed.values())
        while self._budget is not None and self._nbytes() > self._budget and self._stride <= state.steps:
            self._stride *= 2
            for held in (self._here, self._put):
                for step in [step for step in held if not self.wants(step, state.steps)]:
                    del held[step]

    def _nbytes(self) -> int:
        """Of all that is kept; here, states share what a multistep solver remembers in several."""
        here = {id(x): x.nbytes for state in self._here.values() for x in _tensors(state)}
        return sum(here.values()) + sum(self._put.values())

    def has(self, step: int) -> bool:
        """Whether `find` would very likely find it."""
        return step in self._here or (self._cache is not None and self.key(step) in self._cache)

    def find(self, step: int) -> State | None:
        """The state after a step; None if it is not there."""
        if self._cache is None or step in self._here:
            return self._here.get(step)
        found = self._cache.get(self.key(step), device=self._request.device)
        return None if found is None else states.unpack(found)


def _tensors(state: State) -> Iterator[Tensor]:
    yield from _in([state.latents, state.x0, *state.extras, *state.generator, *state.history.values()])


def _in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _in(x)
