"""Edits that stay where the attention looks: a clip and its edit denoised side by side, blended by a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentfast.integrations.diffusers._structure import SourceStructure
from latentfast.integrations.diffusers.capture import AttentionCapture, Weights
from latentfast.integrations.diffusers.masks import attention_mask, dilated
from latentfast.integrations.diffusers.sampling import clean_estimate, frame_dim, setting, starting_noise
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
    look: bool = False,
    directions: Tensor | None = None,
    strengths: Sequence[float] = (1.0,),
    strength: float = 1.0,
    until: float = 1.0,
    structure: float = 0.3,
    observe: float = 0.1,
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
    mask. The mask grows while both run, of the attention so far to `words` (see `AttentionCapture`) and the clean
    latents that the model is on its way to (see `attention_mask`). With `look` it is made of a first run of the source
    alone, so that all of it is known from the first step.

    Args:
        pipe: A text-to-video pipeline whose transformer `AttentionCapture` knows and whose latents have frames: Wan,
            HunyuanVideo, Mochi, CogVideoX.
        prompt: What the clip shows; or a prompt for each clip of a batch.
        edit_prompt: What it shall show inside the mask; None: `prompt`, with `directions`.
        words: Words or phrases of `prompt` for what is edited, mapped together; of a batch a list for each clip. None:
            the words of `prompt` that `edit_prompt` has not.
        edit_words: The same of `edit_prompt`, for a mask that is also to cover what the edit makes of them. None: where
            there are no `words`, the words of `edit_prompt` that `prompt` has not.
        keep: Words of `prompt` for what must stay, in the form of `words`: where more attention is paid to one of them,
            the mask ends. With `edit_words` they are words of `edit_prompt`, too.
        invert: Edit everything but what `words` name: a background is best named by what stands before it.
        mask: Where the edit may act, instead of words: in [0, 1], broadcastable to the latents; or a function that is
            called after each step as ``mask(step, sources, edits)`` and gives it, or None as long as it isn't known.
        look: See above.
        directions: Of `latentfast.edit`, added to the edits.
        strengths: How much of each direction, over all acting steps together.
        strength: The share of the steps, from the end, in which the edit acts, in (0, 1]: before, it is the source.
        until: The share of the steps after which it runs free until the last one, where the mask has the last word.
        structure: The share of the steps, from the first, in which the edit's video attends to itself as the source's
            does: the queries and keys of self-attention are the source's, the values its own, so that what stands where
            stays (Tumanyan et al. 2023, Plug-and-Play Diffusion Features, section 4.2). 0: never, and no hook is set.
        observe: Without `look`: the share of the steps before the mask is first drawn; until then nothing is edited.
        dilate: Cells of the latents that are added around the mask. With `invert` it so reaches into what `words` name,
            whose cells on the edge hold some of the old background, too.
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
    if dilate < 0:
        raise ValueError(f"dilate must not be negative, got {dilate}")
    if not 0 < background <= 1:
        raise ValueError(f"background must be above 0 and up to 1, got {background}")
    if not 0 <= structure <= 1:
        raise ValueError(f"structure must be in [0, 1], got {structure}")
    if not 0 <= observe < 1:
        raise ValueError(f"observe must be in [0, 1), got {observe}")
    noise = starting_noise(pipe, call, generator) if latents is None else latents
    if noise.shape[0] not in (1, len(sources)):
        raise ValueError(f"latents must be of 1 clip or of {len(sources)}, got {noise.shape[0]}")
    noise = noise.expand(len(sources), *noise.shape[1:])
    count = int(setting(pipe, call, "num_inference_steps"))
    length = setting(pipe, call, "max_sequence_length")
    attention = _Attention(pipe, frame_dim(pipe, noise), dilate, background, invert, layers, steps, length)
    layout = SourceStructure(pipe, max(1, round(structure * count))) if structure else None
    looked = _Captures({})
    if mask is None:
        named, named_edits = _named(words, edit_words, sources, edits, look)
        kept = _per_clip("keep", keep, len(sources))
        if look:
            with attention.watch(sources, named, kept) as looked:
                clean = _run(pipe, sources, noise, call, output_type="latent")
            mask = attention.mask(looked, clean)
    with ExitStack() as stack:
        if layout is not None:
            stack.enter_context(layout)  # before the captures: they read what attention gets
        if mask is None:
            both = [*sources, *edits], [*named, *named_edits], [*kept, *kept]
            looked = stack.enter_context(attention.watch(*both))
            mask = attention.growing(looked, torch.cat([noise, noise]), max(1, round(observe * count)))
        confined = SideBySide(
            mask if callable(mask) else _always(mask.to(noise)),
            count,
            span=(1 - strength, until),
            directions=directions,
            strengths=[] if directions is None else strengths,
        )

        def on_step(step: int, latents: Tensor) -> Tensor:
            if layout is not None:
                layout.stepped(step)
            return confined(step, latents)

        pair = torch.cat([noise, noise])
        frames = _run(pipe, [*sources, *edits], pair, call, output_type=output_type, on_step=on_step)
    if confined.mask is None or confined.latents is None:
        raise ValueError("mask must be known by the last step, the function gave None")
    source, edited = confined.latents.chunk(2)
    maps = [capture.maps()[0] for clip, capture in looked.items() if clip < len(sources)]
    return LocalizedEdit(source, edited, confined.mask, maps, frames)


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
        self, prompts: Sequence[str], words: Sequence[Sequence[Words]], keep: Sequence[Sequence[Words]]
    ) -> _Captures:
        """A capture for each clip that has words to look for: of these, and of each word that must stay."""
        captures = {}
        for i, (prompt, named, kept) in enumerate(zip(prompts, words, keep, strict=True)):
            if named:
                groups, rows = [list(named), *kept], slice(i, i + 1)
                options = {"prompt": prompt, "samples": rows, "own_tokens": True, **self._options}
                captures[i] = AttentionCapture(self._pipe, groups, **options)
        return _Captures(captures)

    def mask(self, captures: _Captures, latents: Tensor) -> Tensor:
        """Where the words are, or everything else, of each clip, broadcastable to the latents."""
        clips = self._frames_third(latents)
        found = torch.zeros_like(clips[:, :1])
        options: dict[str, Any] = {"background": self._background, "dilate": 0 if self._invert else self._dilate}
        for i, capture in captures.items():
            found[i] = attention_mask(capture.maps(), clips[i : i + 1], **options)[0]
        return self._frames_third(dilated(1 - found, self._dilate) if self._invert else found)

    def growing(self, captures: _Captures, noise: Tensor, first: int) -> Masks:
        """A mask that is drawn anew after each step from the `first` on, of the attention so far.

        It covers what it finds in the source and in the edit, each in its own clean latents, as far as they are known.
        """
        before = noise

        def masks(step: int, source: Tensor, edited: Tensor) -> Tensor | None:
            nonlocal before
            after = torch.cat([source, edited])
            clean, before = clean_estimate(self._pipe, step, before, after), after
            if step + 1 < first:
                return None
            of_sources, of_edits = self.mask(captures, clean).chunk(2)
            if not any(i >= len(source) for i in captures):
                return of_sources
            return torch.minimum(of_sources, of_edits) if self._invert else torch.maximum(of_sources, of_edits)

        return masks

    def _frames_third(self, x: Tensor) -> Tensor:
        return x if self._frames == 2 else x.transpose(1, 2)


class _Captures(dict[int, AttentionCapture]):
    """Captures by the number of their clip, that begin and end together."""

    def __init__(self, captures: Mapping[int, AttentionCapture]) -> None:
        super().__init__(captures)
        self._stack = ExitStack()

    def __enter__(self) -> _Captures:
        with ExitStack() as stack:
            for capture in self.values():
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


def _named(
    words: Sequence[Any] | None, edit_words: Sequence[Any] | None, sources: list[str], edits: list[str], look: bool
) -> tuple[list[Sequence[Words]], list[Sequence[Words]]]:
    """The words to look for in each source, and in each edit."""
    pairs = list(zip(sources, edits, strict=True))
    named: list[Sequence[Words]] = [changed_words(*pair) for pair in pairs]
    if words is not None:
        named = _per_clip("words", words, len(pairs))
    if edit_words is not None:
        return named, _per_clip("edit_words", edit_words, len(pairs))
    named_edits: list[Sequence[Words]] = [
        () if found else changed_words(edited, source) for found, (source, edited) in zip(named, pairs, strict=True)
    ]
    for pair, found, found_edit in zip(pairs, named, named_edits, strict=True):
        if not found and (look or not found_edit):
            raise ValueError(f"words must name what is edited: {pair[0]!r} has no word that {pair[1]!r} has not")
    return named, named_edits


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
