"""Stacks for the tests of plans: random ones, their tensors, and what the reference makes of them."""

import hypothesis.strategies as st
import torch
from torch import Tensor

from latentfast import plan, reference
from latentfast.reference.plan import Step
from tests.helpers import Draw

_t = st.floats(-0.25, 1.25)
_masks = st.sampled_from([None, None, "mask", "rows"])
_latents = st.sampled_from(["a", "b"])
_refs = st.sampled_from(["a", "style"])

instructions = st.one_of(
    st.builds(plan.Lerp, _latents, _t, _masks),
    st.builds(plan.Nlerp, _latents, _t, _masks),
    st.builds(plan.Slerp, _latents, _t, _masks),
    st.builds(plan.Direction, st.sampled_from(["a", "colour", "d"]), st.floats(-2, 2), _masks),
    st.builds(plan.Blend, _latents, st.sampled_from(["mask", "rows"])),
    st.builds(plan.Confine, st.sampled_from(["source", "b"]), st.sampled_from(["mask", "rows"])),
    st.builds(plan.Adain, _refs, st.floats(0, 1.25), _masks),
    st.builds(plan.ToneMap, st.floats(0, 1), _masks),
)
stacks = st.lists(instructions, min_size=1, max_size=7)


def tensors(draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A tensor for each name of the stacks above, the source among them."""
    b, c, *size = shape
    return {
        "source": draw.normal(*shape),
        "a": draw.normal(*shape),
        "b": draw.normal(*shape),
        "d": draw.normal(1, *shape[1:]),
        "colour": draw.normal(c, *(1 for _ in size)),
        "mask": draw.mask(b, 1, *size),
        "rows": draw.mask(size[-2], 1, dtype=draw.parameter_dtype),
        "style": 2 * draw.normal(1, c, *(n + 1 for n in size)) + 1,
    }


def compiled(stack: list, given: dict[str, Tensor], **options) -> plan.Plan:
    """The stack's plan, with its tensors."""
    rest = {name: x for name, x in given.items() if name != "source"}
    return plan.compile(stack, given["source"], rest, **options)


def steps(stack: list, given: dict[str, Tensor]) -> list[Step]:
    """The instructions as the reference takes them."""
    out = []
    for x in stack:
        operand = None if x.operand is None else given[getattr(x, x.operand[0])]
        mask = getattr(x, "mask", None)
        number = x.number
        if isinstance(x, plan.Standardize | plan.Unstandardize):
            number = (x.mean, x.std, x.scale)
        out.append(Step(x.operation, operand, number, None if mask is None else given[mask]))
    return out


def spec(stack: list):
    """The reference of a stack, as a function of its tensors."""
    return lambda **given: reference.plan.run(given["source"], steps(stack, given))


def sequence(stack: list):
    """The same, rounded after each operation."""
    return lambda **given: reference.plan.sequence(given["source"], steps(stack, given))


def opposite(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A source and a latent opposite to it."""
    x = Draw(dtype, device).grid(*shape)
    return {"source": x, "a": -2 * x}
