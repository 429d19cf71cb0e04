"""From a slider's move, or an edit more, to the pixels on the host: a plan at Wan 480p, against `torch.compile`."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch._inductor.config
from rich.table import Table
from torch import Tensor

from latentfast import plan
from latentfast.benchmarks.bench_plan import RGB_8, STACK, STRENGTH, T
from latentfast.benchmarks.harness import percentiles, synchronize
from latentfast.benchmarks.operation import MODELS
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.table import headed

MOVES, CHANGES, RECOMPILATIONS = {"cuda": 10_000, "cpu": 200}, 200, 3


@dataclass(frozen=True)
class Preview:
    """Milliseconds: of the moves [p50, p99], of all else [p20, p50, p80].

    Attributes:
        moved: From `set` until the bytes lie on the host, the run as a CUDA graph where there is one.
        rebuilt: `change` alone, which is the host's work.
        changed: From `change`, an edit added and taken away in turns, until the bytes lie on the host.
        recompiled: The same for `torch.compile` of the reference; empty where it was not measured.
    """

    latents: tuple[int, ...]
    environment: Environment
    moves: int
    moved: tuple[float, float]
    rebuilt: tuple[float, float, float]
    changed: tuple[float, float, float]
    recompiled: tuple[float, float, float] | None
    quick: bool

    def title(self) -> str:
        """What was measured, where."""
        return f"6 edits, RGB 8x; latents {'x'.join(map(str, self.latents))}; {self.environment.card}"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


class _Shown:
    """A plan, its pixels on the device and on the host, and the run between them."""

    def __init__(self, made: plan.Plan, device: torch.device) -> None:
        self.made, self.device = made, device
        self.pixels = made.run()
        assert isinstance(self.pixels, Tensor)
        on_gpu = device.type == "cuda"
        self.host = torch.empty(self.pixels.shape, dtype=torch.uint8, pin_memory=on_gpu) if on_gpu else self.pixels
        self.replay: Callable[[], object] | None = None
        if on_gpu:
            synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made.run(out=self.pixels)
            self.replay = graph.replay

    def run(self) -> None:
        """The plan as it is."""
        self.made.run(out=self.pixels)
        self.fetch()

    def fetch(self) -> None:
        """The bytes to the host, waited for."""
        if self.host is not self.pixels:
            self.host.copy_(self.pixels, non_blocking=True)
        synchronize(self.device)

    def move(self, value: float) -> None:
        """A slider's move, until its pixels are on the host."""
        self.made.set(0, value)
        if self.replay is None:
            self.run()
            return
        self.replay()
        self.fetch()


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(device: str, quick: bool = False) -> Preview:
    """Measures all of it on one plan.

    Args:
        device: Where the latents are.
        quick: Small latents, few rounds: checks that everything runs.
    """
    where = torch.device(device)
    size = (4, 3, 8, 16) if quick else MODELS["wan21_1_3b_480p"]
    with torch.inference_mode():
        *tensors, made = RGB_8.inputs((1, *size), torch.bfloat16, where)
        shown, last = _Shown(made, where), made.stack[-1]
        for i in range(20):
            shown.move(i / 20)
        moves = 50 if quick else MOVES[where.type]
        moved = sorted(_milliseconds(lambda i=i: shown.move(i % 100 / 100)) for i in range(moves))
        made.set(0, T)
        longer, rebuilt, changed = [*STACK, plan.Direction("colour", STRENGTH[0])], [], []
        for i in range(10 if quick else CHANGES):
            stack = [*(longer if i % 2 == 0 else STACK), last]
            start = time.perf_counter()
            made.change(stack)
            rebuilt.append((time.perf_counter() - start) * 1e3)
            shown.run()
            changed.append((time.perf_counter() - start) * 1e3)
        recompiled = None if quick else _recompiled(tensors, shown)
    p50, p99 = (moved[min(len(moved) - 1, int(share * len(moved)))] for share in (0.5, 0.99))
    return Preview(
        size, environment(where, 0.0), moves, (p50, p99), percentiles(rebuilt), percentiles(changed), recompiled, quick
    )


def _recompiled(tensors: list, shown: _Shown) -> tuple[float, float, float]:
    """The reference compiled anew, as it is for a stack that it has not seen, until its pixels are on the host."""

    def once() -> None:
        torch._dynamo.reset()
        shown.pixels = RGB_8.reference.compile()(*tensors, None)
        shown.fetch()

    with torch._inductor.config.patch(force_disable_caches=True):  # a stack that was not seen before
        once()  # what is done once a process
        return percentiles([_milliseconds(once) for _ in range(RECOMPILATIONS)])


def table(found: Preview) -> Table:
    """A line for each of the measurements."""
    lines = headed(("what, until the pixels are on the host", "ms", "ms at worst"), 1, found.title())
    lines.add_row(f"a slider moved, {found.moves:,} times: p50, p99", *(f"{x:.3f}" for x in found.moved))
    lines.add_row("an edit added or taken away: p50, p80", *(f"{x:.3f}" for x in found.changed[1:]))
    lines.add_row("of which the list's rebuilding", *(f"{x:.3f}" for x in found.rebuilt[1:]))
    if found.recompiled:
        lines.add_row("torch.compile of the reference anew", *(f"{x:.0f}" for x in found.recompiled[1:]))
    return lines
