"""How many launches a call makes: on a CPU, how many of its operators compute something."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_IDLE = ("empty", "new_empty", "item", "_local_scalar_dense")


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: neither views nor bare allocations nor a look at one number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__.startswith(_IDLE))
        return func(*args, **(kwargs or {}))


def launches(function: Callable[[], Any], device: torch.device) -> int:
    """How many kernels, copies and fills a call starts on a GPU, by torch's profiler; on a CPU, its operators.

    The profiler slows the host's launches in what is timed after it: time first.
    """
    if device.type != "cuda":
        with Operators() as operators:
            function()
        return operators.count
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events() or ())
