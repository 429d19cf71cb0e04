"""Which backend runs an operator: what is available, why the rest is not, what is chosen.

The names are ``native-cpu`` (C++), ``cuda`` (CUDA C++), ``triton`` and ``eager`` (plain PyTorch, always there). Left
alone, an operator runs on the first backend of its device's list that is available and has that operator:
native-cpu → eager on the CPU, cuda → triton → eager on a GPU.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from latentfast import _direct, _operators, _settings

_log = logging.getLogger("latentfast")

NAMES = ("native-cpu", "cuda", "triton", "eager")
_PREFERENCE = {"cpu": ("native-cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
_NATIVE_LIBRARIES = {"native-cpu": "_native_cpu", "cuda": "_native_cuda"}
_DISPATCH_KEYS = {"native-cpu": "CPU", "cuda": "CUDA"}


_native_paths: dict[str, Path] = {}  # of the libraries that were loaded


@dataclass(frozen=True)
class Backend:
    """One way to run the operators: its name, whether it can run here and, if not, why."""

    name: str
    available: bool
    reason: str = ""


def _load_native(name: str) -> str:
    """Load a native library beside this file; the reason why that was not possible, or ''."""
    found = sorted(Path(__file__).parent.glob(f"{_NATIVE_LIBRARIES[name]}*.so"))
    if not found:
        return "its library was not built (see `build` in `python -m latentfast.doctor`)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"its library does not load: {error}"
    _native_paths[name] = found[0]
    return ""


def _cuda_reason(load_reason: str) -> str:
    if load_reason:
        return load_reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"built for compute capability 8.0 and newer, this is {torch.cuda.get_device_capability()}"
    return ""


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (torch.cuda.is_available() or _settings.triton_interpreted()):
        return "torch sees no CUDA device and TRITON_INTERPRET is not set"
    return ""


def _probe() -> dict[str, Backend]:
    reasons = {
        "native-cpu": _load_native("native-cpu"),
        "cuda": _cuda_reason(_load_native("cuda")),
        "triton": _triton_reason(),
        "eager": "",
    }
    return {name: Backend(name, not reason, reason) for name, reason in reasons.items()}


_found: dict[str, Backend] = _probe()
_forced: str | None = None
_Table = dict[tuple[str, str], Callable[..., None]]


def backends() -> list[Backend]:
    """The four backends with their availability and, where one is missing, the reason.

    Example:
        >>> import latentfast
        >>> [b.name for b in latentfast.backends()]
        ['native-cpu', 'cuda', 'triton', 'eager']
    """
    return [_found[name] for name in NAMES]


def _implementation_on(backend: str, name: str, device: str) -> Callable[..., None] | None:
    """`backend`'s implementation of an operator on a device type, or None if it has none there."""
    if not _found[backend].available:
        return None
    if backend == "eager":
        return getattr(torch.ops.latentfast_eager, name).default
    if backend == "triton":
        if _operators.STEMS[name] in _operators.WITHOUT_TRITON:
            return None
        usable = device == "cuda" or (device == "cpu" and _settings.triton_interpreted())
        return getattr(torch.ops.latentfast_triton, name).default if usable else None
    key = _DISPATCH_KEYS[backend]
    if key.lower() != device or not torch._C._dispatch_has_kernel_for_dispatch_key(f"latentfast::{name}", key):
        return None
    return getattr(torch.ops.latentfast, name).default


def _refusal(error: Exception) -> Callable[..., None]:
    def refuse(*args) -> None:
        raise error.with_traceback(None)

    return refuse


@cache
def _choices(forced: str | None) -> _Table:
    """Every operator's implementation on every device type: decided beforehand, so that a call is one look-up."""
    table: _Table = {}
    for device, preference in _PREFERENCE.items():
        for name in _operators.SCHEMAS:
            for backend in (forced,) if forced else preference:
                found = _implementation_on(backend, name, device)
                if found is not None:
                    table[device, name] = found
                    break
            else:
                why = f"backend '{forced}' was asked for but has no '{name}' for tensors on '{device}'"
                table[device, name] = _refusal(RuntimeError(why))
    return table


def _log_fallbacks() -> None:
    for device, preference in _PREFERENCE.items():
        if device == "cuda" and not torch.cuda.is_available():
            continue
        chosen = next(name for name in preference if _found[name].available)
        if chosen != preference[0]:
            reason = _found[preference[0]].reason
            _log.warning("on %s latentfast runs on backend '%s', not '%s': %s", device, chosen, preference[0], reason)


def _open_direct_door(forced: str | None) -> None:
    """Open the way past the dispatcher to the native backends that are chosen."""
    _direct.open_for(
        {
            _DISPATCH_KEYS[name].lower(): path
            for name, path in _native_paths.items()
            if _found[name].available and forced in (None, name)
        }
    )


_table: _Table = _choices(None)
_open_direct_door(None)


def implementation(name: str, x: torch.Tensor) -> Callable[..., None]:
    """The callable that runs operator `name` on tensors like `x`; on unknown device types the eager one."""
    found = _table.get(("cuda" if x.is_cuda else x.device.type, name))
    return getattr(torch.ops.latentfast_eager, name).default if found is None else found


def _force(name: str | None) -> None:
    global _forced, _table
    _forced, _table = name, _choices(name)
    _open_direct_door(name)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got '{name}'")
    if not _found[name].available:
        raise RuntimeError(f"{source} asks for backend '{name}', which is not available here: {_found[name].reason}")
    return name


def forced() -> str | None:
    """The backend that `use_backend` or the environment forces, for the records; None if the choice is automatic."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on one backend, for the whole process; an error if it cannot.

    Args:
        name: "native-cpu", "cuda", "triton" or "eager".

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend is not available here (at once), or lacks an operation that is called (at the call).

    Example:
        >>> import torch, latentfast
        >>> a, b = torch.randn(2, 1, 4, 8)
        >>> with latentfast.use_backend("eager"):
        ...     c = latentfast.slerp(a, b, 0.5)
    """
    before = _forced
    _force(_checked(name, "name"))
    try:
        yield
    finally:
        _force(before)


if _settings.backend() is None:
    _log_fallbacks()
else:
    try:
        _force(_checked(str(_settings.backend()), "LATENTFAST_BACKEND"))
    except (ValueError, RuntimeError) as _error:  # told by the first operation: the doctor must be able to run
        _table = dict.fromkeys(_table, _refusal(_error))
        _direct.open_for({})
