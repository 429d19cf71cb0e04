"""Words of a prompt to the numbers of their tokens, in the order in which a pipeline's transformer attends to them."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PromptTokens", "Words", "changed_words", "numbered_words", "prompt_tokens", "token_spans"]

#: A word or a phrase, or one of its occurrences: ("circle", 1) is the second.
Words = str | tuple[str, int]


@dataclass(frozen=True)
class PromptTokens:
    """Where words stand among the keys that a transformer gets from its text encoder.

    Attributes:
        groups: for each of the words asked for, the numbers of its tokens, rising.
        prompt: the numbers of all tokens of the prompt's own text, rising: without padding, end marks, template.
        count: how many keys there are in all, padding included.
    """

    groups: list[list[int]]
    prompt: list[int]
    count: int


def token_spans(prompt: str, words: Sequence[Words]) -> list[list[tuple[int, int]]]:
    """Where words stand in a prompt: for each its occurrences as ``(start, end)`` in characters.

    Whole words in any case; the words of a phrase follow each other with white space between.

    Args:
        prompt: the text.
        words: words or phrases (every occurrence counts), or pairs of one and the number of its occurrence, from 0.

    Returns:
        A list of spans for each of ``words``, never empty.

    Raises:
        TypeError: ``words`` is one string, or holds something else.
        ValueError: a word is empty or isn't in the prompt, or has no such occurrence.

    Example:
        >>> token_spans("a red circle and a red star", ["red star", ("red", 0)])
        [[(19, 27)], [(2, 5)]]
    """
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise TypeError(f"words must be a list of words, got {words!r}")
    return [_spans(prompt, item) for item in words]


def _spans(prompt: str, item: Words) -> list[tuple[int, int]]:
    word, occurrence = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(word, str) or not isinstance(occurrence, int | None) or isinstance(occurrence, bool):
        raise TypeError(f"words must hold words or pairs (word, occurrence), got {item!r}")
    parts = word.split()
    if not parts:
        raise ValueError(f"words must not be empty, got {word!r}")
    # no \b: a word may end in a sign, as in "C++"
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, parts)) + r"(?!\w)"
    spans = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]
    if not spans:
        known = ", ".join(dict.fromkeys(_words(prompt)))
        raise ValueError(f"words must be in the prompt: {word!r} is not among its words: {known or 'none'}")
    if occurrence is None:
        return spans
    if not 0 <= occurrence < len(spans):
        raise ValueError(f"words must name an occurrence from 0 to {len(spans) - 1} of {word!r}, got {occurrence}")
    return [spans[occurrence]]


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", prompt.lower())


def numbered_words(prompt: str) -> list[tuple[str, int]]:
    """All words of a prompt in lower case, each with the number of its occurrence.

    Example:
        >>> numbered_words("A red circle, a star")
        [('a', 0), ('red', 0), ('circle', 0), ('a', 1), ('star', 0)]
    """
    words = _words(prompt)
    return [(word, words[:i].count(word)) for i, word in enumerate(words)]


def changed_words(prompt: str, other: str) -> list[tuple[str, int]]:
    """The words of a prompt that another one has not in their place, each with the number of its occurrence.

    Example:
        >>> changed_words("a red circle and a red star", "a red circle and a big blue star")
        [('red', 1)]
    """
    ours, theirs = _words(prompt), _words(other)
    changed: list[tuple[str, int]] = []
    for kind, first, end, _, _ in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind in ("replace", "delete"):
            changed += [(ours[i], ours[:i].count(ours[i])) for i in range(first, end)]
    return changed


def prompt_tokens(
    pipe: Any, prompt: str, words: Sequence[Words] = (), *, max_sequence_length: int | None = None
) -> PromptTokens:
    """Finds words of a prompt among the tokens that a pipeline's transformer attends to.

    A word of several tokens has all of them; a word that occurs more than once has those of every occurrence.

    Args:
        pipe: a pipeline with a fast ``tokenizer`` (Wan, LTX, CogVideoX, Mochi: T5's; HunyuanVideo: Llama's).
        prompt: the prompt as the pipeline is called with it.
        words: see :func:`token_spans`.
        max_sequence_length: as the pipeline is called with it; None: the default of its call.

    Returns:
        Numbers that count as the transformer's keys do: behind a template that the pipeline cuts off, and with
        padding on the tokenizer's side.

    Raises:
        TypeError: the tokenizer can't tell where its tokens stand in the text, or ``words`` is no list of words.
        ValueError: a word isn't in the prompt, or comes after the last token that the pipeline keeps.

    Example:
        >>> from latentfast import tiny
        >>> pipe = tiny.load_pipeline()  # doctest: +ELLIPSIS
        >>> prompt_tokens(pipe, "a red circle and a blue star", ["red circle", "star"]).groups
        [[1, 2], [6]]
    """
    tokenizer = pipe.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"pipe's tokenizer must be a fast one, got {type(tokenizer).__name__}")
    prompt = _as_encoded(pipe, prompt)
    spans = token_spans(prompt, words)
    text, start, cropped = _templated(pipe, prompt)
    limit = max_sequence_length or _default_length(pipe)
    encoded = tokenizer(
        text, padding="max_length", max_length=limit + cropped, truncation=True, return_offsets_mapping=True
    )
    offsets = [(first - start, last - start) for first, last in encoded["offset_mapping"][cropped:]]
    # Marks and padding have empty spans; a template's tokens lie outside the prompt's text.
    own = [i for i, (first, last) in enumerate(offsets) if first < last and last > 0 and first < len(prompt)]
    groups = []
    for item, occurrences in zip(words, spans, strict=True):
        group = [i for i in own if any(offsets[i][0] < end and offsets[i][1] > begin for begin, end in occurrences)]
        if not group:
            raise ValueError(f"words must be among the {limit} tokens that the pipeline keeps: {item!r} comes later")
        groups.append(group)
    return PromptTokens(groups, own, len(offsets))


def _as_encoded(pipe: Any, prompt: str) -> str:
    """The prompt as the pipeline hands it to its tokenizer."""
    if type(pipe).__name__.startswith("Wan"):
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return prompt_clean(prompt)
    return prompt


def _templated(pipe: Any, prompt: str) -> tuple[str, int, int]:
    """The text that is encoded, where the prompt starts in it, and how many of its first tokens are cut off."""
    parameter = inspect.signature(pipe.encode_prompt).parameters.get("prompt_template")
    if parameter is None or not isinstance(parameter.default, dict):
        return prompt, 0, 0
    template = parameter.default["template"]
    return template.format(prompt), template.index("{}"), int(parameter.default["crop_start"])


def _default_length(pipe: Any) -> int:
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    return int(pipe.tokenizer.model_max_length if parameter is None else parameter.default)
