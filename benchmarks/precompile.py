"""Compile the `torch.compile` baselines of many cases in processes of their own, into one cache, before they are timed.

A compilation takes seconds, on one core, and a run has about sixty of them. The run then finds every one in the cache.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import baseline_variants, released


def warm(ids: list[str], device: torch.device, quick: bool, jobs: int, cache: Path, seconds: float) -> float:
    """Fill the cache folder for the cases `ids`; returns the seconds taken. The run itself compiles what failed."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    start = time.perf_counter()
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    workers = []
    for i in range(min(jobs, len(ids))):
        command = [sys.executable, "-m", "benchmarks.precompile", "--device", str(device), *(["--quick"] * quick)]
        workers.append(subprocess.Popen([*command, *ids[i::jobs]], env=environment))
    for worker in workers:
        try:
            worker.wait(max(1.0, seconds - (time.perf_counter() - start)))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            print("precompile: a worker ran out of time; what it left is compiled during the run", file=sys.stderr)
    # Which launch configuration is best was measured while the workers shared the device: the run shall do it again.
    for choice in cache.rglob("*.best_config"):
        choice.unlink()
    return time.perf_counter() - start


def main() -> None:
    """A worker: compile and run each case's baselines once."""
    from benchmarks.cases import select  # here, because `cases` imports what a parent needs no earlier

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("ids", nargs="+")
    options = parser.parse_args()
    for case in select(options.device, options.quick):
        if case.id not in options.ids:
            continue
        with released(options.device):
            torch.manual_seed(0)
            inputs = case.draw(options.device)
            for variant in baseline_variants(case.operation, True):
                if variant.name.endswith("compiled"):
                    try:
                        variant.call(*inputs)
                    except Exception as error:
                        print(f"precompile: {case.id} {variant.name}: {type(error).__name__}", file=sys.stderr)


if __name__ == "__main__":
    main()
