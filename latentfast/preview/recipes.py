"""Recipes shown by plans: edits and projection in one pass, a slider's move a few numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentfast.plan import Instruction, Plan, ToRGB
from latentfast.plan._recipe import translated
from latentfast.preview.render import RGBRenderer
from latentfast.recipe import Recipe

__all__ = ["RecipeRenderer"]

#: What a preview's parameters say: the recipe, and its tensors by reference.
Told = Callable[[Any], tuple[Recipe, Mapping[str, Tensor]]]


@dataclass
class _Made:
    """A plan, and what it was made for."""

    plan: Plan
    instructions: Sequence[Instruction]
    tensors: Mapping[str, Tensor]
    latents: Tensor


class RecipeRenderer:
    """Shows recipes by RGB factors, edits and projection in one launch (`latentfast.plan`).

    A move of a slider changes numbers in the plan, another clip of the same shape is bound to it, another stack makes
    another plan. What a plan has no instruction for (`Plan.of` says which), or no room, is applied edit by edit, and so
    are previews of some frames alone: a plan makes all of them. Its pixels are within one level of those of the
    operations one after another, which round more often.

    Args:
        weight: RGB factors `(C, 3)`, see `RGBRenderer`.
        bias: `(3,)`.
        tensors: Those that the recipes name; the parameters of a preview are then the recipe itself.
        told: Or what makes a recipe and its tensors of the parameters.

    Example:
        >>> import torch
        >>> from latentfast.preview import RecipeRenderer
        >>> from latentfast.recipe import Direction, Recipe, Tensors
        >>> tensors = Tensors()
        >>> recipe = Recipe([Direction(tensors.add(torch.ones(3, 1, 1, 1)), 1.0)])
        >>> out = torch.empty(1, 2, 16, 16, 3, dtype=torch.uint8)
        >>> renderer = RecipeRenderer(torch.eye(3), torch.zeros(3), tensors)
        >>> renderer.render(torch.zeros(1, 3, 2, 2, 2), recipe, every=1, out=out)
        >>> out.unique()
        tensor([255], dtype=torch.uint8)
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        told: Told | None = None,
    ) -> None:
        self._told: Told = told or (lambda recipe: (recipe, tensors or {}))
        self._factors = weight, bias
        self._one_by_one = RGBRenderer(weight, bias, edit=self.edited)
        self._lock = threading.Lock()
        self._made: dict[tuple[int, ...], _Made] = {}  # by the pixels' shape

    def edited(self, latents: Tensor, parameters: Any) -> Tensor:
        """The latents with the recipe applied; without edits the latents themselves."""
        recipe, tensors = self._told(parameters)
        return recipe.apply(latents, tensors=tensors) if len(recipe) else latents

    @torch.no_grad()
    def render(self, latents: Tensor, parameters: Any, *, every: int, out: Tensor) -> None:
        """See `Renderer`."""
        recipe, tensors = self._told(parameters)
        with self._lock:  # a plan is for one thread
            plan = self._plan(recipe, tensors, latents, tuple(out.shape)) if every == 1 else None
            if plan is not None:
                plan.run(out=out)
        if plan is None:
            self._one_by_one.render(latents, parameters, every=every, out=out)

    def _plan(
        self, recipe: Recipe, tensors: Mapping[str, Tensor], latents: Tensor, shape: tuple[int, ...]
    ) -> Plan | None:
        """A plan for this recipe; None if none can do what it does."""
        try:
            instructions, named = translated(recipe, latents, tensors, None, None)
            made = self._made.get(shape)
            if made is None or not self._follows(made, instructions, named, latents):
                weight, bias = (x.to(latents.device) for x in self._factors)
                rgb = ToRGB(weight, bias, size=(shape[2], shape[3]))
                plan = Plan([*instructions, rgb], latents, named)
                made = _Made(plan, instructions, named, latents)
                if len(self._made) >= 4:  # sizes come and go with the budget of time
                    self._made.clear()
                self._made[shape] = made
        except (TypeError, ValueError, RuntimeError):
            # No instruction, no room, or a backend that was asked for and has no plans. If the recipe itself is wrong,
            # applying it edit by edit says so.
            return None
        return made.plan

    def _follows(
        self, made: _Made, instructions: Sequence[Instruction], named: Mapping[str, Tensor], latents: Tensor
    ) -> bool:
        """Whether a plan could be brought to do this, by its sliders and its source alone."""
        if len(instructions) != len(made.instructions) or made.latents.shape != latents.shape:
            return False
        if made.latents.dtype != latents.dtype or made.latents.device != latents.device:
            return False
        moved = {}
        for index, (before, now) in enumerate(zip(made.instructions, instructions, strict=True)):
            if before == now:
                continue
            if type(before) is not type(now) or now.number is None or before.moved(now.number) != now:
                return False
            moved[index] = now.number
        # the names are digests: the same name is the same tensor
        if named.keys() != made.tensors.keys():
            return False
        if made.latents is not latents:
            made.plan.bind("source", latents)
            made.latents = latents
        if moved:
            made.plan.set_all(moved)
            made.instructions = instructions
        return True
