"""Whole pipelines with and without `accelerate`, from the same seed: the same latents, the same pictures."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

from latentfast.integrations.diffusers import accelerate
from tests.helpers import same_bits
from tests.integrations.pipelines import BY_NAME, CASES, STEPS, Case

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
#: Units of the largest value of a whole sampling that two float32 samplings may differ by.
ULPS = 8.0
WAN = BY_NAME["wan"]


def _largest(latents: list[Tensor]) -> float:
    return max(float(x.abs().max()) for x in latents)


def _assert_near(got: list[Tensor], want: list[Tensor], units: float, start: float = 1.0) -> None:
    """Within so many units in the last place of the largest value that occurs, at the start or later.

    `start`: the deviation of the noise that a sampling starts from, which with Euler's sigmas is the largest.
    """
    assert len(got) == len(want) == STEPS and got[-1].dtype == want[-1].dtype
    allowed = units * torch.finfo(want[-1].dtype).eps * max(_largest(want), start)
    worst = max(float((x - y).abs().max()) for x, y in zip(got, want, strict=True))
    assert worst <= allowed, f"{worst / allowed * units:.1f} units"


@every_case
@every_device
def test_same_latents_in_float32(case: Case, device: str) -> None:
    pipe = case.pipe(device)
    want = case.latents(pipe, device)
    start = float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
    pipe = case.pipe(device)
    with accelerate(pipe) as handle:
        assert handle.report().replaced
        _assert_near(case.latents(pipe, device), want, ULPS, start)
    assert all(map(same_bits, case.latents(pipe, device), want))


@every_device
def test_same_bits_where_steps_are_left_to_diffusers(device: str) -> None:
    """LTX's conditions have a noise level for each token: the prediction waits there for nothing, and is computed."""
    case = BY_NAME["ltx-condition"]
    want = case.latents(case.pipe(device), device)
    pipe = case.pipe(device)
    accelerate(pipe)
    assert all(map(same_bits, case.latents(pipe, device), want))


@every_case
@every_device
def test_bfloat16_within_one_rounding_a_step(case: Case, device: str) -> None:
    """Of what is computed in it: predictions, and with some pipelines the latents."""
    dtype = torch.bfloat16
    want = case.latents(case.pipe(device, dtype), device, dtype)
    pipe = case.pipe(device, dtype)
    accelerate(pipe)
    got = case.latents(pipe, device, dtype)
    assert got[-1].dtype == want[-1].dtype
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        error = float((x.float() - y.float()).abs().max())
        assert error <= (i + 1) * torch.finfo(dtype).eps * _largest(want), f"step {i}"


@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan", "cogvideox-ddim", "sd"])
@every_device
def test_same_pictures_with_tiling(name: str, device: str) -> None:
    """Everything but the arithmetic of the sampling is the autoencoder's: its bits do not change."""
    case = BY_NAME[name]
    pictures = []
    for accelerated in (False, True):
        pipe = case.pipe(device)
        pipe.vae.enable_tiling()
        for attribute, value in vars(pipe.vae).items():
            if attribute.startswith("tile_") and isinstance(value, int) and "frames" not in attribute:
                setattr(pipe.vae, attribute, value // 8)
        if accelerated:
            accelerate(pipe, schedulers=False)
        pictures.append(pipe(**case.inputs(device, output_type="pt"))[0])
    assert torch.isfinite(pictures[0]).all() and same_bits(pictures[1], pictures[0])


# --- What people do with pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "in_place", "compiled_first"),
    [("eager", False, True), ("eager", True, False), ("eager", True, True), ("aot_eager", False, False)],
)
@every_device
def test_compiled_transformer(backend: str, in_place: bool, compiled_first: bool, device: str) -> None:
    want = WAN.latents(WAN.pipe(device), device)
    pipe = WAN.pipe(device)
    handle = None if compiled_first else accelerate(pipe)
    if in_place:
        pipe.transformer.compile(backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    handle = handle or accelerate(pipe)
    _assert_near(WAN.latents(pipe, device), want, ULPS)
    handle.disable()
    _assert_near(WAN.latents(pipe, device), want, ULPS)
    assert type(pipe.scheduler) is diffusers.UniPCMultistepScheduler
    torch._dynamo.reset()


def test_a_callback_sees_what_plain_torch_predicts() -> None:
    """A pipeline whose callbacks may ask for the guided prediction."""

    class Telling(diffusers.WanPipeline):
        _callback_tensor_inputs = [*diffusers.WanPipeline._callback_tensor_inputs, "noise_pred"]  # noqa: RUF012

    def predictions(accelerated: bool) -> list[Tensor]:
        pipe = Telling(**WAN.pipe().components)
        pipe.set_progress_bar_config(disable=True)
        seen: list[Tensor] = []

        def keep(pipe, i: int, t: Tensor, kwargs: dict) -> dict:
            seen.append(kwargs["noise_pred"].clone())
            return {}

        if accelerated:
            accelerate(pipe)
        more = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["noise_pred"]}
        pipe(**WAN.inputs(**more))
        return seen

    want, got = predictions(False), predictions(True)
    assert type(got[0]) is Tensor and same_bits(got[0], want[0])
    _assert_near(got, want, 4 * ULPS)  # of latents that differ by up to as much


def test_a_callback_may_change_the_latents() -> None:
    def halve(pipe, i: int, t: Tensor, kwargs: dict) -> dict:
        return {"latents": kwargs["latents"] * 0.5 if i == 1 else kwargs["latents"]}

    results = []
    for accelerated in (False, True):
        pipe = WAN.pipe()
        if accelerated:
            accelerate(pipe)
        results.append(pipe(**WAN.inputs(callback_on_step_end=halve))[0])
    # callbacks see x0 of the last step, too
    assert pipe.scheduler.x0.shape == results[1].shape
    assert (results[1] - results[0]).abs().max() <= ULPS * torch.finfo(torch.float32).eps * _largest(results)


@pytest.mark.parametrize("name", ["wan", "ltx", "sd", "cogvideox-dpm"])
def test_what_is_saved_loads_in_plain_diffusers(name: str, tmp_path) -> None:
    case = BY_NAME[name]
    pipe = case.pipe()
    parts = {key: type(part) for key, part in pipe.components.items()}
    accelerate(pipe)
    pipe.save_pretrained(tmp_path)
    assert "latentfast" not in (tmp_path / "model_index.json").read_text()
    absent = {key: None for key, part in pipe.components.items() if part is None}
    loaded = type(pipe).from_pretrained(tmp_path, **absent)
    assert {key: type(part) for key, part in loaded.components.items()} == parts
    loaded.set_progress_bar_config(disable=True)
    _assert_near(case.latents(loaded), case.latents(case.pipe()), ULPS)  # loaded weights lie elsewhere in memory


def test_another_scheduler_in_between() -> None:
    """Guidance goes on waiting, for a scheduler that does not know of it."""
    pipe = WAN.pipe()
    handle = accelerate(pipe)
    other = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.scheduler = other
    plain = WAN.pipe()
    plain.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert all(map(same_bits, WAN.latents(pipe), WAN.latents(plain)))
    assert "exchanged since" in str(handle.report())
    handle.disable()
    assert pipe.scheduler is other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", ["wan", "ltx", "sd"])
def test_gpu_offloaded_models(name: str) -> None:
    case = BY_NAME[name]
    results = []
    for accelerated in (False, True):
        pipe = case.pipe()
        pipe.enable_model_cpu_offload()
        if accelerated:
            accelerate(pipe)
        results.append(case.latents(pipe, "cuda"))
    _assert_near(results[1], results[0], ULPS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", ["wan", "cogvideox-ddim", "sd"])
def test_gpu_no_step_waits_for_the_device(name: str) -> None:
    """From the end of the first step to the end of the last."""
    case = BY_NAME[name]
    pipe = case.pipe("cuda")
    accelerate(pipe)
    case.latents(pipe, "cuda")  # finds the coefficients

    def guard(pipe, i: int, t: Tensor, kwargs: dict) -> dict:
        torch.cuda.set_sync_debug_mode("error" if i < STEPS - 1 else "default")
        return {}

    try:
        pipe(**case.inputs("cuda", callback_on_step_end=guard))
    finally:
        torch.cuda.set_sync_debug_mode("default")
