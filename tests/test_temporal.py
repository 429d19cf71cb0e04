"""Temporal losses on every backend: what they must not see, masks, short clips, flows, and both ways to a gradient."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import latentfast
from latentfast import reference
from tests.helpers import (
    DTYPES,
    LOSS_ULPS,
    Draw,
    Target,
    assert_gradient_close,
    assert_matches_spec,
    gradients,
    same_bits,
    skip_where_torch_adds_atomically,
    widened,
    working_dtype,
)

NORMS = ("l2", "l1", "charbonnier")
every_norm = pytest.mark.parametrize("norm", NORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 5)
seeds = st.integers(0, 2**31 - 1)


# --- What the loss does not see ---------------------------------------------------------------------------------------


@given(shape=shapes, seed=seeds, norm=st.sampled_from(NORMS))
def test_a_constant_in_time_changes_nothing(target: Target, shape: tuple, seed: int, norm: str) -> None:
    """The numbers are coarse enough that every difference is exact, so that this holds bit for bit."""
    draw = Draw(device=target.device, seed=seed)
    z, shift = draw.grid(*shape), draw.grid(shape[0], shape[1], 1, *shape[3:])
    options = {"norm": norm, "first": 0.5, "second": 2.0, "reduction": "none"}
    loss, grad = latentfast.temporal_loss_and_grad(z, **options)
    shifted, shifted_grad = latentfast.temporal_loss_and_grad(z + shift, **options)
    assert same_bits(loss, shifted)
    assert torch.equal(grad, shifted_grad)


@given(shape=shapes, seed=seeds, norm=st.sampled_from(NORMS))
def test_a_static_clip_costs_nothing(target: Target, shape: tuple, seed: int, norm: str) -> None:
    still = Draw(device=target.device, seed=seed).normal(shape[0], shape[1], 1, *shape[3:]).expand(shape)
    loss, grad = latentfast.temporal_loss_and_grad(still, norm=norm, second=1.0)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@given(shape=shapes, seed=seeds, norm=st.sampled_from(NORMS))
def test_an_even_edit_of_a_moving_clip_costs_nothing(target: Target, shape: tuple, seed: int, norm: str) -> None:
    draw = Draw(device=target.device, seed=seed)
    ref, shift = draw.grid(*shape), draw.grid(shape[0], shape[1], 1, *shape[3:])
    loss, grad = latentfast.temporal_loss_and_grad(ref + shift, ref, norm=norm, second=1.0)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@given(shape=shapes, seed=seeds)
def test_second_differences_do_not_see_a_steady_motion(target: Target, shape: tuple, seed: int) -> None:
    draw = Draw(device=target.device, seed=seed)
    start, speed = (draw.grid(shape[0], shape[1], 1, *shape[3:]) for _ in range(2))
    z = start + speed * torch.arange(shape[2], device=target.device).view(-1, 1, 1)
    assert latentfast.temporal_loss(z, first=0.0, second=1.0).item() == 0


@given(shape=shapes, seed=seeds, norm=st.sampled_from(NORMS))
def test_a_mask_of_ones_is_no_mask(target: Target, shape: tuple, seed: int, norm: str) -> None:
    draw = Draw(device=target.device, seed=seed)
    z = draw.normal(*shape)
    options = {"norm": norm, "second": 0.5, "reduction": "none"}
    plain, plain_grad = latentfast.temporal_loss_and_grad(z, **options)
    for mask in (torch.ones(shape), torch.ones(shape[0], 1, *shape[2:]).bool(), torch.ones(())):
        loss, grad = latentfast.temporal_loss_and_grad(z, mask=mask.to(target.device), **options)
        # a sum of weights in place of a count: up to one rounding each
        torch.testing.assert_close(loss, plain, rtol=5e-7, atol=0)
        torch.testing.assert_close(
            grad, plain_grad, rtol=0, atol=5e-7 * float(plain_grad.abs().amax()) if grad.numel() else 0
        )


# --- Values against the specification ---------------------------------------------------------------------------------

MASKS = {
    "one for all": (2, 1, 5, 6, 7),
    "full": (2, 3, 5, 6, 7),
    "a frame": (5, 1, 1),
    "an image": (6, 7),
    "channels": (3, 1, 1, 1),
}


@pytest.mark.parametrize("mask", [*MASKS, None])
@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3), (-0.5, 2.0)])
@every_norm
def test_values_and_gradients(norm: str, first: float, second: float, mask: str | None, target: Target) -> None:
    draw = Draw(device=target.device)
    inputs = {"z": draw.normal(2, 3, 5, 6, 7), "ref": draw.normal(2, 3, 5, 6, 7)}
    if mask is not None:
        inputs["mask"] = draw.mask(*MASKS[mask])
    options = {"norm": norm, "first": first, "second": second, "eps": 0.05, "reduction": "none"}
    loss, grad = latentfast.temporal_loss_and_grad(**inputs, **options)
    assert_matches_spec(loss, partial(reference.temporal.temporal_loss, **options), inputs, LOSS_ULPS)
    specs = [
        reference.temporal.temporal_loss_and_grad(**widened(inputs, wide), **options)[1]
        for wide in (torch.float64, working_dtype(grad.dtype))
    ]
    assert_gradient_close(grad, *specs)


@pytest.mark.parametrize(
    ("shape", "frame_dim"),
    [((2, 5, 3, 6, 7), 1), ((2, 3, 5, 6, 7), -3), ((2, 3, 6, 7, 5), 4), ((2, 5), 1), ((2, 5, 7), 1), ((2, 3, 5), 2)],
    ids=str,
)
@every_dtype
def test_time_along_any_dimension(shape: tuple, frame_dim: int, dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    inputs = {"z": draw.normal(*shape), "mask": draw.mask(*shape)}
    options = {"second": 0.5, "frame_dim": frame_dim, "reduction": "none"}
    loss, grad = latentfast.temporal_loss_and_grad(**inputs, **options)
    assert loss.dtype == working_dtype(dtype)
    assert grad.dtype == dtype
    assert_matches_spec(loss, partial(reference.temporal.temporal_loss, **options), inputs, LOSS_ULPS)
    specs = [
        reference.temporal.temporal_loss_and_grad(**widened(inputs, wide), **options)[1]
        for wide in (torch.float64, working_dtype(dtype))
    ]
    assert_gradient_close(grad, *specs)


def test_reductions(target: Target) -> None:
    z = Draw(device=target.device).normal(3, 2, 4, 5, 6)
    each, each_grad = latentfast.temporal_loss_and_grad(z, reduction="none")
    mean, mean_grad = latentfast.temporal_loss_and_grad(z, reduction="mean")
    assert each.shape == (3,)
    assert mean.shape == ()
    torch.testing.assert_close(mean, each.mean(), rtol=2e-7, atol=0)  # one rounding
    # the factor 1/3 goes into each of the two differences that an element's gradient is made of, or into their sum
    torch.testing.assert_close(mean_grad, each_grad / 3, rtol=0, atol=5e-7 * float(mean_grad.abs().max()))


@every_dtype
@every_norm
def test_both_ways_to_a_gradient_agree(norm: str, dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    inputs = {"z": draw.normal(3, 2, 4, 5, 6), "ref": draw.normal(3, 2, 4, 5, 6)}
    options = {"norm": norm, "second": 0.5, "reduction": "none"}
    loss, grad = latentfast.temporal_loss_and_grad(**inputs, **options)
    assert not loss.requires_grad
    function = partial(latentfast.temporal_loss, **options)
    same, grads = gradients(function, inputs, ("z", "ref"), torch.ones_like(loss))
    assert same_bits(loss, same)
    assert same_bits(grad, grads["z"])
    assert torch.equal(grads["ref"], -grad)
    assert same_bits(loss, latentfast.temporal_loss(**inputs, **options))  # without a gradient: another kernel


def test_temporal_loss_and_grad_ignores_autograd(target: Target) -> None:
    z = Draw(device=target.device).normal(2, 2, 4, 5, 6).requires_grad_()
    loss, grad = latentfast.temporal_loss_and_grad(z)
    assert not loss.requires_grad
    assert not grad.requires_grad


@every_dtype
def test_temporal_loss_and_grad_writes_into_out_and_nothing_around_it(dtype: torch.dtype, target: Target) -> None:
    z = Draw(dtype, target.device).normal(3, 2, 4, 5, 6)
    expected, expected_grad = latentfast.temporal_loss_and_grad(z, reduction="none")
    margin = 67
    buffer = z.new_full((z.numel() + 2 * margin,), math.nan)
    losses = expected.new_full((3 + 2,), math.nan)
    out = losses[1:-1], buffer[margin:-margin].view(z.shape)
    loss, grad = latentfast.temporal_loss_and_grad(z, reduction="none", out=out)
    assert loss is out[0]
    assert grad is out[1]
    assert same_bits(loss, expected)
    assert same_bits(grad, expected_grad)
    assert buffer[:margin].isnan().all()
    assert buffer[-margin:].isnan().all()
    assert losses[[0, -1]].isnan().all()


# --- Edges ------------------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("frames", [0, 1, 2])
def test_rule7_terms_with_too_few_frames_are_zero(frames: int, norm: str, target: Target) -> None:
    z = Draw(device=target.device).normal(2, 3, frames, 4, 5)
    with_second = latentfast.temporal_loss_and_grad(z, norm=norm, second=1.0)
    without = latentfast.temporal_loss_and_grad(z, norm=norm, second=0.0)
    assert all(map(same_bits, with_second, without))
    if frames < 2:
        assert with_second[0].item() == 0
        assert torch.equal(with_second[1], torch.zeros_like(z))


@every_norm
def test_terms_without_weight_are_zero(norm: str, target: Target) -> None:
    z = Draw(device=target.device).normal(3, 2, 4, 3, 5)
    mask = torch.ones(3, 1, 4, 1, 1, device=target.device)
    mask[1] = 0
    mask[2, :, ::2] = 0  # no two neighbours left
    loss, grad = latentfast.temporal_loss_and_grad(z, mask=mask, norm=norm, second=1.0, reduction="none")
    assert loss[0] > 0
    assert loss[1:].tolist() == [0, 0]
    assert torch.equal(grad[1:], torch.zeros_like(grad[1:]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_norm
def test_what_a_mask_leaves_out_may_be_anything(norm: str, value: float, target: Target) -> None:
    draw = Draw(device=target.device)
    z, ref = draw.normal(2, 3, 5, 4, 6), draw.normal(2, 3, 5, 4, 6)
    mask = (draw.uniform(2, 1, 5, 4, 6) < 0.7).float()
    hidden = mask.expand(z.shape) == 0
    options = {"mask": mask, "norm": norm, "second": 0.5}
    expected = latentfast.temporal_loss_and_grad(z.masked_fill(hidden, 0), ref.masked_fill(hidden, 0), **options)
    got = latentfast.temporal_loss_and_grad(z.masked_fill(hidden, value), ref.masked_fill(hidden, 0), **options)
    assert all(map(same_bits, expected, got))
    assert torch.equal(got[1][hidden], torch.zeros_like(got[1][hidden]))


def test_l1_has_no_gradient_at_zero(target: Target) -> None:
    z = torch.zeros(1, 1, 3, 1, 2, device=target.device)
    z[0, 0, :, 0, 1] = torch.tensor([0.0, 1.0, 1.0])
    _, grad = latentfast.temporal_loss_and_grad(z, norm="l1")
    assert grad[0, 0, :, 0].tolist() == [[0.0, -0.25], [0.0, 0.25], [0.0, 0.0]]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_charbonnier_of_width_zero_is_l1(scale: float, target: Target) -> None:
    z = scale * Draw(device=target.device).grid(2, 3, 4, 5, 6)
    rounded = latentfast.temporal_loss_and_grad(z, norm="charbonnier", eps=0.0)
    sharp = latentfast.temporal_loss_and_grad(z, norm="l1")
    for one, other in zip(rounded, sharp, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)  # a root of a square in place of an absolute value


@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_charbonnier_of_small_differences_keeps_digits(eps: float, target: Target) -> None:
    """sqrt(d² + eps²) − eps cancels for d ≪ eps; the reference in float32 may lose as much, but no more is granted."""
    z = Draw(device=target.device).normal(2, 3, 4, 5, 6) * eps
    spec = partial(reference.temporal.temporal_loss, norm="charbonnier", eps=eps, reduction="none")
    got = latentfast.temporal_loss(z, norm="charbonnier", eps=eps, reduction="none")
    assert_matches_spec(got, spec, {"z": z}, LOSS_ULPS)


# --- Warp -------------------------------------------------------------------------------------------------------------


def _moving(draw: Draw, dx: int, dy: int, frames: int = 4):
    """A clip that moves by whole pixels (dx, dy) a frame around the edges, and its flow."""
    first = draw.normal(2, 3, 1, 6, 8)
    z = torch.cat([first.roll((t * dy, t * dx), (-2, -1)) for t in range(frames)], 2)
    flow = torch.empty(2, 2, frames - 1, 6, 8, device=z.device, dtype=draw.parameter_dtype)
    flow[:, 0], flow[:, 1] = dx, dy
    return z, flow


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, -2), (-3, 1), (7, 5)])
@every_dtype
def test_a_clip_that_moves_with_its_flow_costs_nothing(dx: int, dy: int, dtype: torch.dtype, target: Target) -> None:
    z, flow = _moving(Draw(dtype, target.device), dx, dy)
    z.requires_grad_()
    loss = latentfast.warp_loss(z, flow)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_a_flow_out_of_the_frame_costs_nothing(target: Target) -> None:
    draw = Draw(device=target.device)
    z = draw.normal(2, 3, 4, 5, 6).requires_grad_()
    for value in (100.0, -6.5, math.inf, -math.inf, math.nan, 1e30):
        loss = latentfast.warp_loss(z, torch.full((2, 2, 3, 5, 6), value, device=target.device))
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("mask_shape", [(2, 1, 3, 5, 6), (2, 3, 3, 5, 6), (3, 1, 1), ()], ids=str)
@pytest.mark.parametrize("flow_scale", [0.3, 1.5, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_warp_values_and_gradients(dtype: torch.dtype, flow_scale: float, mask_shape: tuple, target: Target) -> None:
    draw = Draw(dtype, target.device)
    inputs = {
        "z": draw.normal(2, 3, 4, 5, 6),
        "flow": draw.uniform(2, 2, 3, 5, 6, low=-flow_scale, high=flow_scale),
        "mask": draw.mask(*mask_shape) if mask_shape else torch.full((), 0.5, device=target.device),
    }
    options = {"reduction": "none"}
    loss, got = gradients(partial(latentfast.warp_loss, **options), inputs, ["z"])
    spec = partial(reference.temporal.warp_loss, **options)
    assert_matches_spec(loss, spec, inputs, LOSS_ULPS)
    exact, same = (
        gradients(spec, widened(inputs, wide), ["z"], None)[1]["z"] for wide in (torch.float64, torch.float32)
    )
    assert_gradient_close(got["z"], exact, same)


def test_many_positions_that_flow_into_one(target: Target) -> None:
    """A zoom: the gradient's scattered sums have many terms of both signs, and the same bits on every run."""
    skip_where_torch_adds_atomically(target, "warp_loss")
    draw = Draw(device=target.device)
    z = draw.normal(2, 3, 3, 7, 9)
    ys, xs = torch.arange(7.0).view(7, 1).expand(7, 9), torch.arange(9.0).expand(7, 9)
    flow = torch.stack((4.3 - xs, 3.6 - ys)).view(1, 2, 1, 7, 9).expand(2, 2, 2, 7, 9).to(target.device)
    inputs = {"z": z, "flow": flow}
    runs = [gradients(latentfast.warp_loss, inputs, ["z"])[1]["z"] for _ in range(3)]
    assert all(same_bits(runs[0], run) for run in runs[1:])
    exact, same = (
        gradients(reference.temporal.warp_loss, widened(inputs, wide), ["z"], None)[1]["z"]
        for wide in (torch.float64, torch.float32)
    )
    assert_gradient_close(runs[0], exact, same)


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e15])
def test_warp_gradients_of_any_size(scale: float, target: Target) -> None:
    """Scattered sums in fixed point would need a scale: small samples beside large ones keep their digits."""
    draw = Draw(device=target.device)
    inputs = {"z": draw.normal(2, 2, 3, 5, 6), "flow": draw.uniform(2, 2, 2, 5, 6, low=-1.0, high=1.0)}
    inputs["z"][1] *= scale
    spec = partial(reference.temporal.warp_loss, reduction="none")
    upstream = torch.ones(2, device=target.device)
    got = gradients(partial(latentfast.warp_loss, reduction="none"), inputs, ["z"], upstream)[1]["z"]
    exact, same = (
        gradients(spec, widened(inputs, wide), ["z"], upstream.to(wide))[1]["z"]
        for wide in (torch.float64, torch.float32)
    )
    for sample in range(2):
        assert_gradient_close(got[sample], exact[sample], same[sample])


def test_rule7_warp_of_one_frame(target: Target) -> None:
    z = Draw(device=target.device).normal(2, 3, 1, 4, 5).requires_grad_()
    loss = latentfast.warp_loss(z, z.new_empty(2, 2, 0, 4, 5))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_warp_masks_hide_anything(target: Target) -> None:
    draw = Draw(device=target.device)
    z, flow = draw.normal(1, 2, 3, 4, 5), torch.zeros(1, 2, 2, 4, 5, device=target.device)
    mask = torch.ones(1, 1, 2, 4, 5, device=target.device)
    mask[..., 0, 0] = 0  # no other position has it among its four neighbours, where it would count with weight 0
    spoilt = z.clone()
    spoilt[..., 0, 0] = math.nan
    one, other = (gradients(partial(latentfast.warp_loss, flow=flow, mask=mask), {"z": x}, ["z"]) for x in (z, spoilt))
    assert same_bits(one[0], other[0])
    assert same_bits(one[1]["z"], other[1]["z"])


def test_a_large_float16_gradient_of_a_small_clip_stays_finite(target: Target) -> None:
    z = torch.tensor([0.0, 60.0], dtype=torch.float16, device=target.device).view(1, 1, 2, 1, 1).requires_grad_()
    latentfast.temporal_loss(z).backward()
    assert z.grad.flatten().tolist() == [-120.0, 120.0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scaled_loss_keeps_the_digits_of_a_float16_gradient(target: Target, reduction: str) -> None:
    """Gradients of a mean over many elements are below float16's smallest numbers; scaling the loss, as training in
    half precision does, has to save them.
    """
    draw = Draw(torch.float16, target.device, seed=1)
    # the gradient of a mean is as small with fewer elements, if they are smaller
    b, c, t, h, w = (1, 4, 3, 32, 32) if target.interpreted else (2, 16, 5, 64, 64)
    z = 0.01 * (b * c * t * h * w) / (2 * 16 * 5 * 64 * 64) * draw.normal(b, c, t, h, w)
    flow, visible = draw.normal(b, 2, t - 1, h, w), draw.uniform(b, 1, t - 1, h, w)
    losses = {
        "temporal_loss": lambda fn, x: fn.temporal_loss(x, second=0.5, reduction=reduction),
        "warp_loss": lambda fn, x: fn.warp_loss(x, flow.to(x.dtype), visible.to(x.dtype), reduction=reduction),
    }
    for name, loss in losses.items():
        got, exact = z.clone().requires_grad_(), z.double().requires_grad_()
        (65536 * loss(latentfast, got)).sum().backward()
        (65536 * loss(reference.temporal, exact)).sum().backward()
        assert exact.grad.abs().max() < 65536 * 2**-14, "the case is too easy: float16 holds these gradients unscaled"
        error = (got.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
        assert error < 2**-10, f"{name}: {error:.1e}"  # two roundings of half a unit in the last place each
