"""Where a result was made: versions, device and settings, of which keys hold what may change a result's last bits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from typing import Any

import torch

import latentfast
from latentfast import _settings
from latentfast.backends import forced

__all__ = ["active_backend", "environment", "machine", "versions"]

PACKAGES = ("latentfast", "torch", "triton", "diffusers", "transformers", "tokenizers", "safetensors", "av", "pillow")
#: Of these, the packages that compute.
COMPUTING = ("torch", "triton", "diffusers", "transformers", "tokenizers")

# Where a backend runs; the rest of the order is that of latentfast.backends().
SERVES = {"native-cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",), "eager": ("cpu", "cuda")}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part, the installed ones."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    # looked up once: it takes milliseconds, and what a process has imported does not change
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


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """What of the surroundings may change a result's bits, as JSON: a part of keys.

    Versions of what computes (not Python's), the device's kind (not its number), the active backend, and torch's
    settings that choose other kernels. On the CPU the number of threads belongs to it, as it splits sums.

    Args:
        device: on which the result is made; None: the CPU.

    Example:
        >>> from latentfast.cache import environment
        >>> sorted(environment())
        ['backend', 'device', 'settings', 'versions']
    """
    where = torch.device("cpu" if device is None else device)
    found = versions()
    computing = {name: found[name] for name in COMPUTING if name in found}
    computing |= {"latentfast": latentfast.__version__, "torch": str(torch.__version__)}  # the ones that run
    facts: dict[str, Any] = {"type": where.type}
    if where.type == "cuda":
        facts |= {
            "name": torch.cuda.get_device_name(where),
            "capability": list(torch.cuda.get_device_capability(where)),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        facts |= {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    settings = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "fp16_reduced_sums": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bf16_reduced_sums": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    return {
        "versions": computing,
        "device": facts,
        "backend": active_backend(forced(), where),
        "settings": settings,
    }
