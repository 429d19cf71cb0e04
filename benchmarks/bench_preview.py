"""Previews: what of them is measured, at which sizes."""

import torch
from torch import Tensor

import latentfast
from latentfast.benchmarks import peers
from latentfast.benchmarks.operation import Baseline, Case, Operation
from latentfast.reference import preview as reference


def _preview(factor: int) -> Operation:
    def size(z: Tensor) -> tuple[int, int] | None:
        return None if factor == 1 else (factor * z.shape[3], factor * z.shape[4])

    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        # previews that fill [-1, 1] and now and then leave it, as fitted factors do
        weight = torch.randn((shape[1], 3), device=device, dtype=torch.float32) * (0.5 / shape[1] ** 0.5)
        bias = torch.tensor([-0.1, 0.0, 0.1], device=device)
        return torch.randn(shape, device=device, dtype=dtype), weight, bias

    return Operation(
        stem="preview",
        name="latent_to_rgb",
        variant=f"{factor}x",
        inputs=inputs,
        batch_dims=(0, None, None),
        outputs=(0,),
        ours=lambda z, w, b: latentfast.latent_to_rgb(z, w, b, size=size(z)),
        reference=Baseline(lambda z, w, b: reference.latent_to_rgb(z, w, b, size=size(z)), "latentfast.reference"),
        field=Baseline(lambda z, w, b: peers.latent_to_rgb(z, w, b, size(z)), "einsum, F.interpolate, to bytes"),
    )


PREVIEW_8, PREVIEW_1 = _preview(8), _preview(1)
CASES = [
    Case(PREVIEW_8, "wan480", 1),
    Case(PREVIEW_8, "hunyuan720", 1),
    Case(PREVIEW_1, "hunyuan720", 8),
]
CPU_CASES = [Case(PREVIEW_8, "wan480", 1, torch.float32)]
