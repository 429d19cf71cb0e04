"""Plans of recipes: equal to applying the recipe, or a clear error that names the step."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import latentfast
from latentfast.plan import Plan, ToRGB
from latentfast.recipe import (
    Adain,
    Directions,
    FrequencyMix,
    MissingTensorError,
    NlerpTowards,
    Recipe,
    SlerpTowards,
    TemporalSmooth,
    Tensors,
    ToneMap,
)
from tests.helpers import Draw, Target, assert_within, skip_where_lacking
from tests.recipes import SHAPE, Add, every_edit

#: Without an instruction, or without one for this form.
OTHERS = (FrequencyMix, TemporalSmooth, NlerpTowards)


@pytest.fixture(autouse=True)
def _has_plans(target: Target) -> None:
    skip_where_lacking("plan_run", target.device)


def _of_float64(tensors: Tensors, recipe: Recipe) -> tuple[Recipe, Tensors]:
    """The recipe with its tensors in float64."""
    wide = Tensors()
    new = {name: wide.add(x.double()) for name, x in tensors.items()}
    return Recipe([edit.renamed(new.__getitem__) for edit in recipe]), wide


@given(order=st.permutations(range(14)), count=st.integers(1, 5))
def test_a_plan_of_a_recipe_is_the_recipe(order: list[int], count: int, target: Target) -> None:
    z, tensors, edits = every_edit(Draw(device=target.device))
    recipe = Recipe([edits[i] for i in order if not isinstance(edits[i], OTHERS)][:count])
    wide, doubles = _of_float64(tensors, recipe)
    got = Plan.of(recipe, z, tensors=tensors).run()
    assert_within(got, wide.apply(z.double(), tensors=doubles), recipe.apply(z, tensors=tensors))


def test_a_plan_of_a_recipe_with_pixels_and_context(target: Target) -> None:
    z, tensors, _ = every_edit(Draw(device=target.device))
    other = next(x for x in tensors.values() if x.shape == z.shape)
    recipe = Recipe([SlerpTowards("name:other", 0.3), ToneMap(0.5)])
    size = (8 * SHAPE[3], 8 * SHAPE[4])
    rgb = ToRGB([[0.1, 0.2, 0.3]] * 4, [0.0, 0.1, 0.2], size)
    got = Plan.of(recipe, z, context={"other": other}, rgb=rgb).run()
    edited = recipe.apply(z, context={"other": other})
    wanted = latentfast.latent_to_rgb(edited, rgb.weight, rgb.bias, size=size)
    assert (got.int() - wanted.int()).abs().max() <= 1  # the edited latents differ by roundings of float32
    assert Plan.of(recipe, z, context={"other": other}, rgb=rgb, outputs=("latents",)).run().shape == z.shape


def test_directions_and_masks_for_each(target: Target) -> None:
    draw = Draw(device=target.device)
    z, tensors = draw.normal(*SHAPE), Tensors()
    for rows in (draw.normal(3, *SHAPE), draw.normal(1, 1, 4, 1, 1, 1)):
        for mask in (draw.mask(3, 1, 1, *SHAPE[2:]), draw.mask(1, 2, 1, *SHAPE[2:])):
            edit = Directions(tensors.add(rows), (0.5, -0.25, 1.0), mask=tensors.add(mask))
            recipe = Recipe([edit])
            p = Plan.of(recipe, z, tensors=tensors)
            assert len(p.stack) == 3
            wide, doubles = _of_float64(tensors, recipe)
            same = recipe.apply(z, tensors=tensors)
            assert_within(p.run(), wide.apply(z.double(), tensors=doubles), same)


def test_what_a_plan_cannot_do_is_told_with_the_step(target: Target) -> None:
    z, tensors, edits = every_edit(Draw(device=target.device))
    a_latent = tensors.add(z)
    for edit, why in (
        (next(x for x in edits if isinstance(x, TemporalSmooth)), "no instruction of a plan does this"),
        (Add(1.0), "no instruction of a plan does this"),
        (SlerpTowards(a_latent, 0.5, (1,)), r"dim must be None, one vector a sample, in a plan, got \(1,\)"),
        (Adain(a_latent, channel_dim=2), "channel_dim must be 1 in a plan, got 2"),
        (Directions(a_latent, (1.0, 2.0)), "directions must have 6 dimensions, 2 or 1 the first"),
    ):
        with pytest.raises(ValueError, match=rf"recipe step 2 \({edit.name}\): {why}"):
            Plan.of(Recipe([ToneMap(0.5), edit]), z, tensors=tensors)
    with pytest.raises(MissingTensorError, match="recipe step 1"):
        Plan.of(Recipe([SlerpTowards(f"sha256:{'0' * 64}", 0.5)]), z)
    whole = SlerpTowards(a_latent, 0.5, (1, 2, 3, -1))
    assert torch.isfinite(Plan.of(Recipe([whole]), z, tensors=tensors).run()).all()
