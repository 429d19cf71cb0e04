"""Interpolation on every backend: end points, angles from parallel to opposite, zero vectors, paths, keys, the mean."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import latentfast
from latentfast import reference
from tests.helpers import DTYPES, Draw, Target, assert_matches_spec, assert_within, gradients, pair_at_angle, same_bits

MODES = ("lerp", "nlerp", "slerp")
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

sizes = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 31])
seeds = st.integers(0, 2**31 - 1)


def _pair(shape, dtype=torch.float32, target=None, seed=0):
    draw = Draw(dtype, target.device if target else "cpu", seed)
    return draw.normal(*shape), draw.normal(*shape)


# --- Rule 3: the angle ------------------------------------------------------------------------------------------------

ANGLES = [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 2e-3, 0.01, 0.1, 0.5, 1.0, math.pi / 2, 2.0, 2.8]
NEAR_PI = [0.1, 0.01, 1e-3, 1e-4, 1e-5, 3e-6]


@pytest.mark.parametrize("theta", [*ANGLES, *(math.pi - d for d in NEAR_PI)], ids=lambda x: f"{x:.9g}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rule3_every_angle(theta: float, dtype: torch.dtype, target: Target) -> None:
    a, b = pair_at_angle(theta, (2, 3, 101), dtype, target.device)
    for t in (0.3, -0.25, 1.5):
        inputs = {"a": a, "b": b}
        for mode in ("slerp", "nlerp"):
            function = getattr(latentfast, mode)(a, b, t)
            assert_matches_spec(function, partial(getattr(reference.interpolate, mode), t=t), inputs)


@pytest.mark.parametrize("theta", [*ANGLES, *(math.pi - d for d in NEAR_PI[:4])], ids=lambda x: f"{x:.9g}")
def test_rule3_every_angle_in_float64(theta: float, target: Target) -> None:
    """float64 is summed in float64 alone: sin²θ keeps an absolute error of a few eps, so near π the weights, which are
    quotients by sin θ, lose eps/sin²θ. Near 0 they hardly depend on the angle."""
    a, b = pair_at_angle(theta, (2, 3, 101), device=target.device)
    lost = max(1.0, 1 / math.sin(theta) ** 2) if theta > 1 else 1.0
    for t in (0.3, 1.5):
        exact = reference.interpolate.slerp(a, b, t)
        assert_within(latentfast.slerp(a, b, t), exact, exact, {torch.float64: 64.0 * lost})


def test_rule3_no_nan_for_equal_vectors(target: Target) -> None:
    """The dot product of a float32 vector with itself comes out above 1 for some of these, and acos of that is NaN."""
    a = Draw(device=target.device).normal(32, 999 if target.interpreted else 9999)
    out = latentfast.slerp(a, a.clone(), 0.3)
    assert_within(out, a.double(), a)


@pytest.mark.parametrize("theta", [0.5e-3, 1e-3, 2e-3, 0.0316])
def test_rule3_no_jump_where_the_formula_changes(theta: float, target: Target) -> None:
    """Over a step of 1% in the angle, the result moves as far as the exact result does."""
    results, exact = [], []
    for angle in (0.995 * theta, 1.005 * theta):
        a, b = pair_at_angle(angle, (1, 64), torch.float32, target.device)
        results.append(latentfast.slerp(a, b, 0.37).double())
        exact.append(reference.interpolate.slerp(a.double(), b.double(), 0.37))
    moved, expected = results[1] - results[0], exact[1] - exact[0]
    assert (moved - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * 3  # |a| = 3; rounding twice


def test_rule3_each_vector_has_its_own_angle(target: Target) -> None:
    near, far = pair_at_angle(1e-4, (1, 50), torch.float32), pair_at_angle(2.9, (1, 50), torch.float32)
    a, b = (torch.cat(pair).to(target.device) for pair in zip(near, far, strict=True))
    both = latentfast.slerp(a, b, 0.4)
    for i in range(2):
        assert same_bits(both[i : i + 1], latentfast.slerp(a[i : i + 1], b[i : i + 1], 0.4))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("mode", ["nlerp", "slerp"])
def test_rule3_no_overflow_of_squares(mode: str, scale: float, target: Target, request) -> None:
    """|a|² leaves the range of float32 at 1e±30; the results do not, and do not depend on the scale."""
    if target.backend == "eager" and scale == 1e30:
        request.applymarker(pytest.mark.xfail(strict=True, reason="the eager backend squares float32 in float32"))
    a, b = _pair((2, 64), target=target)
    got = getattr(latentfast, mode)(a * scale, b * scale, 0.3).double() / scale
    assert_within(got.float(), getattr(reference.interpolate, mode)(a.double(), b.double(), 0.3), got * (1 + 2e-7))


# --- Rule 4: end points, extrapolation, length ------------------------------------------------------------------------


@every_mode
@every_dtype
def test_rule4_end_points_keep_bits(mode: str, dtype: torch.dtype, target: Target) -> None:
    a, b = _pair((3, 5, 7), dtype, target)
    b[1] = math.nan  # even then: what is not asked for cannot spread
    a[2] = math.inf
    function = getattr(latentfast, mode)
    for t, end in ((0.0, a), (1.0, b), (0, a), (1, b)):
        assert same_bits(function(a, b, t), end)
        assert same_bits(function(a, b, torch.tensor(float(t), device=target.device)), end)
    ends = torch.tensor([0.0, 1.0, 0.0], device=target.device).view(3, 1, 1)
    assert same_bits(function(a, b, ends), torch.where(ends == 0, a, b))
    path = getattr(latentfast, f"{mode}_path")(a, b, [1.0, 0.5, 0.0])
    assert same_bits(path[0], b)
    assert same_bits(path[2], a)


@every_mode
def test_rule4_end_points_keep_bits_of_opposite_and_zero_vectors(mode: str, target: Target) -> None:
    a = Draw(device=target.device).normal(2, 6)
    for b in (-a, torch.zeros_like(a)):
        path = getattr(latentfast, f"{mode}_path")(a, b, [0.0, 1.0])
        assert same_bits(path[0], a)
        assert same_bits(path[1], b)


@given(seed=seeds, size=sizes, t=st.floats(-2.0, 3.0))
def test_rule4_outside_0_1_the_great_circle_goes_on(target: Target, seed: int, size: int, t: float) -> None:
    """In the plane of two orthonormal vectors u, v at angle θ: slerp(u, cos θ u + sin θ v, t) = cos tθ u + sin tθ v."""
    theta = 0.3 + seed % 1000 / 1000 * 2.5
    a, b = pair_at_angle(theta, (2, size + 1), device=target.device, seed=seed)
    a, b = a / 3, b / 2
    v = (b - math.cos(theta) * a) / math.sin(theta)
    expected = math.cos(t * theta) * a + math.sin(t * theta) * v
    if t not in (0, 1):
        assert (latentfast.slerp(a, b, t) - expected).abs().max() <= 1e-13 / math.sin(theta) ** 2


@given(seed=seeds, size=sizes, t=st.floats(0.0, 1.0))
def test_rule4_length_of_equal_lengths_is_kept(target: Target, seed: int, size: int, t: float) -> None:
    a, b = pair_at_angle(0.01 + seed % 1000 / 1000 * 3.0, (2, size + 1), device=target.device, seed=seed)
    a, b = a / 3, b / 2
    assert (latentfast.slerp(a, b, t).norm(dim=1) - 1).abs().max() <= 1e-11


@given(seed=seeds, size=sizes, t=st.floats(0.0, 1.0), ratio=st.floats(0.01, 100.0))
def test_rule4_length_runs_between(target: Target, seed: int, size: int, t: float, ratio: float) -> None:
    """Up to a right angle. Beyond it the weights, which act on the raw vectors, lead outside for unequal lengths."""
    a, b = pair_at_angle(seed % 1000 / 1000 * math.pi / 2, (2, size + 1), device=target.device, seed=seed)
    b = b * ratio
    low, high = torch.minimum(a.norm(dim=1), b.norm(dim=1)), torch.maximum(a.norm(dim=1), b.norm(dim=1))
    length = latentfast.slerp(a, b, t).norm(dim=1)
    assert (length >= low * (1 - 1e-12)).all()
    assert (length <= high * (1 + 1e-12)).all()


@given(seed=seeds, size=sizes, t=st.floats(0.0, 1.0))
def test_rule4_nlerp_length_is_the_mean_length(target: Target, seed: int, size: int, t: float) -> None:
    a, b = _pair((2, size), torch.float64, target, seed)
    out = latentfast.nlerp(a, b, t)
    expected = (1 - t) * a.norm(dim=1) + t * b.norm(dim=1)
    cancelled = ((1 - t) * a + t * b).norm(dim=1) / expected  # a short lerp is stretched, with the errors in it
    if size > 1:
        assert ((out.norm(dim=1) - expected).abs() <= 1e-14 * expected / cancelled.square().clamp_min(1e-6)).all()


@every_mode
@given(seed=seeds, size=sizes, t=st.floats(0.0, 1.0))
def test_symmetry(mode: str, target: Target, seed: int, size: int, t: float) -> None:
    a, b = pair_at_angle(seed % 997 / 997 * 3.0, (2, size + 1), device=target.device, seed=seed)
    function = getattr(latentfast, mode)
    # 1 − t is rounded, by 1e-16 at most, and slerp moves at most π·|a| per unit of t; sin θ ≥ 0.14 here
    assert (function(a, b, t) - function(b, a, 1 - t)).abs().max() <= 2e-13


# --- Rule 5: zero and opposite vectors --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nlerp", "slerp"])
@every_dtype
def test_rule5_zero_vectors(mode: str, dtype: torch.dtype, target: Target) -> None:
    a, b = _pair((4, 5, 3), dtype, target)
    a[0] = 0
    b[1] = 0
    a[2] = b[2] = 0
    inputs = {"a": a, "b": b}
    for t in (0.25, -0.5, 1.5):
        out = getattr(latentfast, mode)(a, b, t)
        assert_matches_spec(out, partial(getattr(reference.interpolate, mode), t=t), inputs)
        if mode == "slerp":
            assert same_bits(out[:3], latentfast.lerp(a, b, t)[:3])
        assert torch.equal(out[2], torch.zeros_like(out[2]))
    for leaf in gradients(partial(getattr(latentfast, mode), t=0.25), inputs, ("a", "b"))[1].values():
        assert torch.isfinite(leaf).all()


OPPOSITE_VECTORS = {
    "even": [0.5, -1.25, 2.0, 0.75, -3.0, 1.5],
    "odd": [0.5, -1.25, 2.0, 0.75, -3.0],
    "one element": [1.5],
    "two elements": [1.5, -0.25],
    "odd, only the last not zero": [0.0, 0.0, 0.0, 0.0, 2.0],
    "odd, last zero": [0.5, -1.25, 0.0],
    "even, only the last not zero": [0.0, 0.0, 0.0, -2.0],
    "long": [0.25 * (i % 9 - 4) + 0.125 for i in range(1031)],
}


@pytest.mark.parametrize("scale", [-1.0, -1.5, -0.5])
@pytest.mark.parametrize("which", OPPOSITE_VECTORS)
@every_dtype
def test_rule5_opposite_vectors(which: str, scale: float, dtype: torch.dtype, target: Target) -> None:
    """All numbers are short binary fractions: b is exactly opposite to a in every dtype."""
    a = torch.tensor([OPPOSITE_VECTORS[which]] * 2, dtype=dtype, device=target.device)
    a[1] *= 2
    b = a * scale
    assert torch.equal(b.double(), a.double() * scale)
    for t in (0.25, 0.5, 0.75, -0.25, 1.25):
        inputs = {"a": a, "b": b}
        out = latentfast.slerp(a, b, t)
        assert_matches_spec(out, partial(reference.interpolate.slerp, t=t), inputs)
        if which != "one element":
            length = ((1 - t) + t * abs(scale)) * a.double().norm(dim=1)
            # every element rounded, and in float64 the sum of 1031 squares that checks it
            rounding = (16 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps
            assert ((out.double().norm(dim=1) - length).abs() <= rounding * length.abs()).all()


@pytest.mark.parametrize("which", OPPOSITE_VECTORS)
@pytest.mark.parametrize("mode", ["nlerp", "slerp"])
def test_rule5_opposite_vectors_have_finite_gradients(mode: str, which: str, target: Target) -> None:
    a = torch.tensor([OPPOSITE_VECTORS[which]], device=target.device)
    inputs = {"a": a, "b": -a, "t": torch.tensor(0.5, device=target.device)}
    for name, grad in gradients(getattr(latentfast, mode), inputs, ("a", "b", "t"))[1].items():
        assert torch.isfinite(grad).all(), name


def test_rule5_opposite_vectors_half_way_of_nlerp(target: Target) -> None:
    a = torch.tensor([[0.5, -1.25, 2.0, 0.75, -3.0, 1.5]], device=target.device)
    out = latentfast.nlerp(a, -a, 0.5)
    assert_matches_spec(out, partial(reference.interpolate.nlerp, t=0.5), {"a": a, "b": -a})
    assert abs(float(out.norm() / a.norm()) - 1) < 1e-6
    assert abs(float((out * a).sum())) < 1e-6


@pytest.mark.parametrize("dim", [1, (0, 2), (1, 3), 3, (2, 3)])
def test_rule5_opposite_vectors_along_other_dimensions(dim, target: Target) -> None:
    """The pairs that are turned are those of the vector's elements, wherever they lie in memory."""
    a = Draw(device=target.device).grid(2, 4, 3, 5) + 0.0625
    inputs = {"a": a, "b": -a}
    spec = partial(reference.interpolate.slerp, t=0.3, dim=dim)
    assert_matches_spec(latentfast.slerp(a, -a, 0.3, dim=dim), spec, inputs)


# --- Rule 6: NaN and Inf in a vector ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_rule6_non_finite_values_stay_in_their_vector(mode: str, value: float, target: Target) -> None:
    a, b = _pair((2, 3, 4, 5), target=target)
    function = partial(getattr(latentfast, mode), t=0.3, dim=1)
    clean = function(a, b)
    a[1, 2, 3, 4] = value
    out = function(a, b)
    assert not torch.isfinite(out[1, 2, 3, 4])
    clean[1, :, 3, 4] = out[1, :, 3, 4] = 0
    assert same_bits(out, clean)


# --- Shapes, dim and t ------------------------------------------------------------------------------------------------

VIDEO_DIMS = (None, 1, (1, 3, 4), (0, 2), 4, -1, 0, (2, 4), (1, 2, 3, 4), (0, 1, 2, 3, 4), (4, 3))
SHAPES_AND_DIMS = [
    *(((2, 3, 4, 5, 6), dim) for dim in VIDEO_DIMS),
    *(((2, 3, 5, 7), dim) for dim in (None, 1)),
    *(((3, 17), dim) for dim in (None, 0, (0, 1))),
    ((17,), None),
    ((1,), 0),
]


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS, ids=str)
@pytest.mark.parametrize("kind", ["float", "scalar tensor", "a value a vector"])
@pytest.mark.parametrize("mode", MODES)
def test_dims_and_kinds_of_t(mode: str, kind: str, shape: tuple, dim, target: Target) -> None:
    draw = Draw(device=target.device)
    inputs = {"a": draw.normal(*shape), "b": draw.normal(*shape)}
    spec = partial(getattr(reference.interpolate, mode), dim=dim)
    function = partial(getattr(latentfast, mode), dim=dim)
    if kind == "float":
        spec, function = partial(spec, t=-0.3), partial(function, t=-0.3)
    else:
        dims = range(len(shape)) if dim is None else [d % len(shape) for d in ((dim,) if isinstance(dim, int) else dim)]
        kept = [1 if d in dims and (dim is not None or d > 0 or len(shape) == 1) else n for d, n in enumerate(shape)]
        inputs["t"] = draw.uniform(*(kept if kind == "a value a vector" else ()), low=-0.2, high=1.2)
    assert_matches_spec(function(**inputs), spec, inputs)


@pytest.mark.parametrize("t_shape", [(5, 1), (4, 1, 1), (2, 1, 4, 1, 1), (1, 1, 1, 5, 1), (1,)], ids=str)
def test_t_broadcasts_by_the_usual_rules(t_shape: tuple, target: Target) -> None:
    draw = Draw(device=target.device)
    inputs = {"a": draw.normal(2, 3, 4, 5, 6), "b": draw.normal(2, 3, 4, 5, 6), "t": draw.uniform(*t_shape)}
    assert_matches_spec(
        latentfast.slerp(**inputs, dim=(1, 4)), partial(reference.interpolate.slerp, dim=(1, 4)), inputs
    )


def test_zero_dimensional_latents(target: Target) -> None:
    a, b = torch.tensor(2.0, device=target.device), torch.tensor(4.0, device=target.device)
    assert latentfast.slerp(a, b, 0.5).shape == ()
    assert latentfast.lerp(a, b, 0.5).item() == 3.0


# --- Paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 1, (1, 3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_path_has_the_bits_of_its_points(mode: str, dtype: torch.dtype, dim, target: Target) -> None:
    a, b = _pair((2, 3, 5, 7), dtype, target)
    ts = [0.0, 1.0, 0.5, 0.3, -0.4, 1.7, 0.3, 0.999, 1e-6]
    path, single = getattr(latentfast, f"{mode}_path"), getattr(latentfast, mode)
    whole = path(a, b, ts, dim=dim)
    assert whole.shape == (len(ts), *a.shape)
    for k, t in enumerate(ts):
        assert same_bits(whole[k], single(a, b, t, dim=dim)), t
    values = torch.tensor(ts, device=target.device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    from_tensor = path(a, b, values, dim=dim)
    for k in range(len(ts)):
        assert same_bits(from_tensor[k], single(a, b, values[k], dim=dim))


@pytest.mark.parametrize("mode", MODES)
def test_rule7_a_path_of_no_values(mode: str, target: Target) -> None:
    a, b = _pair((2, 3), target=target)
    path = getattr(latentfast, f"{mode}_path")
    for ts in ([], torch.empty(0, device=target.device)):
        assert path(a, b, ts).shape == (0, 2, 3)
    leaf = a.clone().requires_grad_()
    path(leaf, b, []).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(a))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_derivative_in_t_at_an_end_point_is_the_smooth_one(mode: str, t: float, target: Target) -> None:
    """The value there is a copy of an end point; its derivative is the limit from inside."""
    a, b = _pair((2, 9), torch.float64, target)
    at, beside = (
        gradients(
            getattr(latentfast, mode), {"a": a, "b": b, "t": torch.full((), s, dtype=a.dtype, device=a.device)}, ["t"]
        )
        for s in (t, abs(t - 1e-7))
    )
    # the second derivative is of the order θ²·|a|, the step 1e-7
    assert abs(float(at[1]["t"] - beside[1]["t"])) < 1e-4
    assert abs(float(at[1]["t"])) > 1e-2


# --- Keys -------------------------------------------------------------------------------------------------------------

KEY_MODES = (*MODES, "catmull_rom")


@pytest.mark.parametrize("mode", KEY_MODES)
@every_dtype
def test_rule4_keys_keep_bits(mode: str, dtype: torch.dtype, target: Target) -> None:
    keys = Draw(dtype, target.device).normal(4, 2, 3, 5)
    keys[1, 0, 0, 0] = math.nan  # a key that is not asked for cannot spread
    ts = [3.0, 0.0, 2, 2.0]
    out = latentfast.interpolate_keys(keys, ts, mode=mode)
    assert out.is_contiguous()
    assert all(same_bits(out[k], keys[int(t)]) for k, t in enumerate(ts))


@pytest.mark.parametrize("mode", KEY_MODES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_keys_in_any_order(mode: str, n: int, target: Target) -> None:
    keys = Draw(device=target.device).normal(n, 2, 3, 5)
    ts = [t * (n - 1) for t in (0.9, 0.1, 0.5, 0.1, 1.0, 0.0, 0.55)]
    spec = partial(reference.interpolate.interpolate_keys, ts=ts, mode=mode)
    assert_matches_spec(latentfast.interpolate_keys(keys, ts, mode=mode), spec, {"keys": keys})
    shuffled = latentfast.interpolate_keys(keys, list(reversed(ts)), mode=mode)
    assert same_bits(shuffled.flip(0), latentfast.interpolate_keys(keys, ts, mode=mode))


@pytest.mark.parametrize("mode", KEY_MODES)
def test_keys_along_dim(mode: str, target: Target) -> None:
    keys = Draw(device=target.device).normal(3, 2, 4, 5, 3)
    options = {"ts": [0.4, 1.75, 1.0], "mode": mode, "dim": 1}
    spec = partial(reference.interpolate.interpolate_keys, **options)
    assert_matches_spec(latentfast.interpolate_keys(keys, **options), spec, {"keys": keys})


def test_rule7_no_positions_between_keys(target: Target) -> None:
    keys = Draw(device=target.device).normal(3, 2, 4)
    for mode in KEY_MODES:
        assert latentfast.interpolate_keys(keys, [], mode=mode).shape == (0, 2, 4)


# --- The mean on the sphere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.0, 1e-6, 1e-3, 0.5, 1.5, 2.5, 3.0])
def test_the_mean_of_two_is_slerp(theta: float, target: Target) -> None:
    a, b = pair_at_angle(theta, (2, 40), device=target.device)
    b = b * 1.5  # of one length: slerp's weights act on the raw vectors, the mean's on directions
    for t in (0.1, 0.5, 0.8):
        mean = latentfast.spherical_mean(torch.stack((a, b)), [1 - t, t])
        # sums of squares in float64 know the angle's sine to eps/sin θ
        assert (mean - latentfast.slerp(a, b, t)).abs().max() <= 1e-14 / max(math.sin(theta), 0.1) ** 2


def test_the_mean_does_not_depend_on_the_order(target: Target) -> None:
    x = Draw(torch.float64, target.device).normal(4, 2, 30)
    order = [2, 0, 3, 1]
    weights = [0.4, 0.3, 0.2, 0.1]
    one = latentfast.spherical_mean(x, weights)
    other = latentfast.spherical_mean(x[order], [weights[i] for i in order])
    assert (one - other).abs().max() <= 1e-13
    assert (one - latentfast.spherical_mean(x, [7 * w for w in weights])).abs().max() <= 1e-13


@pytest.mark.parametrize("dim", [None, 1, (1, 3), (0, 2), 4], ids=str)
def test_the_mean_along_dim(dim, target: Target) -> None:
    draw = Draw(device=target.device)
    x = draw.normal(1, 2, 3, 2, 4, 5) + 0.3 * draw.normal(3, 2, 3, 2, 4, 5)
    spec = partial(reference.interpolate.spherical_mean, weights=[0.2, 0.5, 0.3], dim=dim)
    assert_matches_spec(latentfast.spherical_mean(x, [0.2, 0.5, 0.3], dim=dim), spec, {"latents": x})


def test_the_mean_of_one_and_of_equals(target: Target) -> None:
    x = Draw(device=target.device).normal(1, 2, 30)
    for latents in (x, x.expand(3, 2, 30)):
        assert_within(latentfast.spherical_mean(latents, [1.0] * len(latents)), x[0].double(), x[0] * (1 + 2e-7))


@pytest.mark.parametrize("shape", [(1, 6), (1, 5), (4, 1)], ids=str)
def test_rule5_the_mean_of_opposite_and_zero_vectors(shape: tuple, target: Target) -> None:
    a = Draw(torch.float64, target.device).normal(*shape)
    for others in ((-a,), (-2 * a,), (torch.zeros_like(a),), (-a, torch.zeros_like(a)), (a, -a)):
        x = torch.stack((a, *others)).requires_grad_()
        mean = latentfast.spherical_mean(x, [1.0] * len(x))
        length = x.detach().norm(dim=2).mean(0)
        assert (mean.detach().norm(dim=1) - length).abs().max() <= 1e-9, others
        mean.sum().backward()
        assert torch.isfinite(x.grad).all()
    nothing = latentfast.spherical_mean(torch.zeros(2, *shape, device=target.device), [1.0, 1.0])
    assert torch.equal(nothing, torch.zeros(shape, device=target.device))


def test_the_mean_can_be_differentiated_twice(target: Target) -> None:
    draw = Draw(torch.float64, target.device)
    x = (draw.normal(1, 2, 4) + 0.4 * draw.normal(3, 2, 4)).requires_grad_()
    w = draw.uniform(3, low=0.2).requires_grad_()
    assert torch.autograd.gradgradcheck(latentfast.spherical_mean, (x, w), fast_mode=True)
