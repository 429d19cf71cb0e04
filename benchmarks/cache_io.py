"""What the cache costs: saving and loading a trajectory against a plain safetensors file of the same bytes, asking
again for what is there, and a sampling loop that saves each step against one that does not.

The trajectory is 50 states of a Wan 720p clip in bfloat16, 484 MB. The plain file is written by safetensors.torch, and
synced where the cache's files are: with their folder. Reads follow twice: from the page cache, and with the files'
pages dropped from it.
"""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from latentfast.benchmarks.harness import Percentiles, percentiles, synchronize
from latentfast.benchmarks.operation import MODELS
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.table import headed, memory, number
from latentfast.cache import Key, LatentCache

STEPS, QUICK_STEPS = 50, 4
QUICK_LATENTS = (16, 4, 12, 20)
ROUNDS, CPU_ROUNDS, QUICK_ROUNDS = 5, 3, 2
#: A step of the loop: about as long as a small model's on a large GPU, which is the hard case for what runs beside it.
STEP_SECONDS = 0.04
HOST_BYTES = 2 << 30


@dataclass(frozen=True)
class Timing:
    """One thing that was timed.

    Attributes:
        name: what.
        seconds: 20th, 50th and 80th percentile of the rounds.
        nbytes: how many bytes it saved or loaded; 0 where that says nothing.
        against: the name of what it is compared with.
        ratio: how many times as long it took, median by median.
    """

    name: str
    seconds: Percentiles
    nbytes: int = 0
    against: str = ""
    ratio: float | None = None


@dataclass(frozen=True)
class CacheIO:
    """What was measured; `wrong` says what came back other than it was put."""

    environment: Environment
    folder: str
    latents: tuple[int, ...]
    steps: int
    timings: list[Timing]
    quick: bool
    wrong: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


Times = dict[str, list[float]]


@contextmanager
def _timed(times: Times, name: str, device: torch.device) -> Iterator[None]:
    synchronize(device)
    start = time.perf_counter()
    yield
    synchronize(device)
    times.setdefault(name, []).append(time.perf_counter() - start)


def _sync(path: Path) -> None:
    """A file and its name on the disk."""
    for each in (path, path.parent):
        file = os.open(each, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def _drop_pages(folder: Path) -> None:
    """Take files out of the page cache; they are synced, so that they can be."""
    for path in folder.rglob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure(device: str, quick: bool = False, folder: Path | None = None) -> CacheIO:
    """Measure all of it.

    Args:
        device: "cuda" or "cpu", where the trajectory is.
        quick: tiny sizes, few rounds: checks that everything runs.
        folder: where the files go; None: the folder for temporary files, which may be memory.
    """
    where = torch.device(device)
    shape = (1, *(QUICK_LATENTS if quick else MODELS["wan21_14b_720p"]))
    steps, rounds = (QUICK_STEPS, QUICK_ROUNDS) if quick else (STEPS, ROUNDS if device == "cuda" else CPU_ROUNDS)
    torch.manual_seed(0)
    states = [torch.randn(shape, device=where, dtype=torch.bfloat16) for _ in range(steps)]
    times: Times = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="latentfast-bench-") as root, torch.inference_mode():
        for i in range(rounds):
            inside = Path(root) / str(i)
            inside.mkdir()
            _files(states, inside, where, times, wrong)
            shutil.rmtree(inside)
        requests = _requests(states[0], Path(root) / "requests", where, 5 if quick else 200)
        loops = _loops(states[0], Path(root), where, steps, rounds, quick)
    nbytes = sum(state.nbytes for state in states)
    timings = [*_compared(times, nbytes), *requests, *loops]
    found = environment(where, 0.0)  # no floor is taken from these numbers, so no copy rate is measured
    return CacheIO(found, str(folder or tempfile.gettempdir()), shape, steps, timings, quick, "; ".join(wrong))


def _files(states: list[Tensor], folder: Path, device: torch.device, times: Times, wrong: list[str]) -> None:
    """One round of saving and loading, both ways."""
    from safetensors.torch import load_file, save_file

    plain, cached = folder / "plain", folder / "cache"
    plain.mkdir()
    file = plain / "trajectory.safetensors"
    names = [f"{i:02d}" for i in range(len(states))]
    start = time.perf_counter()
    with _timed(times, "safetensors, written", device):
        save_file(dict(zip(names, states, strict=True)), file)
    _sync(file)
    times.setdefault("safetensors, synced", []).append(time.perf_counter() - start)

    keys = [Key.of({"trajectory": 0, "step": i}) for i in range(len(states))]
    with LatentCache(cached, host_bytes=HOST_BYTES) as cache:
        start = time.perf_counter()
        with _timed(times, "cache, put", device):
            for key, state in zip(keys, states, strict=True):
                cache.put(key, {"latents": state})
        if not cache.flush():
            wrong.append("an entry was not kept")
        times.setdefault("cache, flushed", []).append(time.perf_counter() - start)

    for pages in ("warm", "cold"):
        if pages == "cold":
            _drop_pages(plain)
        with _timed(times, f"safetensors, {pages}", device):
            # maps the file: the values are read when they are copied
            plain_states = [x.clone() for x in load_file(file, device=str(device)).values()]
        del plain_states
        if pages == "cold":
            _drop_pages(cached)
        with LatentCache(cached, host_bytes=HOST_BYTES) as cache:
            with _timed(times, f"cache, {pages}", device):
                found = [cache.get(key, device=device) for key in keys]
            for state, each in zip(states, found, strict=True):
                if each is None or not torch.equal(each["latents"], state):
                    wrong.append(f"a state came back {'not at all' if each is None else 'with other bits'}")


def _compared(times: Times, nbytes: int) -> list[Timing]:
    """The rows of saving and loading; the cache's beside the plain file's."""
    pairs = {
        "cache, flushed": "safetensors, synced",
        "cache, warm": "safetensors, warm",
        "cache, cold": "safetensors, cold",
    }
    words = {
        "safetensors, written": "save: safetensors, not synced",
        "safetensors, synced": "save: safetensors, synced",
        "cache, put": "save: cache, until the last put returns",
        "cache, flushed": "save: cache, until all is synced",
        "safetensors, warm": "load: safetensors, from the page cache",
        "cache, warm": "load: cache, from the page cache, checked",
        "safetensors, cold": "load: safetensors, from the disk",
        "cache, cold": "load: cache, from the disk, checked",
    }
    found = []
    for name, word in words.items():
        other = pairs.get(name)
        ratio = percentiles(times[name])[1] / percentiles(times[other])[1] if other else None
        found.append(Timing(word, percentiles(times[name]), nbytes, words[other] if other else "", ratio))
    return found


def _requests(state: Tensor, folder: Path, device: torch.device, calls: int) -> list[Timing]:
    """What asking again costs: the key's description, and the answer of each tier, waited for."""
    description = {"prompt": "a red circle on blue", "seed": 3, "sigmas": [i / 50 for i in range(50)], "guidance": 5.0}
    key = Key.of(description)
    ways: dict[str, tuple[dict[str, int], bool]] = {"host memory": ({"host_bytes": HOST_BYTES}, True)}
    if device.type == "cuda":
        ways["GPU memory"] = ({"host_bytes": HOST_BYTES, "device_bytes": HOST_BYTES}, True)
        ways["GPU memory, shared"] = ({"host_bytes": HOST_BYTES, "device_bytes": HOST_BYTES}, False)
    ways["the disk's page cache"] = ({"host_bytes": 0}, True)
    times: Times = {}
    for _ in range(calls):
        with _timed(times, "ask again: a key of 50 sigmas", device):
            Key.of(description)
    for name, (budgets, copy) in ways.items():
        with LatentCache(folder, **budgets) as cache:
            cache.put(key, {"latents": state})
            cache.flush()
            for _ in range(calls):
                with _timed(times, f"ask again: one state from {name}", device):
                    cache.get(key, device=device, copy=copy)
    return [Timing(name, percentiles(values), 0 if "key" in name else state.nbytes) for name, values in times.items()]


def _model(state: Tensor, quick: bool) -> Callable[[Tensor], Tensor]:
    """Something that keeps the device as busy as a transformer does, for about STEP_SECONDS."""
    device = state.device
    size = 256 if quick else 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = torch.randn(size, size, device=device, dtype=dtype) / size**0.5

    def forward(products: int, x: Tensor) -> Tensor:
        hidden = weight
        for _ in range(products):
            hidden = hidden @ weight
        return x + 1e-3 * hidden.sum().to(x.dtype)

    def seconds(products: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        forward(products, state)
        synchronize(device)
        return time.perf_counter() - start

    seconds(2)
    each = min(seconds(8) for _ in range(3)) / 8
    products = 2 if quick else max(2, round(STEP_SECONDS / each))
    return lambda x: forward(products, x)


def _loops(state: Tensor, folder: Path, device: torch.device, steps: int, rounds: int, quick: bool) -> list[Timing]:
    """A sampling loop without saving, with the cache, and with a synced file after each step."""
    from safetensors.torch import save_file

    model = _model(state, quick)
    counter = itertools.count()
    plain = folder / "files"
    plain.mkdir()

    def sample(after: Callable[[int, int, Tensor], None]) -> None:
        run, x = next(counter), state
        for step in range(steps):
            x = model(x)
            after(run, step, x)

    def keep(run: int, step: int, x: Tensor) -> None:
        cache.put(Key.of({"run": run, "step": step}), {"latents": x})

    def write(run: int, step: int, x: Tensor) -> None:
        path = plain / f"{step}.safetensors"
        save_file({"latents": x}, path)
        _sync(path)

    alone, kept, written = (
        "loop: nothing saved",
        "loop: each step put into the cache",
        "loop: each step written, synced",
    )
    ways: dict[str, Callable[[int, int, Tensor], Any]] = {alone: lambda *_: None, kept: keep, written: write}
    times: Times = {}
    # Room for two runs: a loop begins with the memory that the one before has left, as it does in a session.
    with LatentCache(folder / "loop", host_bytes=2 * steps * state.nbytes, disk_bytes=8 << 30) as cache:
        for _ in range(rounds + 1):
            for name, after in ways.items():
                with _timed(times, name, device):
                    sample(after)
                cache.flush()
    found = []
    for name, values in times.items():
        # the first round gets and page-locks the memory, and has a row of its own
        against = "" if name == alone else alone
        ratio = percentiles(values[1:])[1] / percentiles(times[alone][1:])[1] if against else None
        found.append(Timing(name, percentiles(values[1:]), 0, against, ratio))
    first = times[kept][0]
    base = percentiles(times[alone][1:])[1]
    found.append(Timing("loop: the same, the process's first", (first, first, first), 0, alone, first / base))
    return found


def table(found: CacheIO) -> Table:
    """What took how long."""
    here = found.environment
    where = here.card if here.driver != "none" else f"{here.card}, {here.threads} threads"
    shape = "x".join(map(str, found.latents))
    title = f"{found.steps} states of {shape} in bfloat16, {where}, files in {found.folder}"
    result = headed(("what", "ms", "20%", "80%", "GB/s", "times as long", "as"), 1, title)
    result.columns[-1].justify = "left"
    for timing in found.timings:
        low, middle, high = (number(seconds * 1e3) for seconds in timing.seconds)
        rate = f"{timing.nbytes / timing.seconds[1] / 1e9:.2f}" if timing.nbytes else "–"
        ratio = f"{timing.ratio:.3f}" if timing.ratio is not None else "–"
        result.add_row(timing.name, middle, low, high, rate, ratio, timing.against)
    result.caption = f"{memory(max(timing.nbytes for timing in found.timings))} a trajectory"
    return result
