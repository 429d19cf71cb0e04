"""The schedulers of one launch as members of diffusers: configurations, results, launches, x0, what they leave."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from latentfast.integrations.diffusers import schedulers  # noqa: E402
from tests.integrations.schedulers import (  # noqa: E402
    CASES,
    SHAPE,
    TYPICAL,
    Case,
    accepts,
    generator,
    latents,
    model,
    ready,
    sample,
)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
typical = pytest.mark.parametrize("case", TYPICAL, ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore")


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
    with pytest.raises(ValueError, match=r"scheduler must be one of CogVideoXDDIMScheduler, .*, got DDPMScheduler"):
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
    plain, fast = (ready(case, s, 3, "cpu") for s in (case.plain(), case.fast()))
    x = latents(plain)
    p = model(x, 500.0)
    arguments = {"model_output": p, "timestep": plain.timesteps[0], "sample": x}
    if accepts(plain, "timestep_back"):
        arguments |= {"old_pred_original_sample": None, "timestep_back": None}
    results = []
    for scheduler in (plain, fast):
        if accepts(scheduler, "generator"):
            arguments["generator"] = generator("cpu")
        results.append(copy.copy(scheduler).step(**arguments, return_dict=True))
    assert type(results[0]) is type(results[1])
    given = [tuple(r) if isinstance(r, tuple) else r.to_tuple() for r in results]
    assert len(given[0]) == len(given[1])
    for a, b in zip(*given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    if not isinstance(results[0], tuple):
        assert list(results[0].keys()) == list(results[1].keys())


@typical
def test_copies_and_neighbours_do_not_disturb(case: Case) -> None:
    """Two schedulers in turn, and a deep copy made half-way through."""
    n = 4
    one, other, alone = (ready(case, case.fast(), n, "cpu") for _ in range(3))
    x, y = latents(one, seed=1), latents(one, seed=2)
    copies = []

    def watch(scheduler, i: int, given: Tensor, prediction: Tensor, x: Tensor) -> None:
        if i == 1:
            copies.append((copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), x.clone()))
        if i < n - 1:
            sample(ready(case, other, n, "cpu"), y, generator=generator("cpu", 9))

    result = sample(one, x, generator=generator("cpu"), watch=watch)
    assert torch.equal(result, sample(alone, x, generator=generator("cpu")))
    copied, unpickled, middle = copies[0]
    if accepts(one, "old_pred_original_sample"):
        return  # its history is the pipeline's
    again = []
    for scheduler in (copied, unpickled, copy.deepcopy(copied)):
        assert type(scheduler) is type(one)
        again.append(sample(scheduler, middle, begin=2, generator=generator("cpu")))
    assert torch.equal(again[0], again[1]) and torch.equal(again[0], again[2])


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
        x = latents(ready(case, scheduler, 4, "cpu"))
        inside: list[list[str]] = []

        def watched(*args, inside=inside, **kwargs):
            with _Operations() as operations:
                result = scheduler.step(*args, **kwargs)
            inside.append(operations.names)
            return result

        sample(scheduler, x, generator=generator("cpu"), stepping=watched)
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
    scheduler = ready(case, case.fast(), 5, "cpu")
    seen = []

    def watch(scheduler, i: int, given: Tensor, prediction: Tensor, x: Tensor) -> None:
        heun = "Heun" in case.name
        exact = _closed_form(case, scheduler, i, given, prediction) if not heun or i % 2 == 0 else None
        if exact is not None:
            # the noise level is known in float32, and sums of alpha and sigma are ill-conditioned near pure noise
            assert (scheduler.x0.double() - exact).abs().max() <= 2e-4 * max(1.0, float(exact.abs().max())), i
        assert scheduler.x0.shape == x.shape
        seen.append(i)

    sample(scheduler, latents(scheduler), generator=generator("cpu"), watch=watch)
    assert seen


def test_x0_of_lcm_is_its_own_mixture() -> None:
    scheduler = diffusers.LCMScheduler(), schedulers.LCMScheduler()
    x, p = latents(scheduler[0]), model(latents(scheduler[0], seed=4), 100.0)
    for s in scheduler:
        s.set_timesteps(4)
    plain, fast = (s.step(p, s.timesteps[0], x, generator=generator("cpu")) for s in scheduler)
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
        x = latents(ready(case, scheduler, 3, "cpu"))
        watch = lambda scheduler, *rest: kept.append(scheduler.x0 is not None)  # noqa: E731
        results.append(sample(scheduler, x, generator=generator("cpu"), watch=watch))
    assert torch.equal(*results)
    n = len(kept) // 2
    needed = case.name not in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
                               "DEISMultistepScheduler")  # fmt: skip
    assert all(kept[:n]) and kept[n] == needed
    scheduler.set_timesteps(3)
    assert scheduler.x0 is None


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
    expected = sample(plain, x, generator=generator("cpu"), **step)
    assert torch.equal(sample(fast, x, generator=generator("cpu"), **step).isnan(), expected.isnan())
    if "not linear" not in reason:
        assert torch.equal(sample(_again(fast), x, generator=generator("cpu"), **step), expected)
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


def test_a_subclass_of_a_user_steps_as_fast() -> None:
    class Mine(schedulers.UniPCMultistepScheduler):
        pass

    scheduler = Mine()
    scheduler.set_timesteps(3)
    sample(scheduler, latents(scheduler))
    assert scheduler.why_not_fast() == "" and scheduler.x0 is not None


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
        scheduler = ready(case, case.fast(), 4, gpu)
        if begin is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x, p = latents(scheduler, device=gpu), torch.randn(SHAPE, device=gpu).to(torch.bfloat16)
        drawing, older = generator(gpu), None
        times = list(scheduler.timesteps)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i, t in enumerate(times):
                options = {"generator": drawing} if accepts(scheduler, "generator") else {}
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

    scheduler = ready(case, case.fast(), 4, gpu)
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
        ready(case, scheduler, 4, gpu)
        launches.clear()
        sample(scheduler, x, generator=generator(gpu), stepping=watched)
    assert launches and all(len(names) == 1 for names in launches), launches


@pytest.mark.gpu
@typical
def test_gpu_tensors_are_where_diffusers_has_them(case: Case, gpu: str) -> None:
    plain, fast = (ready(case, s, 4, gpu) for s in (case.plain(), case.fast()))
    for name, x in vars(plain).items():
        if isinstance(x, Tensor):
            assert vars(fast)[name].device == x.device and torch.equal(vars(fast)[name], x), name
