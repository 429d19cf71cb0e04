"""The benchmark suite, which lives in the repository's top-level folder `benchmarks/`.

An installed wheel has that folder as `latentfast.benchmarks`, and not this file. In a checkout (editable install, or
run from its root) this file leads there.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
