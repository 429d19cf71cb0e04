"""What is measured: an operation with its inputs, baselines and yardstick; a case is an operation at one size."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Latents (C, T, H, W) of public video models at their usual sizes; the batch comes in front.
SIZES = {
    "wan480": (16, 21, 60, 104),  # Wan 2.1, 81 frames of 832x480
    "wan720": (16, 21, 90, 160),  # Wan 2.1, 81 frames of 1280x720
    "hunyuan720": (16, 33, 90, 160),  # HunyuanVideo, 129 frames of 1280x720
}

Call = Callable[..., Any]


def compiled(function: Call) -> Call:
    """`torch.compile` as the baselines use it: one whole graph, specialised to the shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class Baseline:
    """Another way to compute the same: `call` eagerly, `compile()` gives its `torch.compile` form."""

    call: Call
    note: str
    build: Callable[[], Call] | None = None  # where more than the whole call has to be, or may not be, compiled

    def compile(self) -> Call:
        """The compiled callable, new at every call of this."""
        return self.build() if self.build else compiled(self.call)


@dataclass(frozen=True)
class Operation:
    """One public function with fixed keywords.

    `inputs(shape, dtype, device)` draws the arguments that all forms take. `batch_dims` says, for each of them, along
    which dimension its samples lie (None: shared by all); `outputs` does so for each output: an integer, "mean" for a
    number that is a mean over the batch, "mean's gradient" for samples along dimension 0, divided by the batch's size.
    """

    stem: str
    name: str
    variant: str
    inputs: Callable[[tuple[int, ...], torch.dtype, torch.device], tuple[Tensor, ...]]
    batch_dims: tuple[int | None, ...]
    outputs: tuple[int | str, ...]
    ours: Call
    reference: Baseline
    field: Baseline
    #: The code of the peer that does the same, as published and called as its own pipelines do; None: there is none.
    peer: Baseline | None = None
    #: The sizes that cases may name, without the batch.
    sizes: dict[str, tuple[int, ...]] = field(default_factory=lambda: SIZES)
    #: The fewest bytes a call moves, where that is not each input and output once.
    moved: Callable[[tuple[Tensor, ...], Any], int] | None = None
    #: Matrix flops of a call, where they are the floor.
    flops: Callable[[tuple[Tensor, ...]], int] | None = None

    def sample(self, inputs: tuple[Tensor, ...], i: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The arguments for sample `i` alone, a batch of one; floating ones in `dtype` if it is given."""
        parts = []
        for x, dim in zip(inputs, self.batch_dims, strict=True):
            part = x.detach() if dim is None else x.detach().narrow(dim, i, 1)
            part = part if dtype is None else part.to(dtype)
            parts.append(part.clone().requires_grad_() if x.requires_grad else part)
        return tuple(parts)


@dataclass(frozen=True)
class Case:
    """An operation at one size."""

    operation: Operation
    size: str
    batch: int
    dtype: torch.dtype = torch.bfloat16
    shape_override: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The latents' shape, (B, C, T, H, W)."""
        return (self.batch, *(self.shape_override or self.operation.sizes[self.size]))

    @property
    def workload(self) -> str:
        """The size's name with the batch, such as wan480_b1."""
        return f"{self.size}_b{self.batch}"

    @property
    def id(self) -> str:
        """The case's name, such as slerp-wan480_b1-bfloat16."""
        operation = self.operation
        name = f"{operation.name}[{operation.variant}]" if operation.variant else operation.name
        return f"{name}-{self.workload}-{short(self.dtype)}"

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        """New random arguments."""
        return self.operation.inputs(self.shape, self.dtype, device)

    def tiny(self) -> "Case":
        """The same in a size of a few thousand elements, for a smoke run."""
        return Case(self.operation, "tiny", min(self.batch, 3), self.dtype, (4, 5, 6, 8))


def short(dtype: torch.dtype) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def tensors(result: Any) -> tuple[Tensor, ...]:
    """A call's result as a tuple of tensors."""
    return result if isinstance(result, tuple) else (result,)


def moved_bytes(inputs: tuple[Tensor, ...], result: Any) -> int:
    """The fewest bytes a call has to move: each input read once, each output written once."""
    return sum(x.numel() * x.element_size() for x in (*inputs, *tensors(result)))
