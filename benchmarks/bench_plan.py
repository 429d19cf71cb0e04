"""Plans: what of them is measured, at which sizes.

The plan is made while the arguments are drawn, as it is made before a preview begins; what is measured is its walk,
with and without a slider's move before it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import latentfast
from latentfast import plan
from latentfast.benchmarks import peers
from latentfast.benchmarks.draws import soft_mask
from latentfast.benchmarks.operation import Baseline, Case, Inputs, Operation, moved_bytes
from latentfast.reference.plan import Step, sequence
from latentfast.reference.preview import latent_to_rgb

T, STRENGTH, COMPRESSION, FACTOR = 0.375, (0.5, 0.75), 0.5, 8
#: Six edits whose sums follow from the tensors alone.
STACK = [
    plan.Slerp("target", T),
    plan.Direction("colour", STRENGTH[0]),
    plan.Adain("style"),
    plan.Direction("direction", STRENGTH[1], "mask"),
    plan.ToneMap(COMPRESSION),
    plan.Confine("source", "mask"),
]
#: The same with an adain behind the tone map, which takes its sums in every run.
STACK_WITH_PASS = [*STACK[:2], *STACK[3:5], STACK[2], STACK[5]]


def _inputs(stack: list, rgb: bool) -> Callable[..., Inputs]:
    def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
        z, target, direction, style = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
        colour = torch.randn((shape[1], 1, 1, 1), device=device, dtype=dtype)
        mask = soft_mask(shape, dtype, device)
        weight = torch.randn((shape[1], 3), device=device) * (0.5 / shape[1] ** 0.5)
        bias = torch.tensor([-0.1, 0.0, 0.1], device=device)
        tensors = {"target": target, "direction": direction, "colour": colour, "mask": mask, "style": style}
        whole = [*stack, plan.ToRGB(weight, bias, _size(z))] if rgb else stack
        return z, target, direction, colour, mask, style, weight, bias, plan.compile(whole, z, tensors)

    return draw


def _size(z: Tensor) -> tuple[int, int]:
    return FACTOR * z.shape[3], FACTOR * z.shape[4]


def _reference(passes: bool, rgb: bool) -> Callable[..., Tensor]:
    def call(z, target, direction, colour, mask, style, weight, bias, _):
        steps = [
            Step("slerp", target, T),
            Step("direction", colour, STRENGTH[0]),
            Step("adain", style, 1.0),
            Step("direction", direction, STRENGTH[1], mask),
            Step("tone_map", None, COMPRESSION),
            Step("confine", z, 0.0, mask),
        ]
        if passes:
            steps.insert(4, steps.pop(2))
        x = sequence(z, steps)
        return latent_to_rgb(x, weight, bias, size=_size(z)) if rgb else x

    return call


def _field(passes: bool, rgb: bool) -> Callable[..., Tensor]:
    def call(z, target, direction, colour, mask, style, weight, bias, _):
        x = peers.slerp_acos(z, target, torch.full((), T, device=z.device))
        x = x + STRENGTH[0] * colour
        x = x if passes else peers.adain(x, style)
        x = peers.tone_map(x + STRENGTH[1] * mask * direction, COMPRESSION)
        x = peers.adain(x, style) if passes else x
        x = peers.blend(z, x, mask)
        return peers.latent_to_rgb(x, weight, bias, _size(z)) if rgb else x

    return call


def _operations(passes: bool, rgb: bool) -> Callable[..., Tensor]:
    def call(z, target, direction, colour, mask, style, weight, bias, _):
        x = latentfast.slerp(z, target, T)
        x = latentfast.edit(x, colour[None, None], [STRENGTH[0]])
        x = x if passes else latentfast.adain(x, style)
        x = latentfast.tone_map(latentfast.edit(x, direction[None], [STRENGTH[1]], mask), COMPRESSION)
        x = latentfast.adain(x, style) if passes else x
        x = latentfast.blend(z, x, mask)
        return latentfast.latent_to_rgb(x, weight, bias, size=_size(z)) if rgb else x

    return call


def _moved_and_run(*arguments: Any) -> Tensor:
    made = arguments[-1]
    made.set(0, T)
    return made.run()


def _plan(variant: str, *, passes: bool = False, rgb: bool = True, moved: bool = False) -> Operation:
    return Operation(
        stem="plan",
        name="plan_run",  # which Triton's backend lacks
        variant=variant,
        inputs=_inputs(STACK_WITH_PASS if passes else STACK, rgb),
        batch_dims=(0, 0, 0, None, 0, 0, None, None, None),
        outputs=(0,),
        ours=_moved_and_run if moved else lambda *arguments: arguments[-1].run(),
        reference=Baseline(_reference(passes, rgb), "latentfast.reference, one operation after another"),
        field=Baseline(_field(passes, rgb), "the plain expressions, one after another"),
        peer=Baseline(_operations(passes, rgb), "latentfast's operations, one after another"),
        moved=lambda inputs, result: moved_bytes(inputs[:5], result),  # the style's statistics are known
    )


RGB_8 = _plan("6 edits, RGB 8x")
MOVED = _plan("6 edits, RGB 8x, slider moved", moved=True)
LATENTS = _plan("6 edits", rgb=False)
PASS = _plan("6 edits, RGB 8x, adain behind a tone map", passes=True)

CASES = [Case(operation, "wan480", 1) for operation in (RGB_8, MOVED, LATENTS, PASS)] + [Case(RGB_8, "wan720", 1)]
CPU_CASES = [Case(operation, "wan480", 1, torch.float32) for operation in (RGB_8, LATENTS, PASS)]
