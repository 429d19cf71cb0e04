"""The CPU's measurement, a pytest-benchmark test that each bench_<stem>.py imports, so that it is collected there."""

import itertools
import time

import torch

import latentfast
from benchmarks import accuracy
from benchmarks.harness import Variant, sets_for
from benchmarks.measure import backends_on, baseline_variants, released
from benchmarks.operation import Case, moved_bytes

CPU = torch.device("cpu")
#: Seconds that the rounds of one measurement take together, and the bounds of their number.
_SECONDS, _ROUNDS = 2.0, (10, 300)


def ways(compile: bool) -> list[str]:
    """Every way to compute a case here: the project's backends and the baselines."""
    names = ["eager", "compiled", "field_eager", "field_compiled"] if compile else ["eager", "field_eager"]
    own = [f"latentfast:{name}" for name in backends_on(CPU)]
    return own + names


def _variant(case: Case, way: str) -> Variant:
    if way.startswith("latentfast:"):
        backend = way.removeprefix("latentfast:")
        return Variant(way, case.operation.ours, lambda: latentfast.use_backend(backend))
    return next(v for v in baseline_variants(case.operation, True) if v.name == way)


def test_speed(benchmark, case: Case, way: str, quick: bool, threads: int) -> None:
    """Time a case computed one way, over rotating inputs; the project's own backends' results are checked as well."""
    with released(CPU):
        torch.manual_seed(0)
        inputs = case.draw(CPU)
        variant = _variant(case, way)
        with variant.within():
            nbytes = moved_bytes(inputs, variant.call(*inputs))  # compiles, where there is something to compile
            info = {"case": case.id, "way": way, "bytes": nbytes, "threads": threads}
            if way.startswith("latentfast:"):
                verdict = accuracy.check(case.operation, variant.call, inputs)
                assert verdict.correct, f"{case.id} on {way}: {verdict}"
                info["error"] = [verdict.error.rel_l2, verdict.error.ulp]
                info["reference"] = [verdict.reference.rel_l2, verdict.reference.ulp]
            benchmark.extra_info.update(info)
            start = time.perf_counter()
            variant.call(*inputs)
            taken = time.perf_counter() - start
            rounds = 3 if quick else min(_ROUNDS[1], max(_ROUNDS[0], int(_SECONDS / taken)))
            rotation = itertools.cycle([inputs, *(case.draw(CPU) for _ in range(sets_for(nbytes, CPU) - 1))])
            benchmark.pedantic(variant.call, setup=lambda: (next(rotation), {}), rounds=rounds, warmup_rounds=2)
