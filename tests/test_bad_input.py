"""Rule 8: bad input is a ValueError or TypeError that names argument, finding and expectation, before any launch.

One row a mistake: the call, the exception, and what its message must contain.
"""

import importlib
import math
import re

import pytest
import torch

import latentfast
from latentfast import _direct
from tests.helpers import Target

A = torch.zeros(2, 3, 4)
VIDEO = torch.zeros(2, 3, 4, 5, 6)
FLOW = torch.zeros(2, 2, 3, 5, 6)
META = torch.zeros(2, 3, 4, device="meta")
INTS = torch.zeros(2, 3, 4, dtype=torch.int64)
lf = latentfast

#: Parts of sentences that several rows expect.
FLOATS = "float32, float16, bfloat16 or float64"
DIMS = "dim must name dimensions of a 3-D tensor, from -3 to 2, got"


def _grad(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, requires_grad=True)


_INTERPOLATE = [
    row
    for f in (lf.lerp, lf.nlerp, lf.slerp)
    for row in [
        (lambda f=f: f([1.0], A, 0.5), TypeError, "a must be a tensor, got list"),
        (lambda f=f: f(A, None, 0.5), TypeError, "b must be a tensor, got NoneType"),
        (lambda f=f: f(INTS, INTS, 0.5), TypeError, f"a must be {FLOATS}, got int64"),
        (lambda f=f: f(A, A[:1], 0.5), ValueError, "b must have a's shape (2, 3, 4), got (1, 3, 4)"),
        (lambda f=f: f(A, A.double(), 0.5), TypeError, "b must have a's dtype float32, got float64"),
        (lambda f=f: f(A, META, 0.5), ValueError, "b must be on a's device cpu, got meta"),
        (lambda f=f: f(A, A, "half"), TypeError, "t must be a float or a tensor, got str"),
        (lambda f=f: f(A, A, [0.5]), TypeError, "t must be a float or a tensor, got list"),
        (
            lambda f=f: f(A, A, torch.tensor([1, 0])),
            TypeError,
            "t must be a float or a floating tensor, got torch.int64",
        ),
        (lambda f=f: f(A, A, torch.zeros(2, 3, 1)), ValueError, "t must broadcast to (2, 1, 1), got shape (2, 3, 1)"),
        (lambda f=f: f(A, A, torch.zeros(3, 1, 1)), ValueError, "t must broadcast to (2, 1, 1), got shape (3, 1, 1)"),
        (
            lambda f=f: f(A, A, torch.zeros(1, 2, 1, 1)),
            ValueError,
            "t must broadcast to (2, 1, 1), got shape (1, 2, 1, 1)",
        ),
        (lambda f=f: f(A, A, torch.zeros(2, 1, 1, device="meta")), ValueError, "t must be on a's device cpu, got meta"),
        (lambda f=f: f(A, A, 0.5, dim=3), ValueError, f"{DIMS} 3"),
        (lambda f=f: f(A, A, 0.5, dim=(1, -2)), ValueError, "dim must name each dimension once, got (1, -2)"),
        (lambda f=f: f(A, A, 0.5, dim=()), ValueError, f"{DIMS} ()"),
        (lambda f=f: f(A, A, 0.5, dim=(1.0,)), ValueError, "dim must name dimensions"),
        (lambda f=f: f(A, A, 0.5, dim="channels"), ValueError, "dim must name dimensions"),
        (lambda f=f: f(A, A, 0.5, dim=2.0), ValueError, f"{DIMS} 2.0"),
    ]
]

_PATHS = [
    row
    for f in (lf.lerp_path, lf.nlerp_path, lf.slerp_path)
    for row in [
        (lambda f=f: f(A, A, 0.5), TypeError, "ts must be a sequence of floats or a tensor, got float"),
        (lambda f=f: f(A, A, ["x"]), TypeError, "ts must be a sequence of floats or a tensor, got list"),
        (lambda f=f: f(A, A, torch.tensor(0.5)), ValueError, "ts must have at least one dimension"),
        (
            lambda f=f: f(A, A, torch.zeros(5, 3, 1, 1)),
            ValueError,
            "ts[k] must broadcast to (2, 1, 1), got shape (3, 1, 1)",
        ),
        (lambda f=f: f(A, A[0], [0.5]), ValueError, "b must have a's shape (2, 3, 4), got (3, 4)"),
        (
            lambda f=f: f(A, A, [0.5], out=torch.zeros(2, 3, 4)),
            ValueError,
            "out must have shape (1, 2, 3, 4), got (2, 3, 4)",
        ),
    ]
]

_KEYS = [
    (lambda: lf.interpolate_keys([A], [0.0]), TypeError, "keys must be a tensor, got list"),
    (lambda: lf.interpolate_keys(torch.zeros(()), [0.0]), ValueError, "keys must have shape (N, …) with N ≥ 1, got ()"),
    (lambda: lf.interpolate_keys(A[:0], [0.0]), ValueError, "keys must have shape (N, …) with N ≥ 1, got (0, 3, 4)"),
    (lambda: lf.interpolate_keys(A, [1.5]), ValueError, "ts must lie in [0, 1] for 2 keys, got 1.5"),
    (lambda: lf.interpolate_keys(A, [0.5, -0.1]), ValueError, "ts must lie in [0, 1] for 2 keys, got -0.1"),
    (lambda: lf.interpolate_keys(A, [math.nan]), ValueError, "ts must lie in [0, 1] for 2 keys, got nan"),
    (lambda: lf.interpolate_keys(A, 0.5), TypeError, "ts must be a sequence of floats or a tensor, got float"),
    (
        lambda: lf.interpolate_keys(A, [0.5], mode="cubic"),
        ValueError,
        "mode must be slerp, lerp, nlerp or catmull_rom, got 'cubic'",
    ),
    (lambda: lf.interpolate_keys(A, [0.5], dim=2), ValueError, "dim must name dimensions of a 2-D tensor"),
    (lambda: lf.interpolate_keys(A, torch.zeros(1, device="meta")), ValueError, "ts must be numbers on the host"),
]

_MEAN = [
    (lambda: lf.spherical_mean([A], [1.0]), TypeError, "latents must be a tensor, got list"),
    (lambda: lf.spherical_mean(A[:0], []), ValueError, "latents must have shape (N, …) with N ≥ 1, got (0, 3, 4)"),
    (
        lambda: lf.spherical_mean(A, [1.0]),
        ValueError,
        "weights must have shape (2,), one for each of the latents, got (1,)",
    ),
    (lambda: lf.spherical_mean(A, torch.ones(2, 1)), ValueError, "weights must have shape (2,)"),
    (lambda: lf.spherical_mean(A, [1.0, -1.0]), ValueError, "weights must have a positive sum, got [1.0, -1.0]"),
    (lambda: lf.spherical_mean(A, [1.0, math.nan]), ValueError, "weights must have a positive sum"),
    (lambda: lf.spherical_mean(A, 1.0), TypeError, "weights must be a sequence of floats or a tensor, got float"),
    (lambda: lf.spherical_mean(A, torch.ones(2).int()), TypeError, "weights must be float32"),
    (lambda: lf.spherical_mean(A, torch.ones(2, device="meta")), ValueError, "weights must be on latents's device cpu"),
    (lambda: lf.spherical_mean(A, [1.0, 1.0], dim=2), ValueError, "dim must name dimensions of a 2-D tensor"),
]

_EDIT = [
    (lambda: lf.edit(1.0, A, [1.0]), TypeError, "z must be a tensor, got float"),
    (lambda: lf.edit(INTS, INTS, [1.0]), TypeError, f"z must be {FLOATS}, got int64"),
    (lambda: lf.edit(A, [A], [1.0]), TypeError, "directions must be a tensor, got list"),
    (lambda: lf.edit(A, A[None].half(), [1.0]), TypeError, "directions must have z's dtype float32, got float16"),
    (lambda: lf.edit(A, META[None], [1.0]), ValueError, "directions must be on z's device cpu, got meta"),
    (lambda: lf.edit(A, A, [1.0]), ValueError, "directions must have 4 dimensions (N, *z.shape), got shape (2, 3, 4)"),
    (
        lambda: lf.edit(A, A[None].repeat(2, 1, 1, 1), [1.0] * 3),
        ValueError,
        "directions must hold 3 directions, one for each strength, got 2",
    ),
    (
        lambda: lf.edit(A, torch.zeros(1, 2, 2, 4), [1.0]),
        ValueError,
        "directions must broadcast to (1, 2, 3, 4), got shape (1, 2, 2, 4)",
    ),
    (lambda: lf.edit(A, A[None], 1.0), TypeError, "strengths must be a sequence of floats or a tensor, got float"),
    (lambda: lf.edit(A, A[None], ["much"]), TypeError, "strengths must be a sequence of floats or a tensor, got list"),
    (lambda: lf.edit(A, A[None], torch.ones(1, 3)), ValueError, "strengths must have shape (N,) or (N, 2), got (1, 3)"),
    (lambda: lf.edit(A, A[None], torch.ones(())), ValueError, "strengths must have shape (N,) or (N, 2), got ()"),
    (lambda: lf.edit(A, A[None], torch.ones(1).int()), TypeError, "strengths must be floats, got a tensor of"),
    (
        lambda: lf.edit(A, A[None], torch.ones(1, device="meta")),
        ValueError,
        "strengths must be on z's device cpu, got meta",
    ),
    (lambda: lf.edit(A, A[None], [1.0], [1.0]), TypeError, "mask must be a tensor, got list"),
    (lambda: lf.edit(A, A[None], [1.0], INTS), TypeError, f"mask must be bool, {FLOATS}, got int64"),
    (
        lambda: lf.edit(A, A[None], [1.0], torch.ones(5)),
        ValueError,
        "mask must broadcast to (1, 2, 3, 4), got shape (5,)",
    ),
    (
        lambda: lf.edit(A, A[None], [1.0], torch.ones(2, 2, 3, 4)),
        ValueError,
        "mask must broadcast to (1, 2, 3, 4), got shape (2, 2, 3, 4)",
    ),
    (lambda: lf.edit(A, A[None], [1.0], META), ValueError, "mask must be on z's device cpu, got meta"),
    (lambda: lf.blend(None, A, A), TypeError, "base must be a tensor, got NoneType"),
    (lambda: lf.blend(A, 0.0, A), TypeError, "edited must be a tensor, got float"),
    (lambda: lf.blend(A, A[:, :1], A), ValueError, "edited must have base's shape (2, 3, 4), got (2, 1, 4)"),
    (lambda: lf.blend(A, A.half(), A), TypeError, "edited must have base's dtype float32, got float16"),
    (lambda: lf.blend(A, A, 0.5), TypeError, "mask must be a tensor, got float"),
    (
        lambda: lf.blend(A, A, torch.ones(1, 2, 3, 4)),
        ValueError,
        "mask must broadcast to (2, 3, 4), got shape (1, 2, 3, 4)",
    ),
]

_TEMPORAL = [
    row
    for f in (lf.temporal_loss, lf.temporal_loss_and_grad)
    for row in [
        (lambda f=f: f(None), TypeError, "z must be a tensor, got NoneType"),
        (lambda f=f: f(VIDEO.long()), TypeError, f"z must be {FLOATS}, got int64"),
        (lambda f=f: f(VIDEO, VIDEO[:1]), ValueError, "ref must have z's shape (2, 3, 4, 5, 6), got (1, 3, 4, 5, 6)"),
        (lambda f=f: f(VIDEO, VIDEO.half()), TypeError, "ref must have z's dtype float32, got float16"),
        (lambda f=f: f(VIDEO, mask=1.0), TypeError, "mask must be a tensor, got float"),
        (
            lambda f=f: f(VIDEO, mask=torch.ones(4, 5, 5)),
            ValueError,
            "mask must broadcast to (2, 3, 4, 5, 6), got shape (4, 5, 5)",
        ),
        (lambda f=f: f(VIDEO, norm="l3"), ValueError, "norm must be l2, l1 or charbonnier, got 'l3'"),
        (lambda f=f: f(VIDEO, norm=2), ValueError, "norm must be l2, l1 or charbonnier, got 2"),
        (lambda f=f: f(VIDEO, reduction="sum"), ValueError, "reduction must be mean or none, got 'sum'"),
        (lambda f=f: f(VIDEO, first="1"), TypeError, "first must be a number, got str"),
        (lambda f=f: f(VIDEO, second=math.nan), ValueError, "second must be finite, got nan"),
        (lambda f=f: f(VIDEO, first=math.inf), ValueError, "first must be finite, got inf"),
        (lambda f=f: f(VIDEO, eps=-1e-3), ValueError, "eps must be finite and at least 0, got -0.001"),
        (
            lambda f=f: f(VIDEO, frame_dim=5),
            ValueError,
            "frame_dim must name a dimension after the batch, 1 to 4 for a 5-D z, got 5",
        ),
        (lambda f=f: f(VIDEO, frame_dim=0), ValueError, "frame_dim must name a dimension after the batch"),
        (lambda f=f: f(VIDEO, frame_dim=2.0), TypeError, "frame_dim must be an int, got float"),
        (lambda f=f: f(torch.zeros(4)), ValueError, "frame_dim must name a dimension after the batch"),
        (lambda f=f: f(torch.zeros(())), ValueError, "frame_dim must name a dimension after the batch"),
    ]
]

_WARP = [
    (lambda: lf.warp_loss(A, FLOW), ValueError, "z must have 5 dimensions (B, C, T, H, W), got shape (2, 3, 4)"),
    (lambda: lf.warp_loss([VIDEO], FLOW), TypeError, "z must be a tensor, got list"),
    (lambda: lf.warp_loss(VIDEO, None), TypeError, "flow must be a tensor, got NoneType"),
    (
        lambda: lf.warp_loss(VIDEO, FLOW[:, :, :2]),
        ValueError,
        "flow must have shape (B, 2, T − 1, H, W) = (2, 2, 3, 5, 6), got (2, 2, 2, 5, 6)",
    ),
    (lambda: lf.warp_loss(VIDEO, FLOW.long()), TypeError, f"flow must be {FLOATS}"),
    (lambda: lf.warp_loss(VIDEO, FLOW.to("meta")), ValueError, "flow must be on z's device cpu, got meta"),
    (lambda: lf.warp_loss(VIDEO, FLOW, frame_dim=3), ValueError, "frame_dim must be 1 or 2, got 3"),
    (lambda: lf.warp_loss(VIDEO, FLOW, reduction="all"), ValueError, "reduction must be mean or none, got 'all'"),
    (
        lambda: lf.warp_loss(VIDEO, FLOW, torch.ones(4, 5, 6)),
        ValueError,
        "mask must broadcast to (2, 3, 3, 5, 6), got shape (4, 5, 6)",
    ),
    (lambda: lf.warp_loss(VIDEO, FLOW, True), TypeError, "mask must be a tensor, got bool"),
]

_OUT = [
    row
    for name, call in {
        "lerp": lambda **k: lf.lerp(k.pop("x", A), A, 0.5, **k),
        "nlerp": lambda **k: lf.nlerp(k.pop("x", A), A, 0.5, **k),
        "slerp": lambda **k: lf.slerp(k.pop("x", A), A, 0.5, **k),
        "slerp dims that alternate": lambda **k: lf.slerp(k.pop("x", A)[None], A[None], 0.5, dim=(1, 3), **k),
        "edit": lambda **k: lf.edit(k.pop("x", A), A[None], [1.0], **k),
        "blend": lambda **k: lf.blend(k.pop("x", A), A, A, **k),
    }.items()
    for lead in [(1,) if "alternate" in name else ()]
    for row in [
        (lambda call=call: call(out=[A]), TypeError, "out must be a tensor, got list"),
        (lambda call=call: call(out=torch.zeros(3)), ValueError, "out must have shape"),
        (lambda call=call, n=lead: call(out=torch.zeros(*n, 2, 3, 4).half()), TypeError, "dtype float32, got float16"),
        (
            lambda call=call, n=lead: call(out=torch.zeros(*n, 2, 3, 4, device="meta")),
            ValueError,
            "device cpu, got meta",
        ),
        (
            lambda call=call, n=lead: call(out=torch.zeros(*n, 2, 4, 3).transpose(-1, -2)),
            ValueError,
            "out must be contiguous, got strides",
        ),
        (lambda call=call, n=lead: call(out=_grad(*n, 2, 3, 4)), ValueError, "out must not require grad"),
        (
            lambda call=call, n=lead: call(x=_grad(2, 3, 4), out=torch.zeros(*n, 2, 3, 4)),
            ValueError,
            "out cannot be given while an input requires grad",
        ),
        (
            lambda call=call, n=lead: call(out=A.view(*n, 2, 3, 4)),
            ValueError,
            "out must not share memory with an input",
        ),
    ]
]

_LOSS_OUT = [
    (
        lambda: lf.temporal_loss_and_grad(VIDEO, out=torch.zeros(2)),
        TypeError,
        "out must be a pair (losses, gradient), got Tensor",
    ),
    (
        lambda: lf.temporal_loss_and_grad(VIDEO, out=(torch.zeros(2),)),
        TypeError,
        "out must be a pair (losses, gradient)",
    ),
    (
        lambda: lf.temporal_loss_and_grad(VIDEO, out=(torch.zeros(3), torch.zeros_like(VIDEO))),
        ValueError,
        "out must have shape (2,), got (3,)",
    ),
    (
        lambda: lf.temporal_loss_and_grad(VIDEO.half(), out=(torch.zeros(2).half(), torch.zeros_like(VIDEO).half())),
        TypeError,
        "out must have the loss's dtype float32, got float16",
    ),
    (
        lambda: lf.temporal_loss_and_grad(VIDEO, out=(torch.zeros(2), torch.zeros_like(VIDEO).double())),
        TypeError,
        "out must have z's dtype float32, got float64",
    ),
    (
        lambda: lf.temporal_loss_and_grad(VIDEO, out=(torch.zeros(2), VIDEO)),
        ValueError,
        "out must not share memory with an input",
    ),
]

_NOISE = {"sigma": 1.0, "sigma_next": 0.5}
_BUFFER = torch.zeros(2, 3, 4)

_GUIDE = [
    row
    for f in (lf.guide, lambda *args, **rest: lf.guided_step(A, *args, **_NOISE, **rest))
    for row in [
        (lambda f=f: f([1.0], A, 5.0), TypeError, "cond must be a tensor, got list"),
        (lambda f=f: f(A, [1.0], 5.0), TypeError, "uncond must be a tensor, got list"),
        (lambda f=f: f(A, A[:1], 5.0), ValueError, "uncond must have cond's shape (2, 3, 4), got (1, 3, 4)"),
        (lambda f=f: f(A, A.half(), 5.0), TypeError, "uncond must have cond's dtype float32, got float16"),
        (lambda f=f: f(A, META, 5.0), ValueError, "uncond must be on cond's device cpu, got meta"),
        (lambda f=f: f(INTS, INTS, 5.0), TypeError, f"cond must be {FLOATS}, got int64"),
        (lambda f=f: f(A, A, "5"), TypeError, "scale must be a number, got str"),
        (lambda f=f: f(A, A, A), TypeError, "scale must be a number, got Tensor"),
        (lambda f=f: f(A, A, math.nan), ValueError, "scale must be finite, got nan"),
        (lambda f=f: f(A, A, 5.0, mode="cgf"), ValueError, "mode must be one of cfg, apg, cfg_zero, tcfg, magnitude_a"),
        (
            lambda f=f: f(A, A, 5.0, mode="zero"),
            ValueError,
            "mode must be one of cfg, apg, cfg_zero, tcfg, magnitude_a",
        ),
        (lambda f=f: f(A, A, 5.0, rescale=1.5), ValueError, "rescale must lie in [0, 1], got"),
        (lambda f=f: f(A, A, 5.0, rescale=-0.5), ValueError, "rescale must lie in [0, 1]"),
        (lambda f=f: f(A, A, 5.0, original=1), TypeError, "original must be True or False, got int"),
        (lambda f=f: f(A, A, 5.0, mode="apg", eta=None), TypeError, "eta must be a number, got NoneType"),
        (
            lambda f=f: f(A, A, 5.0, mode="apg", norm_threshold=-1.0),
            ValueError,
            "norm_threshold must be finite and at ",
        ),
        (lambda f=f: f(A, A, 5.0, mode="magnitude_aware", alpha=-1), ValueError, "alpha must be finite and at least 0"),
        (lambda f=f: f(A, A, 5.0, zero_init=True), ValueError, "zero_init belongs to mode cfg_zero, got mode cfg"),
        (
            lambda f=f: f(A, A, 5.0, mode="cfg_zero", zero_init=1),
            TypeError,
            "zero_init must be True or False, got int",
        ),
        (lambda f=f: f(A, A, 5.0, mode="apg", momentum=0.5), ValueError, "momentum needs a momentum_buffer"),
        *(
            (lambda f=f, buffer=buffer: f(A, A, 5.0, mode="apg", momentum_buffer=buffer), error, words)
            for buffer, error, words in [
                ([0.0], TypeError, "momentum_buffer must be a tensor, got list"),
                (torch.zeros(3, 4), ValueError, "momentum_buffer must have cond's shape (2, 3, 4), got (3, 4)"),
                (_BUFFER.half(), TypeError, "momentum_buffer must have cond's dtype float32, got float16"),
                (META, ValueError, "momentum_buffer must be on cond's device cpu, got meta"),
                (torch.zeros(2, 4, 3).mT, ValueError, "momentum_buffer must be contiguous, as it is written into"),
                (_grad(2, 3, 4), ValueError, "momentum_buffer must not require grad"),
                (A, ValueError, "momentum_buffer must not share memory with another argument"),
            ]
        ),
        (
            lambda f=f: f(A, A, 5.0, momentum_buffer=_BUFFER),
            ValueError,
            "momentum_buffer belongs to mode apg, got mode",
        ),
        (lambda f=f: f(A, A, 5.0, out=A), ValueError, "out must not share memory with an input"),
        (lambda f=f: f(A, A, 5.0, out=torch.zeros(2)), ValueError, "out must have shape (2, 3, 4), got (2,)"),
        (lambda f=f: f(A, _grad(2, 3, 4), 5.0, out=_BUFFER), ValueError, "out cannot be given while an input requires"),
    ]
]

_STEP = [
    (
        lambda: lf.guide(torch.zeros(3), None, 5.0),
        ValueError,
        "cond must have at least 2 dimensions, samples first, got",
    ),
    (lambda: lf.guided_step(None, A, A, 5.0, **_NOISE), TypeError, "sample must be a tensor, got NoneType"),
    (lambda: lf.guided_step(A[:1], A, A, 5.0, **_NOISE), ValueError, "sample must have cond's shape (2, 3, 4), got (1"),
    (lambda: lf.guided_step(A, A, A, 5.0, sigma="1", sigma_next=0.0), TypeError, "sigma must be a number, got str"),
    (
        lambda: lf.guided_step(A, A, A, 5.0, sigma=1.0, sigma_next=math.inf),
        ValueError,
        "sigma_next must be finite, got",
    ),
    (lambda: lf.guided_step(A, A, A, 5.0, mask=A, **_NOISE), ValueError, "mask needs known: give both, or neither"),
    (lambda: lf.guided_step(A, A, A, 5.0, known=A, **_NOISE), ValueError, "known needs mask: give both, or neither"),
    (
        lambda: lf.guided_step(A, A, A, 5.0, mask=torch.zeros(5), known=A, **_NOISE),
        ValueError,
        "mask must broadcast to (2, 3, 4), got shape (5,)",
    ),
    (
        lambda: lf.guided_step(A, A, A, 5.0, mask=_grad(2, 1, 4), known=A, **_NOISE),
        ValueError,
        "mask requires grad, but the step is not differentiable in mask; pass mask.detach()",
    ),
    (
        lambda: lf.guided_step(A, A, A, 5.0, mask=A, known=A[0], **_NOISE),
        ValueError,
        "known must have sample's shape (2, 3, 4), got (3, 4)",
    ),
    (
        lambda: lf.guided_step(A, A, A, 5.0, return_x0=1, **_NOISE),
        TypeError,
        "return_x0 must be True or False, got int",
    ),
    (
        lambda: lf.guided_step(A, A, A, 5.0, return_x0=True, out=_BUFFER, **_NOISE),
        TypeError,
        "out must be a pair (next sample, x0), got Tensor",
    ),
    (
        lambda: lf.guided_step(A, A, A, 5.0, return_x0=True, out=(_BUFFER, _BUFFER), **_NOISE),
        ValueError,
        "out[1] must not share memory with another argument",
    ),
]

_COMBINE = [
    (lambda: lf.combine(A, [1.0]), TypeError, "tensors must be a list of tensors, got Tensor"),
    (lambda: lf.combine([], []), ValueError, "tensors must be 1 to 8 tensors, got 0"),
    (lambda: lf.combine([A] * 9, [1.0] * 9), ValueError, "tensors must be 1 to 8 tensors, got 9"),
    (
        lambda: lf.combine([A, A[:1]], [1.0, 1.0]),
        ValueError,
        "tensors[1] must have tensors[0]'s shape (2, 3, 4), got (1",
    ),
    (lambda: lf.combine([A, 3.0], [1.0, 1.0]), TypeError, "tensors[1] must be a tensor, got float"),
    (lambda: lf.combine([INTS], [1.0]), TypeError, f"tensors[0] must be {FLOATS}, got int64"),
    (lambda: lf.combine([A, A], [1.0]), ValueError, "coefficients must be 2 numbers, one for each tensor, got 1"),
    (lambda: lf.combine([A], 1.0), TypeError, "coefficients must be a list of numbers, got float"),
    (lambda: lf.combine([A], ["1"]), TypeError, "coefficients[0] must be a number, got str"),
    (lambda: lf.combine([A], [math.inf]), ValueError, "coefficients[0] must be finite, got inf"),
    (lambda: lf.combine([A], [1.0], out=A), ValueError, "out must not share memory with an input"),
    (lambda: lf.combine([A], [[1.0]], out=A), TypeError, "out must be 1 tensors, one for each row of coefficients"),
    (
        lambda: lf.combine([A], [1.0], out=torch.empty_like(A), dtypes=torch.float32),
        ValueError,
        "dtypes cannot be given together with out",
    ),
    (lambda: lf.combine([A], [[1.0]] * 5), ValueError, "coefficients must be 1 to 4 rows, got 5"),
    (
        lambda: lf.combine([A], [[1.0], [1.0, 2.0]]),
        ValueError,
        "coefficients[1] must be 1 numbers, one for each tensor",
    ),
    (lambda: lf.combine([A], [[1.0]], dtypes=[]), ValueError, "dtypes must be 1 dtypes, one for each result, got 0"),
    (lambda: lf.combine([A], [1.0], dtypes=INTS.dtype), TypeError, "dtypes[0] must be float32, float16, bfloat16 or"),
]

ROWS = [
    *(_INTERPOLATE + _PATHS + _KEYS + _MEAN + _EDIT + _TEMPORAL + _WARP + _OUT + _LOSS_OUT),
    *(_GUIDE + _STEP + _COMBINE),
]


def _launched(*args) -> None:
    raise AssertionError("an operator was launched before the arguments were checked")


def _forbid_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through either door: the dispatcher's table, or a direct call that is not declined."""
    backends = importlib.import_module("latentfast.backends")
    monkeypatch.setattr(backends, "_table", dict.fromkeys(backends._table, _launched))
    for name in ("interpolate", "edit", "blend", "temporal_loss", "guide", "guided_step", "combine"):
        door = getattr(_direct, name)
        monkeypatch.setattr(_direct, name, lambda *args, door=door: None if door(*args) is None else _launched())


@pytest.mark.parametrize(("call", "error", "words"), ROWS, ids=[f"{i}: {row[2]}" for i, row in enumerate(ROWS)])
def test_rule8_bad_input(call, error, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _forbid_launches(monkeypatch)
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_the_guard_against_launches_works(monkeypatch: pytest.MonkeyPatch) -> None:
    _forbid_launches(monkeypatch)
    for _ in range(2):
        for call in (lambda: lf.slerp(A, A, 0.5), lambda: lf.edit(A, A[None], [1.0]), lambda: lf.temporal_loss(VIDEO)):
            with pytest.raises(AssertionError, match="launched"):
                call()
        monkeypatch.setattr(_direct, "enabled", False)  # and the second time past the direct door


def test_out_under_no_grad_takes_inputs_that_require_grad(target: Target) -> None:
    x, out = torch.ones(2, 3, device=target.device, requires_grad=True), torch.zeros(2, 3, device=target.device)
    with torch.no_grad():
        assert lf.slerp(x, x, 0.5, out=out) is out
    assert torch.equal(out, x)


def test_writing_into_out_counts_as_a_change(target: Target) -> None:
    """Autograd must notice that a tensor that it saved has been overwritten."""
    a = torch.ones(2, 3, device=target.device)
    x = torch.ones(2, 3, device=target.device, requires_grad=True)
    product = x * a  # saves a
    lf.lerp(x.detach(), x.detach() + 1, 0.5, out=a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
