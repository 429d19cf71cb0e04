"""`run.json`: what a result was made of, and what is different now. Plain data, readable without latentfast."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from latentfast.cache.digest import bytes_of
from latentfast.cache.environment import active_backend, machine, versions

__all__ = ["RECORD", "checksum", "differences", "surroundings", "tensors_to_bytes"]

#: The name of a record's file.
RECORD = "run.json"


def checksum(content: Tensor | bytes) -> str:
    """SHA-256 of bytes, or of a tensor's values in row-major order (its dtype and shape are not in it)."""
    if isinstance(content, Tensor):
        values = content.detach().cpu().contiguous()  # named, so that it outlives its bytes
        return hashlib.sha256(bytes_of(values)).hexdigest()
    return hashlib.sha256(content).hexdigest()


def tensors_to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Tensors and a note about them in the safetensors format."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def surroundings(device: torch.device, backend: str | None = None) -> dict[str, Any]:
    """Where a result is made: the backend of latentfast, the machine, the versions of the packages that take part."""
    return {"backend": active_backend(backend, device), "machine": machine(device), "versions": versions()}


def differences(then: Any, now: Any) -> list[str]:
    """What two records, or parts of them, do not have in common: a line each, with the place, then and now."""
    return [f"{place}: {_short(a)} then, {_short(b)} now" for place, a, b in _different(then, now, "")]


def _different(then: Any, now: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in (*then, *(name for name in now if name not in then)):
            yield from _different(then.get(name), now.get(name), f"{place}.{name}" if place else str(name))
    elif then != now:
        yield place, then, now


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
