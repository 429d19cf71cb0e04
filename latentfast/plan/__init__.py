"""Plans: an edit stack compiled, without a compiler, to a list of instructions that one kernel walks."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from latentfast.plan._plan import Plan
from latentfast.plan.instructions import (
    Adain,
    Blend,
    Confine,
    Direction,
    Instruction,
    Lerp,
    Nlerp,
    Slerp,
    Standardize,
    ToneMap,
    ToRGB,
    Unstandardize,
)

__all__ = [
    "Adain",
    "Blend",
    "Confine",
    "Direction",
    "Instruction",
    "Lerp",
    "Nlerp",
    "Plan",
    "Slerp",
    "Standardize",
    "ToRGB",
    "ToneMap",
    "Unstandardize",
    "compile",
]


def compile(
    stack: Sequence[Instruction | ToRGB],
    source: Tensor,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    outputs: Sequence[str] | None = None,
) -> Plan:
    """Makes a plan: the stack's operations, one after another, at the price of one pass over its tensors.

    Each instruction is the operation of its name. The plan computes in float32 (float64 for float64 latents) and rounds
    once, at the end, where the operations would round after each.

    A slerp, an nlerp and an adain need sums over the value that they change. As long as that is a linear combination of
    tensors (interpolations, directions, adain and the affines, unmasked), the sums follow from products of the tensors,
    which are taken when they are bound; behind a mask, a blend or a tone map they are taken in every `run`, by a pass
    that reads the tensors again and writes the sums alone (three small launches more).

    Args:
        stack: At most 32 instructions, a `ToRGB` last or none. They name at most 8 latents and directions, the source
            ("source") among them, and 16 tensors in all.
        source: What is edited, `(B, C, T, H, W)`, or `(B, C, H, W)` for images; float32, float16, bfloat16 or float64.
        tensors: The other tensors, by the names in the stack. Latents have the source's shape, dtype and device;
            directions broadcast to it; masks too (bool, the source's dtype or float32); the references of `Adain` have
            its channels, and one sample or as many.
        outputs: "latents", "rgb" or both; None: "rgb" where the stack ends with `ToRGB`. With both, the pixels are
            those of the latents as they are rounded, and take a second launch.

    Returns:
        The plan: `run` gives the result, `set` moves a slider, `bind` takes another tensor, `change` another stack.

    Raises:
        TypeError: something in the stack is no instruction, or a tensor's dtype does not fit.
        ValueError: a name has no tensor, or shapes or devices do not fit.

    Not differentiable.

    Example:
        >>> import torch
        >>> from latentfast import plan
        >>> z, smile = torch.zeros(1, 4, 3, 8, 8), torch.ones(4, 1, 1, 1)
        >>> p = plan.compile([plan.Direction("smile", 0.5), plan.ToneMap(0.0)], z, {"smile": smile})
        >>> p.run().unique()
        tensor([0.5000])
        >>> p.set(0, 0.25)
        >>> p.run().unique()
        tensor([0.2500])
    """
    return Plan(stack, source, tensors, outputs)
