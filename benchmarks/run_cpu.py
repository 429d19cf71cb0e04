"""`python -m benchmarks.run_cpu`: the CPU benchmarks through pytest-benchmark, and rows of JSON from its report."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import targets
from benchmarks.cases import STEMS
from benchmarks.harness import Effort, copy_rate, percentiles
from benchmarks.operation import Case, short
from benchmarks.rows import BASELINES, RESULTS, Environment, Row, Times, environment, save
from benchmarks.table import plain

_ROOT = Path(__file__).parent.parent


def _busy(threads: int) -> list[str]:
    """A note for the rows if other processes want this machine's cores as well."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return [f"the machine was busy: load average {load:.1f} on {cores} cores"] if load > cores - threads + 0.5 else []


def convert(
    report: dict[str, Any], cases: dict[str, Case], here: Environment, quick: bool, notes: list[str]
) -> list[Row]:
    """Rows from pytest-benchmark's report: one for each case and backend of the project's own."""
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in report["benchmarks"]:
        measured[entry["extra_info"]["case"], entry["extra_info"]["way"]] = entry

    def times(case: str, way: str) -> Times:
        entry = measured.get((case, way))
        return Times([1e6 * s for s in percentiles(entry["stats"]["data"])]) if entry else Times()

    rows = []
    for (name, way), entry in measured.items():
        if not way.startswith("latentfast:"):
            continue
        case, info = cases[name], entry["extra_info"]
        own = times(name, way)
        assert own.device_us is not None  # it is the entry at hand
        floor_us = info["bytes"] / here.copy_tbs / 1e6
        rows.append(
            Row(
                op=case.operation.name,
                variant=case.operation.variant,
                stem=case.operation.stem,
                workload=case.workload,
                shape=list(case.shape),
                dtype=short(case.dtype),
                batch=case.batch,
                backend=way.removeprefix("latentfast:"),
                device_us=own.device_us,
                host_us=None,
                bytes=info["bytes"],
                floor_us=floor_us,
                floor_share=floor_us / own.device_us[1],
                gbs=info["bytes"] / own.device_us[1] / 1e3,
                add_us=None,
                baselines={b: times(name, b) for b in BASELINES if (name, b) in measured},
                field_note=case.operation.field.note,
                error_rel_l2=info["error"][0],
                error_ulp=info["error"][1],
                reference_rel_l2=info["reference"][0],
                reference_ulp=info["reference"][1],
                correct=True,  # the test that wrote this entry fails otherwise
                quick=quick,
                notes=notes,
                environment=here,
            )
        )
    return rows


def main() -> int:
    """Run, convert, save, print; pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for cpu.jsonl")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="pytest's -k: measure only what matches")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: checks that everything runs")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile baselines")
    arguments = parser.parse_args()
    notes = _busy(arguments.threads)
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    rate = copy_rate(torch.device("cpu"), (8 if quick else 256) << 20, Effort.quick() if quick else Effort())
    here = environment(torch.device("cpu"), rate)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        command += [f"--benchmark-json={report}", "--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"]
        command += ["--benchmark-sort=fullname", f"--threads={arguments.threads}", *(["--quick"] * quick)]
        command += [*(["--no-compile"] * arguments.no_compile), *(["-k", arguments.only] if arguments.only else [])]
        command += [str(stem.__file__) for stem in STEMS]
        status = subprocess.run(command, cwd=_ROOT).returncode
        data = json.loads(report.read_text()) if report.exists() and report.stat().st_size else {"benchmarks": []}
    cases = [case.tiny() if quick else case for stem in STEMS for case in stem.CPU_CASES]
    rows = convert(data, {case.id: case for case in cases}, here, quick, notes)
    path = arguments.out / f"cpu{'-quick' if quick else ''}.jsonl"
    if rows:
        save(rows, path)
    print(f"\n{plain(rows)}\n")
    if not quick:
        print(f"{targets.report(rows, targets.CPU)}\n")
    for note in notes:
        print(f"! {note}")
    print(f"{here.card}, {here.threads} threads, torch {here.torch}; {len(rows)} rows{f' in {path}' if rows else ''}")
    return status


if __name__ == "__main__":
    sys.exit(main())
