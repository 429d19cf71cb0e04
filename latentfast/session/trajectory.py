"""What a sampling leaves: its request, the states that were kept, the latents at its end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentfast.cache import Key
from latentfast.integrations.diffusers.steps import State, default_generators

__all__ = ["Request", "Seeds", "Trajectory"]


@dataclass(frozen=True)
class Seeds:
    """The generators of a call, as they are when it begins.

    Attributes:
        devices: Where they draw.
        states: Theirs, uint8.
        several: Whether the call is given a list of them.
    """

    devices: tuple[str, ...]
    states: tuple[Tensor, ...]
    several: bool = False

    def generators(self) -> Any:
        """New generators in these states, as a call takes them."""
        made = [torch.Generator(device) for device in self.devices]
        for generator, state in zip(made, self.states, strict=True):
            generator.set_state(state)
        return made if self.several else made[0]

    @contextmanager
    def elsewhere(self, device: torch.device) -> Iterator[None]:
        """Inside, torch's own generators are seeded by these, those of the CPU and the device; outside they keep their
        states.
        """
        digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in self.states)).digest()
        own = default_generators(device)
        before = [generator.get_state() for generator in own]
        try:
            for generator in own:
                generator.manual_seed(int.from_bytes(digest[:8], "little"))
            yield
        finally:
            for generator, state in zip(own, before, strict=True):
                generator.set_state(state)


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        call: The arguments of the pipeline's call, but for the generator and what the session sets itself.
        seeds: Its generators.
        data: All that the result depends on, as JSON; None where the call has something that can't be written.
        inputs: The tensors that `data` names.
        device: Where the pipeline computes.
    """

    call: Mapping[str, Any]
    seeds: Seeds
    data: Mapping[str, Any] | None
    inputs: Mapping[str, Tensor]
    device: torch.device

    @cached_property
    def digest(self) -> str | None:
        """The digest of all that the result depends on."""
        return None if self.data is None else Key.of(self.data).digest

    def arguments(self) -> dict[str, Any]:
        """What to call the pipeline with, with new generators."""
        return {**self.call, "generator": self.seeds.generators()}


@dataclass(frozen=True)
class Trajectory:
    """A sampling that was made, from its first step or from a step of another.

    Its tensors may be shared with the session: never write into them.

    Attributes:
        request: What was asked for.
        steps: How many steps the sampling has.
        latents: At its end, as the pipeline returns them for `output_type="latent"`.
        kept: The steps after which there is a state of its own, in order; 0 is before the first.
        begin: The step after which it leaves its parent; 0 without one.
        parent: The trajectory that it left.
        edited: Whether its latents at `begin` are others than the parent's.
        made: How many steps were run for it.
    """

    request: Request
    steps: int
    latents: Tensor = field(repr=False)
    kept: tuple[int, ...]
    begin: int = 0
    parent: Trajectory | None = field(default=None, repr=False)
    edited: bool = False
    made: int = 0
    _find: Callable[[int], State | None] = field(default=lambda step: None, repr=False)

    def owner(self, step: int) -> Trajectory:
        """The trajectory, this one or one before it, in which a step was made.

        Raises:
            ValueError: there is no such step.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= self.steps:
            raise ValueError(f"step must be a number in [0, {self.steps}], got {step!r}")
        if self.parent is not None and (step < self.begin or (step == self.begin and not self.edited)):
            return self.parent.owner(step)
        return self

    def state(self, step: int) -> State | None:
        """The state after so many steps; None if it was not kept, or a cache has let go of it.

        Raises:
            ValueError: there is no such step.
        """
        return self.owner(step)._find(step)

    def x0(self, step: int) -> Tensor | None:
        """The clip that the prediction in a step, counted from 1, led to; None where that is not known.

        It has the loop's layout, as states have.
        """
        state = self.state(step)
        return None if state is None else state.x0
