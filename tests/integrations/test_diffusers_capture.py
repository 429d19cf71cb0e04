"""Attention capture against the softmax by hand of the very Q and K that the models' attention gets, and its hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
)
from transformers import T5Config, T5EncoderModel

from latentfast.integrations.diffusers import AttentionCapture
from tests.integrations.diffusers_models import (
    KEPT,
    MODELS,
    TEXT,
    VOCABULARY,
    made,
    randn,
    wan,
    wan_inputs,
    word_pieces,
)

pytest_plugins = ("cli_fixtures",)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def masses(monkeypatch: pytest.MonkeyPatch, name: str, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """By hand, in float64, for each layer, sample, video token and key: the mean over heads of the softmax."""
    seen: list[Tensor] = []
    attention = nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        found = MODELS[name].reads(query, key)
        if found is not None:
            q, k = (x.double() for x in found)
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if "encoder_attention_mask" in inputs and len(scores) == len(KEPT):
                scores = scores.masked_fill(~KEPT.to(q.device)[:, None, None], -torch.inf)
            seen.append(scores.softmax(-1).mean(1))
        return attention(query, key, value, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        run(model, inputs)
    if name == "mochi":  # one call a sample, without the keys of padding
        pairs = zip(seen[::2], seen[1::2], strict=True)
        seen = [torch.cat([a, nn.functional.pad(b, (0, TEXT - b.shape[-1]))]) for a, b in pairs]
    return torch.stack(seen)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_maps_are_the_softmax_of_the_models_own_queries_and_keys(name: str, device: str, monkeypatch) -> None:
    model, inputs = made(name, device)
    by_hand = masses(monkeypatch, name, model, inputs)
    assert len(by_hand) == MODELS[name].layers
    plain, before = run(model, inputs), hooks(model)
    groups = [[0], [1, 3], [2]]
    with AttentionCapture(model, groups) as capture, AttentionCapture(model, groups, layers={0: 1, -1: 3}) as weighted:
        watched = run(model, inputs)
    assert torch.equal(plain, watched)
    assert hooks(model) == before
    maps = capture.maps()
    assert maps.shape == (2, 3, *MODELS[name].grid) and maps.dtype == torch.float32 and maps.is_contiguous()
    grouped = torch.stack([by_hand[..., group].sum(-1) for group in groups], 2)
    # float32 products of a few elements: a score is off by some 1e-6, and so are masses below 1
    torch.testing.assert_close(maps.flatten(2).double(), grouped.mean(0), rtol=0, atol=2e-6)
    by_weight = (grouped[0] + 3 * grouped[-1]) / 4
    torch.testing.assert_close(weighted.maps().flatten(2).double(), by_weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_fused_projections(name: str, monkeypatch) -> None:
    model, inputs = made(name)
    with AttentionCapture(model, [[1]]) as apart:
        run(model, inputs)
    model.fuse_qkv_projections()
    plain = run(model, inputs)
    with AttentionCapture(model, [[1]]) as fused:
        assert torch.equal(run(model, inputs), plain)
    # one product instead of three may sum in another order
    torch.testing.assert_close(fused.maps(), apart.maps(), rtol=1e-4, atol=1e-6)


def test_the_images_tokens_of_an_image_to_video_model_are_not_the_texts(monkeypatch) -> None:
    torch.manual_seed(0)
    model = wan(image_dim=8, added_kv_proj_dim=24).eval()
    inputs = wan_inputs() | {"encoder_hidden_states": randn(2, 512, 8), "encoder_hidden_states_image": randn(2, 5, 8)}
    with AttentionCapture(model, [range(512)]) as capture, AttentionCapture(model, [[511]]):
        run(model, inputs)
    torch.testing.assert_close(capture.maps(), torch.ones(2, 1, 3, 2, 3))


def test_steps_samples_and_masks_of_keys() -> None:
    model, inputs = made("wan")
    other = inputs | {"hidden_states": inputs["hidden_states"].flip(0) * 2}
    kept = torch.tensor([True, True, True, False, True, False])
    with (
        AttentionCapture(model, [[1]], steps=[0]) as first,
        AttentionCapture(model, [[1]], steps=[1]) as second,
        AttentionCapture(model, [[1]], steps={0: 1, 1: 3}) as both,
        AttentionCapture(model, [[1]], samples=slice(1, 2)) as last,
        AttentionCapture(model, [[0, 1, 2, 4]], key_mask=kept) as masked,
        AttentionCapture(model, [[1]], steps=[7]) as never,
    ):
        run(model, inputs)
        run(model, other)
    assert not torch.equal(first.maps(), second.maps())
    torch.testing.assert_close(both.maps(), (first.maps() + 3 * second.maps()) / 4)
    torch.testing.assert_close(last.maps(), (first.maps() + second.maps())[1:] / 2)
    torch.testing.assert_close(masked.maps(), torch.ones_like(masked.maps()))
    with pytest.raises(RuntimeError, match="nothing was captured"):
        never.maps()


def test_hooks_are_gone_after_an_error_too() -> None:
    model, inputs = made("wan")
    capture = AttentionCapture(model, [[99]])
    with pytest.raises(ValueError, match="keys from 0 to 5"), capture:
        run(model, inputs)
    assert hooks(model) == 0
    with capture, pytest.raises(RuntimeError, match="running already"):
        capture.__enter__()
    assert hooks(model) == 0


def test_compiled_models_are_captured_where_they_run_eagerly() -> None:
    model, inputs = made("wan")
    plain = run(model, inputs)
    with AttentionCapture(model, [[1]]) as eager:
        run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    run(compiled, inputs)
    with torch.compiler.set_stance("force_eager"), AttentionCapture(compiled, [[1]]) as capture:
        assert torch.equal(run(compiled, inputs), plain)
    assert torch.equal(capture.maps(), eager.maps())
    with AttentionCapture(compiled, [[1]]) as none:
        run(compiled, inputs)
    with pytest.raises(RuntimeError, match="compiled code runs no hooks"):
        none.maps()


def test_a_grid_that_changes_is_told() -> None:
    model, inputs = made("wan")
    with AttentionCapture(model, [[0]]) as capture:
        run(model, inputs)
        small = inputs | {"hidden_states": inputs["hidden_states"][..., :4]}
        with pytest.raises(RuntimeError, match=r"changed from \(3, 2, 3\) to \(3, 2, 2\)"):
            run(model, small)
        capture.reset()
        run(model, small)
    assert capture.maps().shape == (2, 1, 3, 2, 2)


# ------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(VOCABULARY), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    made = WanPipeline(
        tokenizer=word_pieces(), text_encoder=T5EncoderModel(config).eval(), vae=vae, transformer=wan().eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe: Any, prompt: str = "a red circle", **options: Any) -> Tensor:
    given = {
        "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 1.0,
        "max_sequence_length": 16, "output_type": "latent", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe(prompt, **(given | options)).frames


def test_only_the_conditional_call_of_a_guided_step_counts(pipe: WanPipeline) -> None:
    options = {"prompt": "a red circle", "max_sequence_length": 16, "steps": [0]}
    with AttentionCapture(pipe, ["circle"], **options) as plain:
        unguided = call(pipe)
    with AttentionCapture(pipe, ["circle"], **options) as guided, AttentionCapture(pipe, ["red"], **options) as other:
        latents = call(pipe, guidance_scale=4.0, negative_prompt="blue square")
    assert guided.step == 2
    assert torch.equal(guided.maps(), plain.maps()) and not torch.equal(guided.maps(), other.maps())
    assert torch.equal(latents, call(pipe, guidance_scale=4.0, negative_prompt="blue square"))
    assert torch.equal(unguided, call(pipe))


def test_a_new_call_of_the_pipeline_starts_anew(pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with AttentionCapture(pipe, [[1]]) as twice:
        call(pipe, "blue square")
        call(pipe)
    with AttentionCapture(pipe, [[1]]) as once:
        call(pipe)
    assert twice.step == 2
    assert torch.equal(twice.maps(), once.maps())
    # a scheduler may give the same timesteps again
    pipe.scheduler.set_timesteps(3)
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", lambda *_, **__: None)
    with AttentionCapture(pipe, [[1]]) as again:
        for prompt in ("blue square", "a red circle"):
            pipe.scheduler.model_outputs, pipe.scheduler.lower_order_nums = [None] * 2, 0
            pipe.scheduler.last_sample = pipe.scheduler._step_index = None
            call(pipe, prompt)
    assert again.step == 2 and torch.equal(again.maps(), once.maps())


def test_two_transformers_that_take_turns(pipe: WanPipeline) -> None:
    torch.manual_seed(1)
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    turns = WanPipeline(**parts, transformer_2=wan().eval(), boundary_ratio=0.9)
    turns.set_progress_bar_config(disable=True)
    with (
        AttentionCapture(turns, [[1]]) as whole,
        AttentionCapture(turns, [[1]], steps=[0]) as first,
        AttentionCapture(turns, [[1]], steps=[1, 2]) as later,
        AttentionCapture(turns.transformer, [[1]]) as one,
    ):
        call(turns, guidance_scale=3.0)
    # the first transformer runs in the first step alone, called for both sides of the guidance
    assert whole.step == 2 and one.step == 1
    torch.testing.assert_close(whole.maps(), (first.maps() + 2 * later.maps()) / 3)


def test_one_of_two_prompts(pipe: WanPipeline) -> None:
    noise = randn(1, 4, 2, 8, 8).repeat(2, 1, 1, 1, 1)
    with AttentionCapture(pipe, [[1]], samples=slice(1, 2)) as capture:
        call(pipe, ["blue square", "a red circle"], latents=noise, guidance_scale=2.0)
    with AttentionCapture(pipe, [[1]]) as alone:
        call(pipe, latents=noise[:1], guidance_scale=2.0)
    # a batch of two may be multiplied in another order
    torch.testing.assert_close(capture.maps(), alone.maps(), rtol=1e-4, atol=1e-6)


class TwoHalves:
    """A pipeline of the kind that makes one call of [unconditional, conditional] samples."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler = transformer, FlowMatchEulerDiscreteScheduler()
        self.do_classifier_free_guidance = True


@pytest.mark.parametrize("name", ["ltx", "cogvideox", "mochi"])
def test_only_the_conditional_half_of_a_guided_batch_counts(name: str) -> None:
    model, inputs = made(name)
    pipe = TwoHalves(model)
    with AttentionCapture(pipe, [[0], [2]]) as half, AttentionCapture(model, [[0], [2]]) as whole:
        run(model, inputs)
    torch.testing.assert_close(half.maps(), whole.maps()[1:], rtol=1e-6, atol=1e-7)
    with AttentionCapture(pipe, [[0]], samples=slice(0, 1)) as first:
        run(model, inputs)
    assert torch.equal(first.maps(), half.maps()[:, :1])
    pipe.do_classifier_free_guidance = False
    with AttentionCapture(pipe, [[0], [2]]) as both:
        run(model, inputs)
    assert torch.equal(both.maps(), whole.maps())


def test_ltx_which_packs_its_latents_and_guides_in_one_batch(ltx_folder: Path) -> None:
    pipe = LTXPipeline.from_pretrained(str(ltx_folder))
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 32}
    plain = call(pipe, guidance_scale=3.0, negative_prompt="blue", **options)
    with AttentionCapture(pipe, ["red", "circle"], prompt="a red circle", steps=[0]) as guided:
        latents = call(pipe, guidance_scale=3.0, negative_prompt="blue", **options)
    with AttentionCapture(pipe, ["red", "circle"], prompt="a red circle", steps=[0]) as alone:
        call(pipe, guidance_scale=1.0, **options)
    assert torch.equal(latents, plain)
    assert guided.maps().shape == (1, 2, 3, 16, 16)
    torch.testing.assert_close(guided.maps(), alone.maps(), rtol=1e-4, atol=1e-6)


def test_captures_that_are_refused(pipe: WanPipeline) -> None:
    for error, match, tokens, options in (
        (ValueError, "'green' is not among its words: a, red", ["green"], {"prompt": "a red circle"}),
        (ValueError, "words need a pipeline and the prompt", ["red"], {}),
        (ValueError, "8 tokens that the pipeline keeps: 'left'", ["left"], {"prompt": "a red " * 4 + "left"}),
        (TypeError, "tokens must be a list", "red", {"prompt": "a red circle"}),
        (TypeError, "tokens must be a list", [], {}),
        (ValueError, "layers must be from -2 to 1, got 2", [[0]], {"layers": [2]}),
        (ValueError, "steps must be from 0, got -1", [[0]], {"steps": [-1]}),
        (ValueError, "layers must have weights", [[0]], {"layers": {0: -1.0}}),
        (TypeError, "steps must be whole numbers", [[0]], {"steps": [0.5]}),
        (ValueError, "at least one with a weight above 0", [[0]], {"steps": []}),
        (TypeError, "key_mask must be a bool tensor", [[0]], {"key_mask": torch.ones(3)}),
        (TypeError, "samples must be a slice", [[0]], {"samples": 1}),
    ):
        with pytest.raises(error, match=match):
            AttentionCapture(pipe, tokens, max_sequence_length=8, **options)
    with pytest.raises(ValueError, match=r"a transformer of Wan, LTX, .* got Linear"):
        AttentionCapture(nn.Linear(2, 2), [[0]])
    with pytest.raises(ValueError, match="must have a transformer"):
        AttentionCapture(object(), [[0]])
    config = {"block_out_channels": (32, 32), "num_attention_heads": (2, 2), "cross_attention_dim": 8}
    blocks = {
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }
    unet = UNetSpatioTemporalConditionModel(
        layers_per_block=1, projection_class_embeddings_input_dim=96, **config, **blocks
    )
    with pytest.raises(ValueError, match="Stable Video Diffusion attends to one"):
        AttentionCapture(type("Video", (), {"unet": unet})(), [[0]])
    slow = type("Slow", (), {"tokenizer": object(), "transformer": pipe.transformer})()
    with pytest.raises(TypeError, match="must be a fast one"):
        AttentionCapture(slow, ["red"], prompt="a red circle")


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_gpu_capture_never_waits_for_the_device(name: str) -> None:
    model, inputs = made(name, "cuda")
    if name == "mochi":
        pytest.skip("Mochi's own attention looks for its padding with nonzero, which waits")
    run(model, inputs)
    with AttentionCapture(model, [[0], [1, 3]]) as capture:
        run(model, inputs)  # kernels are loaded on their first call
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(model, inputs)
            capture.maps()
        finally:
            torch.cuda.set_sync_debug_mode("default")
