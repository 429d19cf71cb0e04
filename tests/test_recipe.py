"""Recipes as data: what they hold, how they are written and read, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentfast import recipe as recipe_module
from latentfast.recipe import (
    AttentionMask,
    Blend,
    Direction,
    Directions,
    Edit,
    LerpTowards,
    Number,
    OneOf,
    Recipe,
    SlerpTowards,
    Standardize,
    TemporalSmooth,
    TensorRef,
    Tensors,
    ToneMap,
    register,
    registered,
)
from tests.helpers import Draw
from tests.recipes import every_edit, violations

A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


def whole(*edits: dict[str, Any], **other: Any) -> str:
    return json.dumps({"format": "latentfast.recipe", "version": 1, "edits": list(edits)} | other)


def sample() -> Recipe:
    return Recipe(every_edit(Draw())[2])


def test_everything_public_says_what_it_is() -> None:
    public = [getattr(recipe_module, name) for name in recipe_module.__all__ if name.lower() != name or name == "keep"]
    assert all(inspect.getdoc(item) for item in public if inspect.isclass(item) or inspect.isfunction(item))


# --- Immutable stacks ------------------------------------------------------------------------------------------------


def test_methods_return_another_recipe() -> None:
    a, b, c = LerpTowards(A, 0.1), ToneMap(0.2), Direction(B, 0.3)
    recipe = Recipe([a, b])
    assert recipe.then(c).edits == (a, b, c) and recipe.then().edits == (a, b)
    assert recipe.replace(-1, c).edits == (a, c)
    assert recipe.without(0).edits == (b,)
    assert recipe.then(c).move(0, 2).edits == (b, c, a) and recipe.then(c).move(-1, 0).edits == (c, a, b)
    assert recipe.edits == (a, b) and len(recipe) == 2 and list(recipe) == [a, b]
    assert recipe[0] is a and recipe[:1] == Recipe([a])


def test_a_recipe_and_its_edits_do_not_change() -> None:
    recipe = Recipe([ToneMap(0.5)])
    with pytest.raises(AttributeError, match="does not change"):
        recipe.edits = ()
    with pytest.raises(AttributeError, match="does not change"):
        del recipe.edits
    with pytest.raises(FrozenInstanceError):
        recipe[0].compression = 0.1


def test_equal_recipes_are_one() -> None:
    first, second = sample(), sample()
    assert first == second and hash(first) == hash(second) and first.digest == second.digest
    assert first != first.without(0) and first != "a recipe"
    assert Recipe([LerpTowards(A, 0.0)]) != Recipe([LerpTowards(A, -0.0)])
    for again in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first), eval_of(first)):
        assert again == first and again.digest == first.digest


def eval_of(recipe: Recipe) -> Recipe:
    """Of its repr, which is Python."""
    names = {cls.__name__: cls for cls in (*registered().values(), AttentionMask)}
    return eval(repr(recipe), {"Recipe": Recipe, **names})


def test_the_digest_is_that_of_what_it_says() -> None:
    """A number that changes here makes every state in every cache worthless: raise VERSION or a revision with it."""
    recipe = Recipe([LerpTowards(A, 0.25), ToneMap(0.5)])
    assert recipe.digest == "5f917f7299c5935ab4076eb27d4cf799a47bf1183a76cf2678e8811a3f3982cb"
    assert recipe.prefix_digest(1) == Recipe([LerpTowards(A, 0.25)]).digest
    others = [Recipe(), recipe.move(0, 1), recipe.without(1), recipe.replace(1, ToneMap(0.5000000000000001)),
              recipe.replace(0, LerpTowards(B, 0.25)), recipe.replace(0, LerpTowards(A, 0.25, mask=B))]  # fmt: skip
    assert len({recipe.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_digests_do_not_depend_on_the_way_to_a_recipe() -> None:
    recipe = sample()
    _ = recipe.digest
    for i in range(len(recipe)):
        for changed in (
            recipe.replace(i, ToneMap(0.123)),
            recipe.without(i),
            recipe.move(i, 3),
            recipe.then(recipe[i]),
        ):
            assert changed.digest == Recipe(changed.edits).digest


@pytest.mark.parametrize("index", [2, -3, 10**30])
def test_an_index_beyond_the_edits(index: int) -> None:
    recipe = Recipe([ToneMap(0.1), ToneMap(0.2)])
    for call in (recipe.without, lambda i: recipe.replace(i, ToneMap(0.1)), lambda i: recipe.move(0, i)):
        with pytest.raises(IndexError, match=r"must be in \[-2, 1\] for 2 edits"):
            call(index)


def test_what_is_no_edit() -> None:
    for call in (lambda: Recipe([ToneMap(0.1), "blend"]), lambda: Recipe([ToneMap(0.1)]).then("blend")):
        with pytest.raises(TypeError, match="recipe step 2 must be an edit, got str"):
            call()
    with pytest.raises(TypeError, match="index must be an int"):
        Recipe([ToneMap(0.1)]).without("0")


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_every_edit_comes_back() -> None:
    recipe = sample()
    assert {edit.name for edit in recipe} == {name for name in registered() if "/" not in name}
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and again.digest == recipe.digest and again.to_json() == recipe.to_json()
    assert all(type(a) is type(b) for a, b in zip(again, recipe, strict=True))


@given(st.floats(allow_nan=False, allow_infinity=False), st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_floats_come_back_exactly(number: float, numbers: list[float]) -> None:
    recipe = Recipe([LerpTowards(A, number), Directions(B, numbers)])
    again = Recipe.from_json(recipe.to_json())
    assert repr(again[0].t) == repr(number) and list(map(repr, again[1].strengths)) == list(map(repr, numbers))
    assert again.digest == recipe.digest


def test_an_integer_is_the_float_it_equals() -> None:
    assert LerpTowards(A, 1) == LerpTowards(A, 1.0) and Recipe([ToneMap(1)]).digest == Recipe([ToneMap(1.0)]).digest
    assert Recipe.from_json(whole({"edit": "tone_map", "compression": 1})).digest == Recipe([ToneMap(1.0)]).digest


def test_the_text_is_made_to_be_compared() -> None:
    recipe = Recipe([SlerpTowards(A, 0.3), ToneMap(0.5, mask=B)])
    assert recipe.to_json().splitlines()[5:] == [
        '      "edit": "slerp_towards",',
        f'      "target": "{A}",',
        '      "t": 0.3',
        "    },",
        "    {",
        '      "edit": "tone_map",',
        '      "compression": 0.5,',
        f'      "mask": "{B}"',
        "    }",
        "  ]",
        "}",
    ]
    changed = recipe.replace(0, SlerpTowards(A, 0.31)).diff(recipe).splitlines()
    assert [line for line in changed if line[0] in "+-"] == [
        "--- before",
        "+++ after",
        '-      "t": 0.31',
        '+      "t": 0.3',
    ]
    assert recipe.diff(Recipe(recipe.edits)) == ""


def test_files(tmp_path: Path) -> None:
    recipe, path = sample(), tmp_path / "a.recipe.json"
    recipe.save(path)
    assert Recipe.load(path) == recipe and [file.name for file in tmp_path.iterdir()] == [path.name]
    recipe.without(0).save(str(path))
    assert Recipe.load(str(path)) == recipe.without(0)
    path.write_text(whole({"edit": "tone_map", "compression": 2}))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: recipe step 1 \(tone_map\): compression must be"):
        Recipe.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a recipe must be JSON"):
        Recipe.load(path)


GOOD = {"edit": "tone_map", "compression": 0.5}
REFUSED = [
    (whole({"edit": "slerp_towards", "target": A, "t": "0.3"}), "(slerp_towards): t must be a finite number, got '"),
    (whole({"edit": "slerp_towards", "target": A, "t": True}), "(slerp_towards): t must be a finite number, got True"),
    (whole({"edit": "slerp_towards", "target": "mask.pt", "t": 1}), "(slerp_towards): target must be 'sha256:'"),
    (whole({"edit": "slerp_towards", "target": 3, "t": 1}), "(slerp_towards): target must be a reference"),
    (whole({"edit": "slerp_towards", "target": A}), "(slerp_towards): t is missing"),
    (whole({"edit": "slerp_towards", "target": A, "t": 1, "dim": 1}), "(slerp_towards): dim must be a list, got 1"),
    (whole({"edit": "slerp_towards", "target": A, "t": 1, "dim": [1.5]}), "number 1 must be an integer, got 1.5"),
    (whole({"edit": "tone_map", "compression": 1.5}), "(tone_map): compression must be a number in [0, 1], got 1.5"),
    (whole({"edit": "tone_map", "compression": 0.5, "colour": 1}), "(tone_map): colour is not a parameter; there are"),
    (whole({"edit": "tone_map", "compression": 0.5, "mask": {"heat": A, "threshold": 1, "quantile": 0.5}}),
     "(tone_map): mask must be right: threshold and quantile exclude each other"),
    (whole({"edit": "tone_map", "compression": 0.5, "mask": {"heat": A, "group": -1}}), "group must be an integer of"),
    (whole({"edit": "standardize", "mean": [0.0], "std": [0]}), "(standardize): std must have good elements: number 1"),
    (whole({"edit": "standardize", "mean": [0.0], "std": [1, 2]}), "(standardize): std must have a number for each"),
    (whole({"edit": "temporal_smooth", "steps": 0}), "(temporal_smooth): steps must be an integer of at least 1"),
    (whole({"edit": "temporal_smooth", "first": 0}), "(temporal_smooth): first or second must be above 0"),
    (whole({"edit": "frequency_mix", "other": A, "keep": "none"}), "(frequency_mix): keep must be 'low' or 'high'"),
    (whole({"edit": "sharpen"}), ": edit must be one of adain, blend,"),
    (whole({"edit": []}), ": edit must be one of adain, blend,"),
    (whole({"compression": 0.5}), ": edit must be one of adain, blend,"),
    (whole("tone_map"), ": must be an object with an edit's name and parameters, got str"),
    (whole({"edit": "tone_map", "compression": 0.5, "revision": 2}), "(tone_map): revision must be 1, which is what"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_step_is_named(text: str, message: str) -> None:
    step = json.loads(text)["edits"][0]
    text = whole(GOOD, GOOD, step)
    with pytest.raises((TypeError, ValueError)) as refused:
        Recipe.from_json(text)
    assert str(refused.value).startswith("recipe step 3") and message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (whole(version=2), "version must be 1, the only one known here, got 2"),
        (whole(version=None), "version must be 1"),
        (whole(format="comfyui"), "a JSON object whose format is 'latentfast.recipe', got format 'comfyui'"),
        ("[]", "a JSON object whose format is 'latentfast.recipe', got list"),
        (whole(author="me"), "must have format, version and edits alone, got 'author'"),
        (whole(edits={}), "edits must be a list, got dict"),
        ("{", "a recipe must be JSON"),
        ("[" * 100_000, "a recipe must be JSON"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        (whole(GOOD).replace("0.5", "NaN"), "NaN is not a number"),
        (whole(GOOD).replace("0.5", "-Infinity"), "-Infinity is not a number"),
        (whole(GOOD).replace("0.5", "1e999"), "compression must be a number in [0, 1], got inf"),
        (whole({"edit": "lerp_towards", "target": A, "t": 10**400}), "t must be a finite number, got an integer"),
    ],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        Recipe.from_json(text)
    assert message in str(refused.value)


# --- The schema ------------------------------------------------------------------------------------------------------


def test_every_recipe_fits_the_schema() -> None:
    schema = Recipe.schema()
    json.dumps(schema, allow_nan=False)
    assert violations(sample().to_data(), schema, schema) == []
    assert violations(Recipe([TemporalSmooth(), Direction("name:sky", 1.0)]).to_data(), schema, schema) == []
    assert violations(json.loads(whole(GOOD)), schema, schema) == []


# What fits one another is beyond a schema of single parameters.
@pytest.mark.parametrize(
    "text", [text for text, message in REFUSED if not re.search("exclude|for each|or second", message)]
)
def test_what_is_refused_does_not_fit_the_schema(text: str) -> None:
    schema = Recipe.schema()
    assert violations(json.loads(text), schema, schema)


def test_the_schema_says_what_a_parameter_may_be() -> None:
    made = Recipe.schema()["$defs"]["tone_map"]
    assert made["properties"]["compression"] == {"type": "number", "minimum": 0, "maximum": 1}
    assert made["required"] == ["edit", "compression"] and "tone_map" in made["description"]
    assert set(Recipe.schema()["$defs"]) == set(registered())


# --- The registry ----------------------------------------------------------------------------------------------------


@register("test/brighten", revision=3)
@dataclass(frozen=True)
class Brighten(Edit):
    """Brighter."""

    pattern: TensorRef
    amount: Annotated[float, Number(-1, 1)] = 0.1
    where: Annotated[str, OneOf("all", "first")] = "all"

    def apply(self, latents, resolve):
        return latents + self.amount * resolve(self.pattern)


def test_an_edit_of_ones_own() -> None:
    pattern = torch.tensor([1.0, 2.0])
    tensors = Tensors()
    recipe = Recipe([Brighten(tensors.add(pattern), 0.5), ToneMap(0.0)])
    assert recipe.apply(torch.zeros(1, 2), tensors=tensors).tolist() == [[0.5, 1.0]]
    data = recipe.to_data()
    assert data["edits"][0] == {
        "edit": "test/brighten",
        "revision": 3,
        "pattern": tensors.add(pattern),
        "amount": 0.5,
        "where": "all",
    }
    assert Recipe.from_data(data) == recipe and violations(data, Recipe.schema(), Recipe.schema()) == []
    with pytest.raises(ValueError, match=r"amount must be a number in \[-1, 1\], got 2"):
        Brighten(A, 2)
    for revision in (1, 2, None):
        old = json.loads(recipe.to_json())
        old["edits"][0]["revision"] = revision
        with pytest.raises(ValueError, match=r"recipe step 1 \(test/brighten\): revision must be 3"):
            Recipe.from_data(old)


def test_the_same_class_again_as_in_a_notebook() -> None:
    def cell(amount: float) -> type[Edit]:
        @register("test/cell")
        @dataclass(frozen=True)
        class Cell(Edit):
            def apply(self, latents, resolve):
                return latents + amount

        return Cell

    cell(1.0)
    assert Recipe.from_json(whole({"edit": "test/cell"})).apply(torch.zeros(1)).item() == 1.0
    cell(2.0)
    assert Recipe.from_json(whole({"edit": "test/cell"})).apply(torch.zeros(1)).item() == 2.0


def test_what_register_refuses() -> None:
    def add(name: str = "test/refused", bases: tuple = (Edit,), frozen: bool = True, **fields: Any) -> None:
        made = type("Refused", bases, {"__annotations__": fields, "apply": lambda self, latents, resolve: latents})
        register(name)(dataclass(frozen=True)(made) if frozen else made)

    for call, error, message in [
        (lambda: add("tone_map"), ValueError, "'tone_map' is taken by latentfast.recipe.edits.ToneMap"),
        (lambda: add("Tone Map"), ValueError, "name must be lower-case"),
        (lambda: add(frozen=False), TypeError, "Refused must be a dataclass"),
        (lambda: add(bases=()), TypeError, "above a class on latentfast.recipe.Edit"),
        (lambda: add(tensor=torch.Tensor), TypeError, "Refused.tensor: .* says not what values it takes"),
        (lambda: add(words=list[float]), TypeError, "Refused.words: .* says not what values it takes"),
        (lambda: add(edit=float), ValueError, "must not have a field named edit"),
        (lambda: register("test/refused", revision=0), ValueError, "revision must be an integer of at least 1"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert "test/refused" not in registered()
    with pytest.raises(TypeError, match=r"Plain is not registered: put @register"):

        @dataclass(frozen=True)
        class Plain(Edit):
            pass

        Plain()


def test_masks_are_said_in_two_ways() -> None:
    named = ToneMap(0.5, mask=AttentionMask(A, quantile=0.9))
    assert ToneMap(0.5, mask={"heat": A, "quantile": 0.9}) == named
    assert list(named.references()) == [A] and list(Blend(A, B).references()) == [A, B]
    assert Recipe([named, Blend(A, B)]).references == (A, B)
    with pytest.raises(ValueError, match="softness needs a threshold or a quantile"):
        AttentionMask(A, softness=0.1)
    with pytest.raises(TypeError, match=r"target must be a reference to a tensor: what Tensors.add"):
        LerpTowards(torch.zeros(1), 0.5)
    assert Standardize([0], [1]).mean == (0.0,)
