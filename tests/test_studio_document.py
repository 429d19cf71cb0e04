"""The studio's document: undo and redo, what messages may say, a run's file, and the recipe that it comes to."""

import json
import math
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from studio_fakes import SHOT, FakeModel

import latentfast
from latentfast import tiny
from latentfast.cache import LatentCache
from latentfast.cli.sampler import Sampler
from latentfast.recipe import Recipe
from latentfast.studio import protocol
from latentfast.studio.document import Document, History, Layer, Shot
from latentfast.studio.kinds import KINDS, colour_direction
from latentfast.studio.library import Library, rivals
from latentfast.studio.model import Model
from latentfast.studio.pictures import places
from latentfast.studio.protocol import RefusedError, packet, parse, read_run, run_data

OTHER = replace(SHOT, seed=2)


def layer(id: int = 1, kind: str = "warmth", amount: float = 0.5, **more: object) -> Layer:
    return Layer(id, kind, amount, **more)


# --- Undo and redo ----------------------------------------------------------------------------------------------------


def test_undo_and_redo() -> None:
    history = History(Document(SHOT))
    documents = [history.document]
    for count in range(1, 4):
        history.change(replace(history.document, layers=tuple(layer(i) for i in range(count))))
        documents.append(history.document)
    for expected in reversed(documents[:-1]):
        assert history.undo()
        assert history.document == expected
    assert not history.undo()
    for expected in documents[1:]:
        assert history.redo()
        assert history.document == expected
    assert not history.redo()
    history.undo()
    history.change(Document(OTHER))
    assert not history.can_redo


def test_a_motion_is_undone_at_once() -> None:
    history = History(Document(SHOT, (layer(amount=0.0),)))
    for step in range(1, 50):
        history.change(history.document.with_layer(1, amount=step / 50), moving=1)
    history.rest()
    history.change(history.document.with_layer(1, amount=1.0), moving=1)  # another motion of the same slider
    assert history.undo() and history.document.layers[0].amount == 49 / 50
    assert history.undo() and history.document.layers[0].amount == 0.0
    assert not history.can_undo


def test_what_changes_nothing_is_no_step() -> None:
    history = History(Document(SHOT))
    assert not history.change(Document(SHOT))
    assert not history.can_undo


def test_history_is_bounded() -> None:
    history = History(Document(SHOT))
    for seed in range(3 * History.MOST):
        history.change(Document(replace(SHOT, seed=seed)))
    steps = 0
    while history.undo():
        steps += 1
    assert steps == History.MOST


def test_order_of_layers() -> None:
    document = Document(SHOT, tuple(layer(id) for id in (1, 2, 3)))
    assert [x.id for x in document.moved(1, 2).layers] == [2, 3, 1]
    assert [x.id for x in document.moved(3, 0).layers] == [3, 1, 2]
    assert [x.id for x in document.moved(1, 99).layers] == [2, 3, 1]
    assert [x.id for x in document.without(2).layers] == [1, 3]
    with pytest.raises(ValueError, match="not there any more"):
        document.without(7)


# --- Messages ---------------------------------------------------------------------------------------------------------

GOOD = [
    {"type": "generate", "prompt": "a red circle", "seed": 7, "steps": 20, "guidance": 1.5},
    {"type": "cancel"},
    {"type": "add", "kind": "warmth"},
    {"type": "add", "kind": "towards", "prompt": "a star", "seed": 0},
    {"type": "amount", "id": 1, "amount": 0.5, "live": True, "stamp": 123.4},
    {"type": "switch", "id": 1, "on": False},
    {"type": "confine", "id": 1, "words": [["circle", 0], ["a", 1]]},
    {"type": "move", "id": 1, "to": 0},
    {"type": "remove", "id": 1},
    {"type": "undo"},
    {"type": "redo"},
    {"type": "look", "words": []},
    {"type": "shown", "number": 12},
    {"type": "open", "run": {"format": "latentfast.studio"}},
]


@pytest.mark.parametrize("message", GOOD, ids=lambda message: message["type"])
def test_good_messages_are_understood(message: dict) -> None:
    assert type(parse(json.dumps(message))).__name__.lower() == message["type"]


def test_every_message_is_tried() -> None:
    assert {message["type"] for message in GOOD} == set(protocol.Message.kinds_of)


BAD = {
    "": "must be JSON",
    "[1, 2": "must be JSON",
    "[" * 100_000: "nested too deeply|must be JSON",
    "null": "must be an object, got NoneType",
    '{"type": "format the disk"}': "type must be one of .* got 'format the disk'",
    '{"type": ["undo"]}': "type must be one of",
    '{"type": "undo", "type": "redo"}': "stands there twice",
    '{"type": "undo", "path": "/etc/passwd"}': "path is not a parameter",
    '{"type": "remove"}': "id is missing",
    '{"type": "remove", "id": "1"}': "id must be an integer",
    '{"type": "remove", "id": true}': "id must be an integer",
    '{"type": "remove", "id": -1}': "id must be an integer of at least 1",
    '{"type": "amount", "id": 1, "amount": NaN}': "NaN is no number",
    '{"type": "amount", "id": 1, "amount": 1e999}': "amount must be a number in",
    '{"type": "amount", "id": 1, "amount": 2}': r"amount must be a number in \[-1, 1\], got 2",
    '{"type": "generate", "prompt": "", "seed": 0, "steps": 1, "guidance": 1}': "prompt must have 1 to 500 characters",
    json.dumps(GOOD[0] | {"prompt": "x" * 501}): "prompt must have 1 to 500 characters, got 501",
    json.dumps(GOOD[0] | {"prompt": "a\u0000b"}): "no control characters",
    json.dumps(GOOD[0] | {"prompt": "a\ud800b"}): "no control characters",
    json.dumps(GOOD[0] | {"seed": 2**32}): "seed must be an integer",
    json.dumps(GOOD[0] | {"steps": 10**9}): "steps must be an integer",
    '{"type": "add", "kind": "towards"}': "towards must come with prompt and seed",
    '{"type": "add", "kind": "warmth", "prompt": "a", "seed": 1}': "warmth must have no prompt and seed",
    '{"type": "look", "words": ["circle"]}': "words must have good elements",
    json.dumps({"type": "look", "words": [["a", 0]] * 65}): "words must be at most 64",
    json.dumps({"type": "look", "words": [["a", 0]] * 200_000}): "at most 262144 bytes",
}


@pytest.mark.parametrize(("text", "why"), BAD.items(), ids=[f"{i}" for i in range(len(BAD))])
def test_bad_messages_are_refused_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why) as caught:
        parse(text)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


PIECES = ["{", "}", "[]", '"', "\\u0000", "\ud800", "\x7f", "1e999", "-1", "null"]


def malformed(rng: random.Random) -> str:
    """A good message that was damaged, or noise."""
    text = json.dumps(rng.choice(GOOD))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text) + 1)
        what = rng.randrange(5)
        if what == 0:
            text = text[:at] + text[at + rng.randint(1, 9) :]
        elif what == 1:
            text = text[:at] + "".join(rng.choices(string.printable, k=rng.randint(1, 9))) + text[at:]
        elif what == 2:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif what == 3:
            text = text.replace(rng.choice(["0", "1", "true", '"', "a"]), rng.choice(PIECES))
        else:
            text = "".join(rng.choices(text + string.printable, k=len(text)))
        text = text or "x"
    return text


def test_ten_thousand_malformed_messages_are_refused_or_right() -> None:
    rng = random.Random(6)
    refused = 0
    for _ in range(10_000):
        try:
            parse(malformed(rng))
        except RefusedError:
            refused += 1
    assert refused > 9_000  # some are right by chance, such as other letters in a prompt


# --- A run's file -----------------------------------------------------------------------------------------------------


def test_a_run_is_read_back() -> None:
    words = (("circle", 0), ("a", 1))
    layers = (layer(1, words=words), layer(2, "towards", 0.25, on=False, shot=OTHER), layer(3, "contrast", 1.0))
    document = Document(SHOT, layers)
    text = json.dumps({**run_data(document), "recipe": {}, "environment": {"torch": "2"}})
    ids = iter((1, 2, 3))
    assert read_run(json.loads(text), lambda: next(ids)) == document


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "else"}, "a run must be a JSON object of format"),
        ({"version": 2}, "version 1"),
        ({"clip": None}, "clip: must be an object, got NoneType"),
        ({"clip": {"prompt": "a"}}, "clip: seed is missing"),
        ({"layers": "none"}, "layers must be a list of at most 64"),
        ({"layers": [{}] * 65}, "layers must be a list of at most 64"),
        ({"layers": [{"kind": "warmth", "amount": 0.5}, {"kind": "rm -rf", "amount": 1}]}, "layer 2: kind must be"),
        ({"layers": [{"kind": "fade", "amount": -0.5, "clip": {}}]}, r"layer 1: amount must be in \[0, 1\]"),
        ({"layers": [{"kind": "fade", "amount": 0.5}]}, "layer 1: fade must have a clip"),
        ({"layers": [{"kind": "fade", "amount": 0.5, "clip": {"prompt": "../../x"}}]}, "layer 1: seed is missing"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_a_wrong_run_is_refused_in_a_sentence(change: dict, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        read_run({**run_data(Document(SHOT)), **change}, lambda: 1)


# --- The recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def library() -> Library:
    model, library = FakeModel(), Library()
    library.factors = model.factors
    for shot in (SHOT, OTHER):
        library.keep(shot, model.make(shot, outdated=lambda: False, on_step=lambda step: None))
    return library


def test_layers_are_the_operations_of_their_names(library: Library) -> None:
    z, b = (library.clip(shot).latents for shot in (SHOT, OTHER))
    words = (("circle", 0),)
    mask = library.make_mask(SHOT, words)
    assert 0 < mask.mean() < 1
    warm = colour_direction(library.factors[0], KINDS["warmth"].colour, z)
    layers = (
        layer(1, "towards", 0.3, shot=OTHER),
        layer(2, "warmth", 0.5, words=words),
        layer(3, "palette", 0.8, shot=OTHER, on=False),
        layer(4, "contrast", 0.4),
    )
    built = library.build(Document(SHOT, layers))
    x = latentfast.slerp(z, b, 0.3)
    x = latentfast.edit(x, warm[None], (0.5,), mask)
    x = latentfast.tone_map(x, 0.4)
    assert torch.equal(built.apply(z), x)
    assert Recipe.from_json(built.recipe.to_json()) == built.recipe
    assert built.problems == {}


def test_what_is_not_there_yet_is_left_out_and_told(library: Library) -> None:
    layers = (
        layer(1, "fade", shot=replace(SHOT, seed=99)),
        layer(2, "warmth", words=(("triangle", 0),)),
        layer(3, "warmth", words=(("star", 0),)),
    )
    built = library.build(Document(SHOT, layers))
    assert len(built.recipe) == 0
    assert built.problems == {1: "its clip is not there yet", 2: "“triangle” is not among the words of this clip"}
    assert built.masks == ((SHOT, (("star", 0),)),)
    library.make_mask(*built.masks[0])
    assert len(library.build(Document(SHOT, layers)).recipe) == 1


def test_rivals_are_what_other_things_are_called_by() -> None:
    circle, star = torch.zeros(2, 20)
    circle[2:6], star[12:15] = 1.0, 1.0
    everywhere = torch.linspace(0.5, 1, 20)
    maps = torch.stack([circle, everywhere, star, 0.5 * circle + 0.01, 2 * star])
    assert rivals(maps, [0]) == [2, 4]
    assert rivals(maps, [2, 4]) == [0, 3]
    assert rivals(maps, [0, 2, 3, 4]) == []


def test_clips_that_are_wanted_stay() -> None:
    model, library = FakeModel(), Library(most=5 * 1152)
    shots = [replace(SHOT, seed=seed) for seed in range(20)]
    library.want(shots[:3])
    for shot in shots:
        clip = model.make(shot, outdated=lambda: False, on_step=lambda step: None)
        clip.heat = None
        assert clip.bytes == 1152
        library.keep(shot, clip)
    kept = [shot.seed for shot in shots if library.clip(shot) is not None]
    assert kept == [0, 1, 2, 18, 19]


@pytest.mark.parametrize("shades", [32, 1])
def test_a_colour_direction_adds_its_colour(shades: int) -> None:
    weight, bias = tiny.rgb_factors()
    z = torch.randn(1, 16, 1, shades, 1).expand(1, 16, 1, shades, 4).contiguous()
    colour = torch.tensor([0.3, -0.1, 0.2])
    moved = latentfast.edit(z, colour_direction(weight, tuple(colour.tolist()), z)[None], (1.0,))
    before, after = (latentfast.latent_to_rgb(x, weight, bias, dtype=torch.float32) for x in (z, moved))
    assert torch.allclose(after - before, colour.expand_as(before), atol=1e-5)


# --- Packets ----------------------------------------------------------------------------------------------------------


def test_packets() -> None:
    data = packet({"clip": "é"}, b"\x00\xff")
    length = int.from_bytes(data[:4], "little")
    assert json.loads(data[4 : 4 + length]) == {"clip": "é"}
    assert data[4 + length :] == b"\x00\xff"
    with pytest.raises(ValueError, match="not JSON compliant"):
        packet({"stamp": math.nan}, b"")


def test_places_of_latent_frames() -> None:
    assert places(3, 9) == [0.0, 2.5, 6.5]  # Wan's: one frame, then four each
    assert places(7, 25, every=2) == [0.0, 6.5, 14.5, 22.5]
    assert places(4, 12) == [1.0, 4.0, 7.0, 10.0]
    assert places(1, 1) == [0.0]


def test_a_clip_is_recalled_by_a_later_run_of_the_same_model(tmp_path: Path) -> None:
    call = {"num_inference_steps": 2, "num_frames": 5, "height": 32, "width": 32, "guidance_scale": 2.0}
    shot = Shot("a red circle", 3, 2, 2.0)
    sampler = Sampler(tiny.load_pipeline(), call)
    with LatentCache(tmp_path / "cache") as cache:
        model = Model(sampler, cache=cache)
        key = model.key(shot)
        assert model.recall(key) is None
        clip = model.make(shot, outdated=lambda: False, on_step=lambda step: None)
        model.remember(key, clip)
        found = model.recall(key)
        assert found is not None and found.frames is None
        clip.frames = model.decode(clip.latents, lambda: False)[0]
        model.remember(key, clip)
    with LatentCache(tmp_path / "cache") as cache:
        model = Model(Sampler(tiny.load_pipeline(), call), cache=cache)
        found = model.recall(model.key(shot))
        assert found is not None and found.words == clip.words and found.note == clip.note
        for name in ("latents", "heat", "frames"):
            assert torch.equal(getattr(found, name), getattr(clip, name)), name
        for other in (replace(shot, seed=4), replace(shot, steps=3), replace(shot, prompt="a red star")):
            assert model.recall(model.key(other)) is None
        with torch.no_grad():
            sampler.pipeline.transformer.proj_out.bias.add_(1)
        changed = Model(sampler, cache=cache)
        assert changed.recall(changed.key(shot)) is None
    assert Model(sampler).key(shot) is None
    assert Model(sampler).recall(None) is None
