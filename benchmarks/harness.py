"""Timing: device time from CUDA graphs over rotating inputs, host time from loops that do not wait, interleaved."""

import ctypes
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from latentfast._launches import Operators
from latentfast.benchmarks.operation import Inputs

Percentiles = tuple[float, float, float]

_CALLS_IN_A_GRAPH = 60
#: A call that takes long is captured less often: so many seconds of calls, as the host makes them.
_GRAPH_SECONDS = 0.1
_SPIN_CYCLES = 1_000_000  # half a millisecond
#: A call, waited for, from which on few of them are put in a row when the host's time is taken.
_SLOW_SECONDS = 1e-3
#: Of the matrix products that set the floor of what multiplies matrices: dtype and n of (n, n) times (n, n).
MATRIX_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
_MATRIX_SIZES = {"cuda": 8192, "cpu": 1024}


@dataclass
class Variant:
    """One way to compute a case: `call(*inputs)` inside the context that `within()` makes; what was found out about it.

    `launches`: on a GPU, the kernels, copies and fills of a call; on the CPU, the operators that compute something.
    `peak_bytes`: the most device memory that a call takes beyond its inputs, results included.
    """

    name: str
    call: Callable[..., Any]
    within: Callable[[], AbstractContextManager] = nullcontext
    problems: list[str] = field(default_factory=list)
    launches: int | None = None
    peak_bytes: int | None = None

    def note(self, what: str, error: BaseException) -> None:
        """Remember that something about this variant could not be measured."""
        self.problems.append(f"{what}: {type(error).__name__}: {first_line(error)}")


@dataclass(frozen=True)
class Effort:
    """How long a measurement goes on."""

    seconds: float = 0.2  # of device time, for each variant of a case
    least_rounds: int = 7
    most_rounds: int = 40
    host_rounds: int = 25
    host_calls: int = 20
    host_seconds: float = 2.0  # for each variant of a case

    @classmethod
    def quick(cls) -> "Effort":
        """Just enough to run every line."""
        return cls(seconds=0.01, least_rounds=3, most_rounds=3, host_rounds=3, host_calls=3, host_seconds=0.1)


def percentiles(values: list[float]) -> Percentiles:
    """The 20th, 50th and 80th percentile, each a value that was measured."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], ordered[round(0.5 * last)], ordered[round(0.8 * last)]


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is one that works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection inside: it would fall on whichever variant runs."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def cold_bytes(device: torch.device) -> int:
    """The footprint over which inputs rotate: four times the last cache."""
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return 128 << 20


def sets_for(bytes_per_call: int, device: torch.device, most: int = 64) -> int:
    """How many sets of inputs and outputs fill `cold_bytes`."""
    return min(most, max(1, -(-cold_bytes(device) // max(bytes_per_call, 1))))


def copy_rate(device: torch.device, nbytes: int, effort: Effort) -> float:
    """Bytes read plus written in a second by the fastest large copy on the device: what all floors rest on."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    # Replayed from a graph, copy_ is a memory-copy node, which on an H200 reaches 2.8 TB/s where a kernel that does the
    # same reaches 4.3 (docs/performance.md): a floor that rests on the node would flatter every row.
    ways = [Variant("copy_", lambda x: target.copy_(x)), Variant("add", lambda x: torch.add(x, 0, out=target))]
    times = [t for t in device_times(ways, [(source,)], device, effort).values() if t is not None]
    if not times:
        problems = [problem for way in ways for problem in way.problems]
        raise RuntimeError(f"the copy that sets the floor could not be timed: {'; '.join(problems)}")
    return 2 * source.nbytes / min(t[1] for t in times) * 1e6


def matrix_rate(device: torch.device, effort: Effort, size: int | None = None) -> float:
    """Flops a second of a large matrix product in the device's usual dtype: the floor of what multiplies matrices."""
    n, dtype = size or _MATRIX_SIZES[device.type], MATRIX_DTYPES[device.type]
    left, right = (torch.randn((n, n), device=device, dtype=dtype) for _ in range(2))
    product = Variant("mm", torch.mm)
    times = device_times([product], [(left, right)], device, effort)["mm"]
    if times is None:
        raise RuntimeError(f"the matrix product that sets the floor could not be timed: {'; '.join(product.problems)}")
    return 2 * n**3 / times[1] * 1e6


def measure_peaks(variants: list[Variant], inputs: Inputs, device: torch.device) -> None:
    """Set each variant's `peak_bytes`; on the CPU nobody counts, and they stay None."""
    if device.type != "cuda":
        return
    for variant in variants:
        try:
            with variant.within():
                variant.call(*inputs)  # compiles, where there is something to compile
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                variant.call(*inputs)
                variant.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        except Exception as error:  # its times are still worth having, and fail with a note of their own if they must
            variant.note("peak memory", error)


def count_operators(variants: list[Variant], inputs: Inputs) -> None:
    """Set each variant's `launches`, where there is no device to count them; what is compiled has no operators."""
    for variant in variants:
        try:
            with variant.within(), Operators() as operators:
                variant.call(*inputs)
            variant.launches = operators.count
        except Exception as error:
            variant.note("operators", error)


def _nodes(graph: torch.cuda.CUDAGraph) -> int:
    """How many kernels, copies and fills a captured graph holds.

    By the driver's own count: a profiler would do, but it slows the host's launches in what is timed after it.
    """
    count = ctypes.c_size_t()
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
    )
    if status:
        raise RuntimeError(f"cuGraphGetNodes ended with {status}")
    return count.value


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """What makes the host wait for the device cannot be captured; inside, it raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Graph:
    """A CUDA graph that walks over the sets of inputs; outputs are kept apart, so that they rotate as well."""

    def __init__(self, variant: Variant, sets: list[Inputs], pool: Any) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), variant.within():
            variant.call(*sets[0])  # compiles, where there is something to compile
            side.synchronize()
            start = time.perf_counter()
            with _waiting_is_an_error():
                variant.call(*sets[-1])
            seconds = time.perf_counter() - start
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        # One large call is long enough for the events; small ones are put in a row, and as few as it takes of those
        # that are thousands of launches.
        order = sets * (1 if len(sets) == 1 else -(-_CALLS_IN_A_GRAPH // len(sets)))
        order = order[: max(1, int(_GRAPH_SECONDS / seconds))]
        self.calls = len(order)
        outputs: deque[Any] = deque(maxlen=len(sets))
        # The outermost leads back to the stream of now, also from a capture that fails.
        with torch.cuda.stream(torch.cuda.current_stream()), variant.within(), torch.cuda.graph(self.graph, pool=pool):
            for inputs in order:
                outputs.append(variant.call(*inputs))
        outputs.clear()  # the graph's pool keeps the memory; the next variant's graph may share it, as they take turns
        try:
            variant.launches = round(_nodes(self.graph) / self.calls)
        except Exception as error:  # the times do not depend on it
            variant.note("launches", error)

    def microseconds(self) -> float:
        """One replay, a call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The device spins until graph and events are queued; else the way from the host to it would be timed too.
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self.calls


class _Loop:
    """The same without a device of its own: wall time of the calls one after another."""

    def __init__(self, variant: Variant, sets: list[Inputs]) -> None:
        self.variant, self.sets, self.calls = variant, sets, len(sets)
        self.microseconds()

    def microseconds(self) -> float:
        with self.variant.within():
            start = time.perf_counter()
            for inputs in self.sets:
                self.variant.call(*inputs)
            return (time.perf_counter() - start) * 1e6 / len(self.sets)


def device_times(
    variants: list[Variant], sets: list[Inputs], device: torch.device, effort: Effort
) -> dict[str, Percentiles | None]:
    """Microseconds a call on the device; None for a variant that cannot be measured (its `problems` say why).

    The variants take turns round by round, so that clocks, heat and neighbours fall on all alike.
    """
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    runs: dict[str, _Graph | _Loop] = {}
    for variant in variants:
        try:
            runs[variant.name] = _Graph(variant, sets, pool) if device.type == "cuda" else _Loop(variant, sets)
        except Exception as error:  # one variant's failure is a finding about it and must not end the run
            synchronize(device)
            variant.note("device time", error)
    values: dict[str, list[float]] = {name: [] for name in runs}
    rounds = {}
    for name, run in runs.items():
        run.microseconds()
        total = max(run.microseconds() * run.calls, 1.0) / 1e6
        rounds[name] = min(effort.most_rounds, max(effort.least_rounds, int(effort.seconds / total)))
    with _quiet():
        for i in range(max(rounds.values(), default=0)):
            for name, run in runs.items():
                if i < rounds[name]:
                    values[name].append(run.microseconds())
    runs.clear()
    return {v.name: percentiles(values[v.name]) if values.get(v.name) else None for v in variants}


def host_times(
    variants: list[Variant], inputs: Inputs, device: torch.device, effort: Effort
) -> dict[str, Percentiles | None]:
    """Microseconds until a call returns to the host, the device being waited for between rounds only.

    Of calls that take long on the device few are put in a row. So the launch queue (1,024 entries) never fills, which
    would make the host wait and the number the device's.
    """
    calls: dict[str, int] = {}
    values: dict[str, list[float]] = {v.name: [] for v in variants}
    rounds: dict[str, int] = {}
    for variant in variants:
        try:
            with variant.within():
                for _ in range(2):
                    start = time.perf_counter()
                    variant.call(*inputs)
                    synchronize(device)
                    seconds = time.perf_counter() - start
            slow = seconds > _SLOW_SECONDS
            calls[variant.name] = min(3, effort.host_calls) if slow else effort.host_calls
            most = min(effort.host_rounds, 7) if slow else effort.host_rounds
            rounds[variant.name] = min(most, max(3, int(effort.host_seconds / (calls[variant.name] * seconds))))
        except Exception as error:
            variant.note("host time", error)
    usable = [v for v in variants if v.name in rounds]
    with _quiet():
        for i in range(max(rounds.values(), default=0)):
            for variant in usable:
                if i >= rounds[variant.name]:
                    continue
                call = variant.call
                with variant.within():
                    call(*inputs)  # wakes the allocator and the caches for this variant
                    synchronize(device)
                    start = time.perf_counter()
                    for _ in range(calls[variant.name]):
                        call(*inputs)
                    values[variant.name].append((time.perf_counter() - start) * 1e6 / calls[variant.name])
                synchronize(device)
    return {name: percentiles(v) if v else None for name, v in values.items()}


def first_line(error: BaseException) -> str:
    """An error's first line, for a note in a row."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
