"""Recipes applied: the operations' own bits, where tensors come from, and what a wrong step says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch

import latentfast
from latentfast.cache import LatentCache
from latentfast.recipe import (
    AttentionMask,
    Direction,
    Edit,
    LerpTowards,
    MissingTensorError,
    Recipe,
    TemporalSmooth,
    Tensors,
    ToneMap,
    keep,
    reference,
    register,
    smoothed,
)
from latentfast.recipe import tensors as tensors_module
from tests.helpers import Draw, same_bits
from tests.recipes import DEVICES, SHAPE, Add, Same, every_edit


@pytest.fixture
def cache() -> Iterator[LatentCache]:
    with LatentCache(device_bytes=64 << 20, host_bytes=64 << 20) as made:
        yield made


# --- The same as the operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_every_edit_is_its_operation(device: str) -> None:
    z, tensors, edits = every_edit(Draw(torch.float32, device))
    by_name = {edit.name: edit for edit in edits}
    b, n, d, many, mask, heat = tensors.values()
    maps = latentfast.heatmap_to_mask(
        heat[:, 1:].flatten(2), (3, 2, 3), SHAPE[2:], quantile=0.6, softness=0.2, dilate=1, smooth_time=0.5
    )
    outside = 1 - latentfast.heatmap_to_mask(heat[:, :1].flatten(2), (3, 2, 3), SHAPE[2:], threshold=0.4)
    mean, std = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5)
    expected = {
        "lerp_towards": latentfast.lerp(z, b, 0.25),
        "nlerp_towards": latentfast.nlerp(z, b, 0.3, dim=1),
        "slerp_towards": latentfast.blend(z, latentfast.slerp(z, b, 1 / 3), mask),
        "direction": latentfast.edit(z, d[None, None], [0.1], maps),
        "directions": latentfast.edit(z, many, [0.1, -0.2, 0.3], mask),
        "blend": latentfast.blend(z, b, mask),
        "confine": latentfast.blend(n, z, outside),
        "adain": latentfast.adain(z, b, 0.7),
        "tone_map": latentfast.blend(z, latentfast.tone_map(z, 0.6), mask),
        "standardize": latentfast.standardize(z, mean, std, 0.9),
        "unstandardize": latentfast.unstandardize(z, mean, std, 0.9),
        "frequency_mix": latentfast.frequency_mix(n, z, 0.3, 2, temporal_cutoff=0.5, kind="gaussian"),
        "scale_noise": latentfast.lerp(z, n, 0.2),
        "temporal_smooth": smoothed(z, b, mask, steps=2, first=1.0, second=0.5, data=0.1),
    }
    assert set(expected) == set(by_name)
    for name, value in expected.items():
        got = Recipe([by_name[name]]).apply(z, tensors=tensors)
        assert same_bits(got, value), name
    # one after another, with a cache and without
    state = z
    for edit in edits:
        state = edit.apply(state, tensors_module.Resolve(tensors, None))
    recipe = Recipe(edits)
    assert same_bits(recipe.apply(z, tensors=tensors), state)
    with LatentCache(device_bytes=64 << 20, host_bytes=64 << 20) as made:
        for _ in range(2):
            assert same_bits(recipe.apply(z, tensors=tensors, cache=made, keep_result=True), state)


def test_images_have_masks_of_attention_too() -> None:
    draw = Draw()
    z, heat = draw.normal(2, 4, 8, 6), draw.uniform(2, 1, 1, 4, 3)
    tensors = Tensors()
    mask = AttentionMask(tensors.add(heat), threshold=0.5)
    got = Recipe([Direction(tensors.add(torch.ones(1)), 1.0, mask=mask)]).apply(z, tensors=tensors)
    expected = latentfast.heatmap_to_mask(heat.flatten(2), (1, 4, 3), (1, 8, 6), threshold=0.5)[:, :, 0]
    assert same_bits(got, z + expected)


def test_the_result_is_ones_own(cache: LatentCache) -> None:
    z = torch.randn(2, 3)
    for recipe in (Recipe(), Recipe([ToneMap(0.5)]), Recipe([ToneMap(0.5), Same()])):
        for options in ({}, {"cache": cache}, {"cache": cache, "keep_result": True}):
            before = recipe.apply(z, **options)
            recipe.apply(z, **options).fill_(torch.nan)
            assert same_bits(recipe.apply(z, **options), before) and before.isfinite().all()


def test_gradients_go_through_without_a_cache(cache: LatentCache) -> None:
    z, other = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    tensors = Tensors()
    recipe = Recipe([LerpTowards(tensors.add(other), 0.25), Add(1.0)])
    grads = torch.autograd.grad(recipe.apply(z, tensors=tensors).sum(), [z, other])
    assert grads[0].unique().item() == 0.75 and grads[1].unique().item() == 0.25
    with pytest.raises(ValueError, match="latents must not require grad beside a cache"):
        recipe.apply(z, tensors=tensors, cache=cache)
    with pytest.raises(ValueError, match="recipe step 1: tensors must not require grad beside a cache"):
        recipe.apply(z.detach(), tensors=tensors, cache=cache)
    with torch.no_grad():
        assert not recipe.apply(z, tensors=tensors, cache=cache).requires_grad


# --- Where tensors come from -----------------------------------------------------------------------------------------


def test_tensors_come_from_the_cache(cache: LatentCache) -> None:
    tensor = torch.randn(2, 3)
    recipe = Recipe([LerpTowards(keep(cache, tensor), 1.0)])
    expected = tensor.clone()
    tensor.zero_()  # the cache has a copy
    assert same_bits(recipe.apply(torch.zeros(2, 3), cache=cache), expected)
    assert same_bits(recipe.apply(torch.zeros(2, 3), cache=cache, tensors=Tensors()), expected)


def test_a_missing_tensor_is_named(cache: LatentCache) -> None:
    missing = reference(torch.randn(3))
    recipe = Recipe([ToneMap(0.1), LerpTowards(missing, 0.5)])
    for options, where in [({}, "not in tensors"), ({"cache": cache}, "neither in tensors nor in the cache")]:
        with pytest.raises(
            MissingTensorError, match=rf"recipe step 2 \(lerp_towards\): tensor {missing} is {where}"
        ) as e:
            recipe.apply(torch.zeros(3), **options)
        assert e.value.reference == missing


def test_names_are_bound(cache: LatentCache) -> None:
    recipe = Recipe([Add(1.0), Add(2.0, "name:where")])
    tensor, tensors = torch.tensor([0.0, 1.0]), Tensors()
    assert recipe.apply(torch.zeros(2), context={"where": tensor}).tolist() == [1.0, 3.0]
    named = {"where": tensors.add(tensor)}
    assert recipe.apply(torch.zeros(2), context=named, tensors=tensors, cache=cache).tolist() == [1.0, 3.0]
    other = {"where": torch.tensor([2.0, 0.0])}
    assert recipe.apply(torch.zeros(2), context=other, cache=cache).tolist() == [5.0, 1.0]
    bound = recipe.bind(named)
    assert bound.edits == (Add(1.0), Add(2.0, named["where"])) and bound.digest != recipe.digest
    assert recipe.bind({}) is recipe and recipe.bind({"other": A_DIGEST}) is recipe
    with pytest.raises(MissingTensorError, match=r"step 2 \(test/add\): 'name:where' is a name that context must"):
        recipe.apply(torch.zeros(2))
    with pytest.raises(ValueError, match=r"recipe step 2 \(test/add\): tensor must be 'sha256:'"):
        recipe.bind({"where": "nonsense"})


A_DIGEST = f"sha256:{'a' * 64}"


# --- What goes wrong in a step ---------------------------------------------------------------------------------------


def test_an_operations_error_names_the_step() -> None:
    tensors = Tensors()
    other = tensors.add(torch.zeros(2, 4))
    recipe = Recipe([ToneMap(0.1), ToneMap(0.1), LerpTowards(other, 0.5)])
    with pytest.raises(
        ValueError, match=r"^recipe step 3 .lerp_towards.: b must have a's shape \(2, 3\), got \(2, 4\)"
    ):
        recipe.apply(torch.zeros(2, 3), tensors=tensors)
    with pytest.raises(TypeError, match=r"^recipe step 3 .lerp_towards.: b must have a's dtype float64, got float32"):
        recipe.apply(torch.zeros(2, 4, dtype=torch.float64), tensors=tensors)
    with pytest.raises(TypeError, match="latents must be a tensor, got list"):
        recipe.apply([0.0])
    heat = tensors.add(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match=r"recipe step 1 \(tone_map\): heat must have shape \(B, G, t, h, w\)"):
        Recipe([ToneMap(0.1, mask=AttentionMask(heat))]).apply(torch.zeros(1, 1, 1, 2, 2), tensors=tensors)
    with pytest.raises(ValueError, match=r"recipe step 1 \(temporal_smooth\): frame_dim must name a dimension of 2-D"):
        Recipe([TemporalSmooth()]).apply(torch.zeros(2, 3))


def test_an_edit_of_ones_own_that_misbehaves(cache: LatentCache) -> None:
    z = torch.zeros(3)
    for options in ({}, {"cache": cache}):
        with pytest.raises(ValueError, match=r"recipe step 2 \(test/writes\): apply must not write into the latents"):
            Recipe([Add(1.0), Writes(), Add(1.0)]).apply(z, **options)
        with pytest.raises(TypeError, match=r"step 1 \(test/nothing\): apply must return a tensor, got NoneType"):
            Recipe([Nothing()]).apply(z, **options)
    for _ in range(2):  # the second begins with the state that the third would find at hand
        assert Recipe([Add(2.0), Add(3.0)]).apply(z, cache=cache).tolist() == [5.0] * 3
    with pytest.raises(ValueError, match="must not write"):
        Recipe([Add(2.0), Writes()]).apply(z, cache=cache)
    assert Recipe([Add(2.0), Add(4.0)]).apply(z, cache=cache).tolist() == [6.0] * 3


@register("test/writes")
@dataclass(frozen=True)
class Writes(Edit):
    def apply(self, latents, resolve):
        return latents.add_(1)


@register("test/nothing")
@dataclass(frozen=True)
class Nothing(Edit):
    def apply(self, latents, resolve):
        pass


def test_tensors_are_a_mapping() -> None:
    first, second = torch.zeros(2), torch.ones(2)
    tensors = Tensors(first, second)
    assert isinstance(tensors, Mapping) and list(tensors) == [reference(first), reference(second)]
    assert tensors.add(first) == reference(torch.zeros(2)) and len(tensors) == 2
    assert tensors[reference(second)] is second
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        reference([1.0])
