"""The calls that tests/test_direct.py makes: each public function that has a direct door, in the forms that matter."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SHAPE = (2, 4, 5, 6, 8)


def random(device: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


class Case(NamedTuple):
    """A public function in one form: keyword arguments for a device and dtype."""

    function: str
    inputs: Callable[[str, torch.dtype], dict]


def pair(device: str, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> dict:
    return {"a": random(device, *shape, dtype=dtype), "b": random(device, *shape, dtype=dtype, seed=1)}


def _edit(
    device: str, dtype: torch.dtype, directions: tuple[int, ...], mask: tuple[int, ...] | None, strengths
) -> dict:
    inputs = {
        "z": random(device, *SHAPE, dtype=dtype),
        "directions": random(device, *directions, dtype=dtype, seed=1),
        "strengths": strengths,
    }
    if mask is not None:
        inputs["mask"] = random(device, *mask, dtype=dtype, seed=2).clamp(0, 1)
    return inputs


def _clip(device: str, dtype: torch.dtype, *, ref: bool = False, mask: tuple[int, ...] | None = None, **rest) -> dict:
    inputs = {"z": random(device, *SHAPE, dtype=dtype), **rest}
    if ref:
        inputs["ref"] = random(device, *SHAPE, dtype=dtype, seed=1)
    if mask is not None:  # float32 beside half-precision latents
        mask_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        inputs["mask"] = random(device, *mask, dtype=mask_dtype, seed=2).clamp(0, 1)
    return inputs


def _predictions(device: str, dtype: torch.dtype, *, step: bool = True, mask: tuple[int, ...] | None = None, **rest):
    inputs = {"sample": random(device, *SHAPE, dtype=dtype, seed=2)} if step else {}
    inputs |= {"cond": random(device, *SHAPE, dtype=dtype), "uncond": random(device, *SHAPE, dtype=dtype, seed=1)}
    inputs |= {"scale": 5.0, **({"sigma": 0.75, "sigma_next": 0.5} if step else {}), **rest}
    if mask is not None:
        mask_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        inputs["mask"] = random(device, *mask, dtype=mask_dtype, seed=3).clamp(0, 1)
        inputs["known"] = random(device, *SHAPE, dtype=dtype, seed=4)
    return inputs


def _terms(device: str, dtype: torch.dtype, count: int) -> dict:
    tensors = [random(device, *SHAPE, dtype=dtype, seed=seed) for seed in range(count)]
    return {"tensors": tensors, "coefficients": tuple(0.75**i - 0.5 for i in range(count))}


def _rows(device: str, dtype: torch.dtype, count: int, rows: int) -> dict:
    """Tensors of this dtype and of another in turn."""
    given = _terms(device, dtype, count)
    given["tensors"] = [x.to(torch.float32) if i % 2 else x for i, x in enumerate(given["tensors"])]
    given["coefficients"] = [[(k + 1) * c for c in given["coefficients"]] for k in range(rows)]
    return given


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


N = 3
CASES = {
    "lerp": Case("lerp", lambda dev, dt: {**pair(dev, dt), "t": 0.3}),
    "lerp, int t": Case("lerp", lambda dev, dt: {**pair(dev, dt), "t": 1}),
    "nlerp": Case("nlerp", lambda dev, dt: {**pair(dev, dt), "t": 0.3}),
    "slerp": Case("slerp", lambda dev, dt: {**pair(dev, dt), "t": 0.3}),
    "slerp, one vector": Case("slerp", lambda dev, dt: {**pair(dev, dt, (77,)), "t": 0.3}),
    "slerp, long": Case("slerp", lambda dev, dt: {**pair(dev, dt, (1, 16, 5, 60, 104)), "t": 0.3}),
    "slerp_path": Case("slerp_path", lambda dev, dt: {**pair(dev, dt), "ts": [0.0, 0.3, 1.0]}),
    "edit": Case("edit", lambda dev, dt: _edit(dev, dt, (N, 1, *SHAPE[1:]), None, [0.1, -0.2, 3])),
    "edit, one mask": Case("edit", lambda dev, dt: _edit(dev, dt, (N, *SHAPE), (2, 1, 5, 6, 8), (0.1, -0.2, 0.3))),
    "edit, masks": Case(
        "edit", lambda dev, dt: _edit(dev, dt, (1, 1, 4, 1, 1, 1), (N, 1, 1, 5, 6, 8), [0.1, 0.2, 0.3])
    ),
    "edit, (N,)": Case(
        "edit", lambda dev, dt: _edit(dev, dt, (N, *SHAPE), None, random(dev, N, dtype=wide(dt), seed=3))
    ),
    "edit, (N, B)": Case(
        "edit", lambda dev, dt: _edit(dev, dt, (N, *SHAPE), None, random(dev, N, 2, dtype=wide(dt), seed=3))
    ),
    "blend": Case(
        "blend",
        lambda dev, dt: {
            "base": random(dev, *SHAPE, dtype=dt),
            "edited": random(dev, *SHAPE, dtype=dt, seed=1),
            "mask": random(dev, 2, 1, 5, 6, 8, dtype=dt, seed=2).clamp(0, 1),
        },
    ),
    "temporal_loss": Case("temporal_loss", lambda dev, dt: _clip(dev, dt)),
    "temporal_loss, none": Case(
        "temporal_loss", lambda dev, dt: _clip(dev, dt, ref=True, mask=(2, 1, 5, 6, 8), second=0.5, reduction="none")
    ),
    "temporal_loss_and_grad": Case("temporal_loss_and_grad", lambda dev, dt: _clip(dev, dt)),
    "temporal_loss_and_grad, all": Case(
        "temporal_loss_and_grad",
        lambda dev, dt: _clip(
            dev, dt, ref=True, mask=(5, 6, 8), first=0.5, second=2, norm="charbonnier", eps=1e-2, reduction="none"
        ),
    ),
    "temporal_loss_and_grad, frames first": Case(
        "temporal_loss_and_grad", lambda dev, dt: _clip(dev, dt, norm="l1", frame_dim=1)
    ),
}
CASES |= {
    "guide": Case("guide", lambda dev, dt: _predictions(dev, dt, step=False)),
    "guide, unconditional": Case("guide", lambda dev, dt: {**_predictions(dev, dt, step=False), "uncond": None}),
    "guide, zero": Case("guide", lambda dev, dt: _predictions(dev, dt, step=False, mode="cfg_zero", zero_init=True)),
    "guided_step": Case("guided_step", lambda dev, dt: _predictions(dev, dt, rescale=0.7)),
    "guided_step, apg": Case(
        "guided_step", lambda dev, dt: _predictions(dev, dt, mode="apg", eta=0.2, norm_threshold=2, return_x0=True)
    ),
    "guided_step, mask": Case(
        "guided_step", lambda dev, dt: _predictions(dev, dt, mode="tcfg", original=True, mask=(2, 1, 5, 6, 8))
    ),
    "guided_step, all": Case(
        "guided_step",
        lambda dev, dt: _predictions(
            dev, dt, mode="magnitude_aware", alpha=4, rescale=1, mask=(5, 1, 8), return_x0=True
        ),
    ),
    "combine": Case("combine", lambda dev, dt: _terms(dev, dt, 6)),
    "combine, one": Case("combine", lambda dev, dt: _terms(dev, dt, 1)),
    "combine, to float32": Case("combine", lambda dev, dt: {**_terms(dev, dt, 2), "dtypes": torch.float32}),
    "combine, rows": Case("combine", lambda dev, dt: _rows(dev, dt, 3, 4)),
    "combine, precise": Case("combine", lambda dev, dt: {**_rows(dev, dt, 4, 2), "precise": True}),
    "combine, rows of dtypes": Case(
        "combine", lambda dev, dt: {**_rows(dev, dt, 5, 3), "dtypes": (dt, torch.bfloat16, torch.float64)}
    ),
}
