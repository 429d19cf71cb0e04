"""What the reference modules share: the working precision and the dimensions that form one vector."""

from collections.abc import Sequence

import torch
from torch import Tensor


def working(x: Tensor) -> Tensor:
    """`x` in the precision that the specification computes in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def vector_dims(ndim: int, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """The dimensions that form one vector, ascending: all but the first for `None` (a 1-D input is one vector)."""
    if dim is None:
        return tuple(range(1, ndim)) if ndim > 1 else (0,)
    return tuple(sorted(d % ndim for d in ((dim,) if isinstance(dim, int) else dim)))


def kept_shape(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """`shape` with the vector dimensions reduced to 1: what `t` broadcasts to."""
    return tuple(1 if d in dims else n for d, n in enumerate(shape))


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor; made where it is needed, since a copy from the host waits for the device."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def per_vector(t: float | Tensor, x: Tensor, dims: Sequence[int]) -> Tensor:
    """`t` as a tensor of `x`'s dtype and device that broadcasts against `x`, one value a vector."""
    return scalar(t, x.dtype, x.device).broadcast_to(kept_shape(x.shape, dims))


def norm(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Euclidean length of each vector, reduced dimensions kept."""
    return torch.linalg.vector_norm(x, dim=tuple(dims), keepdim=True)
