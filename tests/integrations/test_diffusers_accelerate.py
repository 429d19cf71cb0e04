"""`accelerate`: what it replaces, what it reports, and how it gives everything back."""

import gc
import logging
import subprocess
import sys
import weakref

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import diffusers.guiders as parents
from diffusers.modular_pipelines import WanBlocks

import latentfast
from latentfast.integrations.diffusers import accelerate, guiders, schedulers, vaes
from latentfast.integrations.diffusers.guidance import Prediction
from tests.integrations.pipelines import BY_NAME, STEPS

WAN = BY_NAME["wan"]


def _modular() -> diffusers.ModularPipeline:
    pipe = WanBlocks().init_pipeline()
    plain = WAN.pipe()
    pipe.update_components(transformer=plain.transformer, vae=plain.vae, scheduler=plain.scheduler)
    return pipe


def _classes(pipe) -> dict[str, type]:
    return {name: type(part) for name, part in pipe.components.items()}


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [WAN.pipe, _modular], ids=["pipeline", "modular"])
def test_the_very_objects_come_back(make) -> None:
    pipe = make()
    parts, classes, config = dict(pipe.components), _classes(pipe), dict(pipe.config)
    with accelerate(pipe) as handle:
        assert type(pipe.scheduler) is schedulers.UniPCMultistepScheduler
        assert isinstance(pipe.scheduler, diffusers.UniPCMultistepScheduler)
        assert type(pipe.vae) is vaes.AutoencoderKLWan and pipe.vae is parts["vae"]
        assert pipe.transformer is parts["transformer"]
        if "guider" in parts:
            assert type(pipe.guider) is guiders.ClassifierFreeGuidance and pipe.guider.defers
        assert dict(pipe.config) == config
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert _classes(pipe) == classes and dict(pipe.config) == config
    assert "as it was" in str(handle.report())
    handle.disable()  # again: nothing


def test_parts_by_choice() -> None:
    pipe = WAN.pipe()
    scheduler = pipe.scheduler
    handle = accelerate(pipe, schedulers=False, vae=False)
    assert pipe.scheduler is scheduler and type(pipe.vae) is diffusers.AutoencoderKLWan
    assert handle.report().replaced == ()  # guidance waits for no scheduler but ours
    handle = accelerate(pipe, vae=False, guidance=False)
    assert [row.part for row in handle.report().replaced] == ["scheduler"]
    pipe = _modular()
    guider = pipe.guider
    accelerate(pipe, guiders=False)
    assert pipe.guider is guider
    accelerate(pipe, guidance=False)
    assert not pipe.guider.defers


def test_graphs_of_the_autoencoder_by_choice() -> None:
    pipe = WAN.pipe()
    with accelerate(pipe, cuda_graphs=True) as handle:
        assert "CUDA graphs" in str(handle.report())
        pipe.vae.decode(torch.zeros(1, 16, 2, 4, 4))
    assert "CUDA graphs" not in str(accelerate(pipe).report())


def test_a_second_time_leaves_what_is_replaced_already() -> None:
    pipe = WAN.pipe()
    first = accelerate(pipe)
    scheduler = pipe.scheduler
    second = accelerate(pipe)
    assert second.report().replaced == () and len(second.report().left) == 3
    assert all("already" in row.note for row in second.report().left)
    second.disable()
    assert pipe.scheduler is scheduler and first.report().active
    first.disable()
    assert type(pipe.scheduler) is diffusers.UniPCMultistepScheduler


def test_a_scheduler_exchanged_since_is_accelerated_the_next_time() -> None:
    pipe = WAN.pipe()
    first = accelerate(pipe)
    own = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.scheduler = own
    assert "now FlowMatchEulerDiscreteScheduler" in str(first.report())
    second = accelerate(pipe)
    assert [row.part for row in second.report().replaced] == ["scheduler"]
    first.disable()
    assert type(pipe.scheduler) is schedulers.FlowMatchEulerDiscreteScheduler
    second.disable()
    assert pipe.scheduler is own and type(pipe.vae) is diffusers.AutoencoderKLWan


def test_parts_exchanged_since_are_their_own_again() -> None:
    """The autoencoder and the transformer that were there get back what they were, wherever they are by now."""
    pipe, other = WAN.pipe(), WAN.pipe()
    vae, transformer = pipe.vae, pipe.transformer
    handle = accelerate(pipe)
    pipe.vae, pipe.transformer = other.vae, other.transformer
    assert [row.part for row in handle.report().replaced] == ["scheduler"]
    handle.disable()
    assert type(vae) is diffusers.AutoencoderKLWan and pipe.vae is other.vae
    assert accelerate(WAN.pipe(), schedulers=False).report().replaced  # nothing is left over
    pipe.transformer = transformer
    assert len(accelerate(pipe).report().replaced) == 3


def test_the_hook_goes_with_its_handle() -> None:
    pipe = WAN.pipe()
    inputs = {
        "hidden_states": torch.zeros(1, 16, 1, 4, 4),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(WAN.texts["prompt_embeds"]),
        "return_dict": False,
    }
    with torch.no_grad(), accelerate(pipe):
        assert isinstance(pipe.transformer(**inputs)[0], Prediction)
    with torch.no_grad():
        assert type(pipe.transformer(**inputs)[0]) is torch.Tensor


def test_a_pipeline_that_is_dropped_is_freed() -> None:
    pipe = WAN.pipe()
    handle = accelerate(pipe)
    WAN.latents(pipe)
    model = weakref.ref(pipe.transformer)
    del pipe, handle
    gc.collect()
    assert model() is None


# --- What cannot be replaced ------------------------------------------------------------------------------------------


def test_nothing_to_replace_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ),
        scheduler=diffusers.DDPMScheduler(),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="latentfast"):
        handle = accelerate(pipe)
    assert "DDPMPipeline: nothing was replaced." in caplog.text
    (left,) = handle.report().left
    assert left.part == "scheduler" and "none that takes its place" in left.note


def test_parts_of_ones_own_are_left() -> None:
    class Own(diffusers.UniPCMultistepScheduler):
        pass

    pipe = WAN.pipe()
    pipe.scheduler = own = Own.from_config(pipe.scheduler.config)
    left = {row.part: row for row in accelerate(pipe).report().left}
    assert pipe.scheduler is own and left["scheduler"].kind == "Own"
    modular = _modular()
    modular.update_components(guider=parents.AdaptiveProjectedMixGuidance())
    left = {row.part: row.note for row in accelerate(modular).report().left}
    assert "no formula for AdaptiveProjectedMixGuidance" in left["guider"]


def test_what_is_no_pipeline() -> None:
    with pytest.raises(TypeError, match="pipe must be a pipeline of diffusers, got Linear"):
        accelerate(torch.nn.Linear(1, 1))


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_report_as_a_table() -> None:
    text = str(accelerate(WAN.pipe()).report())
    first, *lines = text.splitlines()
    assert first == "WanPipeline: accelerated." and len(lines) == 3
    assert "UniPCMultistepScheduler  replaced  a step is one launch" in text


def test_steps_left_to_diffusers_are_reported() -> None:
    """LTX's conditions have a noise level for each token."""
    case = BY_NAME["ltx-condition"]
    pipe = case.pipe()
    handle = accelerate(pipe)
    case.latents(pipe)
    assert "steps are left to diffusers: per_token_timesteps" in str(handle.report())


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox-dpm", "svd", "sdxl"])
def test_measured(name: str) -> None:
    case = BY_NAME[name]
    pipe = case.pipe()
    handle = accelerate(pipe)
    with pytest.raises(ValueError, match="shape must be given"):
        handle.report(measure=True)
    case.latents(pipe)
    index, noise = pipe.scheduler.step_index if hasattr(pipe.scheduler, "step_index") else None, pipe.scheduler.x0
    found = handle.report(measure=True, steps=STEPS).measured
    assert found.now.launches < found.before.launches and found.before.us > 0 < found.now.us
    assert found.shape == tuple(noise.shape) and found.dtype == "float32"
    assert pipe.scheduler.x0 is noise and getattr(pipe.scheduler, "step_index", None) == index
    assert "operations" in str(handle.report(measure=True, steps=STEPS)) or torch.cuda.is_available()


def test_wan_takes_one_operation_a_step() -> None:
    """Guidance and UniPC's corrector and predictor: about ninety of diffusers'."""
    handle = accelerate(WAN.pipe())
    found = handle.report(measure=True, shape=(1, 16, 3, 8, 8), dtype=torch.bfloat16, steps=10).measured
    assert found.now.launches == 1 and found.before.launches > 50


def test_measured_with_a_guider() -> None:
    found = accelerate(_modular()).report(measure=True, shape=(1, 16, 3, 8, 8), steps=10).measured
    assert found.now.launches == 1


def test_measuring_needs_a_scheduler() -> None:
    with pytest.raises(ValueError, match="needs a scheduler that was replaced"):
        accelerate(WAN.pipe(), schedulers=False).report(measure=True, shape=(1, 16, 3, 4, 4))


# --- Methods of pipelines ---------------------------------------------------------------------------------------------


def _upsampler() -> diffusers.DiffusionPipeline:
    return diffusers.LTXLatentUpsamplePipeline(vae=BY_NAME["ltx"].pipe().vae, latent_upsampler=None)


def test_methods_of_ltx_upsampler() -> None:
    pipe = _upsampler()
    latents, reference = torch.randn(2, 8, 3, 4, 5), torch.randn(2, 8, 2, 3, 4) * 2 + 1
    want = pipe.adain_filter_latent(latents, reference, 0.75), pipe.tone_map_latents(latents, 0.5)
    handle = accelerate(pipe)
    torch.testing.assert_close(pipe.adain_filter_latent(latents, reference, 0.75), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pipe.tone_map_latents(latents, 0.5), want[1])
    assert torch.isfinite(pipe.adain_filter_latent(torch.ones(1, 8, 2, 3, 4), reference[:1])).all()  # NaN there
    assert torch.equal(pipe.tone_map_latents(latents, 1.5), _upsampler().tone_map_latents(latents, 1.5))
    assert {row.part for row in handle.report().replaced} == {"adain_filter_latent", "tone_map_latents", "vae"}
    assert any(row.part == "_normalize_latents" and "private" in row.note for row in handle.report().left)
    handle.disable()
    assert pipe.adain_filter_latent.__func__ is diffusers.LTXLatentUpsamplePipeline.adain_filter_latent


def test_all_of_it_is_latentfast(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of `combine` a step, and nothing else of latentfast's."""
    pipe = WAN.pipe()
    accelerate(pipe)
    calls: list[int] = []
    combine = latentfast.combine
    monkeypatch.setattr(latentfast, "combine", lambda *a, **k: calls.append(1) or combine(*a, **k))
    WAN.latents(pipe)
    assert len(calls) == STEPS


# --- The package ------------------------------------------------------------------------------------------------------


def test_without_diffusers() -> None:
    """`import latentfast` asks for nothing; the integration names the extra."""
    script = """
import sys
sys.modules["diffusers"] = None
import latentfast
assert not any(name.startswith("latentfast.integrations") for name in sys.modules)
try:
    import latentfast.integrations.diffusers
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'latentfast[diffusers]'" in done.stdout
