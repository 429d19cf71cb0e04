"""Captions of scenes: free word order, words left out, and the tokenizer that reads them.

``caption(scene)`` is the plain full sentence. With a random source, clauses change places, adjectives may
follow their noun, and factors are left out; what a caption does not mention, the model may choose. Each shape
has one phrase with its adjectives beside its noun, so "the circle" or "the blue one" names a shape that an edit
can be confined to, and a caption that mentions shapes mentions as many as the scene has.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from latentfast.tiny.scene import BACKGROUNDS, COLOURS, LIGHTS, MOTIONS, SHAPES, SIZES, Scene, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIZE_WORDS = {"small": ("small", "small", "little"), "big": ("big", "big", "large")}
MOTION_WORDS = {
    "left": ("left",),
    "right": ("right",),
    "up": ("up",),
    "down": ("down",),
    "nowhere": ("nowhere",),
    "around": ("around",),
}
GOING = ("moving", "moving", "going", "that moves")
STANDING = ("still", "not moving", "standing still", "moving nowhere")
_FILLERS = (
    "a an the and in on is of with before moving going that moves not standing still background backdrop light lit "
    "dimly brightly one shape thing scene clip video . , ; :"
)
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
VOCABULARY = tuple(
    dict.fromkeys(
        [PAD, END, UNKNOWN, *SHAPES, *COLOURS, *SIZES, *MOTIONS, *BACKGROUNDS, *LIGHTS]
        + [w for words in SIZE_WORDS.values() for w in words]
        + _FILLERS.split()
    )
)
MAX_TOKENS = 40  # the longest caption has fewer; checked where the training pool is made


def caption(scene: Scene, rng: random.Random | None = None, *, drop: float = 0.0) -> str:
    """Describes a scene in words.

    Args:
        scene: what to describe.
        rng: source of the wording; without it the plain full sentence is returned.
        drop: probability with which each factor is left out. The mention of a shape itself is never left out.

    Returns:
        str: for example ``"a small red circle moving left on a dark background in dim light"``.

    Raises:
        ValueError: ``drop`` is outside [0, 1], or is given without ``rng``.

    Example:
        >>> caption(Scene((Shape("star", "blue", "small", "up"),), "gray", "dim"))
        'a small blue star moving up on a gray background in dim light'
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be a probability in [0, 1]; got {drop}")
    if rng is None:
        if drop:
            raise ValueError("drop needs rng, the source of randomness; got None")
        subject = " and ".join(f"a {s.size} {s.colour} {s.shape} moving {s.motion}" for s in scene.shapes)
        return f"{subject} on a {scene.background} background in {scene.light} light"
    return _free_caption(scene, rng, drop)


def _free_caption(scene: Scene, rng: random.Random, drop: float) -> str:
    def kept() -> bool:
        return rng.random() >= drop

    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    phrases = [_shape_phrase(s, rng, kept) for s in shapes]
    # A comma joins shapes only where none stands inside a phrase: each adjective must have one noun it can
    # belong to.
    joints = (" and ", " and ", " with ") if any("," in p for p in phrases) else (" and ", " and ", ", ", " with ")
    subject = rng.choice(joints).join(phrases)
    background = f"{scene.background} {rng.choice(('background', 'background', 'backdrop'))}"
    adverb = {"dim": "dimly", "bright": "brightly"}[scene.light]
    light = f"{scene.light} light" if rng.random() < 0.8 else f"{adverb} lit"
    if rng.random() < 0.5:  # a sentence with prepositions
        place = [f"{rng.choice(('on', 'on', 'before'))} a {background}"] if kept() else []
        lit = [f"in {light}" if light.endswith("light") else light] if kept() else []
        tail = place + lit
        rng.shuffle(tail)
        if tail and rng.random() < 0.25:
            return " ".join(tail) + ", " + subject
        return " ".join([subject, *tail])
    clauses = [subject]
    if kept():
        clauses.append(background if rng.random() < 0.7 else f"the background is {scene.background}")
    if kept():
        clauses.append(light)
    rng.shuffle(clauses)
    return ", ".join(clauses)


def _shape_phrase(shape: Shape, rng: random.Random, kept: Callable[[], bool]) -> str:
    noun = shape.shape if kept() else rng.choice(("shape", "one", "thing"))
    colour = [shape.colour] if kept() else []
    size = [rng.choice(SIZE_WORDS[shape.size])] if kept() else []
    motion = ""
    if kept():
        if shape.motion == "nowhere" and rng.random() < 0.6:
            motion = rng.choice(STANDING)
        else:
            motion = f"{rng.choice(GOING)} {rng.choice(MOTION_WORDS[shape.motion])}"
    if rng.random() < 0.12:  # adjectives behind the noun: "circle, red, big, moving left"
        behind = size + colour
        rng.shuffle(behind)
        return ", ".join([noun, *behind, *([motion] if motion else [])])
    adjectives = size + colour
    if rng.random() < 0.15:
        adjectives.reverse()
    article = rng.choice(("a", "a", "a", "the", "one", ""))
    if article == "one" and noun == "one":
        article = "a"
    if article == "a" and (adjectives or [noun])[0][0] in "aeiou":
        article = "an"
    return " ".join(w for w in [article, *adjectives, noun, motion] if w)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: one token a word, lower case, punctuation apart, ``</s>`` at the end, as T5's reads.

    Words outside the vocabulary become ``<unk>``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    end = VOCABULARY.index(END)
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )
