"""Where the video models of diffusers attend to their text: the modules to hook, and how queries and keys lie there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "TextAttention",
    "VideoAttention",
    "by_name",
    "guided_in_one_batch",
    "text_attentions",
    "token_grid",
    "video_attentions",
]

#: (queries' hook, keys' hook, arguments of the attention's call) -> q (B, H, Nq, D), k (B, H, Nk, D), as attention
#: gets them: after norm and rotary embedding.
Read = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TextAttention:
    """One layer in which the video's tokens attend to the text's.

    Attributes:
        module: the attention.
        queries: the module whose output holds the video's queries.
        keys: the module whose output holds the text's keys; it runs after `queries`.
    """

    module: nn.Module
    queries: nn.Module
    keys: nn.Module
    reader: Read

    @property
    def joint(self) -> bool:
        """Whether `read` needs the arguments of the attention's call: where the text ends, rotary embeddings."""
        return self.reader is not _cross

    def read(self, queries: Tensor, keys: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """q `(B, H, Nq, D)` of the video and k `(B, H, Nk, D)` of the text, of the two modules' outputs."""
        return self.reader(self.module, queries, keys, call)


@dataclass(frozen=True)
class VideoAttention:
    """One layer in which the video's tokens attend to each other.

    Attributes:
        module: the attention.
        queries, keys: the modules whose outputs hold the video's queries and keys.
        dim: the dimension of the tokens in these outputs.
        text: where joint attention has the text's tokens in it; empty where it has none there.
    """

    module: nn.Module
    queries: nn.Module
    keys: nn.Module
    dim: int = 1
    text: Literal["", "first", "last"] = ""

    def video(self, x: Tensor, call: dict[str, Any]) -> Tensor:
        """The video's tokens in queries or keys, a view; `call` holds the arguments of the attention's call."""
        if not self.text:
            return x
        text = call["encoder_hidden_states"].shape[1]
        start = text if self.text == "first" else 0
        return x.narrow(self.dim, start, x.shape[self.dim] - text)


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by name, also those that come by position."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _cross(attention: Any, queries: Tensor, keys: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-attention without rotary embedding: heads side by side in the channels."""
    # In an image-to-video Wan the image's tokens have keys of their own: norm_k sees the text's alone.
    q, k = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (queries, keys))
    return q, k


def _text_first(attention: Any, queries: Tensor, keys: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Joint attention of CogVideoX: one sequence (B, H, text + video, D)."""
    from diffusers.models.embeddings import apply_rotary_emb

    text, rotary = call["encoder_hidden_states"].shape[1], call.get("image_rotary_emb")
    q: Any = queries[:, :, text:]
    if rotary is not None:
        q = apply_rotary_emb(q, rotary)
    return q, keys[:, :, :text]


def _text_last(attention: Any, queries: Tensor, keys: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Joint attention of HunyuanVideo's single-stream blocks: one sequence (B, video + text, H, D)."""
    text = call["encoder_hidden_states"].shape[1]
    return _added(attention, queries[:, :-text], keys[:, -text:], call)


def _added(attention: Any, queries: Tensor, keys: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Joint attention whose text has projections of its own, both (B, N, H, D): HunyuanVideo's double-stream blocks."""
    from diffusers.models.embeddings import apply_rotary_emb

    rotary = call.get("image_rotary_emb")
    q: Any = queries if rotary is None else apply_rotary_emb(queries, rotary, sequence_dim=1)
    return q.transpose(1, 2), keys.transpose(1, 2)


def _mochi(attention: Any, queries: Tensor, keys: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As `_added`, with Mochi's rotary embedding: angles (N, H, D/2) that differ between heads."""
    rotary = call.get("image_rotary_emb")
    if rotary is not None:
        cos, sin = rotary
        even, odd = queries[..., 0::2].float(), queries[..., 1::2].float()
        pairs = (even * cos - odd * sin).to(queries.dtype), (even * sin + odd * cos).to(queries.dtype)
        queries = torch.stack(pairs, dim=-1).flatten(-2)
    return queries.transpose(1, 2), keys.transpose(1, 2)


def _of(model: nn.Module, *names: str) -> bool:
    """Whether a model is of one of diffusers' classes, or of a subclass."""
    return any(base.__name__ in names for base in type(model).__mro__)


def text_attentions(model: nn.Module) -> list[TextAttention]:
    """A transformer's layers in which the video attends to the text, in the order in which they run.

    Raises:
        ValueError: the model isn't known, or its attention has no text to look at.
    """
    blocks: Any = getattr(model, "blocks", None) or getattr(model, "transformer_blocks", [])
    if _of(model, "WanTransformer3DModel", "LTXVideoTransformer3DModel"):
        return [_normed(block.attn2, _cross) for block in blocks]
    if _of(model, "CogVideoXTransformer3DModel"):
        return [_normed(block.attn1, _text_first) for block in blocks]
    if _of(model, "HunyuanVideoTransformer3DModel"):
        double = [_normed(block.attn, _added, "norm_added_k") for block in blocks]
        singles: Any = model.single_transformer_blocks
        return double + [_normed(block.attn, _text_last) for block in singles]
    if _of(model, "MochiTransformer3DModel"):
        return [_normed(block.attn1, _mochi, "norm_added_k") for block in blocks]
    if _of(model, "UNetSpatioTemporalConditionModel"):
        raise ValueError(
            "pipe must have a prompt of several tokens: Stable Video Diffusion attends to one, its image's"
        )
    known = "Wan, LTX, CogVideoX, HunyuanVideo and Mochi"
    raise ValueError(f"pipe must have a transformer of {known}, got {type(model).__name__}")


def video_attentions(model: nn.Module) -> list[VideoAttention]:
    """A transformer's layers in which the video attends to itself, in the order in which they run.

    Raises:
        ValueError: the model isn't known.
    """
    blocks: Any = getattr(model, "blocks", None) or getattr(model, "transformer_blocks", [])
    if _of(model, "WanTransformer3DModel"):
        return [_video(block.attn1) for block in blocks]
    if _of(model, "CogVideoXTransformer3DModel"):
        return [_video(block.attn1, 2, "first") for block in blocks]
    if _of(model, "HunyuanVideoTransformer3DModel"):
        singles: Any = model.single_transformer_blocks
        return [_video(block.attn) for block in blocks] + [_video(block.attn, 1, "last") for block in singles]
    if _of(model, "MochiTransformer3DModel"):
        return [_video(block.attn1) for block in blocks]
    known = "Wan, CogVideoX, HunyuanVideo and Mochi"
    raise ValueError(f"structure needs a transformer of {known}, got {type(model).__name__}: pass structure=0")


def _video(attention: Any, dim: int = 1, text: Literal["", "first", "last"] = "") -> VideoAttention:
    _check_norms(attention, "norm_k")
    return VideoAttention(attention, attention.norm_q, attention.norm_k, dim, text)


def _normed(attention: Any, reader: Read, keys: str = "norm_k") -> TextAttention:
    _check_norms(attention, keys)
    return TextAttention(attention, attention.norm_q, getattr(attention, keys), reader)


def _check_norms(attention: Any, keys: str) -> None:
    # The norms see what fused projections give as well, so it is them that are hooked.
    if attention.norm_q is None or getattr(attention, keys) is None:
        raise ValueError(f"pipe's attention must normalise its queries and keys, {type(attention).__name__} does not")


def token_grid(model: Any, call: dict[str, Any]) -> tuple[int, int, int]:
    """The grid (T, H, W) of the video's tokens for the arguments of a transformer's call."""
    if _of(model, "LTXVideoTransformer3DModel"):  # its latents come packed
        return call["num_frames"], call["height"], call["width"]
    latents, patch = call["hidden_states"], model.config.patch_size
    frames = latents.shape[1 if _of(model, "CogVideoXTransformer3DModel") else 2]
    per_frame = getattr(model.config, "patch_size_t", None) or 1
    t, h, w = patch if isinstance(patch, (tuple, list)) else (per_frame, patch, patch)
    return frames // t, latents.shape[3] // h, latents.shape[4] // w


def guided_in_one_batch(pipe: Any, model: nn.Module) -> bool:
    """Whether the call that runs now holds the unconditional samples before the conditional ones."""
    if not _of(model, "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel", "MochiTransformer3DModel"):
        return False
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    return pipe.guidance_scale > 1 if guided is None else bool(guided)
