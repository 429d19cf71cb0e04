"""One case measured: every backend and baseline, interleaved, with its error, as rows."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

import latentfast
from latentfast._operators import SCHEMAS
from latentfast.backends import _implementation_on
from latentfast.benchmarks import accuracy
from latentfast.benchmarks.harness import (
    MATRIX_DTYPES,
    Effort,
    Percentiles,
    Variant,
    count_operators,
    device_times,
    first_line,
    host_times,
    measure_peaks,
    sets_for,
)
from latentfast.benchmarks.operation import Baseline, Case, Operation, moved_bytes, short
from latentfast.benchmarks.rows import BASELINES, Environment, Row, Times

_DEVICE_BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("native-cpu",)}  # an interpreted kernel has no speed


@dataclass
class Options:
    """What a run measures and how long it takes."""

    device: torch.device
    effort: Effort
    compile: bool = True
    quick: bool = False
    notes: Sequence[str] = ()  # for every row


def backends_on(device: torch.device) -> list[str]:
    """The project's own backends that can run there; if there is none, the eager one, for smoke runs."""
    able = {b.name for b in latentfast.backends() if b.available}
    return [name for name in _DEVICE_BACKENDS[device.type] if name in able] or ["eager"]


def lacks(backend: str, operation: Operation, device: torch.device) -> bool:
    """Whether a backend leaves this operation to the next one."""
    return operation.name in SCHEMAS and _implementation_on(backend, operation.name, device.type) is None


def baseline_variants(operation: Operation, compile: bool) -> Iterator[Variant]:
    """Those of `BASELINES` that the operation has, in that order."""
    forms: list[tuple[Baseline | None, bool]] = [
        (operation.reference, False),
        (operation.reference, True),
        (operation.field, False),
        (operation.field, True),
        (operation.peer, False),  # never compiled: it is what people run, and seldom one graph
    ]
    for name, (baseline, compiled) in zip(BASELINES, forms, strict=True):
        if baseline is not None and (compile or not compiled):
            yield Variant(name, baseline.compile() if compiled else baseline.call)


def _listed(times: Percentiles | None) -> list[float] | None:
    return list(times) if times else None


def measure(case: Case, options: Options, environment: Environment) -> tuple[list[Row], list[str]]:
    """The case's rows, one a backend, and the failures that left a row out."""
    device, operation = options.device, case.operation
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = case.draw(device)
    failures: list[str] = []
    verdicts: dict[str, accuracy.Verdict] = {}
    ours: list[Variant] = []
    nbytes = footprint = 0
    for name in backends_on(device):
        if lacks(name, operation, device):
            continue
        variant = Variant(name, operation.ours, lambda name=name: latentfast.use_backend(name))  # type: ignore[misc]
        try:
            with variant.within():
                result = operation.ours(*inputs)
                nbytes, footprint = operation.least_bytes(inputs, result), moved_bytes(inputs, result)
                del result
                verdicts[name] = accuracy.check(operation, operation.ours, inputs)
        except Exception as error:  # the other backends' rows are still worth having; the run ends with an error code
            failures.append(f"{case.id} on {name}: {type(error).__name__}: {first_line(error)}")
            continue
        ours.append(variant)
    if not ours:
        return [], failures

    baselines = list(baseline_variants(operation, options.compile))
    measure_peaks([*ours, *baselines], inputs, device)
    sets = [inputs, *(case.draw(device) for _ in range(sets_for(footprint, device) - 1))]
    on_device = device_times([*ours, *baselines], sets, device, options.effort)
    del sets
    on_host: dict[str, Percentiles | None] = {}
    add_us = None
    if device.type == "cuda":
        one = torch.zeros(1, device=device)
        add = Variant("add_", lambda *_: one.add_(1))
        on_host = host_times([*ours, *baselines, add], inputs, device, options.effort)
        add_us = on_host["add_"][1] if on_host["add_"] else None
    else:  # the call returns when its work is done: the one clock is the other
        count_operators([*ours, *(v for v in baselines if not v.name.endswith("compiled"))], inputs)

    flops = operation.flops(inputs) if operation.flops else None
    floor_us = _floor_us(nbytes, flops if case.dtype == MATRIX_DTYPES[device.type] else None, environment)

    def times(v: Variant) -> Times:
        return Times(_listed(on_device.get(v.name)), _listed(on_host.get(v.name)), v.launches, v.peak_bytes)

    notes = [f"{v.name}: {problem}" for v in baselines for problem in v.problems]
    rows = []
    for variant in ours:
        verdict, own = verdicts[variant.name], times(variant)
        median = own.device_us[1] if own.device_us else None
        rows.append(
            Row(
                op=operation.name,
                variant=operation.variant,
                stem=operation.stem,
                workload=case.workload,
                shape=list(case.shape),
                dtype=short(case.dtype),
                batch=case.batch,
                backend=variant.name,
                device_us=own.device_us,
                host_us=own.host_us,
                bytes=nbytes,
                floor_us=floor_us,
                floor_share=floor_us / median if median else None,
                gbs=nbytes / median / 1e3 if median else None,
                add_us=add_us,
                baselines={v.name: times(v) for v in baselines},
                field_note=operation.field.note,
                error_rel_l2=verdict.error.rel_l2,
                error_ulp=verdict.error.ulp,
                reference_rel_l2=verdict.reference.rel_l2,
                reference_ulp=verdict.reference.ulp,
                correct=verdict.correct,
                quick=options.quick,
                notes=[*options.notes, *notes, *(f"{variant.name}: {problem}" for problem in variant.problems)],
                environment=replace(environment),
                peer_note=operation.peer.note if operation.peer else "",
                flops=flops,
                tflops=flops / median / 1e6 if flops and median else None,
                launches=own.launches,
                peak_bytes=own.peak_bytes,
            )
        )
    return rows, failures


def _floor_us(nbytes: int, flops: int | None, environment: Environment) -> float:
    """No call is faster than its bytes at the copy rate, nor than its matrix products at theirs."""
    floor = nbytes / environment.copy_tbs / 1e6
    return max(floor, flops / environment.matrix_tflops / 1e6) if flops and environment.matrix_tflops else floor


@contextlib.contextmanager
def released(device: torch.device) -> Iterator[None]:
    """Give a case's memory back to the device at its end: the next one's may be of another size altogether."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
