"""The specification's own properties, in float64: against closed forms, loops written out, and finite differences."""

import math

import pytest
import torch

from latentfast.reference import _common, edit, interpolate, temporal
from tests.helpers import Draw, pair_at_angle
from tests.operations import OPERATIONS, Operation

draw_shape = (2, 3, 4, 5)


def _draw(seed: int = 0) -> Draw:
    return Draw(torch.float64, seed=seed)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.differentiable], ids=str)
def test_gradients_of_the_reference(operation: Operation) -> None:
    inputs = operation.inputs(_draw(3), (2, 2, 3, 2, 3))
    leaves = [inputs[name].requires_grad_() for name in operation.differentiable]

    def function(*values):
        return operation.gradient_spec(**{**inputs, **dict(zip(operation.differentiable, values, strict=True))})

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_the_reference_imports_and_returns_plain_results(operation: Operation) -> None:
    """Contiguous or not, but new, and of the inputs' dtype (a loss, a preview, a heat map: float32 at least)."""
    inputs = operation.inputs(Draw(torch.bfloat16), (2, 3, 4, 5, 6))
    out = operation.spec(**inputs)
    assert out.dtype == (torch.float32 if operation.widens else torch.bfloat16)
    assert all(out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in inputs.values())


# --- interpolate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e-7, 1e-5, 9.99e-4, 1.001e-3, 0.3, 1.5, 3.0, math.pi - 1e-3, math.pi - 1e-5])
@pytest.mark.parametrize("t", [-0.7, 0.2, 0.5, 1.3])
def test_slerp_in_its_plane(theta: float, t: float) -> None:
    """slerp(u, cos θ u + sin θ v, t) = cos tθ u + sin tθ v for orthonormal u, v."""
    u, v = torch.zeros(2, 1, 6, dtype=torch.float64)
    u[0, 0] = v[0, 1] = 1
    got = interpolate.slerp(u, math.cos(theta) * u + math.sin(theta) * v, t)
    expected = math.cos(t * theta) * u + math.sin(t * theta) * v
    assert (got - expected).abs().max() <= 8e-16 / min(1.0, math.pi - theta) ** 1  # the input's own rounding over sin θ


def test_slerp_runs_at_even_speed() -> None:
    a, b = pair_at_angle(2.0, (1, 20))
    points = interpolate.slerp_path(a / 3, b / 2, [i / 8 for i in range(9)])
    steps = torch.acos((points[1:] * points[:-1]).sum(-1))
    assert (steps - 0.25).abs().max() < 1e-14


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_the_quarter_turn_is_orthogonal_and_keeps_length(n: int) -> None:
    x = _draw().normal(5, n)
    turned = interpolate.quarter_turn(x, (1,))
    assert (turned * x).sum(1).abs().max() < 1e-14
    assert (turned.norm(dim=1) - x.norm(dim=1)).abs().max() < 1e-14


def test_the_quarter_turn_pairs_the_vectors_elements_in_their_order() -> None:
    x = torch.arange(1.0, 9.0).view(2, 2, 2)
    assert interpolate.quarter_turn(x, (1, 2)).flatten(1).tolist() == [[-2, 1, -4, 3], [-6, 5, -8, 7]]
    assert interpolate.quarter_turn(x, (0, 2))[:, 0].flatten().tolist() == [-2, 1, -6, 5]
    last = torch.tensor([[0.0, 0.0, 2.0]])
    assert interpolate.quarter_turn(last, (1,)).tolist() == [[2, 0, 0]]


def test_slerp_of_opposite_vectors_turns_by_half_a_circle() -> None:
    a = _draw().normal(1, 6)
    half = interpolate.slerp(a, -2 * a, 0.5)
    assert (half - 1.5 * interpolate.quarter_turn(a, (1,))).abs().max() < 1e-15
    for t in (0.1, 0.4, 0.9):
        out = interpolate.slerp(a, -2 * a, t)
        assert float((out * a).sum() / (out.norm() * a.norm())) == pytest.approx(math.cos(math.pi * t), abs=1e-14)


def test_nlerp_is_a_stretched_lerp() -> None:
    a, b = _draw().normal(2, 3, 7)
    out, straight = interpolate.nlerp(a, b, 0.3), interpolate.lerp(a, b, 0.3)
    assert (out / straight - (out / straight)[:, :1]).abs().max() < 1e-13
    assert (out.norm(dim=1) - (0.7 * a.norm(dim=1) + 0.3 * b.norm(dim=1))).abs().max() < 1e-14


def test_vector_dims_and_kept_shape() -> None:
    assert _common.vector_dims(5, None) == (1, 2, 3, 4)
    assert _common.vector_dims(1, None) == (0,)
    assert _common.vector_dims(5, (-1, 1)) == (1, 4)
    assert _common.kept_shape((2, 3, 4), (1,)) == (2, 1, 4)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_catmull_rom_weights(n: int) -> None:
    for t in (x / 7 * (n - 1) for x in range(8)):
        weights = interpolate.catmull_rom_weights(t, n)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-15)
        assert all(0 <= k < n for k in weights)
        if 1 <= t <= n - 2:  # away from the doubled end keys it reproduces straight lines and parabolas
            assert sum(w * k for k, w in weights.items()) == pytest.approx(t, abs=1e-13)
            assert sum(w * k * k for k, w in weights.items()) == pytest.approx(t * t, abs=1e-12)
    for k in range(n):
        assert interpolate.catmull_rom_weights(float(k), n) == {k: 1.0}


def test_the_catmull_rom_curve_is_smooth_at_its_keys() -> None:
    keys = _draw().normal(4, 1, 5)
    h = 1e-6
    before, at, after = interpolate.interpolate_keys(keys, [2 - h, 2.0, 2 + h], mode="catmull_rom")
    assert ((after - at) / h - (at - before) / h).abs().max() < 1e-4  # second derivative times h
    assert ((after - before) / (2 * h) - (keys[3] - keys[1]) / 2).abs().max() < 1e-4


def test_the_spherical_mean_minimises_the_squared_angles() -> None:
    draw = _draw()
    x = draw.normal(1, 1, 6) + 0.7 * draw.normal(4, 1, 6)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    mean = interpolate.spherical_mean(x, weights)
    assert float(mean.norm() - (weights * x.norm(dim=2)[:, 0]).sum()) == pytest.approx(0, abs=1e-14)

    def cost(point: torch.Tensor) -> float:
        unit, units = point / point.norm(), x[:, 0] / x[:, 0].norm(dim=1, keepdim=True)
        return float((weights * torch.acos((units * unit).sum(1)) ** 2).sum())

    for i in range(20):
        aside = draw.normal(1, 6)
        for step in (1e-1, 1e-3):
            assert cost(mean + step * aside) > cost(mean), i


def test_the_spherical_mean_lies_amid_an_orthonormal_frame() -> None:
    mean = interpolate.spherical_mean(torch.eye(4, dtype=torch.float64).unsqueeze(1), [1.0] * 4)
    assert (mean - 0.5).abs().max() < 1e-15


# --- edit -------------------------------------------------------------------------------------------------------------


def test_edit_is_the_sum_that_it_says() -> None:
    draw = _draw()
    z, d, s, m = draw.normal(2, 3, 4), draw.normal(5, 2, 3, 4), draw.normal(5, 2), draw.mask(5, 2, 1, 4)
    expected = z + torch.einsum("nb,nbct,nbt->bct", s, d, m[:, :, 0])
    assert (edit.edit(z, d, s, m) - expected).abs().max() < 1e-14


def test_blend_is_the_formula_between_and_a_choice_at_the_ends() -> None:
    base, edited = torch.tensor([1.0, 1.0, math.nan]), torch.tensor([math.inf, 3.0, 5.0])
    assert edit.blend(base, edited, torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 1.5, 5.0]


# --- temporal ---------------------------------------------------------------------------------------------------------


def _penalty(d: float, norm: str, eps: float) -> float:
    return {"l2": d * d, "l1": abs(d), "charbonnier": math.sqrt(d * d + eps * eps) - eps}[norm]


@pytest.mark.parametrize("norm", ["l2", "l1", "charbonnier"])
def test_temporal_loss_written_out(norm: str) -> None:
    draw = _draw()
    z, ref, mask = draw.normal(2, 2, 4, 2, 3), draw.normal(2, 2, 4, 2, 3), draw.mask(2, 1, 4, 2, 3)
    got = temporal.temporal_loss(z, ref, mask, first=0.7, second=0.2, norm=norm, eps=0.1, reduction="none")
    for b in range(2):
        sums = {1: [0.0, 0.0], 2: [0.0, 0.0]}
        for c in range(2):
            for y in range(2):
                for x in range(3):
                    u = [float(z[b, c, t, y, x] - ref[b, c, t, y, x]) for t in range(4)]
                    m = [float(mask[b, 0, t, y, x]) for t in range(4)]
                    for t in range(3):
                        sums[1][0] += m[t] * m[t + 1] * _penalty(u[t + 1] - u[t], norm, 0.1)
                        sums[1][1] += m[t] * m[t + 1]
                    for t in range(2):
                        w = m[t] * m[t + 1] * m[t + 2]
                        sums[2][0] += w * _penalty(u[t + 2] - 2 * u[t + 1] + u[t], norm, 0.1)
                        sums[2][1] += w
        expected = 0.7 * sums[1][0] / sums[1][1] + 0.2 * sums[2][0] / sums[2][1]
        assert float(got[b]) == pytest.approx(expected, rel=1e-13)


def test_warp_by_whole_pixels_is_a_shift() -> None:
    frames = _draw().normal(1, 2, 5, 6)
    flow = torch.zeros(1, 2, 5, 6, dtype=torch.float64)
    flow[:, 0], flow[:, 1] = 2, -1
    warped, inside = temporal.warp(frames, flow)
    assert torch.equal(warped[..., 1:, :4], frames[..., :4, 2:])
    assert inside[0, 1:, :4].all()
    assert not inside[0, 0].any()
    assert not inside[0, :, 4:].any()


def test_warp_of_a_bilinear_ramp_is_exact() -> None:
    ys, xs = torch.arange(5.0, dtype=torch.float64).view(5, 1), torch.arange(6.0, dtype=torch.float64)
    frames = (2 * xs - 3 * ys + xs * ys).view(1, 1, 5, 6)
    flow = _draw().uniform(1, 2, 5, 6, low=-1.5, high=1.5)
    warped, inside = temporal.warp(frames, flow)
    px, py = xs + flow[0, 0], ys + flow[0, 1]
    # x·y is linear in each of x and y, so that bilinear sampling reproduces it
    assert ((warped[0, 0] - (2 * px - 3 * py + px * py)).abs()[inside[0]]).max() < 1e-13
    assert torch.equal(inside[0], (px >= 0) & (px <= 5) & (py >= 0) & (py <= 4))


def test_warp_against_grid_sample() -> None:
    frames, flow = _draw().normal(2, 3, 7, 9), _draw(1).uniform(2, 2, 7, 9, low=-2, high=2)
    warped, inside = temporal.warp(frames, flow)
    ys, xs = torch.arange(7.0, dtype=torch.float64).view(7, 1), torch.arange(9.0, dtype=torch.float64)
    grid = torch.stack((2 * (xs + flow[:, 0]) / 8 - 1, 2 * (ys + flow[:, 1]) / 6 - 1), -1)
    expected = torch.nn.functional.grid_sample(frames, grid, align_corners=True)
    where = inside.unsqueeze(1).expand(frames.shape)
    assert (warped - expected)[where].abs().max() < 1e-13


def test_warp_loss_written_out() -> None:
    draw = _draw()
    z, flow = draw.normal(1, 2, 3, 4, 5), draw.uniform(1, 2, 2, 4, 5, low=-1.2, high=1.2)
    mask = draw.mask(1, 1, 2, 4, 5)
    value = weight = 0.0
    for t in range(2):
        warped, inside = temporal.warp(z[:, :, t + 1], flow[:, :, t])
        w = mask[:, :, t] * inside.unsqueeze(1)
        value += float((w * (warped - z[:, :, t]) ** 2).sum())
        weight += 2 * float(w.sum())
    assert float(temporal.warp_loss(z, flow, mask)) == pytest.approx(value / weight, rel=1e-13)
    assert float(temporal.warp_loss(z.movedim(2, 1), flow, mask.movedim(2, 1), frame_dim=1)) == pytest.approx(
        value / weight, rel=1e-13
    )
