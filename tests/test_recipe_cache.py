"""The states between edits: what a cache saves, and what it must never get wrong."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import latentfast
from latentfast._launches import Operators
from latentfast.cache import Key, LatentCache, digest_tensor, environment
from latentfast.recipe import (
    AttentionMask,
    Direction,
    Directions,
    Edit,
    LerpTowards,
    Recipe,
    SlerpTowards,
    Tensors,
    ToneMap,
    keys,
    reference,
    register,
)
from latentfast.recipe import apply as apply_module
from latentfast.recipe import tensors as tensors_module
from tests.helpers import Draw, same_bits
from tests.recipes import SHAPE, Add, Same, calls_of


@pytest.fixture
def cache() -> Iterator[LatentCache]:
    with LatentCache(device_bytes=64 << 20, host_bytes=64 << 20) as made:
        yield made


def test_the_last_of_ten_costs_one_edit(cache: LatentCache) -> None:
    z = torch.randn(2, 3)
    recipe = Recipe(Add(0.1 * i) for i in range(10))
    assert calls_of(recipe, z, cache=cache) == 10
    for value in (1.0, 2.0, 3.0):
        assert calls_of(recipe.replace(9, Add(value)), z, cache=cache) == 1
    for value in (1.0, 2.0, 3.0):
        changed = recipe.replace(6, Add(value))
        assert calls_of(changed, z, cache=cache) == 4
    assert calls_of(changed.then(Add(5.0)), z, cache=cache) == 2  # the state before it was a result
    assert calls_of(changed.then(Add(6.0)), z, cache=cache) == 1
    assert calls_of(changed.without(9), z, cache=cache) == 1
    assert calls_of(changed.move(0, 1), z, cache=cache) == 10
    assert calls_of(Recipe.from_json(changed.move(0, 1).to_json()), z.clone(), cache=cache) == 1  # content, not objects


@pytest.mark.parametrize("instead", ["dear", "large"])
def test_states_that_are_dear_or_large_are_kept_in_the_cache(instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_module, *{"dear": ("_WORTH_KEEPING", 0.0), "large": ("_MOST_AT_HAND", 0)}[instead])
    if instead == "dear":
        monkeypatch.setattr(apply_module, "_QUICK", 0.0)
    z = torch.randn(2, 3)
    recipe = Recipe(Add(0.1 * i) for i in range(10))
    with LatentCache(host_bytes=1 << 20) as cache:
        expected = recipe.apply(z)
        assert calls_of(recipe, z, cache=cache) == 10
        apply_module._at_hand.clear()
        assert calls_of(recipe, z, cache=cache) == 1
        assert calls_of(recipe.replace(4, Add(7.0)), z, cache=cache) == 6
        assert calls_of(recipe, z, cache=cache) == 1  # what came before is still there
        assert calls_of(recipe, z, cache=cache, keep_result=True) == 1
        assert calls_of(recipe, z, cache=cache, keep_result=True) == 0
        assert same_bits(recipe.apply(z, cache=cache, keep_result=True), expected)


def test_quick_edits_leave_nothing_in_the_cache(cache: LatentCache) -> None:
    recipe = Recipe([Add(0.1), Add(0.2), Add(0.3)])
    recipe.apply(torch.zeros(3), cache=cache)
    assert cache.stats().host.entries == 0
    recipe.apply(torch.zeros(3), cache=cache, keep_result=True)
    assert cache.stats().host.entries == 1
    slow = recipe.then(Slow(), Add(0.4))
    slow.apply(torch.zeros(3), cache=cache)
    assert cache.stats().host.entries == 2
    apply_module._at_hand.clear()
    assert calls_of(slow.then(Add(0.5)), torch.zeros(3), cache=cache) == 2


@register("test/slow")
@dataclass(frozen=True)
class Slow(Edit):
    """Takes as long as what is worth keeping."""

    def apply(self, latents, resolve):
        time.sleep(0.02)
        return latents + 1


def test_states_at_hand_have_a_bound_and_go_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(100)
    monkeypatch.setattr(apply_module, "_MOST_AT_HAND", 3 * z.nbytes)
    apply_module._at_hand.clear()
    with LatentCache(host_bytes=1 << 20) as cache:
        recipe = Recipe(Add(0.1 * i) for i in range(10))
        for at in (9, 5, 0, 7, 9):
            recipe = recipe.replace(at, Add(float(at)))
            assert same_bits(recipe.apply(z, cache=cache), recipe.apply(z))
            (near,) = apply_module._at_hand.values()
            assert sum(state.nbytes for state in near.states.values() if state is not None) <= 3 * z.nbytes
        for at in (9, 8, 9, 5, 9, 1, 9):  # some at hand, the others in the cache
            for value in (0.1, 0.2):
                recipe = recipe.replace(at, Add(value + at))
                ran = calls_of(recipe, z, cache=cache)
            assert ran == 10 - at
    del cache
    gc.collect()
    assert not apply_module._at_hand


@pytest.mark.parametrize(("at_hand", "worth"), [(1 << 20, 1.0), (2000, 1.0), (0, 0.0), (1 << 20, 0.0)])
def test_any_history_gives_the_bits_of_no_history(at_hand: int, worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 steps of somebody who plays: sliders, order, other clips, writes in place; caches that are too small."""
    monkeypatch.setattr(apply_module, "_MOST_AT_HAND", at_hand)
    monkeypatch.setattr(apply_module, "_WORTH_KEEPING", worth)
    monkeypatch.setattr(apply_module, "_QUICK", worth)
    choose = random.Random(0)
    tensors, clips = Tensors(torch.randn(2, 50), torch.randn(2, 50)), [torch.randn(2, 50) for _ in range(3)]
    names = list(tensors)

    def edit() -> Edit:
        t = choose.choice([0.1, 0.2, 0.3])
        return choose.choice([ToneMap(t), LerpTowards(choose.choice(names), t), Add(t), Same()])

    recipe = Recipe(edit() for _ in range(6))
    saved = 0
    with LatentCache(host_bytes=3000) as cache:
        for _ in range(400):
            at = choose.randrange(len(recipe))
            change = choose.randrange(8)
            if change < 5:
                recipe = recipe.replace(at, edit())
            elif change == 5:
                recipe = recipe.move(at, choose.randrange(len(recipe)))
            elif len(recipe) > 3 and change == 6:
                recipe = recipe.without(at)
            elif len(recipe) < 9:
                recipe = recipe.then(edit())
            z = choose.choice(clips) if choose.random() < 0.2 else clips[0]
            if choose.random() < 0.05:
                z.mul_(0.5)
            expected = recipe.apply(z, tensors=tensors)
            before = Add.calls
            got = recipe.apply(z, tensors=tensors, cache=cache, keep_result=choose.random() < 0.3)
            saved += Add.calls - before < sum(isinstance(edit, Add) for edit in recipe)
            assert same_bits(got, expected)
            got.fill_(torch.nan)  # a result is the caller's
    assert saved > 100


def test_other_latents_tensors_or_backends_are_not_taken_for_the_same(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_module, "_WORTH_KEEPING", 0.0)
    monkeypatch.setattr(apply_module, "_QUICK", 0.0)
    z, tensors = torch.randn(2, 3), Tensors()
    first, second = (Add(1.0, tensors.add(torch.randn(2, 3))) for _ in range(2))
    recipe = Recipe([first, Add(1.0)])
    assert calls_of(recipe, z, tensors=tensors, cache=cache) == 2
    for changed in (z + 1, z.double(), z.view(3, 2).t().contiguous(), -z.abs()):
        assert calls_of(Recipe([Add(1.0), Add(1.0)]), changed, cache=cache) == 2
    assert calls_of(recipe.replace(0, second), z, tensors=tensors, cache=cache) == 2
    with latentfast.use_backend("eager"):
        assert calls_of(recipe, z, tensors=tensors, cache=cache) == 2
    assert calls_of(recipe, z, tensors=tensors, cache=cache) == 1


def test_latents_that_were_written_into_are_other_latents(cache: LatentCache) -> None:
    z, recipe = torch.zeros(1, 3), Recipe([Add(1.0), Add(1.0)])
    recipe.apply(z, cache=cache)
    z.add_(1)
    assert recipe.apply(z, cache=cache).tolist() == [[3.0, 3.0, 3.0]]
    z[:, 1:].mul_(2)  # through a view
    assert recipe.apply(z, cache=cache).tolist() == [[3.0, 4.0, 4.0]]
    with torch.inference_mode():
        z.add_(1)
        frozen = torch.zeros(1, 3)
        recipe.apply(frozen, cache=cache)
        frozen.add_(1)  # has no version counter: read anew every time
        assert recipe.apply(frozen, cache=cache).tolist() == [[3.0, 3.0, 3.0]]
    assert recipe.apply(z, cache=cache).tolist() == [[4.0, 5.0, 5.0]]


def test_a_tensor_that_was_written_into_is_refused() -> None:
    tensor, tensors = torch.ones(2), Tensors()
    recipe = Recipe([Add(1.0), Add(1.0, tensors.add(tensor))])
    recipe.apply(torch.zeros(2), tensors=tensors)
    tensor.add_(1)
    with pytest.raises(ValueError, match=r"step 2 \(test/add\): tensors\['sha256:.*must be the tensor of that digest"):
        recipe.apply(torch.zeros(2), tensors=tensors)
    with pytest.raises(ValueError, match="must be the tensor of that digest"):
        recipe.apply(torch.zeros(2), tensors={next(iter(tensors)): torch.ones(3)})


def test_a_repeated_call_reads_no_tensor_to_hash_it(cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []

    def counted(tensor: Tensor) -> str:
        hashed.append(tuple(tensor.shape))
        return digest_tensor(tensor)

    monkeypatch.setattr(tensors_module, "digest_tensor", counted)
    draw, tensors = Draw(), Tensors()
    z, b, d = draw.normal(*SHAPE), draw.normal(*SHAPE), draw.normal(2, *SHAPE)
    recipe = Recipe([SlerpTowards(tensors.add(b), 0.3), Directions(tensors.add(d), (0.1, 0.2)), ToneMap(0.1)])
    recipe.apply(z, tensors=tensors, cache=cache)
    assert hashed == [tuple(b.shape), tuple(d.shape), SHAPE]
    hashed.clear()
    for i in range(5):
        recipe.replace(2, ToneMap(0.1 * i)).apply(z, tensors=tensors, cache=cache)
        recipe.replace(1, Directions(tensors.add(d), (0.1, i))).apply(z, tensors=tensors, cache=cache)
    assert hashed == []
    recipe.apply(draw.normal(*SHAPE), tensors=tensors, cache=cache, source="a clip of some name")
    assert hashed == []


def test_a_moved_slider_launches_one_edit(cache: LatentCache) -> None:
    draw, tensors = Draw(), Tensors()
    z, b = draw.normal(*SHAPE), tensors.add(draw.normal(*SHAPE))
    recipe = Recipe([*(LerpTowards(b, 0.1 * i) for i in range(9)), SlerpTowards(b, 0.5)])
    recipe.apply(z, tensors=tensors, cache=cache)
    with Operators() as alone:
        latentfast.slerp(z, tensors[b], 0.7)
    with Operators() as found:
        recipe.replace(9, SlerpTowards(b, 0.7)).apply(z, tensors=tensors, cache=cache)
    assert found.count <= alone.count + 1  # a cache may copy the state that it hands out


def test_the_digests_of_tensors_that_are_gone_are_gone() -> None:
    known = tensors_module._digests._known
    gc.collect()
    before = len(known)
    for _ in range(100):
        reference(torch.randn(4))
    gc.collect()
    assert len(known) <= before + 1


def test_a_name_stands_for_the_latents(cache: LatentCache) -> None:
    recipe = Recipe([Add(1.0), Add(2.0)])
    assert calls_of(recipe, torch.zeros(2), cache=cache, source="clip") == 2
    assert calls_of(recipe, torch.zeros(2), cache=cache, source="clip") == 1
    for other in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        assert calls_of(recipe, other, cache=cache, source="clip") == 2
    assert calls_of(recipe, torch.zeros(2), cache=cache, source="other clip") == 2
    for wrong in ("", 3):
        with pytest.raises(TypeError, match="source must be a name"):
            recipe.apply(torch.zeros(2), cache=cache, source=wrong)


def test_a_mask_of_attention_is_made_once(cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, tensors = Draw(), Tensors()
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(AttentionMask, "made", _counted(AttentionMask.made, made))
    mask = AttentionMask(tensors.add(draw.uniform(1, 1, 3, 2, 3)), quantile=0.5)
    d = tensors.add(draw.normal(4, 1, 1, 1))
    z = draw.normal(1, *SHAPE[1:])
    recipe = Recipe([ToneMap(0.1), Direction(d, 0.1, mask=mask)])
    expected = recipe.apply(z, tensors=tensors)
    made.clear()
    for strength in (0.1, 0.2, 0.3, 0.1):
        got = recipe.replace(1, Direction(d, strength, mask=mask)).apply(z, tensors=tensors, cache=cache)
    assert made == [SHAPE[2:]] and same_bits(got, expected)


def _counted(function, calls: list):
    def call(self, heat, size):
        calls.append(size)
        return function(self, heat, size)

    return call


def test_a_folder_keeps_results_for_later_sessions(tmp_path: Path) -> None:
    z, recipe = torch.randn(2, 3), Recipe([Add(1.0), Slow(), Add(2.0)])
    with LatentCache(tmp_path) as first:
        expected = recipe.apply(z, cache=first, keep_result=True)
        assert first.flush()
    with LatentCache(tmp_path) as second:
        assert calls_of(recipe, z.clone(), cache=second, keep_result=True) == 0
        assert same_bits(recipe.apply(z, cache=second, keep_result=True), expected)
        assert calls_of(recipe.replace(2, Add(3.0)), z, cache=second) == 1  # the dear edit before it is there
        entries = [json.loads(entry.description) for entry in second.entries()]
    assert [x["edit"] for x in sorted(entries, key=lambda x: x["edit"]["edit"])] == [
        {"edit": "test/add", "amount": 2.0},
        {"edit": "test/slow"},
    ]


def test_keys_are_those_of_their_descriptions() -> None:
    mask = AttentionMask(reference(torch.ones(2)), quantile=0.9)
    edit, where = Directions(mask.heat, (0.1, -0.0), mask=mask), keys.surroundings(torch.device("cpu"))
    made = keys.state_key('a "clip" – ü', Recipe([edit]).digest, edit.canonical, where)
    again = keys.mask_key(mask.canonical, (3, 4, 5), where)
    for key in (made, again):
        assert key == Key.of(key.description)
    assert made.description["edit"] == edit.to_data() and made.description["source"] == 'a "clip" – ü'
    assert again.description["mask"] == mask.to_data() and again.description["size"] == [3, 4, 5]
    assert made.description["environment"] == environment("cpu") == again.description["environment"]
