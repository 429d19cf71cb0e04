"""What moving a slider of a stack of edits costs: `latentfast.recipe` with a cache, and the stack computed anew.

Two times of each way, in microseconds: `waited`, from the call until the device is done, the caller waiting, as who
shows a picture does; and `in_row`, a call when calls follow one another and only the last is waited for. Every call has
a slider's position of its own, and what a position needs (an edit, a recipe) is made inside the time.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import latentfast
from latentfast import reference
from latentfast.benchmarks.draws import soft_mask
from latentfast.benchmarks.harness import percentiles, synchronize
from latentfast.benchmarks.operation import MODELS, compiled
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.table import headed, number
from latentfast.cache import LatentCache
from latentfast.recipe import (
    Adain,
    Blend,
    Direction,
    Directions,
    LerpTowards,
    NlerpTowards,
    Recipe,
    SlerpTowards,
    Tensors,
    ToneMap,
)

#: Which slider moves, of ten.
LAST, MIDDLE = 9, 4
#: Positions in a row; they differ from call to call.
IN_A_ROW = 50
CACHE_BYTES = 2 << 30

Percentiles = tuple[float, float, float]


@dataclass(frozen=True)
class Way:
    """One way to get the result of a new position: microseconds as [p20, p50, p80]."""

    name: str
    waited_us: Percentiles
    in_row_us: Percentiles


@dataclass(frozen=True)
class Stack:
    """A stack of ten edits whose last is `last`; the first way is that edit alone."""

    last: str
    latents: tuple[int, ...]
    dtype: str
    ways: list[Way]
    first_call_ms: float
    same_bits: bool

    def times_one_edit(self, way: Way) -> tuple[float, float]:
        """How many times as long as the last edit alone: waited for, and in a row."""
        one = self.ways[0]
        return way.waited_us[1] / one.waited_us[1], way.in_row_us[1] / one.in_row_us[1]


@dataclass(frozen=True)
class Stacks:
    """What was measured."""

    environment: Environment
    stacks: list[Stack]
    quick: bool

    @property
    def wrong(self) -> str:
        """What is, in a few words; nothing if all is right."""
        return "" if all(stack.same_bits for stack in self.stacks) else "not the bits of the operations one by one"

    def to_json(self) -> str:
        """One line, with the factors."""
        data = asdict(self)
        for written, stack in zip(data["stacks"], self.stacks, strict=True):
            for way, measured in zip(written["ways"], stack.ways, strict=True):
                way["times_one_edit"] = stack.times_one_edit(measured)
        return json.dumps(data)


def measure(device: str, quick: bool = False) -> Stacks:
    """Measure stacks that end with a slerp and with a masked direction.

    Args:
        device: "cuda" (bfloat16) or "cpu" (float32).
        quick: tiny latents, few rounds, nothing compiled: checks that everything runs.
    """
    where = torch.device(device)
    channels, *grid = MODELS["wan21_1_3b_480p"]
    latents = (1, channels, *((2, 4, 4) if quick else grid))
    with torch.no_grad():
        stacks = [_stack(last, latents, where, quick) for last in ("slerp_towards", "direction, masked")]
    # No floor is taken from these numbers, so no copy rate is measured.
    return Stacks(environment(where, 0.0), stacks, quick)


@dataclass(frozen=True)
class _Clips:
    """The tensors of a stack."""

    z: Tensor
    target: Tensor
    colour: Tensor
    several: Tensor
    mask: Tensor


def _drawn(latents: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> _Clips:
    torch.manual_seed(0)
    z, target = torch.randn((2, *latents), device=device, dtype=dtype)
    colour = torch.randn((latents[1], 1, 1, 1), device=device, dtype=dtype)
    several = torch.randn((4, *latents), device=device, dtype=dtype)
    return _Clips(z, target, colour, several, soft_mask(latents, dtype, device))


def _recipe(clips: _Clips, tensors: Tensors, last: str) -> tuple[Recipe, Callable[[float], Any]]:
    """Ten edits, and the last of them by its slider's position."""
    names = {name: tensors.add(getattr(clips, name)) for name in ("target", "colour", "several", "mask")}
    target, colour, several, mask = names.values()

    def moved(t: float) -> Any:
        if last == "slerp_towards":
            return SlerpTowards(target, t)
        return Direction(colour, t, mask=mask)

    edits = [
        SlerpTowards(target, 0.3),
        Direction(colour, 0.5),
        LerpTowards(target, 0.1, mask=mask),
        Adain(target, 0.5),
        ToneMap(0.3),
        Directions(several, (0.1, 0.2, 0.3, 0.4)),
        Blend(target, mask),
        NlerpTowards(target, 0.2),
        Direction(colour, 0.1, mask=mask),
        moved(0.5),
    ]
    return Recipe(edits), moved


def _one(clips: _Clips, last: str, by: Any) -> Callable[[Tensor, Any], Tensor]:
    """The last edit alone, by latentfast's operations or the reference's."""
    if last == "slerp_towards":
        return lambda state, t: by.slerp(state, clips.target, t)
    rows = clips.colour[None, None]
    return lambda state, t: by.edit(state, rows, t.view(1) if isinstance(t, Tensor) else (t,), clips.mask)


def _nine(clips: _Clips, by: Any) -> Tensor:
    """The nine edits before it."""
    state = by.slerp(clips.z, clips.target, 0.3)
    state = by.edit(state, clips.colour[None, None], (0.5,))
    state = by.blend(state, by.lerp(state, clips.target, 0.1), clips.mask)
    state = by.adain(state, clips.target, 0.5)
    state = by.tone_map(state, 0.3)
    state = by.edit(state, clips.several, (0.1, 0.2, 0.3, 0.4))
    state = by.blend(state, clips.target, clips.mask)
    state = by.nlerp(state, clips.target, 0.2)
    return by.edit(state, clips.colour[None, None], (0.1,), clips.mask)


class _Reference:
    """The specification's functions under one name."""

    slerp, nlerp, lerp = reference.interpolate.slerp, reference.interpolate.nlerp, reference.interpolate.lerp
    edit, blend = reference.edit.edit, reference.edit.blend
    adain, tone_map = reference.stats.adain, reference.stats.tone_map


def _stack(last: str, latents: tuple[int, ...], device: torch.device, quick: bool) -> Stack:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clips, tensors = _drawn(latents, device, dtype), Tensors()
    recipe, moved = _recipe(clips, tensors, last)
    z = clips.z
    before = _nine(clips, latentfast)
    ours, plain = _one(clips, last, latentfast), _one(clips, last, _Reference)
    with ExitStack() as stack:
        # a cache for each slider: they move by turns here, and each is to find what it left
        caches = [
            stack.enter_context(LatentCache(device_bytes=CACHE_BYTES, host_bytes=CACHE_BYTES)) for _ in (LAST, MIDDLE)
        ]

        def slider(at: int, t: float) -> Tensor:
            edit, cache = (moved(t), caches[0]) if at == LAST else (ToneMap(t), caches[1])
            return recipe.replace(at, edit).apply(z, tensors=tensors, cache=cache)

        start = time.perf_counter()
        recipe.apply(z, tensors=tensors, cache=caches[0])
        synchronize(device)
        first_call_ms = (time.perf_counter() - start) * 1e3
        ways: dict[str, Callable[[float], Any]] = {
            "the last edit alone": lambda t: ours(before, t),
            "recipe and cache, last slider moved": lambda t: slider(LAST, t),
            "recipe and cache, fifth slider moved": lambda t: slider(MIDDLE, t),
            "recipe without a cache": lambda t: recipe.replace(LAST, moved(t)).apply(z, tensors=tensors),
            "plain PyTorch, the last edit alone": lambda t: plain(before, t),
            "plain PyTorch, all ten": lambda t: plain(_nine(clips, _Reference), t),
        }
        if not quick:
            one, ten = compiled(plain), compiled(lambda t: plain(_nine(clips, _Reference), t))
            # a position is a tensor to them: a number would be compiled into the code, every one anew
            position = torch.empty((), device=device)
            ways["torch.compile, the last edit alone"] = lambda t: one(before, position.fill_(t))
            ways["torch.compile, all ten"] = lambda t: ten(position.fill_(t))
        expected = ours(before, 0.625)
        same = all(
            torch.equal(ways[name](0.625), expected)
            for name in ("recipe and cache, last slider moved", "recipe without a cache")
        )
        measured = _timed(ways, device, quick)
    return Stack(last, latents, str(dtype).removeprefix("torch."), measured, first_call_ms, same)


def _timed(ways: dict[str, Callable[[float], Any]], device: torch.device, quick: bool) -> list[Way]:
    """All ways, by turns, each at positions that it has not had."""
    rounds, row = (3, 3) if quick else (15, IN_A_ROW)
    position = 0

    def several(call: Callable[[float], Any], count: int) -> float:
        nonlocal position
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            position += 1
            call(position % 9973 / 9973)
        synchronize(device)
        return (time.perf_counter() - start) * 1e6 / count

    waited: dict[str, list[float]] = {name: [] for name in ways}
    in_row: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():  # warms up, compiles
        several(call, 3)
    slow = {name: min(several(call, 1) for _ in range(3)) > 1e4 for name, call in ways.items()}
    for _ in range(rounds):
        for name, call in ways.items():
            waited[name] += [several(call, 1) for _ in range(1 if slow[name] else 10)]
            in_row[name].append(several(call, 2 if slow[name] else row))
    return [Way(name, percentiles(waited[name]), percentiles(in_row[name])) for name in ways]


def table(found: Stacks) -> Table:
    """The ways of each stack, and how many times one edit's time they take."""
    headers = ("stack of ten", "where", "a slider's new position", "µs waited for", "edits", "µs in a row", "edits")
    result = headed(headers, 3)
    here = found.environment
    where = here.card if here.driver != "none" else f"{here.card}, {here.threads} threads"
    for stack in found.stacks:
        for i, way in enumerate(stack.ways):
            first = (f"the last: {stack.last}; {'x'.join(map(str, stack.latents))}, {stack.dtype}", where)
            waited, in_row = stack.times_one_edit(way)
            numbers = (number(way.waited_us[1]), number(waited), number(way.in_row_us[1]), number(in_row))
            result.add_row(*(first if i == 0 else ("", "")), way.name, *numbers)
        result.add_row("", "", "recipe and cache, first call", number(stack.first_call_ms * 1e3), "", "", "")
    return result
