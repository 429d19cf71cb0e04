"""Small random video transformers of diffusers, and a tokenizer, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

TEXT = 6  # tokens, of which the second sample's last two are padding
KEPT = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


@dataclass(frozen=True)
class Model:
    """A small random transformer: how it is built and called, and which of its attention's calls are read how."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    grid: tuple[int, int, int]
    layers: int
    joint: str = ""  # where the text's tokens are in joint attention: "first" or "last"

    def reads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """The video's queries and the text's keys of a call of attention; None if it is another attention."""
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        if not self.joint:
            return (q, k) if (q.shape[2], k.shape[2]) == (tokens, TEXT) else None
        if q.shape[2] <= tokens:
            return None
        text = q.shape[2] - tokens
        return (q[:, :, text:], k[:, :, :text]) if self.joint == "first" else (q[:, :, :-text], k[:, :, -text:])


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def wan(**options: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, **options,
    )  # fmt: skip


def wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 3, 4, 6),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": randn(2, TEXT, 8),
    }


def rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = randn(tokens, width // 2).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


MODELS = {
    "wan": Model(wan, wan_inputs, (3, 2, 3), 2),
    "ltx": Model(
        lambda: LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=2, caption_channels=8,
        ),
        lambda: {
            "hidden_states": randn(2, 12, 4), "timestep": torch.tensor([500, 500]), "num_frames": 2, "height": 2,
            "width": 3, "encoder_hidden_states": randn(2, TEXT, 8), "encoder_attention_mask": KEPT.long(),
        },
        (2, 2, 3), 2,
    ),
    "cogvideox": Model(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
            text_embed_dim=8, num_layers=2, sample_width=8, sample_height=4, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
        ),
        lambda: {
            "hidden_states": randn(2, 3, 4, 4, 8), "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": randn(2, TEXT, 8), "image_rotary_emb": rotary(24, 8),
        },
        (3, 2, 4), 2, "first",
    ),
    "hunyuan": Model(
        lambda: HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
            text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(2, 2, 4),
        ),
        lambda: {
            "hidden_states": randn(2, 4, 3, 4, 6), "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": randn(2, TEXT, 8), "encoder_attention_mask": KEPT.long(),
            "pooled_projections": randn(2, 8),
        },
        (3, 2, 3), 2, "last",
    ),
    "mochi": Model(
        lambda: MochiTransformer3DModel(
            patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
            in_channels=4, text_embed_dim=8, time_embed_dim=4, activation_fn="swiglu", max_sequence_length=TEXT,
        ),
        lambda: {
            "hidden_states": randn(2, 4, 2, 4, 6), "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": randn(2, TEXT, 8), "encoder_attention_mask": KEPT,
        },
        (2, 2, 3), 2, "last",
    ),
}  # fmt: skip


def made(name: str, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros of an initialisation would hide what is not read
            parameter.add_(0.3 * torch.randn_like(parameter))

    def there(x: Any) -> Any:
        return tuple(map(there, x)) if isinstance(x, tuple) else x.to(device) if isinstance(x, Tensor) else x

    return model.to(device), {key: there(value) for key, value in MODELS[name].inputs().items()}


VOCABULARY = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "##s", "un", "##seen"]


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts words it doesn't know into known pieces."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )
