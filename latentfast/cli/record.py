"""What a run was made of: versions, machine, backend, checksums."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from typing import Any

import torch
from torch import Tensor

import latentfast
from latentfast import _settings

__all__ = ["active_backend", "checksum", "machine", "tensors_to_bytes", "versions"]

PACKAGES = ("latentfast", "torch", "triton", "diffusers", "transformers", "tokenizers", "safetensors", "av", "pillow")

# Where a backend runs; the rest of the order is that of latentfast.backends().
SERVES = {"native-cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",), "eager": ("cpu", "cuda")}


def checksum(content: Tensor | bytes) -> str:
    """SHA-256 of bytes, or of a tensor's values in row-major order (its dtype and shape are not in it)."""
    if isinstance(content, Tensor):
        content = content.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def tensors_to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Tensors and a note about them in the safetensors format."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part, the installed ones."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the threads: what, besides arguments and versions, may change a result's last bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": str(device),
        "name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def active_backend(forced: str | None, device: torch.device) -> str:
    """The backend that serves a device: the forced one (by argument or environment), or the first available."""
    asked = forced or _settings.backend()
    if asked is not None:
        return asked
    return next(b.name for b in latentfast.backends() if b.available and device.type in SERVES[b.name])
