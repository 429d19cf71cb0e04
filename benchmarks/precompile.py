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

from latentfast.benchmarks.cases import Selection
from latentfast.benchmarks.measure import baseline_variants, released


def warm(selection: Selection, jobs: int, cache: Path, seconds: float) -> float:
    """Fill the cache folder for the selection's cases; returns the seconds taken. The run compiles what failed."""
    start = time.perf_counter()
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    workers = []
    for i in range(min(jobs, len(selection.cases()))):
        command = [sys.executable, "-m", "latentfast.benchmarks.precompile", selection.to_json(), str(i), str(jobs)]
        workers.append(subprocess.Popen(command, env=environment))
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
    """A worker: compile and run its share of the cases' baselines once."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("selection", type=Selection.from_json)
    parser.add_argument("worker", type=int)
    parser.add_argument("jobs", type=int)
    options = parser.parse_args()
    device = torch.device(options.selection.device)
    for case in options.selection.cases()[options.worker :: options.jobs]:
        with released(device):
            torch.manual_seed(0)
            inputs = case.draw(device)
            for variant in baseline_variants(case.operation, True):
                if variant.name.endswith("compiled"):
                    try:
                        variant.call(*inputs)
                    except Exception as error:
                        print(f"precompile: {case.id} {variant.name}: {type(error).__name__}", file=sys.stderr)


if __name__ == "__main__":
    main()
