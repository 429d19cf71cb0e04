"""Interpolation: what of it is measured, at which sizes."""

import torch
from torch import Tensor

import latentfast
from latentfast.benchmarks import peers
from latentfast.benchmarks.draws import clips
from latentfast.benchmarks.operation import Baseline, Case, Operation
from latentfast.reference import interpolate as reference

# Exact in bfloat16, so that a number on the host and a tensor on the device mean the same.
T = 0.3125


def _one(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return *clips(2)(shape, dtype, device), torch.tensor(T, device=device)


def _simple(name: str, field: Baseline) -> Operation:
    ours = getattr(latentfast, name)
    return Operation(
        stem="interpolate",
        name=name,
        variant="",
        inputs=_one,
        batch_dims=(0, 0, None),
        outputs=(0,),
        # A user writes a number; the baselines take it as a tensor on the device, which saves them a copy.
        ours=lambda a, b, t: ours(a, b, T),
        reference=Baseline(getattr(reference, name), "latentfast.reference"),
        field=field,
    )


def _slerp_over(dim: int | tuple[int, ...]) -> Operation:
    dims = (dim,) if isinstance(dim, int) else dim
    return Operation(
        stem="interpolate",
        name="slerp",
        variant=f"dim={dim}".replace(" ", ""),
        inputs=_one,
        batch_dims=(0, 0, None),
        outputs=(0,),
        ours=lambda a, b, t: latentfast.slerp(a, b, T, dim=dim),
        reference=Baseline(lambda a, b, t: reference.slerp(a, b, t, dim=dim), "latentfast.reference"),
        field=Baseline(lambda a, b, t: peers.slerp_acos(a, b, t, dims), "acos slerp"),
    )


def _slerp_path(k: int) -> Operation:
    values = [(i + 0.5) / k for i in range(k)]

    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        return *clips(2)(shape, dtype, device), torch.tensor(values, device=device)

    return Operation(
        stem="interpolate",
        name="slerp_path",
        variant=f"K={k}",
        inputs=inputs,
        batch_dims=(0, 0, None),
        outputs=(1,),
        ours=lambda a, b, ts: latentfast.slerp_path(a, b, values),
        reference=Baseline(reference.slerp_path, "latentfast.reference"),
        field=Baseline(peers.slerp_acos, "acos slerp, all t at once"),
    )


SLERP = _simple("slerp", Baseline(peers.slerp_acos, "acos slerp"))
LERP = _simple("lerp", Baseline(lambda a, b, t: torch.lerp(a, b, T), "torch.lerp"))
NLERP = _simple("nlerp", Baseline(peers.nlerp, "F.normalize"))
PATH_16, PATH_8 = _slerp_path(16), _slerp_path(8)
PER_FRAME, PER_POSITION = _slerp_over((1, 3, 4)), _slerp_over(1)

CASES = [
    Case(SLERP, "wan480", 1),
    Case(SLERP, "wan720", 64),
    Case(PATH_8, "hunyuan720", 8),
    Case(LERP, "wan720", 32),
    Case(SLERP, "wan720", 32),
    Case(SLERP, "wan720", 16, torch.float32),
    Case(PATH_16, "wan480", 1),
    Case(LERP, "wan480", 1),
    Case(NLERP, "wan480", 1),
    Case(PER_FRAME, "wan720", 8),
    Case(PER_POSITION, "wan720", 8),
]
CPU_CASES = [
    Case(operation, "wan480", 1, torch.float32) for operation in (SLERP, NLERP, LERP, PATH_16, PER_FRAME, PER_POSITION)
]
