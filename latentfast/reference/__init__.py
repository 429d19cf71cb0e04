"""The specification: every operation in plain, readable PyTorch.

Also the "eager" backend, the tests' yardstick (run it in float64) and the benchmarks' baseline. Nothing here imports
anything but torch, and nothing here is fast on purpose.
"""

from latentfast.reference import edit, guidance, interpolate, mask, plan, preview, stats, temporal, tiles

__all__ = ["edit", "guidance", "interpolate", "mask", "plan", "preview", "stats", "temporal", "tiles"]
