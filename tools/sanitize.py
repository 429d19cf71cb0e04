"""Calls every operation once on small, odd shapes on the GPU: what compute-sanitizer runs over.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tools/sanitize.py

Without the caching allocator every tensor has bounds of its own, so that an access beyond one is seen.
"""

import argparse
import contextlib
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tests' table of operations

import latentfast
from latentfast import plan
from tests.helpers import Draw, gradients
from tests.operations import LIGHT, OPERATIONS
from tests.plans import compiled, tensors

ODD = (2, 3, 5, 7, 13)
LARGE = (2, 16, 5, 60, 104)  # several chunks a vector, the aligned path
#: Sums of the tensors, sums behind a mask that need a pass of their own, every kind of operand.
STACK = [
    plan.Slerp("a", 0.3),
    plan.Direction("colour", 0.5, "rows"),
    plan.Adain("style", 0.8),
    plan.Direction("d", 0.5, "mask"),
    plan.Slerp("b", 0.4),
    plan.ToneMap(0.4),
    plan.Nlerp("b", 0.2, "mask"),
    plan.Confine("source", "mask"),
]


def calls(dtype: torch.dtype, only: str) -> None:
    """Every operation of the tests' table, forward and backward at odd sizes, forward at a large one."""
    for operation in OPERATIONS:
        if only not in operation.function:
            continue
        try:
            inputs = operation.inputs(Draw(dtype, "cuda"), ODD)
        except pytest.skip.Exception as reason:  # the backend leaves it to another
            print(f"{operation}: {reason}")
            continue
        if operation.differentiable:
            gradients(operation.call, inputs, operation.differentiable)
        else:
            operation.call(**inputs)
    for operation in LIGHT:
        if only not in operation.function:
            continue
        with contextlib.suppress(pytest.skip.Exception):
            operation.call(**operation.inputs(Draw(dtype, "cuda"), LARGE))
    a, b = (x.flatten()[1:] for x in Draw(dtype, "cuda").normal(2, *LARGE))  # not at 16 bytes
    latentfast.slerp(a, b, 0.5)
    latentfast.slerp(a, -a, 0.5)
    for shape in (ODD, LARGE):
        x, y = Draw(dtype, "cuda").normal(2, *shape)
        rows, dtypes = [[0.5, 2, 1], [1, -1, 3]], [dtype, torch.bfloat16]
        latentfast.combine([x, y.bfloat16(), y], rows, dtypes=dtypes, precise=True)
    torch.cuda.synchronize()


def plans(dtype: torch.dtype) -> None:
    """Plans whose reductions are known before the walk and that need passes, to latents and to pixels, moved once."""
    for shape in (ODD, LARGE):
        draw = Draw(dtype, "cuda")
        inputs = tensors(draw, shape)
        for size in (None, (2 * shape[3], 2 * shape[4]), (shape[3] + 7, 3 * shape[4] + 1)):
            rgb = plan.ToRGB(draw.uniform(shape[1], 3), draw.uniform(3), size)
            for stack, outputs in product((STACK[:4], STACK), (["rgb"], ["latents"], ["rgb", "latents"])):
                made = compiled([*stack, rgb], inputs, outputs=outputs)
                made.run()
                made.set(0, 0.7)
                made.run()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--only", default="", help="operations whose name contains this")
    arguments = parser.parse_args()
    with latentfast.use_backend(arguments.backend):
        if arguments.backend == "cuda":
            for name in latentfast.backends():
                print(f"{name.name}: {'available' if name.available else name.reason}")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            calls(dtype, arguments.only)
            if arguments.backend == "cuda" and arguments.only in "plan":
                plans(dtype)
            print(f"{arguments.backend} {dtype}: every operation {arguments.only or 'of the table'} called")


if __name__ == "__main__":
    main()
