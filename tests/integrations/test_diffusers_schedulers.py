"""The latents of the schedulers of one launch, against those of diffusers' own."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from latentfast.integrations.diffusers import schedulers  # noqa: E402
from latentfast.integrations.diffusers.schedulers import _linear  # noqa: E402
from tests.integrations.schedulers import (  # noqa: E402
    CASES,
    SHAPE,
    TYPICAL,
    Case,
    Largest,
    exact,
    float32_noise,
    generator,
    latents,
    model,
    ready,
    sample,
    ulp,
)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
typical = pytest.mark.parametrize("case", TYPICAL, ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


def _assert_same_trajectory(case: Case, steps: int, device: str, begin: int = 0) -> None:
    """In float32: within 8 ulps of the largest value over all steps of diffusers' own trajectory.

    Where they are further apart, float32 itself says no more, and the yardstick is diffusers' own distance from the
    same trajectory in float64. Both are accumulated roundings that the steps amplify, so their largest values differ
    by chance: 1.5 times as far is let pass.
    """
    plain, fast = (ready(case, s, steps, device) for s in (case.plain(), case.fast()))
    if begin:
        plain.set_begin_index(begin)
        fast.set_begin_index(begin)
    x, largest = latents(plain, device=device), Largest()
    expected = sample(plain, x, begin=begin, generator=generator(device), watch=largest)
    result = sample(fast, x, begin=begin, generator=generator(device))
    assert fast.why_not_fast() == ""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert bool(expected.isfinite().all())
    _assert_close(result, expected, largest, lambda: exact(case, steps, x, begin=begin, generator=generator(device)))


def _assert_close(result: Tensor, expected: Tensor, largest: Largest, exactly: Callable[[], Tensor]) -> None:
    apart = float((result - expected).abs().max())
    if apart <= 8 * ulp(largest.value):
        return
    exact = exactly()
    ours, theirs = (float((y.double() - exact).abs().max()) for y in (result, expected))
    ulps = apart / ulp(largest.value)
    assert ours < 1.5 * theirs, f"{ulps:.1f} ulps apart; from float64: {ours:.3g} and {theirs:.3g}"


@every_case
def test_trajectories(case: Case, device: str) -> None:
    if "use_beta_sigmas" in case.settings:
        pytest.importorskip("scipy", reason="diffusers needs scipy for beta sigmas")
    few = (2,) if "shift_terminal" in case.settings else (1, 2)  # of one step diffusers' own timestep is NaN
    for steps in (*few, 4 if "LCM" in case.name else 7):
        _assert_same_trajectory(case, steps, device)


@typical
def test_long_trajectories(case: Case, device: str) -> None:
    _assert_same_trajectory(case, 30, device)


def test_flow_matching_has_the_bits_of_diffusers() -> None:
    """On the CPU, whose kernels add a product as torch does."""
    case = TYPICAL[0]
    plain, fast = (ready(case, s, 20, "cpu") for s in (case.plain(), case.fast()))
    x = latents(plain)
    assert torch.equal(sample(fast, x), sample(plain, x))


@typical
@pytest.mark.parametrize("begin", [1, 3])
def test_starting_in_the_middle(case: Case, begin: int, device: str) -> None:
    """Image to image: the first steps are left out."""
    if not hasattr(case.fast(), "set_begin_index"):
        return _assert_same_from_timestep(case, begin, device)
    _assert_same_trajectory(case, 4 if "LCM" in case.name else 6, device, begin=begin)


def _assert_same_from_timestep(case: Case, begin: int, device: str) -> None:
    plain, fast = (ready(case, s, 6, device) for s in (case.plain(), case.fast()))
    x, largest = latents(plain, device=device), Largest()
    expected = sample(plain, x, begin=begin, generator=generator(device), watch=largest)
    result = sample(fast, x, begin=begin, generator=generator(device))
    assert float((result - expected).abs().max()) <= 8 * ulp(largest.value)


@typical
def test_the_first_timestep_tells_the_place(case: Case, device: str) -> None:
    """Without a begin index: a view of `timesteps`, a copy of it, or a number."""
    plain, fast = (ready(case, s, 4, device) for s in (case.plain(), case.fast()))
    if not hasattr(fast, "index_for_timestep"):
        pytest.skip("it has no place in a schedule")
    for i, t in enumerate(plain.timesteps):
        for same in (fast.timesteps[i], t.clone(), fast.timesteps[i:][0], float(t), t.cpu()):
            value = same if isinstance(same, Tensor) and same.device == plain.timesteps.device else float(same)
            assert fast.index_for_timestep(same) == plain.index_for_timestep(value)


@typical
def test_sampling_again(case: Case, device: str) -> None:
    """Other numbers of steps in turn, with the bits of a new scheduler; nothing is worked out anew."""
    steps = (3, 2) if "LCM" in case.name else (5, 3)
    used = case.fast()
    first = [sample(ready(case, used, n, device), latents(used, device=device), generator=generator(device))
             for n in (*steps, *steps)]  # fmt: skip
    for n, result in zip((*steps, *steps), first, strict=True):
        fresh = ready(case, case.fast(), n, device)
        assert torch.equal(result, sample(fresh, latents(fresh, device=device), generator=generator(device)))
    plans = used._host.plans
    known = dict(plans)
    ready(case, used, steps[1], device)
    assert used._host.plans is plans
    sample(used, latents(used, device=device), generator=generator(device))
    assert plans == known


class _Guided:
    """A prediction that is still a sum: what a deferred guidance hands to `step`."""

    def __init__(self, cond: Tensor, uncond: Tensor, scale: float) -> None:
        self.cond, self.uncond, self.scale = cond, uncond, scale
        self.shape, self.dtype, self.device = cond.shape, cond.dtype, cond.device

    def linear_terms(self) -> list[tuple[Tensor, float]]:
        return [(self.cond, self.scale), (self.uncond, 1 - self.scale)]


@typical
def test_guidance_inside_the_step(case: Case, device: str) -> None:
    """The two predictions go into the step's launch; as if they had been combined before."""
    n = 3 if "LCM" in case.name else 5
    whole, parts = (ready(case, case.fast(), n, device) for _ in range(2))
    x, largest = latents(whole, device=device).double(), Largest()

    def predict(x: Tensor, t: float, combined: bool):
        cond, uncond = model(x, t), model(x, t + 100)
        return uncond + 5.0 * (cond - uncond) if combined else _Guided(cond, uncond, 5.0)

    with float32_noise():
        expected = sample(whole, x, predict=functools.partial(predict, combined=True), generator=generator(device),
                          watch=largest)  # fmt: skip
        result = sample(parts, x, predict=functools.partial(predict, combined=False), generator=generator(device))
    assert parts.why_not_fast() == ""
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12 * largest.value)
    assert isinstance(parts.x0, Tensor)


def test_a_sum_of_terms_is_not_kept_as_history() -> None:
    """A solver that keeps the prediction itself gets it as a tensor."""
    scheduler = schedulers.UniPCMultistepScheduler(prediction_type="sample", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(4)
    x = torch.randn(SHAPE)
    scheduler.step(_Guided(x, 2 * x, 3.0), scheduler.timesteps[0], x)
    assert torch.allclose(scheduler.model_outputs[-1], -x) and torch.allclose(scheduler.x0, -x)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_churn_is_linear_too(name: str) -> None:
    plain, fast = getattr(diffusers, name)(), getattr(schedulers, name)()
    for scheduler in (plain, fast):
        scheduler.set_timesteps(6)
    x, largest = latents(plain), Largest()
    churn = {"s_churn": 2.0, "s_tmin": 0.01, "s_noise": 1.003}
    expected = sample(plain, x, generator=generator("cpu"), watch=largest, **churn)
    result = sample(fast, x, generator=generator("cpu"), **churn)
    assert fast.why_not_fast() == ""
    options = {"generator": generator("cpu"), **churn}
    _assert_close(result, expected, largest, lambda: exact(Case(name, ()), 6, x, **options))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_with_noise(eta: float) -> None:
    """A generator's noise, or the caller's own."""
    for noise in (None, torch.randn(SHAPE, generator=generator("cpu", 8))):
        plain, fast = diffusers.DDIMScheduler(clip_sample=False), schedulers.DDIMScheduler(clip_sample=False)
        largest = Largest()
        for scheduler in (plain, fast):
            scheduler.set_timesteps(6)
        x = latents(plain)
        options = {"eta": eta, "variance_noise": noise}
        generators = [None if noise is not None else generator("cpu") for _ in range(2)]
        expected = sample(plain, x, generator=generators[0], watch=largest, **options)
        result = sample(fast, x, generator=generators[1], **options)
        assert fast.why_not_fast() == ""
        assert float((result - expected).abs().max()) <= 8 * ulp(largest.value)


@typical
@pytest.mark.parametrize("kinds", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2])
def test_halves(case: Case, kinds: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """Latents and predictions of these dtypes, step by step: diffusers' dtypes, one rounding of exact arithmetic."""
    of_sample, of_prediction = kinds
    plain, fast = (ready(case, s, 4, device) for s in (case.plain(), case.fast()))
    x = latents(plain, device=device).to(of_sample)
    drawn: list[Tensor] = []
    draw_plain = _linear.randn_tensor

    def draw(*args, **kwargs):
        drawn.append(draw_plain(*args, **kwargs))
        return drawn[-1]

    def compared(*args, **kwargs):
        drawn.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_linear, "randn_tensor", draw)
            twin = copy.deepcopy(fast)
            result = fast.step(*args, **kwargs)
            noise = iter(drawn.copy())
            patch.setattr(_linear, "randn_tensor", lambda *args, **kwargs: next(noise).double())
            for name in twin._history:
                value = getattr(twin, name, None)
                setattr(twin, name, [_double(v) for v in value] if isinstance(value, list) else _double(value))
            exact = twin.step(*[_double(a) if getattr(a, "ndim", 0) else a for a in args], **kwargs)
        for x, y in zip(result, exact, strict=True):
            # one rounding to the result's dtype, to a half by way of float32
            assert y.dtype == torch.float64
            assert ((x.double() - y).abs() <= 0.501 * torch.finfo(x.dtype).eps * y.abs() + 1e-7).all()
        return result

    result = sample(fast, x, dtype=of_prediction, generator=generator(device), stepping=compared)
    expected = sample(plain, x, dtype=of_prediction, generator=generator(device))
    assert fast.why_not_fast() == ""
    assert result.dtype == expected.dtype and bool(result.isfinite().all())


def _double(x):
    return None if x is None else x.double()


@typical
def test_noise_on_clean_latents(case: Case, device: str) -> None:
    """add_noise and scale_noise, before the first step and between steps, by place and by timestep."""
    clean, noise = (latents(case.plain(), device=device, seed=i) for i in (5, 6))
    clean, noise = clean[:1].contiguous(), noise[:1].contiguous()
    for begin in (None, 2):
        plain, fast = (ready(case, s, 4, device) for s in (case.plain(), case.fast()))
        results = []
        for scheduler in (plain, fast):
            if begin is not None and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            times = scheduler.timesteps[2:3]
            if hasattr(scheduler, "add_noise"):
                results.append(scheduler.add_noise(clean, noise, times))
            else:
                results.append(scheduler.scale_noise(clean, times, noise))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6 * float(results[0].abs().max()))


def test_noise_for_a_batch(device: str) -> None:
    """Several samples at one place take one launch, samples at places of their own are left to diffusers."""
    plain, fast = diffusers.UniPCMultistepScheduler(), schedulers.UniPCMultistepScheduler()
    clean, noise = torch.randn(SHAPE, device=device), torch.randn(SHAPE, device=device)
    results: list[list[Tensor]] = []
    for scheduler in (plain, fast):
        scheduler.set_timesteps(5, device=device)
        own = scheduler.add_noise(clean, noise, scheduler.timesteps[[1, 3]])
        scheduler.set_begin_index(2)
        results.append([own, scheduler.add_noise(clean, noise, scheduler.timesteps[2:3].repeat(2))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_go_through_a_step() -> None:
    """For those who optimise latents through the sampler."""
    fast = schedulers.UniPCMultistepScheduler(**TYPICAL[2].settings)
    fast.set_timesteps(3)
    x = torch.randn(SHAPE, requires_grad=True)
    y = sample(fast, x, predict=lambda x, t: 0.5 * torch.tanh(x))
    y.sum().backward()
    h = 1e-3
    fast.set_timesteps(3)
    with torch.no_grad():
        ahead = sample(fast, x.double() + h, predict=lambda x, t: 0.5 * torch.tanh(x)).sum()
        fast.set_timesteps(3)
        behind = sample(fast, x.double() - h, predict=lambda x, t: 0.5 * torch.tanh(x)).sum()
    assert float(x.grad.sum()) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-4)
