"""Any steps of a sampling, through the pipeline's own `__call__`: to stop after one, and to go on from its state.

A pipeline's call is a preparation (texts, noise, timesteps), a loop over `scheduler.timesteps`, and a decoding. Here
the loop alone is steered, from four points that diffusers has:

* the scheduler is, for the time of a call, of a subclass that bears its parent's name. Its `timesteps` tell when the
  loop goes over them, and what a step returned beside the latents is kept;
* steps that were made before are skipped as an interrupted pipeline skips its own: `pipe._interrupt`, which every loop
  asks first. So the loop counts as it always does: the numbers of steps, `timesteps[i - 1]`, callbacks;
* before the first step that is to be made, the loop's `latents`, the scheduler's history and the generator get the
  values of the state. It is the variable that a callback would be handed, by its name;
* after each step the callback at its end sees the latents, and the state is taken.

Everything else is prepared as in a whole call, from the same arguments. What follows from a state therefore has the
bits of the sampling that was not interrupted, be the pipeline given a text, images, or conditions.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentfast.integrations.diffusers.behind import Behind
from latentfast.integrations.diffusers.schedulers import ACCELERATED

__all__ = ["State", "default_generators", "generators_of", "run_steps"]

#: What a step leaves in a scheduler: tensors, numbers, lists of them.
_Value = Any

#: Attributes that are no history: the configuration, and what this module adds.
_NOT_HISTORY = ("_internal_dict", "_sampling")

#: Arguments by which a pipeline is given more than a text: what it prepares of them, it may prepare with the noise.
_CONDITIONS = ("image", "images", "video", "conditions", "image_embeds", "last_image", "mask", "mask_image")


@dataclass(frozen=True)
class State:
    """A sampling between two steps: all that the rest of it follows from, besides the arguments of the call.

    Its tensors may be shared with other states: never write into them.

    Attributes:
        step: How many steps were made.
        steps: How many there are.
        latents: The loop's, in the layout that its callbacks see.
        history: What the steps left in the scheduler, by attribute: tensors, numbers, None, lists of them. A state
            without any begins a multistep solver anew, as at the first step.
        extras: What the scheduler's next step needs of what its last returned besides the latents.
        generator: The states, uint8, of the call's generators and of torch's own: not every pipeline hands its
            generator to a scheduler that draws noise.
        x0: The clip that the last step's prediction leads to, None where it is not known.
    """

    step: int
    steps: int
    latents: Tensor
    history: Mapping[str, _Value] = field(default_factory=dict)
    extras: tuple[Tensor, ...] = ()
    generator: tuple[Tensor, ...] = ()
    x0: Tensor | None = None

    def with_latents(self, latents: Tensor) -> State:
        """The same place in the sampling with other latents.

        Multistep solvers begin anew there: what they remember is of other latents, and UniPC's corrector would even
        put those back.

        Raises:
            ValueError: the latents have another shape, or the solver is between two halves of one step.
        """
        if latents.shape != self.latents.shape:
            raise ValueError(f"latents must keep their shape {tuple(self.latents.shape)}, got {tuple(latents.shape)}")
        if any(self.history.get(name) is not None for name in ("prev_derivative", "sample")):
            raise ValueError(f"from_step: {self.step} is between the two halves of one step of the solver")
        place = {name: value for name, value in self.history.items() if name == "_step_index"}
        return State(self.step, self.steps, latents, place, (), self.generator)

    def moved(self, step: int, latents: Tensor) -> State:
        """A state before the first step, as one at another step whose latents come from elsewhere."""
        place = {"_step_index": step} if "_step_index" in self.history else {}
        return State(step, self.steps, latents, place, (), self.generator)


def default_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """Torch's own generators: that of the CPU, and that of a device.

    Args:
        device: Of type "cpu" or "cuda".
    """
    if device.type != "cuda":
        return (torch.default_generator,)
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return (torch.default_generator, torch.cuda.default_generators[index])


def generators_of(call: Mapping[str, Any]) -> tuple[torch.Generator, ...]:
    """The generators that a call is given."""
    given = call.get("generator")
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Sequence) else (given,)


def run_steps(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    start: State | None = None,
    end: int | None = None,
    wants: Callable[[int, int], bool] = lambda step, steps: True,
    on_state: Callable[[State], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Any, int]:
    """Call a pipeline, but make only some steps of its sampling.

    Args:
        pipe: A pipeline of diffusers with a loop over `scheduler.timesteps` in its `__call__`, with or without
            `accelerate`.
        call: The arguments of the whole sampling, whichever of its steps are made. Generators among them advance; where
            `start` is given, they are to be as they were when the sampling began.
        start: The state to go on from; None begins.
        end: The number of steps after which to stop; None makes them all.
        wants: Whether the state after `step` of `steps` is wanted; 0 is the state before the first.
        on_state: Gets those states, in order, and does not write into their tensors. On a GPU each comes when the next
            step's forward is queued, at the latest before this returns or raises, and in a stream of its own.
        on_step: Is told after each step that is made how many were, of how many.

    Torch's own generators are left in the state that the last step left them in.

    Returns:
        What the pipeline returned, and how many steps its whole sampling has.

    Raises:
        ValueError: the pipeline can't be steered, or its scheduler keeps something that can't be saved.
    """
    sampling = _Sampling(pipe, call, start, end, wants, on_state or _ignore, on_step or _ignore)
    return sampling.run()


def _ignore(*_: Any) -> None:
    pass


class _Timesteps(Tensor):
    """A schedule that tells a sampling when a loop goes over it; so do its slices and copies."""

    sampling: _Sampling

    def __iter__(self) -> Iterator[Tensor]:
        return self.sampling.over(self.as_subclass(Tensor), sys._getframe(1))

    @classmethod
    def of(cls, timesteps: Tensor, sampling: _Sampling) -> Tensor:
        made = timesteps.as_subclass(cls)
        made.sampling = sampling
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        keeps = func in (Tensor.__getitem__, Tensor.to) and isinstance(args[0], cls) and made.ndim == 1
        return cls.of(made, args[0].sampling) if keeps else made


class _Sampling:
    """One call of a pipeline."""

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        start: State | None,
        end: int | None,
        wants: Callable[[int, int], bool],
        on_state: Callable[[State], None],
        on_step: Callable[[int, int], None],
    ) -> None:
        scheduler = getattr(pipe, "scheduler", None)
        parameters = inspect.signature(type(pipe).__call__).parameters
        if scheduler is None or "callback_on_step_end" not in parameters:
            raise ValueError(
                f"pipe must have a scheduler and take callback_on_step_end, {type(pipe).__name__} does not"
            )
        self.pipe, self.scheduler, self.call = pipe, scheduler, dict(call)
        self.start, self.end, self.wants, self.on_step = start, end, wants, on_step
        self.states = Behind(on_state)
        self.first = 0 if start is None else start.step
        self.codes = [inspect.unwrap(c.__call__).__code__ for c in type(pipe).__mro__ if "__call__" in vars(c)]
        #: The loop can skip steps; where it can't, those before the first are not in it, and its numbers begin at 0.
        self.skips = hasattr(type(pipe), "interrupt")
        self.parameters = parameters
        self.signature = inspect.signature(scheduler.step)
        #: Whether a step needs what the one before it returned.
        self.carries = "old_pred_original_sample" in self.signature.parameters
        self.generators = generators_of(call)
        self.inside = False  # whether one of the scheduler's own methods runs
        self.step = self.first  # how many steps were made
        self.steps: int | None = None
        self.extras: tuple[Tensor, ...] = ()
        self.x0: Tensor | None = None
        self.converted: tuple[Tensor, Tensor | None, Tensor] | None = None  # a prediction, with which sample, as what
        self.before: dict[str, _Value] = {}  # the scheduler's attributes when the loop began

    def run(self) -> tuple[Any, int]:
        scheduler, cls, bar = self.scheduler, type(self.scheduler), getattr(self.pipe, "_progress_bar_config", None)
        if "_sampling" in vars(scheduler):
            raise ValueError("pipe: its scheduler is in the middle of a sampling")
        scheduler._sampling = self
        scheduler.__class__ = _watched(cls)  # type: ignore[arg-type]
        if self.first:
            self.pipe.set_progress_bar_config(**(bar or {}), initial=self.first // getattr(scheduler, "order", 1))
        try:
            made = self.pipe(**self._arguments())
        finally:
            scheduler.__class__ = cls
            del scheduler._sampling
            if self.first:
                self.pipe.set_progress_bar_config(**(bar or {}))
            self.states.finish()
        if self.steps is None:
            raise ValueError(f"pipe: {type(self.pipe).__name__} has no loop over its scheduler's timesteps in its call")
        return made, self.steps

    def _arguments(self) -> dict[str, Any]:
        call, user = self.call, self.call.get("callback_on_step_end")
        inputs = list(getattr(user, "tensor_inputs", None) or call.get("callback_on_step_end_tensor_inputs") or ())
        given = {
            **call,
            "callback_on_step_end": self.after_step,
            "callback_on_step_end_tensor_inputs": inputs if "latents" in inputs else [*inputs, "latents"],
        }
        if isinstance(call.get("latents"), Tensor):
            given["latents"] = call["latents"].detach()  # a tensor of its own: see `restore`
        elif self.start is not None and self._only_text():
            # Nothing but noise would be prepared, only to be replaced: on a large clip that takes tens of milliseconds.
            given["latents"] = self.start.latents.detach()
        return given

    def _only_text(self) -> bool:
        return "latents" in self.parameters and not any(name in self.parameters for name in _CONDITIONS)

    # --- the loop

    def over(self, timesteps: Tensor, frame: Any) -> Iterator[Tensor]:
        """The loop's timesteps; or, of any other loop, those that it goes over."""
        if frame.f_code not in self.codes:
            return iter(timesteps)
        # as callbacks are handed them: by their name
        return self._over(timesteps, frame.f_locals.get("latents"))

    def _over(self, timesteps: Tensor, latents: Any) -> Iterator[Tensor]:
        steps = self.steps = len(timesteps)
        first, end = self.first, steps if self.end is None else self.end
        if not first <= end <= steps or (self.start is not None and self.start.steps != steps):
            were = "" if self.start is None else f" of {self.start.steps}"
            raise ValueError(f"start, end: steps {first}{were} to {end} are not among the {steps} of this call")
        if not isinstance(latents, Tensor):
            raise ValueError(f"pipe: the loop of {type(self.pipe).__name__} has no tensor called latents")
        self.generators = (*self.generators, *default_generators(latents.device))
        self.before = {name: list(x) if isinstance(x, list) else x for name, x in vars(self.scheduler).items()}
        if self.start is None and self.wants(0, steps):
            self.states.take(self._state(latents), latents.device)
        for i, t in enumerate(timesteps.unbind(0)):
            if i == first:
                self.restore(latents)
            if not self.skips:
                if first <= i < end:
                    yield t
                continue
            if i in (0, first, end):
                self.pipe._interrupt = not first <= i < end
            yield t
        if first == steps:
            self.restore(latents)
        if self.skips and end < steps:
            self.pipe._interrupt = False

    def restore(self, latents: Tensor) -> None:
        """Put the state that was to be gone on from in the place of what was prepared."""
        state, scheduler = self.start, self.scheduler
        if state is None:
            return
        # The variable itself, whatever its dtype was: steps may change it. Not into its memory, which others may see.
        latents.data = state.latents.to(latents.device)
        for name, value in state.history.items():
            setattr(scheduler, name, _on(value, latents.device))
        for generator, numbers in zip(self.generators, state.generator, strict=True):
            generator.set_state(numbers)
        self.extras = state.extras

    def after_step(self, pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """The callback at a step's end: the user's own first, with the number that the step has in the whole."""
        steps, user = self.steps or 0, self.call.get("callback_on_step_end")
        number = i if self.skips else i + self.first
        replaced = dict(user(pipe, number, t, tensors)) if user is not None else {}
        self.step = number + 1
        if self.wants(self.step, steps):
            latents = replaced.get("latents", tensors["latents"])
            self.states.take(self._state(latents), latents.device)
        self.on_step(self.step, steps)
        return replaced

    def _state(self, latents: Tensor) -> State:
        history = self._history()
        generator = tuple(generator.get_state() for generator in self.generators)
        return State(self.step, self.steps or 0, latents.clone(), history, self.extras, generator, self.x0)

    def _history(self) -> dict[str, _Value]:
        """What the steps left in the scheduler; and all its numbers, as set_timesteps may leave some as they were."""
        scheduler, history = self.scheduler, {}
        leave = (*_NOT_HISTORY, *getattr(type(scheduler), "_beside", ()))
        for name, value in vars(scheduler).items():
            if name in leave:
                continue
            if isinstance(value, list):
                value = list(value)
            elif value is self.before.get(name) and not (value is None or isinstance(value, bool | int | float | str)):
                continue
            if not _plain(value):
                what = f"{name} ({type(value).__name__})"
                raise ValueError(f"pipe: {type(scheduler).__name__} keeps {what}, which can't be saved")
            history[name] = value
        return history

    # --- what the scheduler is asked

    def view(self, timesteps: Tensor) -> Tensor:
        """The scheduler's timesteps, as a pipeline gets them."""
        return timesteps if self.inside else _Timesteps.of(timesteps, self)

    def stepped(self, parents: Callable, scheduler: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A step of the scheduler."""
        self.states.hand_on()  # the forward is queued, and the first thing that a step does may be to wait for it
        given = self.signature.bind(*args, **kwargs).arguments
        if self.carries and self.step == self.first and self.extras:
            # CogVideoX's loop has the last step's second result in a variable, which begins with None.
            given["old_pred_original_sample"] = self.extras[0].to(given["sample"].device)
            args, kwargs = (), given
        was, self.inside = self.inside, True
        try:
            x0 = self._x0(scheduler, given) if self.wants(self.step + 1, self.steps or 0) else None
            result = parents(scheduler, *args, **kwargs)
        finally:
            self.inside, self.converted = was, None
        second = (result if isinstance(result, tuple) else result.to_tuple())[1:2]
        if self.carries:
            self.extras = second
        own = getattr(scheduler, "x0", None)
        self.x0 = own if own is not None else x0 if x0 is not None else next(iter(second), None)
        return result

    def convert(self, parents: Callable, scheduler: Any, prediction: Tensor, args: tuple, kwargs: dict) -> Any:
        """A prediction as a multistep solver remembers it: `x0` needs it before the step does, and is it for most. So
        it is made once, and once kept.
        """
        sample, known = kwargs.get("sample"), self.converted
        if known is not None and known[0] is prediction and known[1] is sample and not args and len(kwargs) < 2:
            return known[2]
        made = parents(scheduler, prediction, *args, **kwargs)
        self.converted = prediction, sample, made
        return made

    @staticmethod
    def _x0(scheduler: Any, given: dict[str, Any]) -> Tensor | None:
        """The clip that a plain scheduler's step leads to, where its step does not return it."""
        known = ACCELERATED.get(type(scheduler).__name__)
        if known is None or known._x0_of is None or hasattr(scheduler, "keep_x0"):
            return None
        if given.get("per_token_timesteps") is not None:
            return None
        if getattr(scheduler, "step_index", 0) is None:
            scheduler._init_step_index(given["timestep"])
        return known._x0_of(scheduler, given["sample"], given["model_output"])


@functools.cache
def _watched(cls: type) -> type:
    """A subclass of a scheduler's class, with its name, that asks the sampling that runs."""

    def timesteps(self: Any) -> Tensor:
        return vars(self)["_sampling"].view(vars(self)["timesteps"])

    def set_timesteps(self: Any, value: Tensor) -> None:
        vars(self)["timesteps"] = value

    @functools.wraps(cls.step)  # type: ignore[attr-defined]
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_sampling"].stepped(cls.step, self, args, kwargs)  # type: ignore[attr-defined]

    def convert_model_output(self: Any, prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        parents = cls.convert_model_output  # type: ignore[attr-defined]
        return vars(self)["_sampling"].convert(parents, self, prediction, args, kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    own = {"timesteps": property(timesteps, set_timesteps), "step": step}
    if hasattr(cls, "convert_model_output"):
        own["convert_model_output"] = convert_model_output
    return type(cls.__name__, (cls,), {**names, **own})


def _plain(value: _Value) -> bool:
    """Whether a value is of the kinds that a history has."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _on(value: _Value, device: torch.device) -> _Value:
    """A history's value where the latents are; schedulers write into their lists."""
    if isinstance(value, list | tuple):
        return [_on(x, device) for x in value]
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value
