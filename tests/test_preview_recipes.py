"""`RecipeRenderer`: the pixels are those of the operations, and a move changes numbers, not the plan."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from latentfast.plan import Plan
from latentfast.preview import PreviewEngine, RecipeRenderer, RGBRenderer
from latentfast.recipe import (
    Adain,
    Confine,
    Direction,
    Edit,
    FrequencyMix,
    LerpTowards,
    Recipe,
    SlerpTowards,
    Tensors,
    ToneMap,
)
from tests.helpers import Target

SHAPE = (1, 4, 3, 5, 6)


class Clips:
    """Tensors of recipes, by name."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(0)
        self.z, self.b, other = 0.5 * torch.randn(3, *SHAPE, device=device)
        mask = (torch.rand(1, 1, 3, 5, 6, device=device) > 0.5).float()
        self.tensors = Tensors()
        self.b_name, self.other, self.mask, self.source, self.colour = (
            self.tensors.add(x) for x in (self.b, other, mask, self.z, 0.2 * torch.ones(4, 1, 1, 1, device=device))
        )
        self.factors = torch.eye(4, device=device)[:, :3].contiguous(), torch.zeros(3, device=device)

    def stack(self, t: float = 0.3, strength: float = 0.5) -> list[Edit]:
        return [
            SlerpTowards(self.b_name, t),
            Direction(self.colour, strength, mask=self.mask),
            Adain(self.other, 0.5),
            ToneMap(0.2),
            Confine(self.source, self.mask),
        ]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that is made."""
    made: list[Plan] = []
    init = Plan.__init__

    def counted(self, *arguments, **options) -> None:
        made.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(Plan, "__init__", counted)
    return made


def rendered(renderer, latents: Tensor, recipe: Recipe, every: int = 1) -> Tensor:
    out = torch.empty(1, -(-3 // every), 40, 48, 3, dtype=torch.uint8, device=latents.device)
    renderer.render(latents, recipe, every=every, out=out)
    return out.int()


def one_by_one(clips: Clips) -> RGBRenderer:
    return RGBRenderer(*clips.factors, edit=lambda z, recipe: recipe.apply(z, tensors=clips.tensors))


def recipes(clips: Clips) -> Iterator[Recipe]:
    stack = clips.stack()
    for count in range(len(stack) + 1):
        yield Recipe(stack[:count])
    yield Recipe(stack[::-1])
    yield Recipe([FrequencyMix(clips.other), *stack])  # no plan does this
    yield Recipe([LerpTowards(clips.b_name, 0.1)] * 40)  # nor so many


def test_pixels_are_those_of_the_operations(target: Target) -> None:
    clips = Clips(target.device)
    renderer, expected = RecipeRenderer(*clips.factors, clips.tensors), one_by_one(clips)
    # an interpreted kernel takes a tenth of a second a call: the empty recipe, a plan, and what is no plan's
    some = list(recipes(clips))[:: 7 if target.interpreted else 1]
    for recipe in some:
        for every in (1, 2):
            found = rendered(renderer, clips.z, recipe, every)
            # both are within half a level and their roundings of the exact result
            assert (found - rendered(expected, clips.z, recipe, every)).abs().max() <= 1


def test_a_move_changes_numbers_alone(plans: list[Plan]) -> None:
    clips = Clips()
    renderer, expected = RecipeRenderer(*clips.factors, clips.tensors), one_by_one(clips)
    for step in range(5):
        recipe = Recipe(clips.stack(t=step / 5, strength=1 - step / 5))
        found = rendered(renderer, clips.z, recipe)
        assert (found - rendered(expected, clips.z, recipe)).abs().max() <= 1
    assert len(plans) == 1
    other = clips.z.flip(0) * 0.5
    for latents in (other, clips.z):
        found = rendered(renderer, latents, recipe)
        assert (found - rendered(expected, latents, recipe)).abs().max() <= 1
    assert len(plans) == 1
    rendered(renderer, clips.z, recipe.without(1))
    assert len(plans) == 2


def test_an_edit_that_fails_says_why() -> None:
    clips = Clips()
    renderer = RecipeRenderer(*clips.factors, clips.tensors)
    wrong = Recipe([LerpTowards("sha256:" + "0" * 64, 0.5)])
    with pytest.raises(ValueError, match="recipe step 1"):
        rendered(renderer, clips.z, wrong)


def test_in_the_engine() -> None:
    clips = Clips()
    renderer, expected = RecipeRenderer(*clips.factors, clips.tensors), one_by_one(clips)
    with PreviewEngine(clips.z, renderer, Recipe(), budget=60) as engine, engine.subscribe() as previews:
        recipe = Recipe(clips.stack())
        number = engine.update(recipe)
        while (preview := previews.get(60)).number < number:
            pass
    assert (preview.frames.int() - rendered(expected, clips.z, recipe)).abs().max() <= 1
