"""From the arguments of a call to a request, with all that its result depends on."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentfast.integrations.diffusers.steps import generators_of
from latentfast.session.arguments import UnwritableError, to_data
from latentfast.session.describe import describe_pipeline
from latentfast.session.trajectory import Request, Seeds, Trajectory

__all__ = ["follow", "request", "seeds_of"]

_logger = logging.getLogger("latentfast.session")

#: Arguments that are the session's own.
_OURS = ("self", "generator", "output_type", "return_dict")
#: What is called then is code, which can't be written.
_CALLBACKS = ("callback_on_step_end", "callback_on_step_end_tensor_inputs")


def seeds_of(call: dict[str, Any], seed: int) -> Seeds:
    """The generators of a call, taken out of it, in the states that they have; or one of a seed, on the CPU."""
    several = isinstance(call.get("generator"), list | tuple)
    given = generators_of(call) or (torch.Generator().manual_seed(seed),)
    call.pop("generator", None)
    return Seeds(tuple(str(g.device) for g in given), tuple(g.get_state() for g in given), several)


def request(pipe: Any, call: Mapping[str, Any], seeds: Seeds) -> Request:
    """What a whole sampling is asked for with.

    Raises:
        TypeError: the pipeline's call has no such argument, or it is the session's own.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        if name in _OURS:
            raise TypeError(f"{name} is the session's own argument")
        if name not in parameters:
            raise TypeError(f"{name} is no argument of {type(pipe).__name__}'s call")
    inputs: dict[str, Tensor] = {}
    device = pipe.device  # looks through all modules, so once a request
    try:
        if call.get(_CALLBACKS[0]) is not None:
            raise UnwritableError(f"{_CALLBACKS[0]} can't be written")
        arguments = {
            name: call.get(name, None if parameter.default is inspect.Parameter.empty else parameter.default)
            for name, parameter in parameters.items()
            if name not in (*_OURS, *_CALLBACKS)
        }
        data: dict[str, Any] | None = {
            "kind": "sampling",
            "pipeline": describe_pipeline(pipe, device),
            "call": to_data(arguments, inputs, "call")["mapping"],
            "seeds": {
                "devices": list(seeds.devices),
                "several": seeds.several,
                "states": to_data(seeds.states, inputs),
            },
            "from": None,
        }
    except UnwritableError as reason:
        _logger.warning("session: this request is not looked up, and its result can't be saved: %s", reason)
        data = None
    return Request(dict(call), seeds, data, inputs, device)


def follow(
    pipe: Any,
    parent: Trajectory,
    step: int,
    call: Mapping[str, Any],
    edit: Mapping[str, Any],
    inputs: dict[str, Tensor],
) -> Request:
    """What the rest of a sampling is asked for with; the parent's own request if nothing is changed.

    Args:
        pipe: The pipeline.
        parent: Whose first steps stay.
        step: How many.
        call: All arguments for the rest.
        edit: What the latents are changed by, as JSON; empty for nothing.
        inputs: The tensors that it names.
    """
    made, before = request(pipe, call, parent.request.seeds), parent.request
    if made.data is None or before.data is None:
        same = not edit and all(made.call.get(name) is before.call.get(name) for name in {*made.call, *before.call})
        return before if same else Request(made.call, made.seeds, None, made.inputs, made.device)
    if not edit and {**made.data, "from": None} == {**before.data, "from": None}:
        return before
    origin = {"request": before.digest, "step": step, **edit}
    return Request(made.call, made.seeds, {**made.data, "from": origin}, {**made.inputs, **inputs}, made.device)
