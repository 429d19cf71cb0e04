"""`LinearStep`: a scheduler of diffusers whose step is one launch of `latentfast.combine`.

A subclass inherits everything from diffusers' scheduler: configuration, noise levels, timesteps, the order of its
solver. Only the arithmetic on latents is replaced. The coefficients of a step follow from the noise levels and from how
many steps came before; `_probe` reads them off diffusers' own step, on the host, when a step of that kind is first met.
They are kept for the schedule, so sampling again with the same number of steps only looks them up.

The prediction may be a sum that has not been computed, such as of a guidance: an object with a tensor's `shape` and
`dtype`, and a method `linear_terms()` that returns the tensors and their coefficients, `[(cond, w), (uncond, 1 − w)]`.
They go into the step's launch in its place.

Nothing waits for the device: the values of the timesteps are kept on the host, and a timestep that is a view of
`timesteps`, as pipelines pass them, is found by its place in memory.
"""

import copyreg
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import latentfast
from latentfast.integrations.diffusers.schedulers._probe import PREDICTION, NotLinear, Place, Plan, plan
from latentfast.ops._checks import DTYPES
from latentfast.ops.combine import MOST_RESULTS, MOST_TENSORS

#: Schedules whose coefficients are kept: a server samples with a few.
_SCHEDULES = 8
#: Steps whose coefficients are kept for one schedule; more are met only if options change with every step.
_PLANS = 4096

#: What is known of a schedule: the plans of steps by their circumstances, or why there is none; places of timesteps.
_Plans = dict[Hashable, Any]


@dataclass
class _Host:
    """What is known on the host of a scheduler's tensors."""

    #: The scheduler's own tensors, on whatever device, and where they are on the host.
    own: dict[str, Tensor]
    copies: dict[str, Tensor]
    plans: _Plans

    def is_of(self, attributes: dict[str, Any]) -> bool:
        """Whether a scheduler still has the tensors that its steps follow from."""
        own = self.own
        return (
            attributes.get("timesteps") is own.get("timesteps")
            and attributes.get("sigmas") is own.get("sigmas")
            and attributes.get("alphas_cumprod") is own.get("alphas_cumprod")
        )


class LinearStep:
    """A base beside a scheduler of diffusers; the subclass takes its name and its place."""

    #: Attributes with the tensors that one step leaves to the next, or lists of them.
    _history: ClassVar[tuple[str, ...]] = ()
    #: Other attributes that the coefficients depend on.
    _settings: ClassVar[tuple[str, ...]] = ()
    #: Arguments of `step` that are timesteps, where the coefficients depend on their values.
    _times: ClassVar[tuple[str, ...]] = ()
    #: Attributes that diffusers leaves behind from an earlier sampling, without a meaning for the next.
    _stale: ClassVar[tuple[str, ...]] = ()
    #: The attribute that lists the timesteps of the last steps.
    _past_times: ClassVar[str | None] = None
    #: Attributes that `set_timesteps` puts on the device.
    _on_device: ClassVar[tuple[str, ...]] = ("timesteps",)
    #: Why a configuration leaves the step to diffusers: values of the configuration that say so.
    _reasons: ClassVar[dict[str, str]] = {
        "thresholding": "dynamic thresholding needs a quantile of every sample",
        "clip_sample": "clip_sample limits every element",
    }
    #: Whether sums are made in float64: the coefficients of higher orders cancel.
    _precise: ClassVar[bool] = True
    #: Attributes that diffusers' scheduler does not have.
    _beside: ClassVar[tuple[str, ...]] = ("_host", "_schedules", "_why", "x0", "keep_x0")
    _parent: ClassVar[Any]
    _parameters: ClassVar[tuple[str, ...]]
    _returns_dict: ClassVar[bool]

    #: Whether `x0` is made even where that is a further output of a step's launch.
    keep_x0: bool = True
    #: The clip that the last step's prediction leads to; None before the first step, and where it is not known. To be
    #: read alone: solvers go on with it.
    x0: Tensor | None = None
    _host: _Host | None = None
    _why: str = ""

    def __init_subclass__(cls) -> None:
        if LinearStep not in cls.__bases__:
            return  # a user's subclass of one of these
        cls._parent = parent = cls.__mro__[cls.__mro__.index(LinearStep) + 1]
        # a pipeline's model_index.json names the class's module: plain diffusers has to find it
        cls.__module__ = parent.__module__
        for name in ("step", "set_timesteps", "index_for_timestep", "_init_step_index", "add_noise"):
            if hasattr(parent, name):
                setattr(cls, name, cls._wrapped(name, getattr(cls, f"_fast_{name.lstrip('_')}")))
        parameters = inspect.signature(cls._parent.step).parameters
        cls._parameters, cls._returns_dict = tuple(parameters)[1:], parameters["return_dict"].default

    @classmethod
    def _wrapped(cls, name: str, function: types.FunctionType) -> Callable:
        """The function with the signature and the docstring of diffusers' method: pipelines look at them."""
        own = types.FunctionType(function.__code__, function.__globals__, name, function.__defaults__)
        return functools.update_wrapper(own, getattr(cls._parent, name))

    def __reduce__(self):
        if LinearStep not in type(self).__bases__:
            return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]
        # by name, as `__module__` is diffusers': pickle would look for the class there
        return _blank, (type(self).__name__,), vars(self)

    # --- what diffusers calls

    def _fast_set_timesteps(self, *args, **kwargs) -> None:
        bound = inspect.signature(self._parent.set_timesteps).bind(self, *args, **kwargs)
        device = bound.arguments.get("device")
        if getattr(self, "solver_p", None) is None:
            bound.arguments["device"] = "cpu"  # to know the values; what belongs to the device goes there afterwards
        self._parent.set_timesteps(*bound.args, **bound.kwargs)
        self.x0 = None
        for name in self._stale:
            vars(self).pop(name, None)
        copies = self._copies()
        for name in self._on_device:
            setattr(self, name, copies[name].to(device) if device is not None else copies[name])
        self._host = _Host(self._tensors(), copies, self._plans_of(copies))

    def _fast_index_for_timestep(self, timestep, schedule_timesteps=None):
        """As diffusers', on the host's copy of the timesteps."""
        if schedule_timesteps is None or schedule_timesteps is self.timesteps:  # type: ignore[attr-defined]
            host, value = self._on_host(), self._value(timestep)
            key = ("index_for_timestep", _number(value))
            if key not in host.plans:
                host.plans[key] = self._parent.index_for_timestep(self, value, host.copies["timesteps"])
            return host.plans[key]
        return self._parent.index_for_timestep(self, timestep, schedule_timesteps)

    def _fast_init_step_index(self, timestep) -> None:
        begin = self.begin_index  # type: ignore[attr-defined]
        self._step_index = self._fast_index_for_timestep(timestep) if begin is None else begin

    def _fast_step(self, *args, **kwargs):
        given = dict(zip(self._parameters, args, strict=False))
        given.update(kwargs)
        try:
            found = self._plan(given)
        except NotLinear as reason:
            self._why = str(reason)
            self.x0 = None
            return self._parent.step(self, *args, **kwargs)
        return self._run(found, given)

    def _fast_add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As diffusers', in one launch where all samples get as much noise."""
        given = {"original_samples": original_samples, "noise": noise, "timesteps": timesteps}
        return self._noised("add_noise", "timesteps", given)

    def why_not_fast(self) -> str:
        """Why steps are left to diffusers: what in the configuration, or in the last step, says so; '' if nothing."""
        for name, reason in self._reasons.items():
            if self.config.get(name):  # type: ignore[attr-defined]
                return reason
        return self._why

    # --- noise on clean latents

    def _noised(self, method: str, name: str, given: dict[str, Any]) -> Tensor:
        times, tensors = given[name], {key: x for key, x in given.items() if key != name}
        x = next(iter(tensors.values()))
        begin = getattr(self, "begin_index", None) if hasattr(self, "sigmas") else None
        ordinary = all(isinstance(y, Tensor) and y.shape == x.shape and y.dtype in DTYPES for y in tensors.values())
        # where a pipeline has told its place, diffusers does not look at the timesteps
        if not ordinary or not isinstance(times, Tensor) or (times.numel() != 1 and begin is None):
            return getattr(self._parent, method)(self, **given)
        plans = self._on_host().plans
        value = torch.zeros(1, dtype=times.dtype) if begin is not None else self._value(times).reshape(1)
        key = (method, value.item(), begin, getattr(self, "step_index", None), *(y.dtype for y in tensors.values()))
        found = plans.get(key)
        if found is None:
            dtypes = {key: y.dtype for key, y in tensors.items()}
            found = plans[key] = plan(self._plain(), method, dtypes, {name: value}, ())
        terms = [given[name] for _, name, _ in found.inputs]
        return latentfast.combine(terms, found.rows[0], dtypes=found.dtypes[0], precise=True)

    # --- the values on the host

    def _tensors(self) -> dict[str, Tensor]:
        """The attributes that are tensors, but for the latents among them."""
        latents = (*self._history, "x0")
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and name not in latents}

    def _copies(self) -> dict[str, Tensor]:
        """The tensors on the host: what was there before, and for what is new a copy, which waits for the device."""
        host = self._host

        def copy(name: str, x: Tensor) -> Tensor:
            before = None if host is None else host.own.get(name)
            same = before is not None and (x is before or _moved(x, before))
            return host.copies[name] if same and host is not None else x.cpu()

        return {name: copy(name, x) for name, x in self._tensors().items()}

    def _on_host(self) -> _Host:
        """The host's copies; made anew if someone has replaced a tensor."""
        host = self._host
        if host is None or not host.is_of(vars(self)):
            copies = self._copies()
            host = self._host = _Host(self._tensors(), copies, self._plans_of(copies))
        return host

    def _plans_of(self, copies: dict[str, Tensor]) -> _Plans:
        """The coefficients that are known of a schedule."""
        schedules: OrderedDict[Hashable, _Plans] = vars(self).setdefault("_schedules", OrderedDict())
        values = tuple(x.detach().numpy().tobytes() for name, x in copies.items() if name in ("timesteps", "sigmas"))
        key = (values, getattr(self, "num_inference_steps", None), repr(self.config))  # type: ignore[attr-defined]
        plans = schedules.setdefault(key, {})
        schedules.move_to_end(key)
        while len(schedules) > _SCHEDULES:
            schedules.popitem(last=False)
        return plans

    def _value(self, timestep):
        """A timestep on the host: a number as it is, a view of `timesteps` from the copy there."""
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
            return timestep
        copies, own = self._on_host().copies, self.timesteps  # type: ignore[attr-defined]
        if timestep.numel() == 1 and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            return copies["timesteps"][(timestep.storage_offset() - own.storage_offset()) // own.stride(0)]
        return timestep.cpu()  # a wait, as diffusers has it with every timestep

    # --- a step

    def _plan(self, given: dict[str, Any]) -> Plan:
        """What a step with these arguments does."""
        sample, prediction = given.get("sample"), given.get("model_output")
        if not isinstance(sample, Tensor) or prediction is None or "timestep" not in given:
            raise NotLinear("a step takes a prediction, a timestep and a sample")
        host, own, shape = self._on_host(), vars(self), sample.shape
        if own.get("_step_index", 0) is None:
            self._fast_init_step_index(given["timestep"])
        # whatever the coefficients depend on
        key: list[Hashable] = [own.get("_step_index"), self.keep_x0, hasattr(prediction, "linear_terms")]
        for name, value in given.items():
            if name in self._times:
                key.append(_number(self._value(value)))
            elif name == "timestep":
                key.append(_kind(value))
            elif name == "model_output" or isinstance(value, Tensor):
                if value.shape != shape:
                    raise NotLinear(f"{name} and the sample differ in shape")
                key.append((name, value.dtype))
            elif name != "generator" and name != "return_dict":
                key.append((name, value))
        for name in self._history:
            key.append(_present(own.get(name)))
        for name in self._settings:
            value = own.get(name)
            key.append(tuple(value) if isinstance(value, list) else value)
        found = host.plans.get(tuple(key))
        if found is None:
            if len(host.plans) >= _PLANS:
                host.plans.clear()
            found = host.plans[tuple(key)] = self._probe(given)
        if isinstance(found, str):
            raise NotLinear(found)
        return found

    def _probe(self, given: dict[str, Any]) -> Plan | str:
        """What diffusers' step does with such arguments, or why that cannot be said in one launch."""
        for name, reason in self._reasons.items():
            if self.config.get(name):  # type: ignore[attr-defined]
                return reason
        tensors: dict[str, torch.dtype] = {}
        arguments: dict[str, Any] = {"return_dict": True}
        for name, value in given.items():
            if name in self._times:
                arguments[name] = self._value(value)
            elif name == "timestep" and isinstance(value, Tensor):  # its value does not matter, its dtype may
                arguments[name] = torch.zeros((), dtype=value.dtype, device="cpu")
            elif name == "model_output" or isinstance(value, Tensor):
                tensors[name] = value.dtype
            elif name not in ("generator", "return_dict"):
                arguments[name] = value
        if any(dtype not in DTYPES for dtype in tensors.values()):
            return "there are no kernels for a tensor's dtype"
        sum_of_terms = hasattr(given["model_output"], "linear_terms")
        try:
            found = plan(
                self._plain(), "step", tensors, arguments, self._history, self._x0_of, self.keep_x0, sum_of_terms
            )
        except NotLinear as reason:
            return str(reason)
        except Exception as error:  # what diffusers refuses, its own step refuses again, with its own words
            return f"diffusers: {error}"
        if len(found.rows) > MOST_RESULTS or len(found.inputs) + sum_of_terms > MOST_TENSORS:
            return f"a step makes {len(found.rows)} tensors of {len(found.inputs)}: more than one launch takes"
        return found

    def _plain(self):
        """diffusers' scheduler in this one's state, on the host."""
        twin = self._parent.__new__(self._parent)
        vars(twin).update({name: list(x) if isinstance(x, list) else x for name, x in vars(self).items()})
        for name in self._beside:
            vars(twin).pop(name, None)
        vars(twin).update(self._on_host().copies)
        return twin

    #: `_x0_of(plain scheduler, sample, model_output)`; None: the step's second result is x0.
    _x0_of: ClassVar[Callable | None] = None

    def _run(self, found: Plan, given: dict[str, Any]):
        """The launch, and what follows from it for the scheduler."""
        sample = given["sample"]
        noise = [
            randn_tensor(sample.shape, generator=given.get("generator"), device=sample.device, dtype=dtype)
            for dtype in found.noise
        ]
        inputs, rows = found.inputs, found.rows
        parts: list[Tensor] | None = None
        linear_terms = getattr(given["model_output"], "linear_terms", None)
        if linear_terms is not None:
            terms = linear_terms()
            parts = [x for x, _ in terms]
            inputs, rows = found.expanded(tuple(float(weight) for _, weight in terms))
        own = vars(self)
        # what the call has, by kind and name: a tensor, or a list of them by their numbers
        have: dict[str, dict[str, Any]] = {"argument": given, "history": own, "noise": {"": noise}}
        if parts is not None:
            have = {**have, "argument": {**given, PREDICTION[1]: parts}}
        tensors = [have[kind][name] if number is None else have[kind][name][number] for kind, name, number in inputs]
        made = latentfast.combine(tensors, rows, dtypes=found.dtypes, precise=self._precise) if rows else ()
        have["made"] = {"": made}
        results = [_get(have, place) for place in found.results]
        x0 = _get(have, found.x0)
        state = {
            name: [_get(have, place) for place in places] if isinstance(places, list) else _get(have, places)
            for name, places in found.state.items()
        }  # all read before any is replaced
        own.update(state)
        own.update(found.changes)
        if self._past_times is not None:
            own[self._past_times] = [*own[self._past_times][1:], given["timestep"]]
        self.x0, self._why = x0, ""
        if found.output is None or not given.get("return_dict", self._returns_dict):
            return tuple(results)
        return found.output(*results)


def _get(have: dict[str, dict[str, Any]], place: Place | None) -> Tensor | None:
    """The tensor at a place."""
    if place is None:
        return None
    kind, name, number = place
    return have[kind][name] if number is None else have[kind][name][number]


def _present(value: Any) -> Hashable:
    """Which tensors a history holds, and of what dtype."""
    if isinstance(value, list):
        return tuple([None if x is None else x.dtype for x in value])
    return None if value is None else value.dtype


def _number(value: Any) -> Hashable:
    return value.item() if isinstance(value, Tensor) else value


def _kind(timestep: Any) -> Any:
    """What a timestep is: some schedulers refuse whole numbers."""
    return timestep.dtype if isinstance(timestep, Tensor) else type(timestep)


def _moved(x: Tensor, before: Tensor | None) -> bool:
    """Whether diffusers has put a tensor on another device, with the values that it had."""
    return before is not None and x.shape == before.shape and x.dtype == before.dtype and x.device != before.device


def _blank(name: str):
    from latentfast.integrations.diffusers import schedulers

    cls = getattr(schedulers, name)
    return cls.__new__(cls)
