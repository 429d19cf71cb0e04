"""Bad input to plans: one sentence that names the argument, what came and what was expected."""

import math
import re

import pytest
import torch

from latentfast import plan
from tests.helpers import Target, skip_where_lacking


def _bad(call, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_bad_input_is_told_in_a_sentence(target: Target) -> None:
    skip_where_lacking("plan_run", target.device)
    device = target.device
    z = torch.zeros(2, 3, 2, 4, 5, device=device)
    mask = torch.zeros(2, 1, 2, 4, 5, device=device)

    def made(stack, source=z, outputs=None, **tensors):
        return lambda: plan.compile(stack, source, tensors, outputs=outputs)

    lerp = [plan.Lerp("a", 0.5)]
    _bad(made("lerp"), TypeError, "stack must be a sequence of instructions, got str")
    _bad(made(["lerp"]), TypeError, "stack[0] must be an instruction of latentfast.plan, got str")
    _bad(made(lerp * 33, a=z), ValueError, "stack must hold at most 32 instructions, got 33")
    _bad(made([plan.ToRGB([], []), *lerp]), ValueError, "ToRGB must be the last instruction of stack, got it at 0 of 2")
    _bad(made([], source=z[0, 0]), ValueError, "source must have shape (B, C, T, H, W) or (B, C, H, W), got (2, 4, 5)")
    _bad(made([], source=[1.0]), TypeError, "source must be a tensor, got list")
    _bad(made(lerp), ValueError, "tensors must hold 'a', which the stack names, got []")
    _bad(made(lerp, a=z[:1]), ValueError, "a must have source's shape (2, 3, 2, 4, 5), got (1, 3, 2, 4, 5)")
    _bad(made(lerp, a=z.double()), TypeError, "a must have source's dtype float32, got float64")
    _bad(made(lerp, a=None), TypeError, "a must be a tensor, got NoneType")
    _bad(made(lerp, a=z.clone().requires_grad_()), ValueError, "a requires grad, but a plan is not differentiable")
    _bad(made([plan.Direction("d", 1.0)], d=z[..., :2]), ValueError, "d must broadcast to (2, 3, 2, 4, 5)")
    _bad(made([plan.Blend("a", "m")], a=z, m=mask[..., :2]), ValueError, "m must broadcast to (2, 3, 2, 4, 5)")
    _bad(made([plan.Adain("a")], a=z[:, :2]), ValueError, "a must have shape (2 or 1, 3, …, …, …), got (2, 2, 2, 4, 5)")
    _bad(made([plan.Standardize([0.0], [1.0])]), ValueError, "stack[0].mean must hold 3 numbers")
    _bad(made([], outputs=("rgb",)), ValueError, "stack must end with ToRGB for the output 'rgb'")
    _bad(made([], outputs=("pixels",)), ValueError, "outputs must hold 'latents', 'rgb' or both, got ('pixels',)")
    _bad(made([plan.ToRGB([[1.0] * 3] * 2, [0.0] * 3)]), ValueError, "weight must have shape (3, 3), got (2, 3)")
    _bad(lambda: plan.Lerp(z, 0.5), TypeError, "towards must be the name of a tensor, got Tensor")
    _bad(lambda: plan.Slerp("a", math.nan), ValueError, "t must be finite, got nan")
    _bad(lambda: plan.ToneMap(2.0), ValueError, "compression must lie in [0, 1], got 2.0")
    _bad(lambda: plan.Standardize([0.0], [-1.0]), ValueError, "std must be positive, got -1.0")
    p = plan.compile([plan.Blend("a", "m"), *lerp], z, {"a": z, "m": mask})
    _bad(lambda: p.set(0, 0.5), ValueError, "stack[0]: Blend has no slider")
    _bad(lambda: p.set(2, 0.5), IndexError, "index must name one of 2 edits, got 2")
    _bad(lambda: p.set(1, math.inf), ValueError, "stack[1]: t must be finite, got inf")
    _bad(lambda: p.run(out=z), ValueError, "out must not share memory with an input")
    _bad(lambda: p.run(out=z.double()), TypeError, "out must be a tensor of torch.float32, got torch.float64")
    _bad(lambda: p.run(out=z[:1].clone()), ValueError, "out must have shape (2, 3, 2, 4, 5), got (1, 3, 2, 4, 5)")
    _bad(lambda: p.run(out=(z, z)), ValueError, "out must hold 1 tensors, latents, got 2")
    _bad(lambda: p.bind("source", z[:1]), ValueError, "source must have the plan's source's shape")
