"""The direct door: eager calls on plain tensors go from here to a native library's host functions at once.

There are two doors to the same kernels. The dispatcher's is for everything that must see an operation before it runs:
autograd, torch.compile, export, modes, transforms, subclasses; it costs a call several microseconds, more than the
launch of a kernel. The direct one, ``csrc/python/direct.cpp``, is for calls that want none of that; to any other it
answers None before anything has happened, and the caller goes on through the dispatcher. Both end in the same host
function of the same library (``csrc/common/operators.h``), so their results have the same bits.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from latentfast._operators import NORMS

_log = logging.getLogger("latentfast")

#: Whether some backend's door is open. Ask it first, and not while Dynamo traces: it could not look inside.
enabled = False


def _connected() -> ModuleType | None:
    """The door's library; None where it was not built, or this Python or torch lacks what it needs."""
    if "t" in sys.abiflags:  # without a global lock objects are laid out differently
        return None
    try:
        from latentfast import _native_direct  # type: ignore[attr-defined]

        guards = torch._C._dynamo.guards
        _native_direct.connect(
            {
                "dlpack_exchange_api": torch.Tensor.__dlpack_c_exchange_api__,
                "Tensor": torch.Tensor,
                "Parameter": torch.nn.Parameter,
                "is_neg": torch._C.TensorBase.is_neg,
                "empty": torch.empty,
                "float32": torch.float32,
                "float16": torch.float16,
                "bfloat16": torch.bfloat16,
                "float64": torch.float64,
                "norms": NORMS,
                # what could have to see an operation before it runs
                "is_grad_enabled": torch.is_grad_enabled,
                "function_modes": torch._C._len_torch_function_stack,
                "dispatch_modes": torch._C._len_torch_dispatch_stack,
                "transforms_active": torch._C._are_functorch_transforms_active,
                "is_tracing": torch._C._is_tracing,
                # only for speed: what Inductor's generated code allocates with, on the current device
                "empty_strided_cpu": getattr(guards, "_empty_strided_cpu", None),
                "empty_strided_cuda": getattr(guards, "_empty_strided_cuda", None),
                "current_cuda_device": getattr(torch._C, "_cuda_getDevice", None),
            }
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        _log.debug("the direct door stays closed: %s", error)
        return None
    return _native_direct


_library = _connected()
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}  # DLPack's numbers


def open_for(libraries: dict[str, Path]) -> None:
    """Open the door for these device types, to these native libraries, and close it for the others."""
    global enabled
    if _library is None:
        return
    opened = [
        _library.open(number, str(libraries[device]) if device in libraries else None)
        for device, number in _DEVICE_TYPES.items()
    ]
    enabled = any(opened)


def _absent(*args):
    return None


interpolate: Callable[..., torch.Tensor | None] = getattr(_library, "interpolate", _absent)
edit: Callable[..., torch.Tensor | None] = getattr(_library, "edit", _absent)
blend: Callable[..., torch.Tensor | None] = getattr(_library, "blend", _absent)
#: Losses, or the pair of losses and gradient.
temporal_loss: Callable[..., Any] = getattr(_library, "temporal_loss", _absent)
scaled: Callable[..., torch.Tensor | None] = getattr(_library, "scaled", _absent)
guide: Callable[..., torch.Tensor | None] = getattr(_library, "guide", _absent)
#: The next sample, or the pair of it and x0.
guided_step: Callable[..., Any] = getattr(_library, "guided_step", _absent)
combine: Callable[..., torch.Tensor | None] = getattr(_library, "combine", _absent)
