"""The preview engine: from a slider's move to frames on the host, and what a preview costs the run it is attached to.

Moves come one after another, each once the frames of the one before are there, as a hand that waits; then as fast as
they can for some seconds, as a hand that does not: most of these are overtaken, and the rate is what is shown. Runs of
the embedded model's pipeline, whose steps are the host's work nearly alone, and on a GPU of Wan 2.1 1.3B's are timed
with and without an engine that shows each of their steps, by turns.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.utils import logging
from rich.table import Table
from torch import Tensor

import latentfast
from latentfast import tiny
from latentfast.benchmarks.draws import soft_mask
from latentfast.benchmarks.harness import synchronize
from latentfast.benchmarks.operation import MODELS
from latentfast.benchmarks.resume import wan_name, wan_pipeline
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.share_of_step import WAN_1_3B
from latentfast.benchmarks.table import headed, number
from latentfast.integrations.diffusers.sampling import starting_noise
from latentfast.preview import PreviewEngine, RecipeRenderer, RGBRenderer
from latentfast.recipe import Adain, Confine, Direction, LerpTowards, Recipe, SlerpTowards, Tensors, ToneMap

TINY = (1, 16, 7, 16, 16)
PATIENCE = 60.0


@dataclass(frozen=True)
class Moves:
    """Moves of one slider of six edits, shown by RGB factors at 8 times the latents' size.

    Attributes:
        moves: How many.
        median_ms, p99_ms: From `update` to the consumer, the frames on the host.
        per_second: Previews that were shown while moves came as fast as they could.
        size: Height and width at which they were shown then.
        added_ms: From an edit more to its frames, the median of 20.
    """

    latents: tuple[int, ...]
    dtype: str
    moves: int
    median_ms: float
    p99_ms: float
    per_second: float
    size: tuple[int, int]
    added_ms: float


@dataclass(frozen=True)
class Attached:
    """Seconds of a pipeline's sampling runs, the medians.

    Attributes:
        alone: Without an engine.
        watched: With one that shows each step's clean estimate to a consumer.
        same_bits: The latents are the same.
    """

    model: str
    steps: int
    alone: float
    watched: float
    same_bits: bool

    @property
    def cost(self) -> float:
        """What watching adds, as a share."""
        return self.watched / self.alone - 1


@dataclass(frozen=True)
class Previews:
    """What was measured."""

    environment: Environment
    moves: list[Moves]
    attached: list[Attached]
    quick: bool

    @property
    def wrong(self) -> str:
        """What is, in a few words; nothing if all is right."""
        changed = [run.model for run in self.attached if not run.same_bits]
        return f"a preview changed the bits of the sampling it was attached to: {', '.join(changed)}" if changed else ""

    def to_json(self) -> str:
        """One line, with the shares."""
        data = asdict(self)
        for written, run in zip(data["attached"], self.attached, strict=True):
            written["cost"] = run.cost
        return json.dumps(data)


def measure(device: str, quick: bool = False) -> Previews:
    """Measure the engine on latents of the embedded model and, on a GPU, of Wan 480p; and beside sampling runs.

    Args:
        device: "cuda" (bfloat16) or "cpu" (float32).
        quick: few moves, one short run: checks that everything runs.
    """
    where = torch.device(device)
    sizes = [TINY]
    if where.type == "cuda":
        channels, *grid = MODELS["wan21_1_3b_480p"]
        sizes.append((1, channels, *grid))
    with torch.no_grad():
        moves = [_moves(size, where, 20 if quick else 10_000 if where.type == "cuda" else 500) for size in sizes]
        attached = [_embedded(where, quick)]
        if where.type == "cuda":
            attached.append(_wan(where, quick))
    return Previews(environment(where, 0.0), moves, attached, quick)


def _moves(shape: tuple[int, ...], device: torch.device, count: int) -> Moves:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    z, target, style = torch.randn((3, *shape), device=device, dtype=dtype)
    colour = torch.randn((shape[1], 1, 1, 1), device=device, dtype=dtype)
    tensors = Tensors()
    names = [tensors.add(x) for x in (target, style, colour, soft_mask(shape, dtype, device), z)]
    target_name, style_name, colour_name, mask, source = names
    edits = [
        SlerpTowards(target_name, 0.0),
        Direction(colour_name, 0.5),
        Adain(style_name, 0.5),
        LerpTowards(style_name, 0.2, mask=mask),
        ToneMap(0.3),
        Confine(source, mask),
    ]
    recipe = Recipe(edits)
    factors = torch.randn(shape[1], 3, device=device) / shape[1] ** 0.5, torch.zeros(3, device=device)
    renderer = RecipeRenderer(*factors, tensors)
    with PreviewEngine(z, renderer, recipe, budget=0.1, idle=PATIENCE) as engine, engine.subscribe() as previews:

        def seconds(shown: Recipe) -> float:
            begin = time.perf_counter()
            wanted = engine.update(shown)
            while previews.get(PATIENCE).number < wanted:
                pass
            return time.perf_counter() - begin

        def moved(i: int) -> Recipe:
            return recipe.replace(0, SlerpTowards(target_name, (i % 997) / 997))

        for i in range(10):
            seconds(moved(i))
        took = sorted(seconds(moved(i)) for i in range(count))
        added = [seconds(recipe.then(*[ToneMap(0.1)] * (i % 2 + 1))) for i in range(20)]
        rate, size = _rate(engine, [moved(i) for i in range(997)], 0.3 if count < 100 else 3.0)
    return Moves(
        shape,
        str(dtype).removeprefix("torch."),
        count,
        statistics.median(took) * 1e3,
        took[min(count - 1, int(0.99 * count))] * 1e3,
        rate,
        size,
        statistics.median(added) * 1e3,
    )


def _rate(engine: PreviewEngine, states: list[Recipe], seconds: float) -> tuple[float, tuple[int, int]]:
    """Previews a second while a hand moves 250 times a second, and their size."""
    before, begin = engine.stats().previews, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        engine.update(states[int(passed * 250) % len(states)])
        time.sleep(0.004)
    stats = engine.stats()
    assert stats.quality is not None
    return (stats.previews - before) / passed, stats.quality.size


def _embedded(device: torch.device, quick: bool) -> Attached:
    pipe = tiny.load_pipeline(device)
    call = {"prompt": "a red circle moving left", **tiny.RECOMMENDED}
    return _attached("the embedded model", pipe, call, tiny.rgb_factors(device), quick)


def _wan(device: torch.device, quick: bool) -> Attached:
    layers = WAN_1_3B["num_layers"]
    pipe, call = wan_pipeline(device, layers, quick)
    factors = torch.randn(16, 3, device=device) / 4, torch.zeros(3, device=device)
    return _attached(wan_name(layers), pipe, call, factors, quick)


def _attached(model: str, pipe: Any, call: dict[str, Any], factors: tuple[Tensor, Tensor], quick: bool) -> Attached:
    logging.disable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    steps, rounds = (2, 1) if quick else (20, 5)
    call = {**call, "num_inference_steps": steps}
    noise = starting_noise(pipe, call, torch.Generator().manual_seed(0))

    def run(**options: Any) -> tuple[float, Tensor]:
        synchronize(pipe.device)
        begin = time.perf_counter()
        latents = pipe(latents=noise, output_type="latent", **call, **options).frames
        synchronize(pipe.device)
        return time.perf_counter() - begin, latents

    run()
    alone: list[float] = []
    watched: list[float] = []
    same = True
    with PreviewEngine(None, RGBRenderer(*factors)) as engine, engine.subscribe():
        for _ in range(rounds):
            seconds, expected = run()
            alone.append(seconds)
            seconds, latents = run(callback_on_step_end=engine.attach(pipe, noise=noise))
            watched.append(seconds)
            same &= torch.equal(latents, expected)
    return Attached(model, steps, statistics.median(alone), statistics.median(watched), same)


def table(found: Previews) -> Table:
    """A row for each size of latents, and one for the run."""
    headers = ("latents", "dtype", "move to frames, ms", "p99", "an edit more, ms", "previews a second", "at")
    result = headed(headers, 2, title=f"{latentfast.__name__} previews on {found.environment.card}")
    for moves in found.moves:
        result.add_row(
            "x".join(map(str, moves.latents)),
            moves.dtype,
            number(moves.median_ms),
            number(moves.p99_ms),
            number(moves.added_ms),
            number(moves.per_second),
            "x".join(map(str, moves.size)),
        )
    for run in found.attached:
        seconds = f"{run.alone:.2f} s alone", "", f"{run.watched:.2f} s", f"{run.cost:+.1%}"
        result.add_row(f"{run.steps} steps of {run.model}", "", *seconds, "")
    return result
