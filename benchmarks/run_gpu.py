"""`python -m benchmarks.run_gpu --out DIR`: every case on this machine's GPU, as rows of JSON, and a table."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import precompile, targets
from benchmarks.cases import select
from benchmarks.harness import Effort, copy_rate
from benchmarks.measure import Options, backends_on, measure, released
from benchmarks.rows import Row, environment, save, slug
from benchmarks.table import plain

_COPY_BYTES = 2 << 30


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows, NAME-OF-THE-CARD.jsonl")
    parser.add_argument("--only", default="", help="measure only cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: checks that everything runs")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile baselines")
    jobs = min(10, (os.cpu_count() or 2) // 2)
    parser.add_argument("--compile-jobs", type=int, default=jobs, help="processes that compile beforehand")
    parser.add_argument("--seconds-limit", type=float, default=None, help="start no further case after this time")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda, or cpu with --quick")
    return parser.parse_args()


def main() -> int:
    """Measure, save, print; 0 if every backend gave right results and nothing was left out."""
    start = time.perf_counter()
    arguments = _arguments()
    device: torch.device = arguments.device
    if device.type != "cuda" and not (device.type == "cpu" and arguments.quick):
        sys.exit(f"--device must be cuda, or cpu together with --quick, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; `--device cpu --quick` runs the same code without one")
    cases = select(device, arguments.quick, arguments.only)
    if arguments.list or not cases:
        print("\n".join(case.id for case in cases) or f"no case's name contains '{arguments.only}'")
        return 0 if cases else 2

    compile_it, left = not arguments.no_compile, arguments.seconds_limit or 600.0
    with tempfile.TemporaryDirectory(prefix="latentfast-inductor-", ignore_cleanup_errors=True) as cache:
        if compile_it and arguments.compile_jobs > 1:
            ids = [case.id for case in cases]
            took = precompile.warm(ids, device, arguments.quick, arguments.compile_jobs, Path(cache), left / 2)
            print(f"compiled the baselines of {len(ids)} cases in {took:.0f} s", flush=True)
        effort = Effort.quick() if arguments.quick else Effort()
        rate = copy_rate(device, 64 << 20 if arguments.quick else _COPY_BYTES, effort)
        here = environment(device, rate)
        print(f"{here.card}, driver {here.driver}, torch {here.torch}, commit {here.commit}")
        print(f"copy {rate / 1e12:.3f} TB/s; backends: {', '.join(backends_on(device))}", flush=True)

        options = Options(device, effort, compile_it, arguments.quick)
        rows: list[Row] = []
        failures: list[str] = []
        path = arguments.out / f"{slug(here.card)}{'-quick' if arguments.quick else ''}.jsonl"
        for i, case in enumerate(cases):
            if arguments.seconds_limit and time.perf_counter() - start > arguments.seconds_limit:
                failures += [f"{c.id}: not measured, {arguments.seconds_limit:g} s were over" for c in cases[i:]]
                break
            begun = time.perf_counter()
            try:
                with released(device):
                    found, failed = measure(case, options, here)
            except Exception as error:  # a case that does not fit the card must not cost the rows of the others
                found, failed = [], [f"{case.id}: {type(error).__name__}: {error}"]
            rows += found
            failures += failed
            save(rows, path)  # after every case: a run that is cut short keeps what it has
            print(f"  {case.id}: {time.perf_counter() - begun:.1f} s", flush=True)
        again = copy_rate(device, 64 << 20 if arguments.quick else _COPY_BYTES, effort)

    print(f"\n{plain(rows)}\n")
    if not arguments.quick:
        print(f"{targets.report(rows, targets.GPU)}\n")
    notes = sorted({f"{row.title} {row.workload}: {note}" for row in rows for note in row.notes})
    wrong = [f"{row.title} {row.workload} on {row.backend}: wrong result" for row in rows if not row.correct]
    for line in [*notes, *failures, *wrong]:
        print(f"! {line}")
    print(f"copy at the end {again / 1e12:.3f} TB/s; {len(rows)} rows in {path}; {time.perf_counter() - start:.0f} s")
    return 1 if failures or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
