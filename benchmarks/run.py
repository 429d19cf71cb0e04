"""A run: every selected case on this machine, as rows of JSON, then tables, targets and what went wrong."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from latentfast.benchmarks import precompile, targets
from latentfast.benchmarks.cases import Selection
from latentfast.benchmarks.harness import Effort, copy_rate, matrix_rate
from latentfast.benchmarks.measure import Options, backends_on, measure, released
from latentfast.benchmarks.operation import Case
from latentfast.benchmarks.rows import Environment, Row, environment, load, merged, save, slug
from latentfast.benchmarks.table import terminal

_COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
_QUICK_BYTES, _QUICK_MATRIX = 8 << 20, 128
#: A call of the CPU takes long enough for the rounds of more seconds.
_EFFORTS = {"cuda": Effort(), "cpu": Effort(seconds=2.0)}


def default_jobs() -> int:
    """Processes that compile beforehand, where none is asked for."""
    return min(10, (os.cpu_count() or 2) // 2)


def run(
    selection: Selection,
    out: Path,
    console: Console,
    *,
    compile: bool = True,
    jobs: int = 1,
    threads: int = 2,
    seconds_limit: float | None = None,
) -> int:
    """Measure, save, print; 0 if every backend gave right results and nothing was left out, else 1.

    Args:
        selection: of the cases; it has some.
        out: folder of the rows, NAME-OF-THE-CARD.jsonl or cpu.jsonl; rows of other cases that are there stay.
        console: where the report goes.
        compile: whether the `torch.compile` baselines are measured.
        jobs: processes that compile them beforehand.
        threads: of every way to compute on the CPU.
        seconds_limit: no further case is started after this time.
    """
    start = time.perf_counter()
    device, cases = torch.device(selection.device), selection.cases()
    effort = Effort.quick() if selection.quick else _EFFORTS[device.type]
    with _threads(threads if device.type == "cpu" else None), _inductor_cache() as cache:
        notes = _busy(threads) if device.type == "cpu" else []
        if compile and jobs > 1:
            took = precompile.warm(selection, jobs, cache, (seconds_limit or 600.0) / 2)
            console.print(f"compiled the baselines of {len(cases)} cases in {took:.0f} s")
        here = _environment(device, effort, selection.quick)
        console.print(f"{here.card}, driver {here.driver}, torch {here.torch}, commit {here.commit}")
        rates = f"copy {here.copy_tbs:.3f} TB/s, matrix products {here.matrix_tflops:.3g} TFLOP/s"
        console.print(f"{rates}; backends: {', '.join(backends_on(device))}")

        name = slug(here.card) if device.type == "cuda" else "cpu"
        path = out / f"{name}{'-quick' if selection.quick else ''}.jsonl"
        before = load(path) if path.exists() else []
        options = Options(device, effort, compile, selection.quick, notes)
        rows: list[Row] = []
        failures: list[str] = []
        for case, found, failed in _measured(cases, options, here, start, seconds_limit):
            rows += found
            failures += failed
            save(merged(before, rows), path)  # after every case: a run that is cut short keeps what it has
            console.print(f"  {case.id}: {time.perf_counter() - start:.0f} s")
        again = copy_rate(device, _QUICK_BYTES if selection.quick else _COPY_BYTES[device.type], effort)

    console.print(terminal(rows))
    if not selection.quick:
        console.print(targets.report(rows, targets.GPU if device.type == "cuda" else targets.CPU), soft_wrap=True)
    remarks = [*notes, *sorted({f"{r.title} {r.workload}: {x}" for r in rows for x in r.notes if x not in notes})]
    wrong = [f"{row.title} {row.workload} on {row.backend}: wrong result" for row in rows if not row.correct]
    for line in [*remarks, *failures, *wrong]:
        console.print(f"! {line}", soft_wrap=True)
    took = time.perf_counter() - start
    older = len(merged(before, rows)) - len(rows)
    where = f"{len(rows)} rows in {path}{f', beside {older} older ones' if older else ''}"
    console.print(f"copy at the end {again / 1e12:.3f} TB/s; {where}; {took:.0f} s", soft_wrap=True)
    return 1 if failures or wrong else 0


def _measured(
    cases: list[Case], options: Options, here: Environment, start: float, seconds_limit: float | None
) -> Iterator[tuple[Case, list[Row], list[str]]]:
    for case in cases:
        if seconds_limit and time.perf_counter() - start > seconds_limit:
            yield case, [], [f"{case.id}: not measured, {seconds_limit:g} s were over"]
            continue
        try:
            with released(options.device):
                found, failed = measure(case, options, here)
        except Exception as error:  # a case that does not fit the card must not cost the rows of the others
            found, failed = [], [f"{case.id}: {type(error).__name__}: {error}"]
        yield case, found, failed


def _environment(device: torch.device, effort: Effort, quick: bool) -> Environment:
    copy = copy_rate(device, _QUICK_BYTES if quick else _COPY_BYTES[device.type], effort)
    matrix = matrix_rate(device, effort, _QUICK_MATRIX if quick else None)
    with released(device):
        return environment(device, copy, matrix)


def _busy(threads: int) -> list[str]:
    """A note for the rows if other processes want this machine's cores as well."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return [f"the machine was busy: load average {load:.1f} on {cores} cores"] if load > cores - threads + 0.5 else []


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _inductor_cache() -> Iterator[Path]:
    """A folder of this run's own for what `torch.compile` makes: nothing of an older run counts."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory(prefix="latentfast-inductor-", ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
