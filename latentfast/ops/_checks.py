"""Checks of a user's arguments, shared by the public operations. Each failure names argument, finding and
expectation."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that elements of `dtype` are computed in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shares_memory(x: Tensor, others: Iterable[Tensor | None]) -> bool:
    """Whether some of `others` lies in `x`'s memory."""
    storage = x.untyped_storage().data_ptr()
    for other in others if storage else ():  # a loop, since any() of a generator takes three times as long
        if other is not None and other.untyped_storage().data_ptr() == storage:
            return True
    return False


def latent(name: str, x: object) -> Tensor:
    """`x`, if it is a floating tensor that the kernels know."""
    if x.__class__ is Tensor and x.dtype in DTYPES:
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {_short(x.dtype)}")
    return x


def like(name: str, x: object, other_name: str, other: Tensor) -> Tensor:
    """`x`, if it is a tensor of `other`'s shape, dtype and device."""
    if x.__class__ is Tensor and x.shape == other.shape and x.dtype is other.dtype and x.device == other.device:
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != other.shape:
        raise ValueError(f"{name} must have {other_name}'s shape {tuple(other.shape)}, got {tuple(x.shape)}")
    same_kind(name, x, other_name, other)
    return x


def same_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """An error unless `x` has `other`'s dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {_short(other.dtype)}, got {_short(x.dtype)}")
    same_device(name, x, other_name, other)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """An error unless `x` is on `other`'s device."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")


def broadcasts(name: str, shape: Sequence[int], target: Sequence[int]) -> None:
    """An error unless `shape` broadcasts to `target` without enlarging it."""
    lead = len(target) - len(shape)
    if lead >= 0:
        for size, full in zip(shape, target[lead:] if lead else target, strict=True):
            if size != full and size != 1:
                break
        else:
            return
    raise ValueError(f"{name} must broadcast to {tuple(target)}, got shape {tuple(shape)}")


def mask_of(name: str, mask: object, z_name: str, z: Tensor, target: Sequence[int]) -> Tensor:
    """A mask ready for a kernel: on `z`'s device, broadcastable to `target`, in `z`'s dtype or float32, contiguous."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    dtype = mask.dtype
    if dtype != torch.bool and dtype not in DTYPES:
        raise TypeError(f"{name} must be bool, float32, float16, bfloat16 or float64, got {_short(dtype)}")
    same_device(name, mask, z_name, z)
    broadcasts(name, mask.shape, target)
    if dtype is not z.dtype and (dtype is not torch.float32 or z.dtype is torch.float64):
        # float32 masks go in as they are, so that a heat map loses nothing beside half-precision latents
        mask = mask.to(z.dtype if dtype is torch.bool or z.dtype is torch.float64 else torch.float32)
    return mask if mask.is_contiguous() else mask.contiguous()


def output(
    out: object, shape: tuple[int, ...], like_name: str, like_tensor: Tensor, inputs: tuple[Tensor | None, ...]
) -> Tensor:
    """The caller's own output buffer, if a kernel can write into it: shape, dtype, device, contiguous, not an
    input."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out must have shape {tuple(shape)}, got {tuple(out.shape)}")
    same_kind("out", out, like_name, like_tensor)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if out.requires_grad:
        raise ValueError("out must not require grad: an operation that writes into out is not differentiable")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("out cannot be given while an input requires grad; call it under torch.no_grad()")
    if not torch.compiler.is_compiling():
        if shares_memory(out, inputs):
            raise ValueError("out must not share memory with an input, got one that does")
        torch.autograd.graph.increment_version(out)
    return out


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """`value`, if it is a finite number from `low` to `high`."""
    if value.__class__ is float and low <= value <= high and -math.inf < value < math.inf:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not isinstance(value, torch.SymFloat | torch.SymInt) and not (
        low <= value <= high and -math.inf < value < math.inf
    ):
        if high < math.inf:
            wanted = f"lie in [{low:g}, {high:g}]"
        else:
            wanted = "be finite" if low == -math.inf else f"be finite and at least {low:g}"
        raise ValueError(f"{name} must {wanted}, got {value}")
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
