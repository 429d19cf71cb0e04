"""Modular Wan pipelines whose denoising loop guides, steps and blends in one go, against the loops of diffusers."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
import diffusers.guiders as parents
from diffusers.modular_pipelines import Wan22Blocks, WanBlocks
from diffusers.modular_pipelines.wan.denoise import (
    Wan22DenoiseStep,
    Wan22Image2VideoDenoiseStep,
    Wan22VaceDenoiseStep,
    WanDenoiseStep,
    WanImage2VideoDenoiseStep,
)

import latentfast
from latentfast.integrations.diffusers import accelerate, guiders
from latentfast.integrations.diffusers.blocks import WanFusedAfterDenoiser, fuse
from tests.helpers import same_bits
from tests.integrations.pipelines import STEPS, TOKENS, WIDTH, wan_transformer

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)
LOOPS = [
    WanDenoiseStep, WanImage2VideoDenoiseStep, Wan22DenoiseStep, Wan22Image2VideoDenoiseStep, Wan22VaceDenoiseStep,
]  # fmt: skip
SHAPE = (1, 16, 3, 4, 4)
SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
GUIDERS = {
    "cfg": lambda: parents.ClassifierFreeGuidance(guidance_scale=5.0),
    "cfg-late": lambda: parents.ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75),
    "cfg-original": lambda: parents.ClassifierFreeGuidance(guidance_scale=4.0, use_original_formulation=True),
    "rescale": lambda: parents.ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7),
    "apg": lambda: parents.AdaptiveProjectedGuidance(
        guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5, eta=0.0
    ),
    "zero-star": lambda: parents.ClassifierFreeZeroStarGuidance(guidance_scale=5.0),
    "another's": lambda: parents.AdaptiveProjectedMixGuidance(),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def _blocks(cls: type = WanBlocks, fused: bool = True):
    blocks = cls()
    inner = blocks.sub_blocks["denoise"].sub_blocks
    if fused:
        inner["denoise"] = fuse(inner["denoise"])
    return blocks.sub_blocks["denoise"]


def _pipe(scheduler: str, guider: str, device: str, fused: bool, cls: type = WanBlocks, dtype=torch.float32):
    pipe = _blocks(cls, fused).init_pipeline()
    torch.manual_seed(0)
    models = {"transformer": wan_transformer()}
    made = GUIDERS[guider]()
    own = {"guider": (guiders.replacement_for(made) or made) if fused else made}
    if cls is Wan22Blocks:
        models["transformer_2"] = wan_transformer()
        other = GUIDERS[guider]()
        own["guider_2"] = (guiders.replacement_for(other) or other) if fused else other
    models = {name: model.to(device, dtype) for name, model in models.items()}
    pipe.update_components(**models, **own, scheduler=SCHEDULERS[scheduler]())
    pipe.blocks.sub_blocks["denoise"].set_progress_bar_config(disable=True)
    return pipe


def _run(pipe, device: str, dtype=torch.float32, **more) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    texts = torch.randn((2, 1, TOKENS, WIDTH), generator=draw).to(device, dtype)
    noise = torch.randn(SHAPE, generator=draw).to(device)
    return pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        latents=noise,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=STEPS,
        output="latents",
        **more,
    )


def _close(got: Tensor, want: Tensor, ulps: float = 8.0) -> None:
    """Within 8 units of the largest value: each step rounds less often here than there."""
    assert (got - want).abs().max() <= ulps * torch.finfo(want.dtype).eps * want.abs().max()


@pytest.mark.parametrize("guider", GUIDERS)
@every_scheduler
@every_device
def test_same_latents(scheduler: str, guider: str, device: str) -> None:
    want = _run(_pipe(scheduler, guider, device, fused=False), device)
    _close(_run(_pipe(scheduler, guider, device, fused=True), device), want, 32.0 if guider == "apg" else 8.0)


@pytest.mark.parametrize("fused", [False, True], ids=["blocks of diffusers", "fused blocks"])
@pytest.mark.parametrize("guider", ["cfg", "rescale", "apg"])
@every_scheduler
@every_device
def test_accelerated(scheduler: str, guider: str, fused: bool, device: str) -> None:
    """With schedulers of ours, which take guidance that waits from either kind of blocks."""
    want = _run(_pipe(scheduler, guider, device, fused=False), device)
    pipe = _pipe(scheduler, guider, device, fused)
    accelerate(pipe)
    _close(_run(pipe, device), want, 32.0 if guider == "apg" else 8.0)


@every_scheduler
def test_two_transformers(scheduler: str) -> None:
    """Wan 2.2: a transformer and a guider for the first steps, others for the rest."""
    runs = [_run(_pipe(scheduler, "rescale", "cpu", fused, Wan22Blocks), "cpu") for fused in (False, True)]
    _close(runs[1], runs[0])


@every_scheduler
@every_device
def test_predictions_in_halves(scheduler: str, device: str) -> None:
    """Latents in float32; guidance is rounded to bfloat16 by diffusers alone."""
    dtype = torch.bfloat16
    runs = [_run(_pipe(scheduler, "cfg", device, fused, dtype=dtype), device, dtype) for fused in (False, True)]
    assert runs[1].dtype == torch.float32
    # |prediction| < 1 here: three roundings of bfloat16 of guidance at 5 times that, a step, and sigma goes from 1 to 0
    assert (runs[1] - runs[0]).abs().max() <= 3 * 5 * torch.finfo(dtype).eps


# --- The mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guider", ["cfg", "cfg-late", "apg"])
@every_scheduler
@every_device
def test_what_the_mask_keeps_has_its_bits(scheduler: str, guider: str, device: str) -> None:
    mask = torch.zeros((1, 1, 1, 4, 4), device=device)
    mask[..., :2] = 1.0
    known = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).to(device)
    pipe = _pipe(scheduler, guider, device, fused=True)
    got = _run(pipe, device, latent_mask=mask, known_latents=known)
    assert same_bits(got[..., 2:].contiguous(), known[..., 2:].contiguous())
    assert not torch.equal(got[..., :2], known[..., :2])
    ones = _run(pipe, device, latent_mask=torch.ones_like(mask), known_latents=known)
    assert same_bits(ones, _run(_pipe(scheduler, guider, device, fused=True), device))


def test_steps_of_the_mask_are_those_of_plain_torch() -> None:
    """Euler with a mask written out, on the transformer's own predictions."""
    pipe = _pipe("euler", "cfg", "cpu", fused=True)
    mask, known, noise = torch.rand((1, 1, 3, 4, 4)), torch.randn(SHAPE), torch.randn(SHAPE)
    taken: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda m, inputs, output: taken.append(output[0].clone()))
    start: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: start.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    got = _run(pipe, "cpu", latent_mask=mask, known_latents=known, known_noise=noise)
    latents, sigmas = start[0], pipe.scheduler.sigmas.tolist()
    for i in range(STEPS):
        cond, uncond = taken[2 * i], taken[2 * i + 1]
        stepped = latents + (sigmas[i + 1] - sigmas[i]) * (uncond + 5.0 * (cond - uncond))
        kept = (1 - sigmas[i + 1]) * known + sigmas[i + 1] * noise
        latents = kept + mask * (stepped - kept)
    _close(got, latents)


def test_bad_masks_are_told() -> None:
    pipe = _pipe("euler", "cfg", "cpu", fused=True)
    mask = torch.ones((1, 1, 1, 4, 4))
    with pytest.raises(ValueError, match="known_latents is missing"):
        _run(pipe, "cpu", latent_mask=mask)
    with pytest.raises(ValueError, match="latent_mask is missing"):
        _run(pipe, "cpu", known_latents=torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="known_latents must have the latents' shape"):
        _run(pipe, "cpu", latent_mask=mask, known_latents=torch.zeros(1, 16, 3, 4, 5))
    pipe.update_components(scheduler=diffusers.UniPCMultistepScheduler())
    with pytest.raises(ValueError, match="flow predictions, got UniPCMultistepScheduler with epsilon"):
        _run(pipe, "cpu", latent_mask=mask, known_latents=torch.zeros(SHAPE))


# --- The parts --------------------------------------------------------------------------------------------------------


def test_one_launch_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("guide", "guided_step", "combine", "blend"):
        function = getattr(latentfast, name)
        monkeypatch.setattr(latentfast, name, lambda *a, _f=function, _n=name, **k: calls.append(_n) or _f(*a, **k))
    _run(_pipe("euler", "apg", "cpu", fused=True), "cpu")
    assert calls == ["guided_step"] * STEPS


@pytest.mark.parametrize("cls", LOOPS)
def test_fuse_copies(cls: type) -> None:
    step = cls()
    fused = fuse(step)
    assert type(fused) is cls and isinstance(fused.sub_blocks["after_denoiser"], WanFusedAfterDenoiser)
    assert not isinstance(step.sub_blocks["after_denoiser"], WanFusedAfterDenoiser)
    assert list(fused.sub_blocks) == list(step.sub_blocks)
    assert {c.name for c in fused.expected_components} == {c.name for c in step.expected_components}
    assert {x.name for x in step.inputs} < {x.name for x in fused.inputs}
    with pytest.raises(ValueError, match="step must be a denoising loop of Wan"):
        fuse(fused)
