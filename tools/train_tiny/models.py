"""The sizes of the embedded model's parts, their making, and the folder they are saved in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from latentfast.tiny.caption import END, PAD, VOCABULARY, make_tokenizer
from tools.train_tiny.common import Log

FLOW_SHIFT = 3.0
LATENT_NOISE = 0.25  # sigma of the latent the decoder is trained to stand
LARGEST_FILE, LARGEST_FOLDER = 15 * 2**20, 24_000_000  # bytes


def make_vae(smoke: bool = False) -> AutoencoderKLWan:
    """The smaller encoder halves the cost of a training clip and of ``encode`` on a CPU; the decoder sets
    the quality.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16 if smoke else 32,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for m in vae.modules():  # every residual block starts as the identity
        if isinstance(m, WanResidualBlock):
            nn.init.zeros_(m.conv2.weight)
            nn.init.zeros_(m.conv2.bias)
    return vae


def make_text_encoder(smoke: bool = False) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(VOCABULARY),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=1 if smoke else 3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(END),
        attn_implementation="eager",
    )
    return UMT5EncoderModel(config)


def make_transformer(smoke: bool = False) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=128,
        freq_dim=128,
        ffn_dim=128 if smoke else 1024,
        num_layers=1 if smoke else 8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )


def make_scheduler(kind: str = "euler") -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    if kind == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=FLOW_SHIFT)
    if kind == "unipc":
        return UniPCMultistepScheduler(
            num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        )
    raise ValueError(f"scheduler must be euler or unipc; got {kind!r}")


@torch.no_grad()
def seal_vae(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Writes the latents' statistics into the configuration and makes the log-variance, the output's second
    half, a constant.
    """
    z = vae.config.z_dim
    vae.quant_conv.weight[z:] = 0
    vae.quant_conv.bias[z:] = 2 * math.log(LATENT_NOISE)
    vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    vae.eval()


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    scheduler: str,
    log: Log,
) -> WanPipeline:
    """Writes the pipeline in float16 in diffusers' own format and loads it back, as a user would."""
    pipe = WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=make_scheduler(scheduler),
        transformer=transformer,
    )
    # half() rather than to(): the library's to() keeps norms and tables in float32, and they fit in float16 as
    # well.
    for m in (vae, text_encoder, transformer):
        nn.Module.half(m)
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size="12MB")
    for path in folder.rglob("config.json"):  # a path of the training machine has no place in a released file
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    check_sizes(folder, log)
    return WanPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def check_sizes(folder: Path, log: Log) -> int:
    files = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    total, largest = sum(files.values()), max(files.values())
    log(f"{folder}: {total / 1e6:.2f} MB in {len(files)} files, the largest {largest / 2**20:.2f} MiB")
    if total > LARGEST_FOLDER or largest > LARGEST_FILE:
        log(f"TOO LARGE: at most {LARGEST_FOLDER / 1e6:.0f} MB in all and {LARGEST_FILE / 2**20:.0f} MiB a file")
    return total
