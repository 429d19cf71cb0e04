"""All stems' cases together."""

import torch

from benchmarks import bench_edit, bench_interpolate, bench_temporal, bench_tiles
from benchmarks.operation import Case

STEMS = (bench_interpolate, bench_edit, bench_temporal, bench_tiles)


def select(device: torch.device, quick: bool = False, only: str = "") -> list[Case]:
    """The cases for a device whose id contains `only`; `quick`: each operation once, in a tiny size.

    In the order of the lists, a case of each stem in turn: a run that ends early has something of everything.
    """
    lists = [list(stem.CASES if device.type == "cuda" or quick else stem.CPU_CASES) for stem in STEMS]
    cases = [stem[i] for i in range(max(map(len, lists))) for stem in lists if i < len(stem)]
    if quick:
        cases = list({case.id: case for case in (case.tiny() for case in cases)}.values())
    return [case for case in cases if only in case.id]
