"""Arguments of a call as plain data: JSON in which tensors and pictures stand by their digests."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentfast.cache import digest_tensor

__all__ = ["UnwritableError", "from_data", "to_data"]


class UnwritableError(TypeError):
    """A value that JSON and tensors can't say."""


def to_data(value: Any, tensors: dict[str, Tensor], where: str = "value") -> Any:
    """A value as JSON. What JSON does not have is an object with one name, which says what it is.

    Args:
        value: None, numbers, text, tensors, arrays, pictures of PIL, generators, dtypes, devices, dataclasses of
            diffusers, and lists, tuples and mappings of them.
        tensors: Gets those in it, by digest. One that is in there already is not digested again.
        where: What it is called in an error.

    Raises:
        UnwritableError: something else is in it.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list | tuple):
        return [to_data(x, tensors, f"{where}[{i}]") for i, x in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise UnwritableError(f"{where}: its names must be text")
        return {"mapping": {name: to_data(x, tensors, f"{where}.{name}") for name, x in value.items()}}
    if isinstance(value, Tensor):
        return {"tensor": _kept(value, tensors)}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value)}
    if type(value).__module__ == "numpy":
        array = torch.from_numpy(value) if getattr(value, "shape", ()) else None
        return to_data(value.item(), tensors, where) if array is None else {"array": _kept(array, tensors)}
    if type(value).__module__.startswith("PIL."):
        return {"picture": _kept(_pixels(value), tensors), "mode": value.mode}
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("diffusers."):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"dataclass": name, "fields": to_data(fields, tensors, where)["mapping"]}
    raise UnwritableError(f"{where}: {type(value).__name__} can't be written as data")


def from_data(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `to_data`, but for tuples, which come back as lists.

    Raises:
        ValueError: a tensor is missing, or the data is of no form that `to_data` writes.
    """
    if isinstance(data, list):
        return [from_data(x, tensors) for x in data]
    if not isinstance(data, dict):
        return data
    if "dataclass" in data:
        module, _, name = data["dataclass"].partition(":")
        found = getattr(importlib.import_module(module), name, None) if module.startswith("diffusers.") else None
        if not dataclasses.is_dataclass(found):
            raise ValueError(f"{data['dataclass']!r} is no dataclass of diffusers")
        return found(**{key: from_data(x, tensors) for key, x in data["fields"].items()})  # type: ignore[operator]
    if "picture" in data:
        from PIL import Image

        return Image.fromarray(_found(data["picture"], tensors).cpu().numpy(), data["mode"])
    kind: str
    value: Any
    kind, value = next(iter(data.items()), ("", ""))
    if kind == "mapping":
        return {name: from_data(x, tensors) for name, x in value.items()}
    if kind == "tensor":
        return _found(value, tensors)
    if kind == "array":
        return _found(value, tensors).cpu().numpy()
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device(value)
    if kind == "dtype" and isinstance(found := getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        return found
    raise ValueError(f"{kind!r} is no kind of value that is known here")


def _kept(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    known = (name for name, other in tensors.items() if other is tensor)
    name = next(known, None) or digest_tensor(tensor)
    tensors[name] = tensor
    return name


def _found(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the tensor {name[:16]}… is missing")
    return tensors[name]


def _pixels(picture: Any) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(picture))
