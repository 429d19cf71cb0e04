"""What every training stage shares: the log, the budget, the optimizer, and a step captured as one CUDA graph."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

NO_GRAPHS = "--no-graphs"


class Log:
    """Writes each line to stdout and to ``<folder>/train.log``, with the seconds since the start; collects
    results as JSON. Of several processes only the first one writes files.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.start, self.rank = folder, time.time(), rank

    def __call__(self, *words: object) -> None:
        line = f"[{time.time() - self.start:6.1f}s] " + " ".join(str(w) for w in words)
        if self.rank:
            print(f"rank {self.rank} {line}", flush=True)
            return
        print(line, flush=True)
        with open(self.folder / "train.log", "a") as f:
            f.write(line + "\n")

    def record(self, stage: str, **values: object) -> None:
        """Adds measured values to ``<folder>/training.json``, from which the model card is written."""
        if self.rank:
            return
        path = self.folder / "training.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known.setdefault(stage, {}).update(values)
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


@dataclass
class Budget:
    """How long a stage lasts: in seconds of wall clock, or in steps (then a run can be repeated exactly)."""

    seconds: float = math.inf
    steps: int = 0
    started: float = field(default_factory=time.time)

    def fraction(self, step: int) -> float:
        if self.steps:
            return min(1.0, step / self.steps)
        return min(1.0, (time.time() - self.started) / self.seconds)

    def restart(self) -> None:
        """Sets the clock back: capturing and compiling are not training."""
        self.started = time.time()


def prepare(seed: int, device: str) -> None:
    """Seeds everything and allows TF32, which all stages train with."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("train_tiny: --device cuda was asked for, but torch sees no CUDA device; use --device cpu")


def amp(device: str) -> torch.autocast:
    # The cache of casted weights would outlive a captured step's buffers.
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class MuonAdamW:
    """Muon for weight matrices, AdamW for everything else; the whole step can be captured in a CUDA graph.

    Muon: K. Jordan et al. 2024, with the update scaled by 0.2 sqrt(max(rows, columns)) so that one learning
        rate serves both
    (Liu et al. 2025, arXiv:2502.16982). Convolutions count as matrices of shape (out, in * taps).

    Args:
        named: parameters with their names.
        rate: learning rate, a scalar tensor on the parameters' device; the caller changes it in place.
        muon_rate: Muon's rate as a multiple of ``rate``.
        decay: decoupled weight decay of both.
        betas: of AdamW.
        adamw_names: parameters whose name contains one of these are left to AdamW.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        rate: Tensor,
        *,
        muon_rate: float = 1.0,
        decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        adamw_names: tuple[str, ...] = (),
    ) -> None:
        named = [(n, p) for n, p in named if p.requires_grad]
        self.params = [p for _, p in named]
        self.rate, self.muon_rate, self.decay = rate, muon_rate, decay

        def is_matrix(name: str, p: nn.Parameter) -> bool:
            return p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 16 and not any(s in name for s in adamw_names)

        fused = {"capturable": True, "fused": True} if rate.is_cuda else {}
        others = [p for n, p in named if not is_matrix(n, p)]
        self.adamw = torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=betas, **fused)
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for n, p in named:
            if is_matrix(n, p):
                self.groups.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.momentum = {k: torch.zeros(len(v), *k, device=rate.device) for k, v in self.groups.items()}

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets all moments, in place (a captured step keeps pointing at them)."""
        for m in self.momentum.values():
            m.zero_()
        for state in self.adamw.state.values():
            for name, value in state.items():
                if name != "step":
                    value.zero_()

    @torch.no_grad()
    def step(self, clip: float = 1.0) -> None:
        nn.utils.clip_grad_norm_(self.params, clip, foreach=True)
        self.adamw.step()
        for shape, params in self.groups.items():
            grad = torch.stack([p.grad.reshape(shape) for p in params])
            momentum = self.momentum[shape]
            momentum.lerp_(grad, 0.05)
            update = orthogonalize(grad.lerp(momentum, 0.95)).float()
            update *= self.rate * (self.muon_rate * 0.2 * math.sqrt(max(shape)))
            if self.decay:
                torch._foreach_mul_(params, 1 - self.rate * self.decay)
            torch._foreach_sub_(params, [u.reshape(p.shape) for u, p in zip(update, params, strict=True)])


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Brings the singular values of each matrix of a batch near 1 (Newton-Schulz, Jordan's coefficients), in
    bfloat16.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    u = matrices.bfloat16()
    u = u.mT if tall else u
    u = u / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a = u @ u.mT
        u = 3.4445 * u + (-4.775 * a + 2.0315 * a @ a) @ u
    return u.mT if tall else u


def captured(step: Callable[[], Tensor], log: Log, device: str, warm: int = 3) -> Callable[[], Tensor]:
    """The same step as one CUDA graph, data and noise included; eager where there is no GPU or graphs are
    switched off.

    A failed capture leaves the device's random generator unusable, so the program then starts itself again
    without graphs; stages that are done are not repeated. One of several processes cannot start again alone: it
    raises.
    """
    if not device.startswith("cuda") or NO_GRAPHS in sys.argv:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Threads of the communication library ask for events meanwhile, which the default mode forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local" if dist.is_initialized() else "global"):
            result = step()
    except Exception as e:  # whatever the reason: a slower run is better than none
        if dist.is_initialized():
            raise
        log(f"NOT CAPTURED ({repr(e)[:600]}): starting again with {NO_GRAPHS}")
        os.execv(sys.executable, [*sys.orig_argv, NO_GRAPHS])

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Snapshot:
    """A copy of weights to fall back to when training diverges."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.copy = [p.detach().clone() for p in params]

    @torch.no_grad()
    def take(self) -> None:
        torch._foreach_copy_(self.copy, [p.detach() for p in self.params])

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.params, self.copy)


def millions(*modules: nn.Module) -> float:
    return sum(p.numel() for m in modules for p in m.parameters()) / 1e6


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = (a.float().clamp(-1, 1) - b.float()).square().mean().item()
    return -10 * math.log10(max(error, 1e-12) / 4)
