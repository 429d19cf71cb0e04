"""Linear combinations on every backend: any number of tensors and results, of any dtypes."""

import math

import pytest
import torch
from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import (
    DTYPES,
    Draw,
    Target,
    assert_matches_spec,
)

spec = reference.guidance
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("count", range(1, 9))
@every_dtype
def test_combine(count: int, dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    tensors = [draw.normal(2, 3, 5, 7) for _ in range(count)]
    numbers = [(-0.8) ** i * 1.7 for i in range(count)]
    inputs = {str(i): x for i, x in enumerate(tensors)}

    def exact(**inputs: Tensor) -> Tensor:
        return spec.combine(list(inputs.values()), numbers)

    assert_matches_spec(latentfast.combine(tensors, numbers), exact, inputs)
    assert_matches_spec(latentfast.combine(tuple(tensors), tuple(numbers)), exact, inputs)


MIXED = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32, torch.float16), None])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 8)])
def test_combine_mixes_dtypes(shape: tuple[int, ...], dtypes: tuple | None, target: Target) -> None:
    """Each result is what the tensors, widened, give, rounded once to its dtype."""
    tensors = [Draw(dtype, target.device, seed=i).normal(*shape) for i, dtype in enumerate(MIXED)]
    rows = [[(-0.8) ** i * (k + 1.7) for i in range(len(MIXED))] for k in range(len(dtypes or "12"))]
    results = latentfast.combine(tensors, rows, dtypes=dtypes)
    assert isinstance(results, tuple)
    wide = [x.to(torch.float32) for x in tensors]
    for result, row, dtype in zip(results, rows, dtypes or [torch.float32] * 2, strict=True):
        assert result.dtype == dtype
        assert torch.equal(result, latentfast.combine(wide, row).to(dtype))
        exact = spec.combine([x.double() for x in tensors], row)
        # 5 terms in float32, and one rounding to the result's dtype
        scale = sum(abs(c) * x.double().abs() for c, x in zip(row, tensors, strict=True))
        bound = 5 * torch.finfo(torch.float32).eps * scale + 0.5 * torch.finfo(dtype).eps * exact.abs()
        assert bool(((result.double() - exact).abs() <= bound).all())


def test_combine_in_float64_if_anything_is(target: Target) -> None:
    x = Draw(device=target.device).normal(3, 5)
    y = Draw(torch.float64, target.device, seed=1).normal(3, 5)
    one, other = latentfast.combine([x, y], [[1.0, 1e-9], [0.1, 1.0]], dtypes=[torch.float64, torch.float32])
    assert torch.equal(one, x.double() + 1e-9 * y) or (one - (x.double() + 1e-9 * y)).abs().max() < 1e-15
    assert one.dtype == torch.float64 and other.dtype == torch.float32
    assert (one - x.double()).abs().max() > 0


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precise_sums_are_rounded_once(dtype: torch.dtype, shape: tuple[int, ...], target: Target) -> None:
    """Also where the terms cancel."""
    x, y = (Draw(dtype, target.device, seed=i).normal(*shape) for i in range(2))
    z = (x.double() - 0.001 * y.double()).to(dtype)
    rows = [[1000.0 / 3, -1000.0 / 3, 0.7], [0.1, 0.2, 0.3]]
    results = latentfast.combine([x, z, y], rows, dtypes=[torch.float32, dtype], precise=True)
    exact = spec.combine([x.double(), z.double(), y.double()], rows, [torch.float64] * 2)
    for row, result, truth in zip(rows, results, exact, strict=True):
        # products contracted with sums round less often than the specification, which shows where a sum is a tie
        slack = 1e-15 * sum(abs(w) * t.double().abs() for w, t in zip(row, (x, z, y), strict=True))
        lowest, highest = ((truth + s).float().to(result.dtype) for s in (-slack, slack))
        assert (lowest <= result).all() and (result <= highest).all()
    for row, result in zip(rows, results, strict=True):
        assert torch.equal(latentfast.combine([x, z, y], row, dtypes=result.dtype, precise=True), result)


def test_rows_of_combine_are_single_calls(target: Target) -> None:
    """Bit for bit, also on the way through autograd, with the sum of the rows' gradients."""
    tensors = [Draw(device=target.device, seed=i).normal(2, 3, 8) for i in range(3)]
    rows = [[0.5, -1.0, 2.0], [1.0, 0.0, 0.25], [0.0, 0.0, 1.0], [3.0, 1.0, -1.0]]
    single = [latentfast.combine(tensors, row) for row in rows]
    assert all(map(torch.equal, latentfast.combine(tensors, rows), single))
    outs = [torch.empty_like(x) for x in single]
    assert all(x is y for x, y in zip(latentfast.combine(tensors, rows, out=outs), outs, strict=True))
    assert all(map(torch.equal, outs, single))
    leaves = [x.clone().requires_grad_() for x in tensors]
    results = latentfast.combine(leaves, rows)
    assert all(map(torch.equal, results, single))
    sum((k + 1) * x.sum() for k, x in enumerate(results)).backward()
    for i, leaf in enumerate(leaves):
        assert torch.allclose(leaf.grad, torch.full_like(leaf, sum((k + 1) * row[i] for k, row in enumerate(rows))))


def test_rows_of_combine_under_compile(target: Target) -> None:
    x, y = (Draw(device=target.device, seed=i).normal(2, 8) for i in range(2))

    def step(x: Tensor, y: Tensor) -> Tensor:
        a, b = latentfast.combine([x, y.to(torch.bfloat16)], [[1.0, -0.5], [0.5, 2.0]])
        return a + b

    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(x, y), step(x, y))


def test_combine_takes_one_tensor_twice_and_whole_numbers(target: Target) -> None:
    x = Draw(device=target.device).grid(3, 5)
    assert torch.equal(latentfast.combine([x, x], [2, -1]), x)
    assert torch.equal(latentfast.combine([x], [1.0]), x)
    leaf = x.clone().requires_grad_()
    latentfast.combine([leaf, leaf], [2.0, -0.5]).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(x, 1.5))


def test_combine_is_a_multistep_solver(target: Target) -> None:
    """DPM-Solver++(2M) of diffusers, its step as one sum of three."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(6, device=target.device)
    levels = [float(s) for s in scheduler.sigmas]
    sample = Draw(device=target.device).normal(2, 3, 4, 5)
    clean: list[Tensor] = []
    for i in range(3):
        prediction = Draw(device=target.device, seed=i).normal(2, 3, 4, 5)
        expected = scheduler.step(prediction, scheduler.timesteps[i], sample, return_dict=False)[0]
        now, following = levels[i], levels[i + 1]
        clean.append(latentfast.combine([sample, prediction], [1.0, -now]))

        def half_log_snr(s: float) -> float:
            return math.log((1 - s) / s) if s < 1 else -math.inf

        if now < 1 and i > 1:
            h = half_log_snr(following) - half_log_snr(now)
            ratio = (half_log_snr(now) - half_log_snr(levels[i - 1])) / h
            weight = (1 - following) * -math.expm1(-h)
            got = latentfast.combine(
                [sample, clean[i], clean[i - 1]],
                [following / now, weight * (1 + 0.5 / ratio), -weight * 0.5 / ratio],
            )
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # its coefficients are float32
        sample = expected
