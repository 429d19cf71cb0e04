"""The schedulers of one launch against diffusers' own."""

import copy
import functools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from latentfast.integrations.diffusers import schedulers  # noqa: E402
from latentfast.integrations.diffusers.schedulers import _linear  # noqa: E402
from tests.integrations.schedulers import CASES, SHAPE, TYPICAL, Case, accepts, latents, model, sample  # noqa: E402

every_case = pytest.mark.parametrize("case", CASES, ids=str)
typical = pytest.mark.parametrize("case", TYPICAL, ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


def _generator(device: str, seed: int = 3) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _ready(case: Case, scheduler, steps: int, device: str):
    scheduler.set_timesteps(steps, device=device, **dict(case.arguments))
    return scheduler


def _ulp(value: float, dtype: torch.dtype = torch.float32) -> float:
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value))


class _Largest:
    """The largest value over all steps: of the latents, and of what the solver keeps from one step to the next."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self, scheduler, i: int, given: Tensor, prediction: Tensor, x: Tensor) -> None:
        kept = [value if isinstance(value, list) else [value] for value in vars(scheduler).values()]
        tensors = [given, x, *(v for values in kept for v in values if isinstance(v, Tensor) and v.shape == x.shape)]
        self.value = max(self.value, *(float(v.abs().max()) for v in tensors))


@contextmanager
def _float32_noise() -> Iterator[None]:
    """Noise as it is drawn in float32 also where it is wanted in float64."""

    def draw(shape, generator=None, device=None, dtype=None):
        return draw_plain(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    draw_plain = _linear.randn_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "randn_tensor", draw)
        yield


def _exact(case: Case, steps: int, x: Tensor, **options) -> Tensor:
    """The trajectory in float64, with the coefficients that diffusers works out."""
    with _float32_noise():
        return sample(_ready(case, case.fast(), steps, x.device.type), x.double(), **options)


def _assert_same_trajectory(case: Case, steps: int, device: str, begin: int = 0) -> None:
    """In float32: within 8 ulps of the largest value over all steps of diffusers' own trajectory.

    Where they are further apart, float32 itself says no more: diffusers' own steps, which round after each operation,
    are then the ones that are further from the same trajectory in float64.
    """
    plain, fast = (_ready(case, s, steps, device) for s in (case.plain(), case.fast()))
    if begin:
        plain.set_begin_index(begin)
        fast.set_begin_index(begin)
    x, largest = latents(plain, device=device), _Largest()
    expected = sample(plain, x, begin=begin, generator=_generator(device), watch=largest)
    result = sample(fast, x, begin=begin, generator=_generator(device))
    assert fast.why_not_fast() == ""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert bool(expected.isfinite().all())
    _assert_close(result, expected, largest, lambda: _exact(case, steps, x, begin=begin, generator=_generator(device)))


def _assert_close(result: Tensor, expected: Tensor, largest: _Largest, exactly: Callable[[], Tensor]) -> None:
    apart = float((result - expected).abs().max())
    if apart <= 8 * _ulp(largest.value):
        return
    exact = exactly()
    ours, theirs = (float((y.double() - exact).abs().max()) for y in (result, expected))
    assert ours < theirs, f"{apart / _ulp(largest.value):.1f} ulps apart; from float64: {ours:.3g} and {theirs:.3g}"


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
    plain, fast = (_ready(case, s, 20, "cpu") for s in (case.plain(), case.fast()))
    x = latents(plain)
    with _in_float32():
        assert torch.equal(sample(fast, x), sample(plain, x))


@contextmanager
def _in_float32() -> Iterator[None]:
    """Without the float64 sums that schedulers ask for: diffusers' own order of operations."""
    with pytest.MonkeyPatch.context() as patch:
        combine = functools.partial(_linear.latentfast.combine, precise=False)
        patch.setattr(_linear, "latentfast", type("module", (), {"combine": lambda *a, precise, **k: combine(*a, **k)}))
        yield


@typical
@pytest.mark.parametrize("begin", [1, 3])
def test_starting_in_the_middle(case: Case, begin: int, device: str) -> None:
    """Image to image: the first steps are left out."""
    if not hasattr(case.fast(), "set_begin_index"):
        return _assert_same_from_timestep(case, begin, device)
    _assert_same_trajectory(case, 4 if "LCM" in case.name else 6, device, begin=begin)


def _assert_same_from_timestep(case: Case, begin: int, device: str) -> None:
    plain, fast = (_ready(case, s, 6, device) for s in (case.plain(), case.fast()))
    x, largest = latents(plain, device=device), _Largest()
    expected = sample(plain, x, begin=begin, generator=_generator(device), watch=largest)
    result = sample(fast, x, begin=begin, generator=_generator(device))
    assert float((result - expected).abs().max()) <= 8 * _ulp(largest.value)


@typical
def test_the_first_timestep_tells_the_place(case: Case, device: str) -> None:
    """Without a begin index: a view of `timesteps`, a copy of it, or a number."""
    plain, fast = (_ready(case, s, 4, device) for s in (case.plain(), case.fast()))
    if not hasattr(fast, "index_for_timestep"):
        pytest.skip("it has no place in a schedule")
    for i, t in enumerate(plain.timesteps):
        for same in (fast.timesteps[i], t.clone(), fast.timesteps[i:][0], float(t), t.cpu()):
            value = same if isinstance(same, Tensor) and same.device == plain.timesteps.device else float(same)
            assert fast.index_for_timestep(same) == plain.index_for_timestep(value)


@typical
def test_sampling_again(case: Case, device: str) -> None:
    """Another number of steps, and the first once more, with the bits of a new scheduler; nothing is worked out anew."""
    steps = (3, 2) if "LCM" in case.name else (5, 3)
    used = case.fast()
    first = [sample(_ready(case, used, n, device), latents(used, device=device), generator=_generator(device))
             for n in (*steps, *steps)]  # fmt: skip
    for n, result in zip((*steps, *steps), first, strict=True):
        fresh = _ready(case, case.fast(), n, device)
        assert torch.equal(result, sample(fresh, latents(fresh, device=device), generator=_generator(device)))
    plans = used._host.plans
    known = dict(plans)
    _ready(case, used, steps[1], device)
    assert used._host.plans is plans
    sample(used, latents(used, device=device), generator=_generator(device))
    assert plans == known


@typical
def test_copies_and_neighbours_do_not_disturb(case: Case) -> None:
    """Two schedulers in turn, and a deep copy made half-way through."""
    n = 4
    one, other, alone = (_ready(case, case.fast(), n, "cpu") for _ in range(3))
    x, y = latents(one, seed=1), latents(one, seed=2)
    copies = []

    def watch(scheduler, i: int, given: Tensor, prediction: Tensor, x: Tensor) -> None:
        if i == 1:
            copies.append((copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), x.clone()))
        if i < n - 1:
            sample(_ready(case, other, n, "cpu"), y, generator=_generator("cpu", 9))

    result = sample(one, x, generator=_generator("cpu"), watch=watch)
    assert torch.equal(result, sample(alone, x, generator=_generator("cpu")))
    copied, unpickled, middle = copies[0]
    if accepts(one, "old_pred_original_sample"):
        return  # its history is the pipeline's
    again = []
    for scheduler in (copied, unpickled, copy.deepcopy(copied)):
        assert type(scheduler) is type(one)
        again.append(sample(scheduler, middle, begin=2, generator=_generator("cpu")))
    assert torch.equal(again[0], again[1]) and torch.equal(again[0], again[2])


@typical
def test_configurations_go_round(case: Case, tmp_path) -> None:
    """Saved by one, loaded by the other; the names are diffusers'."""
    plain, fast = case.plain(), case.fast()
    parent = type(plain)
    assert isinstance(fast, parent) and type(fast).__name__ == parent.__name__
    assert type(fast).__module__ == parent.__module__
    assert fast.config == plain.config and fast.order == plain.order and len(fast) == len(plain)
    assert fast.compatibles == plain.compatibles
    assert getattr(fast, "init_noise_sigma", None) == getattr(plain, "init_noise_sigma", None)
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    names = [path.name for path in (tmp_path / "fast").iterdir()]
    assert all((tmp_path / "fast" / n).read_text() == (tmp_path / "plain" / n).read_text() for n in names)
    assert dict(parent.from_pretrained(tmp_path / "fast").config) == dict(
        parent.from_pretrained(tmp_path / "plain").config
    )
    made = schedulers.accelerated(parent.from_pretrained(tmp_path / "fast"))
    assert type(made) is type(fast) and type(schedulers.accelerated(made)) is type(fast)
    assert type(type(fast).from_pretrained(tmp_path / "plain")) is type(fast)


def test_a_pipeline_stays_loadable_by_plain_diffusers(tmp_path) -> None:
    """Its index names diffusers' classes."""

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, scheduler) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler)

    pipe = Pipeline(diffusers.UniPCMultistepScheduler(**TYPICAL[2].settings))
    pipe.scheduler = schedulers.accelerated(pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    loaded = Pipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is diffusers.UniPCMultistepScheduler
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"
    }


def test_a_scheduler_without_a_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match="scheduler must be one of CogVideoXDDIMScheduler, .*, got DDPMScheduler"):
        schedulers.accelerated(diffusers.DDPMScheduler())

    class UniPCMultistepScheduler(diffusers.UniPCMultistepScheduler):
        pass

    with pytest.raises(ValueError, match="got UniPCMultistepScheduler"):
        schedulers.accelerated(UniPCMultistepScheduler())


def test_a_shift_that_was_set_is_kept() -> None:
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain.set_shift(7.0)
    fast = schedulers.accelerated(plain)
    fast.set_timesteps(5)
    plain.set_timesteps(5)
    assert torch.equal(fast.sigmas, plain.sigmas) and torch.equal(fast.timesteps, plain.timesteps)


@typical
def test_results_as_diffusers_returns_them(case: Case) -> None:
    plain, fast = (_ready(case, s, 3, "cpu") for s in (case.plain(), case.fast()))
    x = latents(plain)
    p = model(x, 500.0)
    arguments = {"model_output": p, "timestep": plain.timesteps[0], "sample": x}
    if accepts(plain, "timestep_back"):
        arguments |= {"old_pred_original_sample": None, "timestep_back": None}
    results = []
    for scheduler in (plain, fast):
        if accepts(scheduler, "generator"):
            arguments["generator"] = _generator("cpu")
        results.append(copy.copy(scheduler).step(**arguments, return_dict=True))
    assert type(results[0]) is type(results[1])
    given = [tuple(r) if isinstance(r, tuple) else r.to_tuple() for r in results]
    assert len(given[0]) == len(given[1])
    for a, b in zip(*given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    if not isinstance(results[0], tuple):
        assert list(results[0].keys()) == list(results[1].keys())


class _Operations(TorchDispatchMode):
    """The operators that run, but for those that only make room, look or draw noise."""

    quiet = ("empty", "view", "select", "_local_scalar_dense", "randn", "slice", "detach", "alias", "expand", "normal_")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not any(name.split("::")[1].startswith(word) for word in self.quiet):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@typical
def test_a_step_is_one_launch(case: Case) -> None:
    """One operator of latentfast and nothing beside it but noise, for all that a step leaves."""
    scheduler = case.fast()
    for _ in range(2):  # the second time the coefficients are known
        x = latents(_ready(case, scheduler, 4, "cpu"))
        inside: list[list[str]] = []

        def watched(*args, inside=inside, **kwargs):
            with _Operations() as operations:
                result = scheduler.step(*args, **kwargs)
            inside.append(operations.names)
            return result

        sample(scheduler, x, generator=_generator("cpu"), stepping=watched)
    assert len(inside) == len(scheduler.timesteps)
    assert all(len(names) == 1 and names[0].endswith("::combine") for names in inside), inside
    assert scheduler.x0 is not None


def _closed_form(case: Case, scheduler, i: int, x: Tensor, p: Tensor) -> Tensor:
    """x0 of a prediction at the i-th step."""
    x, p = x.double(), p.double()
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        return x - float(scheduler.sigmas[i]) * p
    if "Euler" in case.name:  # variance-exploding
        sigma = float(scheduler.sigmas[i])
        if kind == "sample":
            return p
        return x - sigma * p if kind == "epsilon" else x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * p
    if hasattr(scheduler, "sigmas"):
        alpha = 1 / math.sqrt(float(scheduler.sigmas[i]) ** 2 + 1)
    else:
        alpha = math.sqrt(float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])]))
    sigma = math.sqrt(1 - alpha**2)
    return {"epsilon": (x - sigma * p) / alpha, "sample": p, "v_prediction": alpha * x - sigma * p}[kind]


@every_case
def test_x0(case: Case) -> None:
    """The clip that a step's prediction leads to, against the closed form."""
    if "use_beta_sigmas" in case.settings or "LCM" in case.name:
        pytest.skip("diffusers needs scipy for beta sigmas; LCM's x0 is its own mixture: see below")
    scheduler = _ready(case, case.fast(), 5, "cpu")
    seen = []

    def watch(scheduler, i: int, given: Tensor, prediction: Tensor, x: Tensor) -> None:
        heun = "Heun" in case.name
        exact = _closed_form(case, scheduler, i, given, prediction) if not heun or i % 2 == 0 else None
        if exact is not None:
            # the noise level is known in float32, and sums of alpha and sigma are ill-conditioned near pure noise
            assert (scheduler.x0.double() - exact).abs().max() <= 2e-4 * max(1.0, float(exact.abs().max())), i
        assert scheduler.x0.shape == x.shape
        seen.append(i)

    sample(scheduler, latents(scheduler), generator=_generator("cpu"), watch=watch)
    assert seen


def test_x0_of_lcm_is_its_own_mixture() -> None:
    scheduler = diffusers.LCMScheduler(), schedulers.LCMScheduler()
    x, p = latents(scheduler[0]), model(latents(scheduler[0], seed=4), 100.0)
    for s in scheduler:
        s.set_timesteps(4)
    plain, fast = (s.step(p, s.timesteps[0], x, generator=_generator("cpu")) for s in scheduler)
    torch.testing.assert_close(scheduler[1].x0, plain.denoised, rtol=1e-5, atol=1e-5)
    assert scheduler[1].x0 is fast.denoised


@typical
def test_x0_where_it_is_not_wanted(case: Case) -> None:
    """The trajectory is the same; x0 is there where the solver needs it itself."""
    results, kept = [], []
    for keep in (True, False):
        scheduler = case.fast()
        assert scheduler.x0 is None
        scheduler.keep_x0 = keep
        x = latents(_ready(case, scheduler, 3, "cpu"))
        watch = lambda scheduler, *rest: kept.append(scheduler.x0 is not None)  # noqa: E731
        results.append(sample(scheduler, x, generator=_generator("cpu"), watch=watch))
    assert torch.equal(*results)
    n = len(kept) // 2
    needed = case.name not in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
                               "DEISMultistepScheduler")  # fmt: skip
    assert all(kept[:n]) and kept[n] == needed
    scheduler.set_timesteps(3)
    assert scheduler.x0 is None


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
    whole, parts = (_ready(case, case.fast(), n, device) for _ in range(2))
    x, largest = latents(whole, device=device).double(), _Largest()

    def predict(x: Tensor, t: float, combined: bool):
        cond, uncond = model(x, t), model(x, t + 100)
        return uncond + 5.0 * (cond - uncond) if combined else _Guided(cond, uncond, 5.0)

    with _float32_noise():
        expected = sample(whole, x, predict=functools.partial(predict, combined=True), generator=_generator(device),
                          watch=largest)  # fmt: skip
        result = sample(parts, x, predict=functools.partial(predict, combined=False), generator=_generator(device))
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


FALLBACKS = [
    ("DDIMScheduler", {}, {}, "clip_sample limits every element"),
    ("DDIMScheduler", {"thresholding": True}, {}, "quantile"),
    ("UniPCMultistepScheduler", {"thresholding": True}, {}, "quantile"),
    ("LCMScheduler", {"clip_sample": True}, {}, "clip_sample"),
    ("DEISMultistepScheduler", {"thresholding": True}, {}, "quantile"),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_type": "bh1"},
     {}, "not linear"),  # NaN: the last sigma is 0
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "step", "reason"), FALLBACKS)
def test_what_is_left_to_diffusers(name: str, config: dict, step: dict, reason: str) -> None:
    plain, fast = getattr(diffusers, name)(**config), getattr(schedulers, name)(**config)
    for scheduler in (plain, fast):
        scheduler.set_timesteps(4)
    x = latents(plain)
    expected = sample(plain, x, generator=_generator("cpu"), **step)
    assert torch.equal(sample(fast, x, generator=_generator("cpu"), **step).isnan(), expected.isnan())
    if "not linear" not in reason:
        assert torch.equal(sample(_again(fast), x, generator=_generator("cpu"), **step), expected)
        assert fast.x0 is None
    assert reason in fast.why_not_fast()


def _again(scheduler):
    scheduler.set_timesteps(4)
    return scheduler


def test_a_timestep_for_each_token_is_left_to_diffusers() -> None:
    plain, fast = diffusers.FlowMatchEulerDiscreteScheduler(), schedulers.FlowMatchEulerDiscreteScheduler()
    x, p = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    results = []
    for scheduler in (plain, fast):
        scheduler.set_timesteps(4)
        times = torch.full((2, 6), float(scheduler.timesteps[0]))
        results.append(scheduler.step(p, scheduler.timesteps[0], x, per_token_timesteps=times, return_dict=False)[0])
    assert torch.equal(*results)
    assert fast.why_not_fast() == "per_token_timesteps and the sample differ in shape"
    fast.step(p, fast.timesteps[1], x)
    assert fast.why_not_fast() == "" and fast.step_index == 2


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_churn_is_linear_too(name: str) -> None:
    plain, fast = getattr(diffusers, name)(), getattr(schedulers, name)()
    for scheduler in (plain, fast):
        scheduler.set_timesteps(6)
    x, largest = latents(plain), _Largest()
    churn = {"s_churn": 2.0, "s_tmin": 0.01, "s_noise": 1.003}
    expected = sample(plain, x, generator=_generator("cpu"), watch=largest, **churn)
    result = sample(fast, x, generator=_generator("cpu"), **churn)
    assert fast.why_not_fast() == ""
    options = {"generator": _generator("cpu"), **churn}
    _assert_close(result, expected, largest, lambda: _exact(Case(name, ()), 6, x, **options))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_with_noise(eta: float) -> None:
    """A generator's noise, or the caller's own."""
    for noise in (None, torch.randn(SHAPE, generator=_generator("cpu", 8))):
        plain, fast = diffusers.DDIMScheduler(clip_sample=False), schedulers.DDIMScheduler(clip_sample=False)
        largest = _Largest()
        for scheduler in (plain, fast):
            scheduler.set_timesteps(6)
        x = latents(plain)
        options = {"eta": eta, "variance_noise": noise}
        generators = [None if noise is not None else _generator("cpu") for _ in range(2)]
        expected = sample(plain, x, generator=generators[0], watch=largest, **options)
        result = sample(fast, x, generator=generators[1], **options)
        assert fast.why_not_fast() == ""
        assert float((result - expected).abs().max()) <= 8 * _ulp(largest.value)


def test_diffusers_own_errors() -> None:
    fast = schedulers.EulerDiscreteScheduler()
    fast.set_timesteps(3)
    x = torch.randn(SHAPE)
    fast.step(x, fast.timesteps[0], x)
    with pytest.raises(ValueError, match="Passing integer indices"):
        fast.step(x, 1, x)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        schedulers.UniPCMultistepScheduler().step(x, 1, x)
    with pytest.raises(TypeError):
        fast.step(x, fast.timesteps[0])


def test_replaced_noise_levels_are_noticed() -> None:
    plain, fast = diffusers.FlowMatchEulerDiscreteScheduler(), schedulers.FlowMatchEulerDiscreteScheduler()
    x = torch.randn(SHAPE)
    results = []
    for scheduler in (plain, fast):
        scheduler.set_timesteps(4)
        scheduler.step(x, scheduler.timesteps[0], x)
        scheduler.sigmas = scheduler.sigmas * 0.5
        scheduler._step_index = 1
        results.append(scheduler.step(x, scheduler.timesteps[1], x, return_dict=False)[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@typical
@pytest.mark.parametrize("kinds", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2])
def test_halves(case: Case, kinds: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """Latents and predictions of these dtypes, step by step: diffusers' dtypes, and one rounding of exact arithmetic."""
    of_sample, of_prediction = kinds
    plain, fast = (_ready(case, s, 4, device) for s in (case.plain(), case.fast()))
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

    result = sample(fast, x, dtype=of_prediction, generator=_generator(device), stepping=compared)
    expected = sample(plain, x, dtype=of_prediction, generator=_generator(device))
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
        plain, fast = (_ready(case, s, 4, device) for s in (case.plain(), case.fast()))
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


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return "cuda"


@pytest.mark.gpu
@typical
def test_gpu_no_step_waits_for_the_device(case: Case, gpu: str) -> None:
    """From the first step on, whose coefficients are not known yet; with and without a begin index."""
    for begin in (None, 0):
        scheduler = _ready(case, case.fast(), 4, gpu)
        if begin is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x, p = latents(scheduler, device=gpu), torch.randn(SHAPE, device=gpu).to(torch.bfloat16)
        generator, older = _generator(gpu), None
        times = [t for t in scheduler.timesteps]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i, t in enumerate(times):
                options = {"generator": generator} if accepts(scheduler, "generator") else {}
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)
                if accepts(scheduler, "timestep_back"):
                    x, older = scheduler.step(p, older, t, times[i - 1] if i else None, x, **options)
                else:
                    x = scheduler.step(p, t, x, **options, return_dict=False)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert scheduler.why_not_fast() == "" and bool(x.isfinite().all())


@pytest.mark.gpu
@typical
def test_gpu_a_step_is_one_kernel(case: Case, gpu: str) -> None:
    """Beside the drawing of noise."""
    from torch.profiler import ProfilerActivity, profile

    scheduler = _ready(case, case.fast(), 4, gpu)
    x = latents(scheduler, device=gpu)
    launches: list[list[str]] = []

    def watched(*args, **kwargs):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            result = scheduler.step(*args, **kwargs)
            torch.cuda.synchronize()
        on_device = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        launches.append([name for name in on_device if "distribution" not in name])
        return result

    for _ in range(2):
        _ready(case, scheduler, 4, gpu)
        launches.clear()
        sample(scheduler, x, generator=_generator(gpu), stepping=watched)
    assert launches and all(len(names) == 1 for names in launches), launches


@pytest.mark.gpu
@typical
def test_gpu_tensors_are_where_diffusers_has_them(case: Case, gpu: str) -> None:
    plain, fast = (_ready(case, s, 4, gpu) for s in (case.plain(), case.fast()))
    for name, x in vars(plain).items():
        if isinstance(x, Tensor):
            assert vars(fast)[name].device == x.device and torch.equal(vars(fast)[name], x), name
