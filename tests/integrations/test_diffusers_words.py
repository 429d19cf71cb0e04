"""Words of a prompt to tokens: several tokens a word, repeated words, templates, padding, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

from latentfast.integrations.diffusers.words import changed_words, prompt_tokens, token_spans
from tests.integrations.diffusers_models import word_pieces


class Pipe:
    """What of a pipeline finding words needs."""

    def __init__(self) -> None:
        self.tokenizer = word_pieces()

    def __call__(self, max_sequence_length: int = 512) -> None: ...

    def encode_prompt(self, prompt: str) -> None: ...


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


def test_words_of_one_token_of_several_and_repeated(pipe: Pipe) -> None:
    found = prompt_tokens(pipe, "a  red circle, a blue unseen circles", ["red circle", "unseen", "a", ("a", 1)])
    # a=0 red=1 circle=2 ,=3 a=4 blue=5 un=6 ##seen=7 circle=8 ##s=9 </s>=10
    assert found.groups == [[1, 2], [6, 7], [0, 4], [4]]
    assert found.prompt == list(range(10)) and found.count == 512
    assert prompt_tokens(pipe, "A Red circle", ["red"], max_sequence_length=8).count == 8


def test_padding_on_the_left(pipe: Pipe) -> None:
    tokenizer = pipe.tokenizer
    tokenizer.padding_side = "left"
    try:
        found = prompt_tokens(pipe, "a red circle", ["circle"], max_sequence_length=8)
    finally:
        tokenizer.padding_side = "right"
    assert (found.groups, found.prompt) == ([[6]], [4, 5, 6])


def test_a_template_is_cut_off(pipe: Pipe) -> None:
    class Templated:
        tokenizer = pipe.tokenizer

        def __call__(self, max_sequence_length: int = 12) -> None: ...

        def encode_prompt(self, prompt_template: dict = {"template": "red moving {} left", "crop_start": 2}) -> None:  # noqa: B006
            ...

    found = prompt_tokens(Templated(), "a red circle", ["red"])
    assert (found.groups, found.prompt, found.count) == ([[1]], [0, 1, 2], 12)


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        (["green"], ValueError, "'green' is not among its words: a, red, circle"),
        (["circle red"], ValueError, "'circle red' is not among its words"),
        (["circ"], ValueError, "'circ' is not among"),
        ([" "], ValueError, "must not be empty"),
        ([("red", 1)], ValueError, "from 0 to 0 of 'red', got 1"),
        ("red", TypeError, "must be a list of words, got 'red'"),
        ([3], TypeError, "words or pairs"),
    ],
)
def test_words_that_are_refused(words: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        token_spans("a red circle", words)


def test_changed_words() -> None:
    assert changed_words("a red circle and a red star", "a red circle and a blue star") == [("red", 1)]
    assert changed_words("A Red circle", "a red circle, moving") == []
    assert changed_words("a big circle", "a circle") == [("big", 0)]
