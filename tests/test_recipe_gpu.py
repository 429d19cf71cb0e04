"""Recipes on a GPU: nothing waits for the device, CUDA graphs, streams, states in the device's tier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from latentfast.cache import LatentCache
from latentfast.recipe import (
    Adain,
    Direction,
    Directions,
    LerpTowards,
    Recipe,
    SlerpTowards,
    TemporalSmooth,
    Tensors,
    ToneMap,
)
from latentfast.recipe import apply as apply_module
from tests.helpers import Draw, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SHAPE = (1, 16, 5, 30, 52)


@pytest.fixture
def cache() -> Iterator[LatentCache]:
    with LatentCache(device_bytes=256 << 20, host_bytes=256 << 20) as made:
        yield made


def stack() -> tuple[torch.Tensor, Tensors, Recipe]:
    draw, tensors = Draw(torch.bfloat16, "cuda"), Tensors()
    z, other = draw.normal(*SHAPE), tensors.add(draw.normal(*SHAPE))
    several, mask = tensors.add(draw.normal(3, *SHAPE)), tensors.add(draw.mask(1, 1, *SHAPE[2:]))
    colour = tensors.add(draw.normal(16, 1, 1, 1))
    edits = [
        SlerpTowards(other, 0.3),
        Direction(colour, 0.5, mask=mask),
        Adain(other, 0.5),
        Directions(several, (0.1, 0.2, 0.3)),
        ToneMap(0.3, mask=mask),
        TemporalSmooth(2),
        LerpTowards(other, 0.2),
    ]
    return z, tensors, Recipe(edits)


def test_moving_sliders_does_not_wait_for_the_device(cache: LatentCache) -> None:
    z, tensors, recipe = stack()
    recipe.apply(z, tensors=tensors, cache=cache)
    cache.flush()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(20):
            recipe.replace(4, ToneMap(0.01 * i)).apply(z, tensors=tensors, cache=cache)
            recipe.replace(-1, SlerpTowards(recipe[0].target, 0.01 * i)).apply(z, tensors=tensors, cache=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("at_hand", [0, 256 << 20])
def test_states_have_the_bits_of_their_edits(cache: LatentCache, at_hand: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At hand, and from the cache: its device's tier, its host's, another stream's."""
    monkeypatch.setattr(apply_module, "_MOST_AT_HAND", at_hand)
    monkeypatch.setattr(apply_module, "_QUICK", 0.0)
    apply_module._at_hand.clear()
    z, tensors, recipe = stack()
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    torch.cuda.synchronize()
    for i in range(30):
        changed = recipe.replace((6, 4, 6, 0)[i % 4], LerpTowards(recipe[0].target, 0.01 * (i % 5)))
        with torch.cuda.stream(streams[i % 3]):
            got = changed.apply(z, tensors=tensors, cache=cache)
            assert same_bits(got, changed.apply(z, tensors=tensors))
    with LatentCache(device_bytes=0, host_bytes=64 << 20) as below:
        for _ in range(2):
            assert same_bits(recipe.apply(z, tensors=tensors, cache=below), recipe.apply(z, tensors=tensors))
            below.flush()
            apply_module._at_hand.clear()


def test_a_graph_keeps_nothing_and_reads_nothing(cache: LatentCache) -> None:
    z, tensors, recipe = stack()
    expected = recipe.apply(z, tensors=tensors, cache=cache)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        recipe.apply(z, tensors=tensors, cache=cache)
    cache.flush()  # the first launch of a kernel takes long enough for its result to be kept
    torch.cuda.synchronize()
    before = cache.stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = recipe.apply(z, tensors=tensors, cache=cache)
    assert cache.stats() == before
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, expected)
    z.copy_(-z)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, recipe.apply(z, tensors=tensors)) and not same_bits(out, expected)
    assert same_bits(recipe.apply(z, tensors=tensors, cache=cache), out)


def test_a_tensor_elsewhere_is_named(cache: LatentCache) -> None:
    z, tensors, recipe = stack()
    elsewhere = Tensors(*(x.cpu() for x in tensors.values()))
    with pytest.raises(ValueError, match=r"recipe step 1 \(slerp_towards\): b must be on a's device cuda:0, got cpu"):
        recipe.apply(z, tensors=elsewhere)
