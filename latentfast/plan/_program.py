"""From a stack of instructions to the list that the kernels walk."""

from collections.abc import Sequence
from dataclasses import dataclass

from latentfast._operators import PLAN_OPERATIONS
from latentfast.plan.instructions import Instruction, ToRGB, _Affine

#: Of a plan: what the native kernels have room for (csrc/common/plan.h).
MOST_INSTRUCTIONS, MOST_TENSORS, MOST_OPERANDS = 32, 16, 8
#: The name of what the plan edits.
SOURCE = "source"
#: Of the tensor in front of a later segment: the value that was edited so far.
VALUE = -1


@dataclass(frozen=True)
class Segment:
    """Instructions from `start` to `stop`, among which every reduction is of a linear combination of `values`: numbers
    of tensors, the first of them the value in front of the segment. No values: no reductions."""

    start: int
    stop: int
    values: tuple[int, ...]

    @property
    def moments(self) -> int:
        """How many moments a channel has."""
        n = len(self.values)
        return 3 * n + n * (n + 1) // 2


@dataclass(frozen=True)
class Program:
    """What the kernels are given: `code` five integers an instruction, `tensors` the names and roles that its numbers
    stand for, `sliders` the numbers of the instructions that have one, `slider_of` and `row_of` their places."""

    code: tuple[int, ...]
    tensors: tuple[tuple[str, str], ...]
    sliders: tuple[float, ...]
    slider_of: tuple[int, ...]
    row_of: tuple[int, ...]
    segments: tuple[Segment, ...]


def split(stack: Sequence[Instruction | ToRGB]) -> tuple[list[Instruction], ToRGB | None]:
    """The instructions, and the projection at their end."""
    if isinstance(stack, str) or not isinstance(stack, Sequence):
        raise TypeError(f"stack must be a sequence of instructions, got {type(stack).__name__}")
    rgb = stack[-1] if stack and isinstance(stack[-1], ToRGB) else None
    edits: list[Instruction] = []
    for i, instruction in enumerate(stack[:-1] if rgb is not None else stack):
        if isinstance(instruction, ToRGB):
            raise ValueError(f"ToRGB must be the last instruction of stack, got it at {i} of {len(stack)}")
        if not isinstance(instruction, Instruction):
            raise TypeError(f"stack[{i}] must be an instruction of latentfast.plan, got {type(instruction).__name__}")
        edits.append(instruction)
    if len(edits) > MOST_INSTRUCTIONS:
        raise ValueError(f"stack must hold at most {MOST_INSTRUCTIONS} instructions, got {len(edits)}")
    return edits, rgb


def build(edits: Sequence[Instruction]) -> Program:
    """The program of a stack."""
    numbers: dict[tuple[str, str], int] = {(SOURCE, "latents"): 0}
    code: list[int] = []
    sliders: list[float] = []
    slider_of: list[int] = []
    row_of: list[int] = []
    for instruction in edits:
        operand = mask = slider = row = -1
        if instruction.operand is not None:
            field, role = instruction.operand
            operand = numbers.setdefault((getattr(instruction, field), role), len(numbers))
        name = getattr(instruction, "mask", None)
        if name is not None:
            mask = numbers.setdefault((name, "mask"), len(numbers))
        if instruction.number is not None:
            slider = len(sliders)
            sliders.append(instruction.number)
        if instruction.operation == "adain" or isinstance(instruction, _Affine):
            row = sum(r >= 0 for r in row_of)
        slider_of.append(slider)
        row_of.append(row)
        code += [PLAN_OPERATIONS[instruction.operation], operand, mask, slider, row]
    read = [role for _, role in numbers if role in ("latents", "direction")]
    if len(read) > MOST_OPERANDS or len(numbers) > MOST_TENSORS:
        raise ValueError(
            f"stack must name at most {MOST_OPERANDS} latents and directions, the source among them, and at most "
            f"{MOST_TENSORS} tensors in all, got {len(read)} and {len(numbers)}"
        )
    return Program(
        tuple(code), tuple(numbers), tuple(sliders), tuple(slider_of), tuple(row_of), _segments(edits, code)
    )  # fmt: skip


def _is_linear(instruction: Instruction) -> bool:
    """Whether it takes linear combinations to linear combinations with coefficients that are known beforehand."""
    return instruction.operation not in ("blend", "confine", "tone_map") and getattr(instruction, "mask", None) is None


def _segments(edits: Sequence[Instruction], code: Sequence[int]) -> tuple[Segment, ...]:
    """A segment ends where a reduction follows on an instruction that is not linear, right behind the last of these."""
    cuts, bent = [0], None
    for k, instruction in enumerate(edits):
        if instruction.reduces and bent is not None:
            cuts.append(bent)
            bent = None
        if not _is_linear(instruction):
            bent = k + 1
    return tuple(_segment(edits, code, start, stop) for start, stop in zip(cuts, [*cuts[1:], len(edits)], strict=True))


def _segment(edits: Sequence[Instruction], code: Sequence[int], start: int, stop: int) -> Segment:
    last = max((k for k in range(start, stop) if edits[k].reduces), default=-1)
    if last < 0:
        return Segment(start, stop, ())
    values = [0 if start == 0 else VALUE]
    for k in range(start, last + 1):
        operand = code[5 * k + 1]
        if edits[k].operation in ("lerp", "nlerp", "slerp", "direction") and operand not in values:
            values.append(operand)
    return Segment(start, stop, tuple(values))
