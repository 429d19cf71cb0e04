"""States as tensors by name, and back: what a cache or a file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentfast.integrations.diffusers.steps import State

__all__ = ["Pool", "layout_of", "pack", "read", "read_state", "unpack", "write"]

#: The tensor that says how the others belong together, as JSON in bytes.
_LAYOUT = "layout"


def to_tensor(data: Any, device: torch.device | str = "cpu") -> Tensor:
    """JSON as a tensor of bytes."""
    text = json.dumps(data, separators=(",", ":"))
    return _moved(torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8), torch.device(device))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for what the device does: page-locked memory on the way to a GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def text_of(tensor: Tensor) -> Any:
    """The inverse of `to_tensor`."""
    return json.loads(bytes(tensor.cpu().numpy()))


class Pool:
    """Tensors on one device, by names that values refer to; what several values share is there once."""

    def __init__(self, device: torch.device) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._device = device
        self._known: dict[int, tuple[str, Tensor]] = {}  # the tensor itself, so that no other gets its id

    def write(self, value: Any) -> Any:
        """A value of numbers, tensors and lists of them as JSON; in it the scalars that a scheduler has on the host."""
        if isinstance(value, list | tuple):
            return [self.write(x) for x in value]
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 0 and value.device.type == "cpu":
            bits = value.detach().reshape(1).view(torch.uint8).tolist()
            return {"bits": bits, "dtype": str(value.dtype).removeprefix("torch.")}
        if id(value) not in self._known:
            name = f"t{len(self._known)}"
            self._known[id(value)] = name, value
            self.tensors[name] = _moved(value.detach(), self._device).contiguous()
        return {"t": self._known[id(value)][0]}

    def with_layout(self, data: Any) -> dict[str, Tensor]:
        """The tensors, and beside them what was written."""
        return {_LAYOUT: to_tensor(data, self._device), **self.tensors}


def read(tensors: Mapping[str, Tensor], value: Any) -> Any:
    """The inverse of `Pool.write`, with lists for tuples."""
    if isinstance(value, dict):
        if "t" in value:
            return tensors[value["t"]]
        return torch.tensor(value["bits"], dtype=torch.uint8).view(getattr(torch, value["dtype"])).reshape(())
    return [read(tensors, x) for x in value] if isinstance(value, list) else value


def layout_of(tensors: Mapping[str, Tensor]) -> Any:
    """What `Pool.with_layout` was given."""
    return text_of(tensors[_LAYOUT])


def write(pool: Pool, state: State) -> dict[str, Any]:
    """A state as JSON, with its tensors in the pool."""
    return {
        "step": state.step,
        "steps": state.steps,
        "latents": pool.write(state.latents),
        "history": {key: pool.write(value) for key, value in state.history.items()},
        "extras": pool.write(state.extras),
        "generator": pool.write(state.generator),
        "x0": pool.write(state.x0),
    }


def read_state(tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> State:
    """The inverse of `write`; a generator's numbers are where it wants them: on the CPU, in memory of their own."""
    return State(
        step=data["step"],
        steps=data["steps"],
        latents=read(tensors, data["latents"]),
        history={key: read(tensors, value) for key, value in data["history"].items()},
        extras=tuple(read(tensors, data["extras"])),
        generator=tuple(x.cpu().clone() for x in read(tensors, data["generator"])),
        x0=read(tensors, data["x0"]),
    )


def pack(state: State) -> dict[str, Tensor]:
    """A state as tensors by name, all on its latents' device."""
    pool = Pool(state.latents.device)
    return pool.with_layout(write(pool, state))


def unpack(tensors: Mapping[str, Tensor]) -> State:
    """The inverse of `pack`."""
    return read_state(tensors, layout_of(tensors))
