"""Pipelines of diffusers' own classes with small random weights, and what to call them with. Nothing is downloaded.

Texts are given as embeddings, so that no pipeline needs a text encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from torch import Tensor

STEPS = 4
TOKENS, WIDTH = 6, 16


@dataclass(frozen=True)
class Case:
    """A pipeline and the arguments of one call of it, of which the texts are made by `texts`."""

    name: str
    build: Callable[[], DiffusionPipeline]
    texts: dict[str, tuple[int, ...]]
    arguments: dict[str, Any] = field(default_factory=dict)
    #: The component that predicts.
    model: str = "transformer"

    def __str__(self) -> str:
        return self.name

    def pipe(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        """The same weights every time."""
        torch.manual_seed(0)
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)

    def inputs(self, device: str = "cpu", dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
        """The same arguments every time."""
        generator = torch.Generator().manual_seed(1)
        texts = {
            name: torch.ones(shape, dtype=torch.bool, device=device)
            if name.endswith("attention_mask")
            else torch.randn(shape, generator=generator).to(device, dtype)
            for name, shape in self.texts.items()
        }
        noise = torch.Generator().manual_seed(2)
        return {
            **texts,
            "num_inference_steps": STEPS,
            "generator": noise,
            "output_type": "latent",
            **self.arguments,
            **more,
        }

    def latents(self, pipe: DiffusionPipeline, device: str = "cpu", dtype: torch.dtype = torch.float32, **more: Any):
        """The latents after each step, from callbacks."""
        seen: list[Tensor] = []

        def keep(pipe: DiffusionPipeline, i: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
            seen.append(kwargs["latents"].clone())
            return kwargs

        pipe(**self.inputs(device, dtype, callback_on_step_end=keep, **more))
        return seen


def _wan_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan_transformer(**config: Any) -> diffusers.WanTransformer3DModel:
    """A transformer of two small layers."""
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, **config
    )


def _unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )


def _wan() -> DiffusionPipeline:
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=_wan_vae(), scheduler=_unipc(), transformer=wan_transformer()
    )


def _wan22() -> DiffusionPipeline:
    transformers = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=_wan_vae(), scheduler=_unipc(), boundary_ratio=0.8, **transformers
    )


def _wan_i2v() -> DiffusionPipeline:
    transformer = wan_transformer(in_channels=36, out_channels=16)
    return diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=_wan_vae(), scheduler=_unipc(), transformer=transformer
    )


def _ltx_parts(**shift: Any) -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**(shift or {"use_dynamic_shifting": True}))
    return {
        "tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler, "transformer": transformer
    }  # fmt: skip


def _hunyuan() -> DiffusionPipeline:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _cogvideox(scheduler: type) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        transformer = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=WIDTH,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            max_text_seq_length=TOKENS,
        )
        vae = diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        )
        how = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return diffusers.CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler(**how)
        )

    return build


def _mochi() -> DiffusionPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=TOKENS,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )


def _kl() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )


def _unet(**config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
        **config,
    )


def _animatediff() -> DiffusionPipeline:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    return diffusers.AnimateDiffPipeline(
        vae=_kl(), text_encoder=None, tokenizer=None, unet=_unet(), motion_adapter=adapter, scheduler=scheduler
    )


def _svd() -> DiffusionPipeline:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        intermediate_size=16,
        patch_size=56,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    from transformers import CLIPImageProcessor

    return diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    )


def _betas() -> dict[str, Any]:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _sd() -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=_kl(),
        text_encoder=None,
        tokenizer=None,
        unet=_unet(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**_betas(), steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> DiffusionPipeline:
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_kl(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**_betas(), steps_offset=1),
    )


def _picture() -> Image.Image:
    return Image.linear_gradient("L").resize((32, 32)).convert("RGB")


_TEXT = (1, TOKENS, WIDTH)
_TEXTS = {"prompt_embeds": _TEXT, "negative_prompt_embeds": _TEXT}
_MASKS = {"prompt_attention_mask": (1, TOKENS), "negative_prompt_attention_mask": (1, TOKENS)}
_VIDEO = {"height": 32, "width": 32, "num_frames": 9}

CASES = [
    Case("wan", _wan, _TEXTS, {**_VIDEO, "guidance_scale": 5.0}),
    Case("wan-2.2", _wan22, _TEXTS, {**_VIDEO, "guidance_scale": 4.0, "guidance_scale_2": 3.0}),
    Case("wan-i2v", _wan_i2v, _TEXTS, {**_VIDEO, "guidance_scale": 5.0, "image": _picture()}),
    Case("ltx", lambda: diffusers.LTXPipeline(**_ltx_parts()), {**_TEXTS, **_MASKS}, {**_VIDEO, "guidance_scale": 3.0}),
    Case(
        "ltx-rescaled",
        lambda: diffusers.LTXPipeline(**_ltx_parts()),
        {**_TEXTS, **_MASKS},
        {**_VIDEO, "guidance_scale": 3.0, "guidance_rescale": 0.7},
    ),
    Case(
        "ltx-condition",
        lambda: diffusers.LTXConditionPipeline(**_ltx_parts(shift=2.0)),
        {**_TEXTS, **_MASKS},
        {**_VIDEO, "guidance_scale": 3.0, "conditions": LTXVideoCondition(image=_picture())},
    ),
    Case(
        "hunyuan",
        _hunyuan,
        {"prompt_embeds": _TEXT, "pooled_prompt_embeds": (1, 8), "prompt_attention_mask": (1, TOKENS)},
        {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 4.5},
    ),
    Case(
        "hunyuan-guided",
        _hunyuan,
        {
            "prompt_embeds": _TEXT,
            "pooled_prompt_embeds": (1, 8),
            "prompt_attention_mask": (1, TOKENS),
            "negative_prompt_embeds": _TEXT,
            "negative_pooled_prompt_embeds": (1, 8),
            "negative_prompt_attention_mask": (1, TOKENS),
        },
        {"height": 16, "width": 16, "num_frames": 9, "true_cfg_scale": 3.0},
    ),
    Case(
        "cogvideox-ddim",
        _cogvideox(diffusers.CogVideoXDDIMScheduler),
        _TEXTS,
        {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 6.0},
    ),
    Case(
        "cogvideox-dpm",
        _cogvideox(diffusers.CogVideoXDPMScheduler),
        _TEXTS,
        {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 6.0, "use_dynamic_cfg": True},
    ),
    Case("mochi", _mochi, {**_TEXTS, **_MASKS}, {"height": 16, "width": 16, "num_frames": 7, "guidance_scale": 4.5}),
    Case(
        "animatediff",
        _animatediff,
        _TEXTS,
        {"height": 16, "width": 16, "num_frames": 3, "guidance_scale": 7.5},
        model="unet",
    ),
    Case("svd", _svd, {}, {"height": 32, "width": 32, "num_frames": 3, "image": _picture()}, model="unet"),
    Case("sd", _sd, _TEXTS, {"height": 16, "width": 16, "guidance_scale": 7.5}, model="unet"),
    Case(
        "sdxl",
        _sdxl,
        {**_TEXTS, "pooled_prompt_embeds": (1, 8), "negative_pooled_prompt_embeds": (1, 8)},
        {"height": 16, "width": 16, "guidance_scale": 5.0},
        model="unet",
    ),
]
BY_NAME = {case.name: case for case in CASES}
