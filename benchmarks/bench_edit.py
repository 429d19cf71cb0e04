"""Edits: what of them is measured, at which sizes."""

import torch
from torch import Tensor

import latentfast
from latentfast.benchmarks import peers
from latentfast.benchmarks.draws import soft_mask, two_clips_and_mask
from latentfast.benchmarks.operation import Baseline, Case, Operation
from latentfast.reference import edit as reference

# Exact in bfloat16, so that numbers on the host and a tensor on the device mean the same.
STRENGTHS = (1.5, -0.75, 0.5, 0.25)


def _edit(n: int) -> Operation:
    strengths = list(STRENGTHS[:n])

    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        z = torch.randn(shape, device=device, dtype=dtype)
        directions = torch.randn((n, 1, *shape[1:]), device=device, dtype=dtype)
        return z, directions, torch.tensor(strengths, device=device), soft_mask(shape, dtype, device)

    return Operation(
        stem="edit",
        name="edit",
        variant=f"N={n}",
        inputs=inputs,
        batch_dims=(0, None, None, 0),
        outputs=(0,),
        ours=lambda z, d, s, m: latentfast.edit(z, d, strengths, m),
        reference=Baseline(reference.edit, "latentfast.reference"),
        field=Baseline(peers.edit, "z + (s*m*d).sum(0)"),
    )


EDIT_1, EDIT_4 = _edit(1), _edit(4)
BLEND = Operation(
    stem="edit",
    name="blend",
    variant="",
    inputs=two_clips_and_mask,
    batch_dims=(0, 0, 0),
    outputs=(0,),
    ours=latentfast.blend,
    reference=Baseline(reference.blend, "latentfast.reference"),
    field=Baseline(peers.blend, "(1-m)*a + m*b"),
)

SIZES = (("wan480", 1), ("wan720", 32))
CASES = [Case(operation, *size) for operation in (EDIT_1, EDIT_4, BLEND) for size in SIZES]
CPU_CASES = [Case(operation, "wan480", 1, torch.float32) for operation in (EDIT_1, EDIT_4, BLEND)]
