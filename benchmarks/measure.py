"""One case measured: every backend and baseline, interleaved, with its error, as rows."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

import latentfast
from benchmarks import accuracy
from benchmarks.harness import Effort, Percentiles, Variant, device_times, first_line, host_times, sets_for
from benchmarks.operation import Baseline, Case, Operation, moved_bytes, short
from benchmarks.rows import BASELINES, Environment, Row, Times

_DEVICE_BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("native-cpu",)}  # an interpreted kernel has no speed
#: Device time (µs) of a call from which on few of them are put in a row when the host's time is taken.
_SLOW = 1000.0


@dataclass
class Options:
    """What a run measures and how long it takes."""

    device: torch.device
    effort: Effort
    compile: bool = True
    quick: bool = False


def backends_on(device: torch.device) -> list[str]:
    """The project's own backends that can run there; if there is none, the eager one, for smoke runs."""
    able = {b.name for b in latentfast.backends() if b.available}
    return [name for name in _DEVICE_BACKENDS[device.type] if name in able] or ["eager"]


def baseline_variants(operation: Operation, compile: bool) -> Iterator[Variant]:
    """The baselines of `BASELINES`, in that order."""
    forms: list[tuple[str, Baseline, bool]] = [
        ("eager", operation.reference, False),
        ("compiled", operation.reference, True),
        ("field_eager", operation.field, False),
        ("field_compiled", operation.field, True),
    ]
    assert tuple(name for name, _, _ in forms) == BASELINES
    for name, baseline, compiled in forms:
        if compile or not compiled:
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
    nbytes = 0
    for name in backends_on(device):
        variant = Variant(name, operation.ours, lambda name=name: latentfast.use_backend(name))  # type: ignore[misc]
        try:
            with variant.within():
                nbytes = moved_bytes(inputs, operation.ours(*inputs))
                verdicts[name] = accuracy.check(operation, operation.ours, inputs)
        except Exception as error:  # the other backends' rows are still worth having; the run ends with an error code
            failures.append(f"{case.id} on {name}: {type(error).__name__}: {first_line(error)}")
            continue
        ours.append(variant)
    if not ours:
        return [], failures

    baselines = list(baseline_variants(operation, options.compile))
    sets = [inputs, *(case.draw(device) for _ in range(sets_for(nbytes, device) - 1))]
    on_device = device_times([*ours, *baselines], sets, device, options.effort)
    del sets
    one = torch.zeros(1, device=device)
    add = Variant("add_", lambda *_: one.add_(1))
    slow = max((t[1] for t in on_device.values() if t), default=0.0) > _SLOW
    on_host = host_times([*ours, *baselines, add], inputs, device, options.effort, slow)

    floor_us = nbytes / (environment.copy_tbs * 1e12) * 1e6
    times = {b.name: Times(_listed(on_device.get(b.name)), _listed(on_host.get(b.name))) for b in baselines}
    notes = [f"{v.name}: {problem}" for v in baselines for problem in v.problems]
    rows = []
    add_time = on_host.get("add_")
    for variant in ours:
        verdict, median = verdicts[variant.name], on_device[variant.name]
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
                device_us=_listed(median),
                host_us=_listed(on_host.get(variant.name)),
                bytes=nbytes,
                floor_us=floor_us,
                floor_share=floor_us / median[1] if median else None,
                gbs=nbytes / median[1] / 1e3 if median else None,
                add_us=add_time[1] if add_time else None,
                baselines=times,
                field_note=operation.field.note,
                error_rel_l2=verdict.error.rel_l2,
                error_ulp=verdict.error.ulp,
                reference_rel_l2=verdict.reference.rel_l2,
                reference_ulp=verdict.reference.ulp,
                correct=verdict.correct,
                quick=options.quick,
                notes=notes + [f"{variant.name}: {problem}" for problem in variant.problems],
                environment=replace(environment),
            )
        )
    return rows, failures


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
