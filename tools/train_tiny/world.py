"""Several processes that train one model, each on its own device: started by ``torchrun``, alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process's place among ``size`` processes. With one process every method is free of communication."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str) -> World:
        """Meets the other processes that ``torchrun``'s environment variables tell of, and takes one device each."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            cuda = device.startswith("cuda")
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=20))
        return cls(rank, size, device)

    def largest(self, values: Iterable[float]) -> list[float]:
        """The largest of each value over all processes, so that all decide alike."""
        values = list(values)
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        if self.size > 1:
            for t in tensors:
                dist.broadcast(t.detach(), 0)

    def gather(self, value: object) -> list:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        self.largest([0.0])

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class GradientMean:
    """The mean of all processes' gradients, in one buffer: ``collect``, ``reduce``, ``give``.

    The collective lies between two captured graphs rather than inside one: it costs one launch a step, and no
    capture has to survive the communication library's own threads.
    """

    def __init__(self, params: list[nn.Parameter], world: World) -> None:
        self.params, self.world = params, world
        self.buffer = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
        parts = self.buffer.split([p.numel() for p in params])
        self.views = [part.view_as(p) for part, p in zip(parts, params, strict=True)]

    @torch.no_grad()
    def collect(self) -> None:
        torch._foreach_copy_(self.views, [p.grad for p in self.params])
        self.buffer.div_(self.world.size)

    def reduce(self) -> None:
        dist.all_reduce(self.buffer)

    def give(self) -> None:
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view
