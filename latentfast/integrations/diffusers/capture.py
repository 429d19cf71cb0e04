"""Where a video model's attention looks for words of its prompt, added up while a pipeline runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from latentfast.integrations.diffusers._attention import (
    TextAttention,
    by_name,
    guided_in_one_batch,
    text_attentions,
    token_grid,
)
from latentfast.integrations.diffusers.words import PromptTokens, Words, prompt_tokens
from latentfast.ops.mask import token_heatmap

__all__ = ["AttentionCapture"]

#: Layers or steps: which, or how much each counts.
Weights = Iterable[int] | Mapping[int, float] | None


class AttentionCapture:
    """Adds up, while a pipeline runs, the attention that its video tokens pay to words of the prompt.

    A context manager: inside, forward hooks on public modules read the queries of the video and the keys of the text
    in each chosen layer, and `latentfast.token_heatmap` reduces them to one number a word and video token. Scores are
    never stored, the model's results keep their bits, nothing waits for the device. Outside, no hook is left.

    The map of a word is the mean over heads, chosen layers and chosen steps of the softmax mass on its tokens. The
    softmax is the model's own in the cross-attention of Wan and LTX. In joint attention (CogVideoX, HunyuanVideo,
    Mochi) it runs over the keys of the text alone: the text–video block of the scores.

    Only the conditional half of guidance counts. What runs first in a step is the conditional call where a pipeline
    makes two (Wan, HunyuanVideo), and the second half of the batch where it makes one (LTX, CogVideoX, Mochi). A new
    call of the pipeline starts anew; `maps` are those of the last.

    Code that `torch.compile` made runs no hooks: a compiled transformer is captured under
    ``torch.compiler.set_stance("force_eager")``.

    Args:
        pipe: A pipeline whose ``transformer`` (and ``transformer_2``) is one of Wan, LTX, CogVideoX, HunyuanVideo or
            Mochi; or such a transformer itself: then each of its calls is a step, and all samples count.
        tokens: What is mapped, each a word or phrase of `prompt` (see `words.token_spans`), or a list of words or of
            key numbers that are mapped together.
        prompt: The prompt that the pipeline is called with; needed for words and for `own_tokens`.
        layers: Numbers of the transformer's blocks, negative from the end, or ``{number: weight}``; None: all, alike.
        steps: Numbers of the denoising steps from 0, or ``{number: weight}``; None: all, alike.
        samples: Which samples of the (conditional) batch are mapped; None: all.
        key_mask: bool `(Nk,)` or `(B, Nk)`, True for keys that take part; None: those of the model's own mask.
        own_tokens: Only the prompt's own tokens take part in the softmax, without padding and end marks, which hold
            most of the mass in some models.
        max_sequence_length: As the pipeline is called with it; None: the default of its call.

    Raises:
        TypeError: an argument is of a wrong type, or the pipeline's tokenizer can't tell words apart.
        ValueError: a word isn't in the prompt; a layer or step doesn't exist; the model's attention isn't known.

    Example:
        >>> from latentfast import tiny
        >>> from latentfast.integrations.diffusers import AttentionCapture
        >>> pipe, prompt = tiny.load_pipeline(), "a red circle moving left"
        >>> call = {"height": 128, "width": 128, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.5}
        >>> with AttentionCapture(pipe, ["circle"], prompt=prompt) as capture:
        ...     frames = pipe(prompt, **call).frames
        >>> capture.maps().shape
        torch.Size([1, 1, 2, 8, 8])
    """

    def __init__(
        self,
        pipe: Any,
        tokens: Sequence[Words | Sequence[Words] | Sequence[int]],
        *,
        prompt: str | None = None,
        layers: Weights = None,
        steps: Weights = None,
        samples: slice | None = None,
        key_mask: Tensor | None = None,
        own_tokens: bool = False,
        max_sequence_length: int | None = None,
    ) -> None:
        self._pipe = None if isinstance(pipe, nn.Module) else pipe
        found = [pipe]
        if self._pipe is not None:
            found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
        # torch.compile wraps a module; its hooks are those of the module inside
        self._transformers = [getattr(model, "_orig_mod", model) for model in found if model is not None]
        if not self._transformers:
            raise ValueError(f"pipe must have a transformer, {type(pipe).__name__} has none")
        self._groups, own = _groups(self._pipe, tokens, prompt, own_tokens, max_sequence_length)
        if key_mask is not None and (not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool):
            raise TypeError(f"key_mask must be a bool tensor, got {key_mask!r}")
        if samples is not None and not isinstance(samples, slice):
            raise TypeError(f"samples must be a slice, got {type(samples).__name__}")
        self._key_masks = [] if key_mask is None else [key_mask]
        if own is not None:
            self._key_masks.append(_mask_of(own))
        self._samples = samples or slice(None)
        self._blocks = [text_attentions(model) for model in self._transformers]
        self._layers = [_weights("layers", layers, len(blocks)) for blocks in self._blocks]
        self._steps = _weights("steps", steps, None)
        self._hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forgets what was added up and counts steps from 0, as a new call of the pipeline does by itself."""
        self._sum: Tensor | None = None
        self._total, self._step, self._rows = 0.0, -1, slice(None)
        self._timesteps: Any = None
        self._timestep: Any = None
        self._weight = 0.0
        self._grid: tuple[int, int, int] | None = None
        self._mask: Tensor | None = None

    def __enter__(self) -> AttentionCapture:
        if self._hooks:
            raise RuntimeError("this capture is running already")
        try:
            for model, blocks, weights in zip(self._transformers, self._blocks, self._layers, strict=True):
                self._hooks.append(model.register_forward_pre_hook(self._starts, with_kwargs=True))
                for number, block in enumerate(blocks):
                    if weights is None or number in weights:
                        weight = 1.0 if weights is None else weights[number]
                        self._hooks += _Reader(self, block, weight).hooks()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def maps(self) -> Tensor:
        """The maps so far, also while the pipeline runs.

        Returns:
            A new tensor `(B, G, T, H, W)` on the grid of the model's video tokens, float32 (float64 for a float64
            model), each value in [0, 1].

        Raises:
            RuntimeError: nothing was captured yet.
        """
        if self._sum is None or self._grid is None:
            raise RuntimeError(
                "nothing was captured: run the pipeline inside the `with`, in one of the chosen steps; and compiled "
                'modules under torch.compiler.set_stance("force_eager"), because compiled code runs no hooks'
            )
        return (self._sum / self._total).unflatten(2, self._grid)

    @property
    def step(self) -> int:
        """The number of the denoising step that runs or ran last, from 0; -1 before the first."""
        return self._step

    def _starts(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each call of a transformer: does it count, and for what rows?"""
        given = by_name(model, args, kwargs)
        self._weight = self._counts(given.get("timestep"))
        if not self._weight:
            return
        rows, batch = self._samples, given["hidden_states"].shape[0]
        if self._pipe is not None and guided_in_one_batch(self._pipe, model):
            rows = slice(*(batch // 2 + i if j < 2 else i for j, i in enumerate(rows.indices(batch // 2))))
        grid = token_grid(model, given)
        if self._grid not in (None, grid):
            raise RuntimeError(f"the grid of tokens changed from {self._grid} to {grid}: call reset() between")
        self._grid, self._rows = grid, rows
        self._mask = self._taking_part(given.get("encoder_attention_mask"), given["hidden_states"].device)

    def _counts(self, timestep: Any) -> float:
        """The weight of the call that begins now, 0 if it is not one to count."""
        if self._pipe is not None:
            # Both calls of a guided step get one and the same tensor. It is kept, so that no other takes its place.
            if timestep is not None and timestep is self._timestep:
                return 0.0
            timesteps = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
            # made anew by set_timesteps, or all of them done: another call of the pipeline
            if timesteps is not self._timesteps or (timesteps is not None and self._step + 1 >= len(timesteps)):
                self.reset()
                self._timesteps = timesteps
            self._timestep = timestep
        self._step += 1
        return 1.0 if self._steps is None else self._steps.get(self._step, 0.0)

    def _taking_part(self, text_mask: Tensor | None, device: torch.device) -> Tensor | None:
        masks = []
        if text_mask is not None and text_mask.ndim == 2:
            masks.append(text_mask[self._rows].to(torch.bool))
        # kept on the device, and not waited for
        self._key_masks = [mask.to(device, non_blocking=True) for mask in self._key_masks]
        masks += self._key_masks
        return math.prod(masks[1:], start=masks[0]) if masks else None

    def _add(self, q: Tensor, k: Tensor, weight: float) -> None:
        heat = token_heatmap(q, k, self._groups, key_mask=self._mask)
        weight *= self._weight
        if self._sum is None:
            self._sum = heat.mul_(weight)
        else:
            self._sum.add_(heat, alpha=weight)
        self._total += weight


class _Reader:
    """The hooks of one layer: queries wait for their keys, and both are reduced at once."""

    def __init__(self, capture: AttentionCapture, block: TextAttention, weight: float) -> None:
        self._capture, self._block, self._weight = capture, block, weight
        self._call: dict[str, Any] = {}
        self._queries: Tensor | None = None

    def hooks(self) -> list[Any]:
        block = self._block
        hooks: list[Any] = [
            block.queries.register_forward_hook(self._got_queries),
            block.keys.register_forward_hook(self._got_keys),
        ]
        if block.joint:
            hooks.append(block.module.register_forward_pre_hook(self._called, with_kwargs=True))
        return hooks

    def _called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._capture._weight:
            self._call = by_name(module, args, kwargs)

    def _got_queries(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._capture._weight:
            self._queries = output

    @torch.no_grad()
    def _got_keys(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._queries is None:
            return
        rows = self._capture._rows
        q, k = self._block.read(self._queries[rows], output[rows], self._call)
        self._queries, self._call = None, {}
        self._capture._add(q.detach(), k.detach(), self._weight)


def _groups(
    pipe: Any, tokens: Sequence[Any], prompt: str | None, own_tokens: bool, length: int | None
) -> tuple[list[list[int]], PromptTokens | None]:
    """The groups' key numbers, and where the prompt's own tokens are if only they take part."""
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
        raise TypeError(f"tokens must be a list of words or of lists of key numbers, got {tokens!r}")
    # A pair (word, occurrence) is a word too; whatever else is no list of words holds numbers.
    groups = [[item] if isinstance(item, str) or _is_pair(item) else list(item) for item in tokens]
    words = [word for group in groups for word in group if isinstance(word, (str, tuple))]
    if not words and not own_tokens:
        return groups, None
    if prompt is None or pipe is None:
        what = "words" if words else "own_tokens"
        raise ValueError(f"{what} need a pipeline and the prompt that it is called with: pass pipe and prompt")
    found = prompt_tokens(pipe, prompt, words, max_sequence_length=length)
    keys = iter(found.groups)
    numbers = [[n for item in g for n in (next(keys) if isinstance(item, (str, tuple)) else [item])] for g in groups]
    return [list(dict.fromkeys(group)) for group in numbers], found if own_tokens else None


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _mask_of(found: PromptTokens) -> Tensor:
    mask = torch.zeros(found.count, dtype=torch.bool)
    mask[found.prompt] = True
    return mask


def _weights(name: str, chosen: Weights, count: int | None) -> dict[int, float] | None:
    """`layers` or `steps` as weights by number; None for all alike. `count` is how many there are, if known."""
    if chosen is None:
        return None
    given = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen, 1.0)
    weights: dict[int, float] = {}
    for number, weight in given.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be whole numbers, got {number!r}")
        if not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise ValueError(f"{name} must have weights that are not negative, got {weight!r} for {number}")
        low, high = (0, math.inf) if count is None else (-count, count - 1)
        if not low <= number <= high:
            there = "from 0" if count is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be {there}, got {number}")
        if weight:
            weights[number % count if count else number] = float(weight)
    if not weights:
        raise ValueError(f"{name} must name at least one with a weight above 0, got {chosen!r}")
    return weights
