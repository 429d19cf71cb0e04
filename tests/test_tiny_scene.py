"""The renderer and the captions of ``latentfast.tiny``: repeatable, true to the factors, and words that name them."""

from __future__ import annotations

import random

import pytest
import torch

from latentfast.tiny import Scene, Shape, caption, random_scenes, render, scene
from latentfast.tiny.caption import END, MAX_TOKENS, SIZE_WORDS, UNKNOWN, VOCABULARY, make_tokenizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_render_is_repeatable_by_seed() -> None:
    scenes = random_scenes(4, two=0.5, generator=seeded(1))
    first, again = (render(scenes, size=32, num_frames=5, generator=seeded(2)) for _ in range(2))
    other = render(scenes, size=32, num_frames=5, generator=seeded(3))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.video, other.video)


def test_render_shapes_and_ranges() -> None:
    clips = render([Scene(), Scene((Shape(), Shape("star", "blue")))], size=48, num_frames=7, generator=seeded())
    assert clips.video.shape == (2, 3, 7, 48, 48)
    assert clips.masks.shape == (2, 2, 7, 48, 48)
    assert clips.video.dtype == clips.masks.dtype == torch.float32
    assert clips.video.abs().max() <= 1
    assert clips.masks.min() >= 0
    # Two coverages of one pixel can add up to a rounding error above one.
    assert clips.masks.sum(1).max() <= 1 + 1e-6
    assert clips.masks[0, 1].max() == 0, "a scene of one shape has no second mask"
    assert clips.masks[1].amax((1, 2, 3)).min() > 0.99


def test_table_and_scenes_are_inverse() -> None:
    table = scene.random_table(64, two=0.5, generator=seeded(4))
    assert torch.equal(scene.to_table(scene.from_table(table)), table)
    assert {len(s.shapes) for s in scene.from_table(table)} == {1, 2}


def test_two_shapes_differ_in_shape_or_colour() -> None:
    for s in random_scenes(2000, two=1.0, generator=seeded(5)):
        a, b = s.shapes
        assert (a.shape, a.colour) != (b.shape, b.colour)


@pytest.mark.parametrize("colour", scene.COLOURS)
def test_mask_shows_the_colour(colour: str) -> None:
    clips = render(Scene((Shape("square", colour),), light="bright"), size=64, num_frames=3, generator=seeded(6))
    inside = clips.masks[0, 0] > 0.999
    y, x = torch.meshgrid(*[(torch.arange(64) + 0.5) / 64] * 2, indexing="ij")
    lit = torch.tensor(scene.COLOUR_RGB[scene.COLOURS.index(colour)])[:, None, None] * scene.shading(x, y)
    expected = (lit.clamp(max=1) * 2 - 1)[:, None].expand(3, 3, 64, 64)
    # Where coverage is at least 0.999 the background adds at most a thousandth of the range.
    torch.testing.assert_close(clips.video[0][:, inside], expected[:, inside], rtol=0, atol=2.5e-3)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_mask_moves_as_told(motion: str, axis: int, sign: int) -> None:
    masks = render(Scene((Shape(motion=motion),)), size=64, generator=seeded(7)).masks[0, 0]
    place = torch.linspace(0, 1, 64)
    centre = [(masks.sum(d) * place).sum(-1) / masks.sum((1, 2)) for d in (2, 1)]
    travel = [(c[-1] - c[0]).item() for c in centre]
    assert sign * travel[axis] > 0.45
    assert abs(travel[1 - axis]) < 0.02  # the other coordinate moves by the pixel grid's error only


def test_still_and_round_paths() -> None:
    still, around = (
        render(Scene((Shape(motion=m),)), size=64, generator=seeded(8)).masks[0, 0] for m in ("nowhere", "around")
    )
    assert torch.equal(still[0], still[-1])
    # The round path closes: the last frame is the first.
    torch.testing.assert_close(around[0], around[-1], rtol=0, atol=1e-4)
    assert (around[0] * around[12]).sum() < 0.2 * around[0].sum()


def test_sizes_and_the_front_shape() -> None:
    masks = {s: render(Scene((Shape(size=s),)), size=64, generator=seeded(9)).masks for s in scene.SIZES}
    assert masks["big"].mean() > 2 * masks["small"].mean()
    table = scene.to_table([Scene((Shape("square", "red"), Shape("square", "blue")))])
    layout = scene.random_layout(table, seeded())
    layout.centre[:] = 0.5
    clips = scene.draw(table, layout, size=32, times=torch.zeros(1))
    assert clips.masks[0, 1, 0, 16, 16] > 0.999
    assert clips.masks[0, 0, 0, 16, 16] < 0.001, "the first shape is behind the second"


def test_bad_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="colour must be one of"):
        Shape(colour="pink")
    with pytest.raises(ValueError, match="light must be one of"):
        Scene(light="neon")
    with pytest.raises(ValueError, match="one or two shapes"):
        Scene(())
    with pytest.raises(TypeError, match="factors must be"):
        render("a red circle")
    with pytest.raises(ValueError, match="int64 table"):
        render(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="must be positive"):
        render(Scene(), size=0)


def mentions(text: str, shape: Shape) -> bool:
    """Each of a shape's words stands in the text; motion may be said in other words when there is none."""
    words = text.replace(",", " ").split()
    moves = (
        "nowhere" in words or "still" in words or "not" in words if shape.motion == "nowhere" else shape.motion in words
    )
    return shape.shape in words and shape.colour in words and any(w in words for w in SIZE_WORDS[shape.size]) and moves


def test_full_captions_name_every_factor() -> None:
    rng = random.Random(0)
    for s in random_scenes(500, two=0.5, generator=seeded(10)):
        for text in (caption(s), caption(s, rng)):
            assert all(mentions(text, shape) for shape in s.shapes), text
            assert s.background in text.split() or f"{s.background}," in text.split(), text
            assert s.light in text, text


def test_captions_mention_as_many_shapes_as_there_are() -> None:
    rng = random.Random(1)
    nouns = {*scene.SHAPES, "shape", "thing", "one"}
    for s in random_scenes(300, two=0.5, generator=seeded(11)):
        words = caption(s, rng, drop=1.0).replace(",", " ").split()
        # "one" is an article as well, so it may stand there once more for each shape.
        assert len(s.shapes) <= sum(w in nouns for w in words) <= 2 * len(s.shapes)
        assert not {*scene.COLOURS, *scene.SHAPES} & set(words)


def test_captions_vary_and_repeat_by_seed() -> None:
    s = Scene((Shape("star", "cyan", "small", "up"), Shape("circle", "red", "big", "left")), "gray", "dim")
    assert len({caption(s, random.Random(i), drop=0.3) for i in range(50)}) > 40
    assert caption(s, random.Random(3), drop=0.3) == caption(s, random.Random(3), drop=0.3)
    with pytest.raises(ValueError, match="drop must be"):
        caption(s, random.Random(0), drop=1.5)
    with pytest.raises(ValueError, match="drop needs rng"):
        caption(s, drop=0.5)


def test_tokenizer_reads_every_caption() -> None:
    pytest.importorskip("transformers")
    tokenizer = make_tokenizer()
    rng = random.Random(2)
    texts = [caption(s, rng, drop=0.2) for s in random_scenes(500, two=0.7, generator=seeded(12))]
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert ids[-1] == VOCABULARY.index(END)
        assert VOCABULARY.index(UNKNOWN) not in ids, text
        assert len(ids) <= MAX_TOKENS
        assert [VOCABULARY[i] for i in ids[:-1]] == text.replace(",", " ,").split()


def test_tokenizer_edges() -> None:
    pytest.importorskip("transformers")
    tokenizer = make_tokenizer()
    assert tokenizer("").input_ids == [VOCABULARY.index(END)]
    assert tokenizer("A RED,  Circle!").input_ids == tokenizer("a red , circle !").input_ids
    assert VOCABULARY[tokenizer("a turquoise circle").input_ids[1]] == UNKNOWN
    padded = tokenizer(["red", "a red circle"], padding="max_length", max_length=8, return_tensors="pt")
    assert padded.attention_mask.sum(1).tolist() == [2, 4]
