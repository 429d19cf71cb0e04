"""How far a result is from the exact one: float64, on the same inputs, in the same run as the timing."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentfast.benchmarks.operation import Call, Inputs, Operation, tensors

#: Bits of the significand, the hidden one included.
PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
FLOAT32_EPS = 2.0**-23
#: The rule: at most twice the error of the reference in the same dtype, plus this many ulps.
FEW = 4
#: The rule for integers, as pictures are: no level off by more than one, which happens where the exact value lies half
#: way between two, and that seldom: 1e-3 is what one level in every 50 numbers of the usual size (130) makes.
LEVELS, LEVELS_REL_L2 = 1, 1e-3


@dataclass
class Error:
    """Distance to the exact result: relative in the L2 norm, and the largest in units of the last place (ulp).

    The last place of an integer is 1: there `ulp` is the largest difference in levels.
    """

    rel_l2: float
    ulp: float

    def worse(self, other: "Error") -> "Error":
        """The larger of both numbers; NaN counts as larger."""
        pick = lambda x, y: x if math.isnan(x) or x >= y else y  # noqa: E731
        return Error(pick(self.rel_l2, other.rel_l2), pick(self.ulp, other.ulp))


def _last_place(exact: Tensor, dtype: torch.dtype) -> Tensor | float:
    """The unit of the last place of results in `dtype` that ought to be `exact`."""
    if not dtype.is_floating_point:
        return 1.0
    # Near zero by cancellation only the working precision (float32) speaks: no ulp is taken smaller than four of its
    # roundings at the result's usual size.
    least = 0.0 if dtype == torch.float64 else 4 * FLOAT32_EPS * float(exact.square().mean().sqrt())
    exponent = torch.frexp(exact)[1].double() - PRECISION[dtype]
    return torch.exp2(exponent).clamp_min(max(least, torch.finfo(dtype).tiny))


class _Sum:
    """Error of one output, gathered sample by sample so that no float64 copy of a whole batch is needed."""

    def __init__(self) -> None:
        self.difference = self.exact = self.ulp = 0.0

    def add(self, got: Tensor, exact: Tensor) -> None:
        exact = exact.double()
        difference = (got.double() - exact).abs()
        self.difference += float(difference.square().sum())
        self.exact += float(exact.square().sum())
        if exact.numel() == 0:
            return
        worst = float((difference / _last_place(exact, got.dtype)).max())
        self.ulp = worst if math.isnan(worst) else max(self.ulp, worst)

    def result(self) -> Error:
        relative = math.sqrt(self.difference / self.exact) if self.exact else math.sqrt(self.difference)
        return Error(math.nan if math.isnan(self.difference) else relative, self.ulp)


@dataclass(frozen=True)
class Verdict:
    """A result's error, the same-dtype reference's, and whether the first is within the rule."""

    error: Error
    reference: Error
    correct: bool


def _judged(error: Error, reference: Error, dtype: torch.dtype) -> Verdict:
    # A comparison with NaN is false: a result that holds one is never correct.
    few, small = (FEW, FEW * FLOAT32_EPS) if dtype.is_floating_point else (LEVELS, LEVELS_REL_L2)
    correct = error.rel_l2 <= 2 * reference.rel_l2 + small and error.ulp <= 2 * reference.ulp + few
    return Verdict(error, reference, correct)


def poisoned_call(call: Call, inputs: Inputs) -> Any:
    """A call whose new outputs lie, as far as the allocator reuses freed blocks, in memory filled with NaN."""
    # An integer has no NaN; 171 is neither end of a picture's range nor its middle.
    before = [torch.full_like(x, math.nan if x.is_floating_point() else 171) for x in tensors(call(*inputs))]
    del before
    return call(*inputs)


def check(operation: Operation, call: Call, inputs: Inputs) -> Verdict:
    """`call`'s result against the reference in float64 on the same inputs; the same-dtype reference's beside it."""
    got = [x.detach() for x in tensors(poisoned_call(call, inputs))]
    if len(got) != len(operation.outputs):
        raise ValueError(f"{operation.name} gave {len(got)} tensors, its case describes {len(operation.outputs)}")
    batch = operation.batch(inputs)
    ours, theirs = [_Sum() for _ in got], [_Sum() for _ in got]
    means: list[list[list[Tensor]]] = [[[], []] for _ in got]
    for i in range(batch):
        exact = tensors(operation.reference.call(*operation.sample(inputs, i, torch.float64)))
        same = tensors(operation.reference.call(*operation.sample(inputs, i)))
        for k, how in enumerate(operation.outputs):
            e, s = exact[k].detach(), same[k].detach()
            if how == "mean":
                means[k][0].append(e)
                means[k][1].append(s)
                continue
            if how == "mean's gradient":
                part, e, s = got[k].narrow(0, i, 1), e / batch, s / batch
            else:
                part = got[k] if how is None else got[k].narrow(int(how), i, 1)
            ours[k].add(part, e)
            theirs[k].add(s, e)
    for k, how in enumerate(operation.outputs):
        if how == "mean":
            e = torch.stack(means[k][0]).mean()
            ours[k].add(got[k], e)
            theirs[k].add(torch.stack(means[k][1]).mean(), e)
    # Each output is held against its own yardstick; the row keeps the worst of each number.
    verdicts = [_judged(a.result(), b.result(), x.dtype) for a, b, x in zip(ours, theirs, got, strict=True)]
    error, reference = verdicts[0].error, verdicts[0].reference
    for verdict in verdicts[1:]:
        error, reference = error.worse(verdict.error), reference.worse(verdict.reference)
    return Verdict(error, reference, all(verdict.correct for verdict in verdicts))
