"""What is measured: an operation with its inputs, baselines and yardstick; a case is an operation at one size."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

#: Latents (C, T, H, W) of public video models, for `latentfast bench run --model`; the batch comes in front.
MODELS = {
    "wan21_1_3b_480p": (16, 21, 60, 104),  # 81 frames of 832x480
    "wan21_14b_720p": (16, 21, 90, 160),  # 81 frames of 1280x720
    "wan22_ti2v_5b_720p": (48, 31, 44, 80),  # 121 frames of 1280x704
    "hunyuan_720p": (16, 33, 90, 160),  # 129 frames of 1280x720
    "ltx_480p": (128, 16, 15, 22),  # 121 frames of 704x480
    "cogvideox_5b": (16, 13, 60, 90),  # 49 frames of 720x480
    "mochi_480p": (12, 28, 60, 106),  # 163 frames of 848x480
    "svd_xt": (4, 25, 72, 128),  # 25 frames of 1024x576
    "animatediff": (4, 16, 64, 64),  # 16 frames of 512x512
}
#: The same with the short names of the cases that are always run; `tiny` is for smoke runs.
SIZES = MODELS | {
    "wan480": MODELS["wan21_1_3b_480p"],
    "wan720": MODELS["wan21_14b_720p"],
    "hunyuan720": MODELS["hunyuan_720p"],
    "ltx": MODELS["ltx_480p"],
    "tiny": (4, 5, 6, 8),
}

Call = Callable[..., Any]
#: Arguments of a call: tensors, numbers, or lists and tuples of them.
Inputs = tuple[Any, ...]


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
    which dimension its samples lie (None: shared by all; a list's number holds for each tensor in it); `outputs` does
    so for each output tensor, lists flattened: an integer, None for one that no sample owns, "mean" for a number that
    is a mean over the batch, "mean's gradient" for samples along dimension 0, divided by the batch's size.
    """

    stem: str
    name: str
    variant: str
    inputs: Callable[[tuple[int, ...], torch.dtype, torch.device], Inputs]
    batch_dims: tuple[int | None, ...]
    outputs: tuple[int | str | None, ...]
    ours: Call
    reference: Baseline
    field: Baseline
    #: The code of the peer that does the same, as published and called as its own pipelines do; None: there is none.
    peer: Baseline | None = None
    #: The sizes that cases may name, without the batch; for `--model` by the names of MODELS, for smoke runs "tiny".
    sizes: dict[str, tuple[int, ...]] = field(default_factory=lambda: SIZES)
    #: The fewest bytes a call moves, where that is not each input and output once.
    moved: Callable[[Inputs, Any], int] | None = None
    #: Matrix flops of a call, where they can be the floor.
    flops: Callable[[Inputs], int] | None = None

    def sample(self, inputs: Inputs, i: int, dtype: torch.dtype | None = None) -> Inputs:
        """The arguments for sample `i` alone, a batch of one; floating ones in `dtype` if it is given."""

        def part(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            taken = x.detach() if dim is None else x.detach().narrow(dim, i, 1)
            taken = taken.to(dtype) if dtype is not None and x.is_floating_point() else taken
            return taken.clone().requires_grad_() if x.requires_grad else taken

        pairs = zip(inputs, self.batch_dims, strict=True)
        return tuple(tree_map(lambda leaf, dim=dim: part(leaf, dim), x) for x, dim in pairs)

    def batch(self, inputs: Inputs) -> int:
        """How many samples the arguments hold; 1 if all of them are shared."""
        pairs = zip(inputs, self.batch_dims, strict=True)
        return next((tensors(x)[0].shape[dim] for x, dim in pairs if dim is not None), 1)

    def least_bytes(self, inputs: Inputs, result: Any) -> int:
        """The fewest bytes a call moves."""
        return self.moved(inputs, result) if self.moved else moved_bytes(inputs, result)


@dataclass(frozen=True)
class Case:
    """An operation at one size."""

    operation: Operation
    size: str
    batch: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """The operation's size behind the batch; of most it is the latents' (B, C, T, H, W)."""
        sizes = self.operation.sizes
        return (self.batch, *(sizes[self.size] if self.size in sizes else SIZES[self.size]))

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

    def draw(self, device: torch.device) -> Inputs:
        """New random arguments."""
        return self.operation.inputs(self.shape, self.dtype, device)

    def tiny(self) -> "Case":
        """The same in a size of a few thousand elements, for a smoke run."""
        return Case(self.operation, "tiny", min(self.batch, 3), self.dtype)


def short(dtype: torch.dtype) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def tensors(values: Any) -> tuple[Tensor, ...]:
    """The tensors in a call's arguments or result, in order."""
    return tuple(x for x in tree_leaves(values) if isinstance(x, Tensor))


def moved_bytes(inputs: Inputs, result: Any) -> int:
    """Each input read once, each output written once."""
    return sum(x.numel() * x.element_size() for x in tensors((inputs, result)))
