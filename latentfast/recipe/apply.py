"""Applying a recipe: edit after edit, or from the last state that is known.

A state is what the latents are between two edits. Those of the last recipe that was applied with a cache stay at hand:
whoever moves a slider needs the one before it at once, and a look-up in a cache that keeps accounts, let alone a copy
into it, takes longer than a short edit. The cache itself is given what is dear enough to be worth a copy and to outlive
that, and what is too large to be at hand. Either way a state is found by what made it, and has the bits that its edits
give: nothing is fused across edits, so it does not matter where a recipe is taken up.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from latentfast.ops import _checks
from latentfast.recipe.edit import Edit
from latentfast.recipe.errors import told
from latentfast.recipe.keys import Surroundings, state_key, surroundings
from latentfast.recipe.tensors import Resolve, reference

if TYPE_CHECKING:
    from latentfast.recipe.recipe import Recipe

__all__ = ["applied"]

_STATE = "latents"
#: Of the states at hand, for each cache.
_MOST_AT_HAND = 256 << 20
#: Edits that together took so many seconds are dearer than reading their result from a disk.
_WORTH_KEEPING = 10e-3
#: An edit that took less the last time runs again sooner than a cache is asked for its result.
_QUICK = 1e-3


class _Where(NamedTuple):
    """What two states must have in common to be compared by their recipes' digests alone.

    Attributes:
        source: Reference or name of the latents that the first edit began with.
        around: See `surroundings`.
        stream: On a GPU, in whose order the states are there.
    """

    source: str
    around: Surroundings
    stream: int


#: States by the digest of the recipe that made them; None: it was given to the cache.
_States = dict[str, Tensor | None]


class _AtHand(NamedTuple):
    """The states of one recipe's prefixes."""

    where: _Where
    states: _States


_at_hand: weakref.WeakKeyDictionary[Any, _AtHand] = weakref.WeakKeyDictionary()
_took: dict[type[Edit], float] = {}


def applied(
    recipe: Recipe, latents: Tensor, cache: Any, tensors: Mapping[str, Tensor], source: str | None, keep_result: bool
) -> Tensor:
    """The work of `Recipe.apply`."""
    _checks.latent("latents", latents)
    if cache is not None and latents.is_cuda and torch.cuda.is_current_stream_capturing():
        cache = None  # a graph that is replayed must neither read nor leave what may be gone by then
    resolve, edits = Resolve(tensors, cache), recipe.edits
    if cache is None:
        state = latents
        for number, edit in enumerate(edits, 1):
            state = _run(edit, number, state, resolve)
        return state if edits else latents.clone()
    if torch.is_grad_enabled() and latents.requires_grad:
        raise ValueError("latents must not require grad beside a cache, whose states have none; use torch.no_grad()")
    # without the Stream that torch.cuda.current_stream makes, which takes longer than a short edit's launch
    stream = torch._C._cuda_getCurrentRawStream(latents.get_device()) if latents.is_cuda else 0
    where = _Where(_source(latents, source), surroundings(latents.device), stream)
    near = _at_hand.get(cache)
    known: _States = near.states if near is not None and near.where == where else {}
    # The state after the last edit is there only if it was to be kept.
    last = len(edits) if keep_result else len(edits) - 1
    done, state = _taken_up(recipe, last, cache, known, where, latents)
    if done == len(edits):
        return state.clone()
    if done == last == len(edits) - 1 and known.get(recipe.prefix_digest(done)) is state:
        return _run(edits[-1], len(edits), state, resolve)  # the last slider moves: what is at hand stays as it is
    begun, spent = state, 0.0
    made: _States = {}
    if done:
        made[recipe.prefix_digest(done)] = begun if begun.nbytes <= _MOST_AT_HAND else None
    room = _MOST_AT_HAND - sum(x.nbytes for x in made.values() if x is not None)
    for number, edit in enumerate(edits[done:], done + 1):
        start = time.perf_counter()
        state = _run(edit, number, state, resolve)
        took = time.perf_counter() - start
        _took[type(edit)] = took
        if number > last:
            break
        if state.requires_grad:
            raise ValueError(f"recipe step {number}: tensors must not require grad beside a cache")
        spent += took
        # a result is not held: it is the caller's, who may write into it
        held = number < len(edits) and state.nbytes <= room
        if number < len(edits):
            made[recipe.prefix_digest(number)] = state if held else None
        room -= state.nbytes if held else 0
        if not held or spent >= _WORTH_KEEPING:
            cache.put(_key(recipe, number, where), {_STATE: state}, seconds=spent)
            spent = 0.0
    if done < last or known.get(recipe.prefix_digest(done)) is not begun:
        _at_hand[cache] = _AtHand(where, _with_known(made, recipe, known, room))
    return state


def _taken_up(
    recipe: Recipe, last: int, cache: Any, known: _States, where: _Where, latents: Tensor
) -> tuple[int, Tensor]:
    """How many of the first `last` edits have a known result, and that; else 0 and the latents."""
    near = next((count for count in range(last, 0, -1) if recipe.prefix_digest(count) in known), 0)
    # Of quick edits the cache is given the results only where there is no room for them at hand.
    at_hand = near and known[recipe.prefix_digest(near)] is not None
    for count in range(last, 0, -1):
        state = known.get(recipe.prefix_digest(count)) if count <= near else None
        if state is not None:
            return count, state
        if at_hand and count < len(recipe.edits) and _took.get(type(recipe.edits[count - 1]), 1.0) < _QUICK:
            continue
        # not a copy: it goes into the next edit, and from there nowhere
        found = cache.get(_key(recipe, count, where), device=latents.device, copy=False)
        if found is not None:
            return count, found[_STATE]
    return 0, latents


def _with_known(made: _States, recipe: Recipe, known: _States, room: int) -> _States:
    """What was made and, as far as there is room, what was known and is a prefix still."""
    for count in range(len(recipe.edits) - 1, 0, -1):
        digest = recipe.prefix_digest(count)
        state = known.get(digest)
        if digest in made or digest not in known:
            continue
        if state is None or state.nbytes <= room:
            made[digest] = state
            room -= 0 if state is None else state.nbytes
    return made


def _run(edit: Edit, number: int, state: Tensor, resolve: Resolve) -> Tensor:
    """The state after an edit, in memory of its own."""
    version = None if state.is_inference() else state._version
    try:
        made = edit.apply(state, resolve)
    except (TypeError, ValueError) as error:
        raise told(error, number, edit.name) from error
    if not isinstance(made, Tensor):
        raise TypeError(f"recipe step {number} ({edit.name}): apply must return a tensor, got {type(made).__name__}")
    if version is not None and state._version != version:
        _at_hand.clear()  # it may be one of these that was written into
        raise ValueError(f"recipe step {number} ({edit.name}): apply must not write into the latents it is given")
    return made.clone() if _checks.shares_memory(made, (state,)) else made


def _source(latents: Tensor, name: str | None) -> str:
    if name is None:
        return reference(latents)
    if not isinstance(name, str) or not name:
        raise TypeError(f"source must be a name, got {name!r}")
    # the same name for a clip in two sizes or precisions is a likely mistake, and easily told apart
    return f"named:{name}:{str(latents.dtype).removeprefix('torch.')}:{tuple(latents.shape)}"


def _key(recipe: Recipe, count: int, where: _Where) -> Any:
    """Of the state after the first `count` edits."""
    return state_key(where.source, recipe.prefix_digest(count - 1), recipe.edits[count - 1].canonical, where.around)
