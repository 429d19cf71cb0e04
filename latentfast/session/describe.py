"""What a pipeline's results depend on, besides the arguments of its call: a part of keys."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from latentfast.cache import digest_module, environment
from latentfast.cache.digest import parts_of
from latentfast.session.arguments import UnwritableError, to_data

__all__ = ["describe_components", "describe_pipeline"]

_texts: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def describe_pipeline(pipe: Any, device: torch.device) -> dict[str, Any]:
    """A pipeline as data: class, parts with the fingerprints of their weights, settings, and the surroundings.

    Args:
        pipe: The pipeline.
        device: Where it computes.

    Raises:
        UnwritableError: a part's weights are not in memory, or its configuration has something that can't be written.
    """
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    own = {name: value for name, value in dict(pipe.config).items() if name not in parts and name[0] != "_"}
    return {
        "pipeline": _class_of(pipe),
        "config": to_data(own, {}, "pipe.config"),
        "components": describe_components(pipe, parts),
        "environment": environment(device),
    }


def describe_components(pipe: Any, names: Iterable[str]) -> dict[str, Any]:
    """Parts of a pipeline as data, by name."""
    return {name: _component(getattr(pipe, name)) for name in sorted(names) if getattr(pipe, name, None) is not None}


def _component(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"class": _class_of(part)}
    if isinstance(part, nn.Module):
        return found | _module(part)
    if hasattr(part, "set_timesteps"):
        config = {name: value for name, value in part.config.items() if not name.startswith("_")}
        shift = getattr(part, "shift", None)  # it may have been set after the configuration was made
        found["shift"] = float(shift) if isinstance(shift, int | float) else None
        found["latentfast"] = hasattr(part, "why_not_fast")  # same name, other arithmetic
        return found | {"config": to_data(config, {}, "scheduler.config")}
    if part not in _texts:
        _texts[part] = hashlib.sha256(_text_of(part).encode()).hexdigest()
    return found | {"content": _texts[part]}


def _module(part: nn.Module) -> dict[str, Any]:
    """Weights, and what of a module is not in its weights and changes what it computes."""
    flags = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str) and k[0] != "_"}
    adapters, processors = [], set()
    for prefix, module in parts_of(part):
        # looked for where they can be: a module takes long to say that it lacks something
        if hasattr(type(module), "active_adapters") and hasattr(module, "scaling"):
            adapters.append([prefix, repr(module.active_adapters), repr(module.scaling)])
        processor = vars(module).get("processor") or module._modules.get("processor")
        if processor is not None:
            processors.add(f"{_class_of(processor)} {getattr(processor, '_attention_backend', None)}")
    try:
        weights = digest_module(part)
    except ValueError as error:  # offloaded tensor by tensor: they are nowhere to be read
        raise UnwritableError(str(error)) from error
    return {
        "weights": weights,
        "config": _config(part),
        "flags": to_data(flags, {}, "flags"),
        "adapters": sorted(adapters),
        "attention": sorted(processors),
        "step_cache": repr(getattr(part, "_cache_config", None)),
        # a guidance that waits is rounded once less (latentfast.integrations.diffusers.guidance)
        "hooks": sorted({_class_of(hook) for hook in part._forward_hooks.values()}),
    }


def _config(part: nn.Module) -> Any:
    """A module's configuration: a mapping in diffusers, an object that writes itself in transformers."""
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_json_string"):
        # that itself would compare everything with the class's defaults first, at every request
        named = {"_name_or_path", "transformers_version"}
        return {name: repr(value) for name, value in sorted(vars(config).items()) if name not in named}
    return to_data({k: v for k, v in dict(config or {}).items() if k[0] != "_"}, {}, "config")


def _class_of(thing: Any) -> str:
    cls = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


def _text_of(part: Any) -> str:
    """A tokenizer or a processor in its own written form, without where it was loaded from and how it was last used."""
    core = getattr(part, "backend_tokenizer", None)
    if core is not None:
        found = json.loads(core.to_str())
        found |= {"truncation": None, "padding": None}  # set by every call of it
    elif hasattr(part, "get_vocab"):
        found = {"vocabulary": part.get_vocab()}
    elif hasattr(part, "to_json_string"):
        return part.to_json_string()
    else:
        return json.dumps(dict(part.config), sort_keys=True, default=repr)
    sides = {name: getattr(part, name, None) for name in ("model_max_length", "padding_side", "truncation_side")}
    return json.dumps([found, sides], sort_keys=True, default=repr)
