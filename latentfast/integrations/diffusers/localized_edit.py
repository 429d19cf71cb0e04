"""Edits that stay where the attention looks: a clip and its edit denoised side by side, blended by a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentfast.integrations.diffusers.capture import AttentionCapture, Weights
from latentfast.integrations.diffusers.masks import attention_mask, dilated
from latentfast.integrations.diffusers.sampling import frame_dim, setting, starting_noise
from latentfast.integrations.diffusers.words import Words, changed_words
from latentfast.ops.edit import blend, edit

__all__ = ["LocalizedEdit", "SideBySide", "localized_edit"]

#: (step, sources, edits so far) -> the mask from now on; None as long as it isn't known.
Masks = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class LocalizedEdit:
    """A clip and its edit.

    Attributes:
        source: The latents of the clip under its own prompt, as the pipeline's own call makes them.
        edited: Those of its edit; where `mask` is 0 they have the bits of `source`.
        mask: Where the edit acts, one channel, broadcastable to the latents: zeros and ones, or a user's.
        maps: Of the attention to `words`, then to each of `keep`: `(G, t, h, w)` for each clip; of a user's mask none.
        frames: What the pipeline made of both, the sources first, in the asked ``output_type``.
    """

    source: Tensor
    edited: Tensor
    mask: Tensor
    maps: list[Tensor]
    frames: Any


class SideBySide:
    """The step callback of an edit: the batch is ``[sources, edits]``, both from the same noise.

    After every acting step the edits are blended over the sources, so that they hold the source's bits outside the
    mask. Before, and as long as no mask is known, they follow the sources; after, they run free, and the last step
    blends once more.

    Args:
        masks: What the edits are confined to after each step.
        steps: How many steps there are.
        span: The shares of the steps between which the edit acts.
        directions: Of `latentfast.edit`, added to the edits in equal parts after each acting step; None: none.
        strengths: How much of each, in all.

    Attributes:
        mask: The last one, None before it is known.
        latents: Sources and edits after the last step.
    """

    def __init__(
        self,
        masks: Masks,
        steps: int,
        *,
        span: tuple[float, float] = (0.0, 1.0),
        directions: Tensor | None = None,
        strengths: Sequence[float] = (),
    ) -> None:
        self._masks, self._last = masks, steps - 1
        self._first, self._end = min(round(span[0] * steps), self._last), max(1, round(span[1] * steps))
        self._directions = directions
        self._parts = [strength / max(1, self._end - self._first) for strength in strengths]
        self.mask: Tensor | None = None
        self.latents: Tensor | None = None

    def __call__(self, step: int, latents: Tensor) -> Tensor:
        """The latents to go on with after a step."""
        source, edited = latents.chunk(2)
        acts = self._first <= step < self._end
        if acts or self.mask is None:
            self.mask = self._masks(step, source, edited)
        if step < self._first or self.mask is None:
            edited = source
        elif acts or step == self._last:
            if acts and self._directions is not None:
                edited = edit(edited, self._directions.to(edited), self._parts)
            edited = blend(source, edited, self.mask)
        self.latents = torch.cat([source, edited])
        return self.latents


def localized_edit(
    pipe: Any,
    prompt: str | Sequence[str],
    edit_prompt: str | Sequence[str] | None = None,
    *,
    words: Sequence[Any] | None = None,
    edit_words: Sequence[Any] | None = None,
    keep: Sequence[Any] = (),
    invert: bool = False,
    mask: Tensor | Masks | None = None,
    look: bool = True,
    directions: Tensor | None = None,
    strengths: Sequence[float] = (1.0,),
    strength: float = 1.0,
    until: float = 1.0,
    observe: float = 0.2,
    dilate: int = 1,
    background: float = 0.7,
    layers: Weights = None,
    steps: Weights = None,
    latents: Tensor | None = None,
    generator: torch.Generator | None = None,
    output_type: str = "pil",
    **call: Any,
) -> LocalizedEdit:
    """Makes a clip and its edit, which differs only where words of the prompt are in the picture.

    Both are denoised side by side from the same noise, and after each step the edit is blended over the source by a
    mask. The mask is made of the attention to `words` (see `AttentionCapture` and `attention_mask`): with `look`, of a
    first run of the source alone, so that all of it is known from the first step; without, it grows while both run, of
    the attention so far of the source to `words` and of the edit to `edit_words`, which saves that run and finds
    objects less exactly.

    Args:
        pipe: A text-to-video pipeline whose transformer `AttentionCapture` knows and whose latents have frames: Wan,
            HunyuanVideo, Mochi, CogVideoX.
        prompt: What the clip shows; or a prompt for each clip of a batch.
        edit_prompt: What it shall show inside the mask; None: `prompt`, with `directions`.
        words: Words or phrases of `prompt` for what is edited, mapped together; of a batch a list for each clip. None:
            the words of `prompt` that `edit_prompt` has not.
        edit_words: The same of `edit_prompt`, for a mask that grows. None: its words that `prompt` has not.
        keep: Words of `prompt` for what must stay, in the form of `words`: where more attention is paid to one of them,
            the mask ends.
        invert: Edit everything but what `words` name: a background is best named by what stands before it.
        mask: Where the edit may act, instead of words: in [0, 1], broadcastable to the latents; or a function that is
            called after each step as ``mask(step, sources, edits)`` and gives it, or None as long as it isn't known.
        look: See above.
        directions: Of `latentfast.edit`, added to the edits.
        strengths: How much of each direction, over all acting steps together.
        strength: The share of the steps, from the end, in which the edit acts, in (0, 1]: before, it is the source.
        until: The share of the steps after which it runs free until the last one, where the mask has the last word.
        observe: Without `look`: the share of the steps before the mask is first drawn.
        dilate: Cells of the latents that are added around the mask.
        background: See `sharpen`.
        layers: Of the attention, see `AttentionCapture`.
        steps: Of the attention, see `AttentionCapture`.
        latents: The starting noise of each clip; None: drawn as the pipeline does, from `generator`.
        generator: Of the starting noise.
        output_type: What becomes of the clips, as for the pipeline; "latent" decodes nothing.
        **call: Further arguments of the pipeline's call: steps, guidance, size, `callback_on_step_end`.

    Returns:
        See `LocalizedEdit`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a word isn't in its prompt, numbers or shapes do not fit, or nothing says what to edit.

    Example:
        >>> from latentfast import tiny
        >>> from latentfast.integrations.diffusers import localized_edit
        >>> pipe, prompts = tiny.load_pipeline(), ["a red circle and a blue star", "a green circle and a blue star"]
        >>> call = {"height": 128, "width": 128, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}
        >>> made = localized_edit(pipe, *prompts, words=["red circle"], keep=["blue star"], **call)
        >>> made.edited.shape, made.mask.shape
        (torch.Size([1, 16, 2, 16, 16]), torch.Size([1, 1, 2, 16, 16]))
        >>> outside = (made.mask == 0).expand_as(made.source)
        >>> torch.equal(made.edited[outside], made.source[outside])
        True
    """
    sources, edits = _prompts(prompt, edit_prompt, directions)
    for name, share in (("strength", strength), ("until", until)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be above 0 and up to 1, got {share}")
    if until <= 1 - strength:
        raise ValueError(f"until must be after the edit begins, at {1 - strength:g} of the steps, got {until}")
    if not 0 <= observe < 1:
        raise ValueError(f"observe must be in [0, 1), got {observe}")
    noise = starting_noise(pipe, call, generator) if latents is None else latents
    if noise.shape[0] not in (1, len(sources)):
        raise ValueError(f"latents must be of 1 clip or of {len(sources)}, got {noise.shape[0]}")
    noise = noise.expand(len(sources), *noise.shape[1:])
    count = int(setting(pipe, call, "num_inference_steps"))
    length = setting(pipe, call, "max_sequence_length")
    attention = _Attention(pipe, frame_dim(pipe, noise), dilate, background, invert, layers, steps, length)
    looked = _Captures(())
    with ExitStack() as stack:
        if mask is None:
            named, kept = _named("words", words, sources, edits), _per_clip("keep", keep, len(sources))
            if look:
                with attention.watch(sources, named, kept, 0) as looked:
                    clean = _run(pipe, sources, noise, call, output_type="latent")
                mask = attention.mask(looked, clean)
            else:
                named_edits = _named("edit_words", edit_words, edits, sources)
                looked = stack.enter_context(attention.watch(sources, named, kept, 0))
                of_edits = stack.enter_context(attention.watch(edits, named_edits, kept, len(sources)))
                mask = attention.growing(looked, of_edits, max(1, round(observe * count)))
        confined = SideBySide(
            mask if callable(mask) else _always(mask.to(noise)),
            count,
            span=(1 - strength, until),
            directions=directions,
            strengths=[] if directions is None else strengths,
        )
        both = torch.cat([noise, noise])
        frames = _run(pipe, [*sources, *edits], both, call, output_type=output_type, on_step=confined)
    if confined.mask is None or confined.latents is None:
        raise ValueError("mask must be known by the last step, the function gave None")
    source, edited = confined.latents.chunk(2)
    return LocalizedEdit(source, edited, confined.mask, [capture.maps()[0] for capture in looked], frames)


class _Attention:
    """Masks of the attention to words, for a batch of clips whose prompts differ."""

    def __init__(
        self,
        pipe: Any,
        frames: int,
        dilate: int,
        background: float,
        invert: bool,
        layers: Weights,
        steps: Weights,
        length: int | None,
    ) -> None:
        self._pipe, self._frames, self._dilate, self._background, self._invert = (
            pipe,
            frames,
            dilate,
            background,
            invert,
        )
        self._options: dict[str, Any] = {"layers": layers, "steps": steps, "max_sequence_length": length}

    def watch(
        self, prompts: Sequence[str], words: Sequence[Sequence[Words]], keep: Sequence[Sequence[Words]], first: int
    ) -> _Captures:
        """A capture for each clip: of its words, and of each word that must stay."""
        return _Captures(
            AttentionCapture(
                self._pipe,
                [list(named), *kept],
                prompt=prompt,
                samples=slice(first + i, first + i + 1),
                own_tokens=True,
                **self._options,
            )
            for i, (prompt, named, kept) in enumerate(zip(prompts, words, keep, strict=True))
        )

    def mask(self, captures: _Captures, latents: Tensor) -> Tensor:
        """Where the words are, or everything else, broadcastable to the latents."""
        frames_second = self._frames == 2
        clips = latents if frames_second else latents.transpose(1, 2)
        dilate = 0 if self._invert else self._dilate
        masks = [
            attention_mask(capture.maps(), clip[None], background=self._background, dilate=dilate)
            for capture, clip in zip(captures, clips, strict=True)
        ]
        found = torch.cat(masks)
        if self._invert:
            found = dilated(1 - found, self._dilate)
        return found if frames_second else found.transpose(1, 2)

    def growing(self, of_sources: _Captures, of_edits: _Captures, first: int) -> Masks:
        """A mask that is drawn anew after each step from the `first` on, of the attention so far."""

        def masks(step: int, source: Tensor, edited: Tensor) -> Tensor | None:
            if step + 1 < first:
                return None
            return torch.maximum(self.mask(of_sources, source), self.mask(of_edits, edited))

        return masks


class _Captures(list[AttentionCapture]):
    """Captures that begin and end together."""

    def __init__(self, captures: Iterable[AttentionCapture]) -> None:
        super().__init__(captures)
        self._stack = ExitStack()

    def __enter__(self) -> _Captures:
        with ExitStack() as stack:
            for capture in self:
                stack.enter_context(capture)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _always(mask: Tensor) -> Masks:
    return lambda step, source, edited: mask


def _prompts(
    prompt: str | Sequence[str], edit_prompt: str | Sequence[str] | None, directions: Tensor | None
) -> tuple[list[str], list[str]]:
    if edit_prompt is None and directions is None:
        raise ValueError("edit_prompt or directions must say what to edit, got neither")
    sources = [prompt] if isinstance(prompt, str) else list(prompt)
    edits = sources if edit_prompt is None else [edit_prompt] if isinstance(edit_prompt, str) else list(edit_prompt)
    if len(edits) != len(sources) or not sources:
        raise ValueError(f"edit_prompt must be of as many clips as prompt, got {len(edits)} and {len(sources)}")
    return sources, edits


def _named(name: str, words: Sequence[Any] | None, prompts: list[str], others: list[str]) -> list[Sequence[Words]]:
    """The words to look for in each clip."""
    if words is not None:
        named = _per_clip(name, words, len(prompts))
    else:
        named = [changed_words(prompt, other) for prompt, other in zip(prompts, others, strict=True)]
    for prompt, found in zip(prompts, named, strict=True):
        if not found:
            raise ValueError(f"{name} must name what is edited: {prompt!r} has no word of its own to look for")
    return named


def _per_clip(name: str, words: Sequence[Any], clips: int) -> list[Sequence[Words]]:
    """`words` of one clip, or a list of words for each clip of a batch, as the latter."""
    if isinstance(words, str):
        raise TypeError(f"{name} must be a list of words, got {words!r}")
    if not words or isinstance(words[0], (str, tuple)):
        if clips > 1 and words:
            raise ValueError(f"{name} must be a list of words for each of {clips} clips, got {words!r}")
        return [words] * clips
    if len(words) != clips:
        raise ValueError(f"{name} must be a list of words for each of {clips} clips, got {len(words)}")
    return list(words)


def _run(
    pipe: Any,
    prompts: list[str],
    noise: Tensor,
    call: dict[str, Any],
    *,
    output_type: str,
    on_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Any:
    """One call of the pipeline; a callback of the user's own comes after ours."""
    own = call.get("callback_on_step_end")

    def forward(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed = {} if on_step is None else {"latents": on_step(step, tensors["latents"])}
        return changed if own is None else {**changed, **own(pipeline, step, timestep, {**tensors, **changed})}

    options = {**call, "callback_on_step_end": forward}
    return pipe(prompt=prompts, latents=noise.contiguous(), output_type=output_type, **options).frames
