"""How well edits stay where the attention looks: on the embedded model, read back by its judge.

Scenes of two shapes, of which one changes its colour or its kind, named by its words; and of one, whose background
changes. Each edit is made twice from the same noise: confined by the mask of the attention, and by no mask.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.table import headed
from latentfast.integrations.diffusers import LocalizedEdit, localized_edit
from latentfast.integrations.diffusers.masks import attention_mask
from latentfast.tiny import RECOMMENDED, Judge, Reading, Scene, Shape, caption, load_pipeline, random_scenes
from latentfast.tiny.scene import BACKGROUNDS, COLOURS, FRAMES, SHAPE_FACTORS, SHAPES

#: What is asked for: colour or kind of one of two shapes, or the background behind one.
TASKS = ("colour", "shape", "background")
#: Scenes are drawn until enough source clips show what their prompts say, or so many times as many were drawn.
MOST_DRAWN = 4
#: A cell of the latents is a shape's if at least so much of its pixels is.
TOUCHED = 0.25
#: Of `localized_edit` and of the pipeline's call. Masks are known before, from a run of the source alone. What stands
#: where is settled in the first steps: the edit of a shape's kind leaves them to the source. Colours and the background
#: are settled early as well, and their edits begin at once. Colours come more often with more guidance. What holds the
#: shape before a new background ends a cell inside it (`dilate`), because its edge's cells hold the old one as well.
OPTIONS: dict[str, dict[str, Any]] = {
    "colour": {"look": True, "structure": 0.3, "guidance_scale": 3.0},
    "shape": {"look": True, "structure": 0.3, "strength": 0.9},
    "background": {"look": True, "structure": 0.8},
}
#: Of every call. Prompts are padded to fewer tokens than the pipeline's own 512, which it was trained on as well.
CALL: dict[str, Any] = {**RECOMMENDED, "max_sequence_length": 64}


@dataclass(frozen=True)
class Task:
    """One edit: a scene, the scene that is asked for, and the number of the shape that is named."""

    kind: str
    scene: Scene
    wanted: Scene
    named: int

    def words(self) -> list[str]:
        return [phrase(self.scene.shapes[self.named])]

    def keep(self) -> list[str]:
        return [phrase(shape) for i, shape in enumerate(self.scene.shapes) if i != self.named]


@dataclass
class Outcome:
    """What the judge saw of one edit. None where there is nothing to measure.

    Attributes:
        changed: what was asked for came.
        other_kept: the other shape, or with the background the only one, is the same in all its factors.
        rest_kept: so is every other factor.
        psnr: dB of what had to stay, against the source clip: the pixels outside the shape before and after the edit;
            with the background those of the shape, two pixels from its edge.
        iou: of the mask with the judge's mask of the named shape, at the latents' size.
        iou_tokens: of the attention's own map, enlarged and cut at half its largest value.
    """

    changed: bool
    other_kept: bool
    rest_kept: bool
    psnr: float | None = None
    iou: float | None = None
    iou_tokens: float | None = None


@dataclass
class Result:
    """A task's edits, with and without the mask; `drawn` scenes were tried until enough showed what they should."""

    kind: str
    drawn: int = 0
    confined: list[Outcome] = field(default_factory=list)
    free: list[Outcome] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """All tasks, and how they were made; `options` are those that take the place of `OPTIONS` and `CALL`."""

    environment: Environment
    options: dict[str, Any]
    seconds: float
    results: list[Result]

    def to_json(self) -> str:
        """One line: the settings, and of each task its averages and every outcome."""
        results = [
            {
                "task": result.kind,
                "options": CALL | OPTIONS[result.kind] | self.options,
                "drawn": result.drawn,
                **{name: {"mean": averages(of), "edits": [asdict(x) for x in of]} for name, of in ways(result).items()},
            }
            for result in self.results
        ]
        written = {"environment": asdict(self.environment), "seconds": round(self.seconds, 1), "tasks": results}
        return json.dumps(written)


def phrase(shape: Shape) -> str:
    """The words that name a shape in its scene's caption."""
    return f"{shape.size} {shape.colour} {shape.shape}"


def tasks(kind: str, seed: int) -> Iterator[Task]:
    """Edits without end, drawn at random."""
    rng, generator = random.Random(f"{kind} {seed}"), torch.Generator().manual_seed(seed)
    while True:
        scene = random_scenes(1, two=0.0 if kind == "background" else 1.0, generator=generator)[0]
        named = rng.randrange(len(scene.shapes))
        shapes = list(scene.shapes)
        if kind == "background":
            others = [x for x in BACKGROUNDS if x != scene.background]
            yield Task(kind, scene, dataclasses.replace(scene, background=rng.choice(others)), named)
            continue
        taken = [getattr(shape, kind) for shape in shapes]  # neither its own nor the other's: the two stay apart
        value = rng.choice([x for x in (COLOURS if kind == "colour" else SHAPES) if x not in taken])
        shapes[named] = dataclasses.replace(shapes[named], **{kind: value})
        yield Task(kind, scene, dataclasses.replace(scene, shapes=tuple(shapes)), named)


def measure(
    device: str,
    prompts: int,
    *,
    kinds: tuple[str, ...] = TASKS,
    batch: int = 16,
    seed: int = 0,
    pictures: int = 4,
    say: Callable[[str], None] = lambda text: None,
    options: dict[str, Any] | None = None,
) -> Measured:
    """Makes and reads the edits.

    Args:
        device: Where the model runs.
        prompts: Edits of each kind whose source clip shows what its prompt says, as the judge reads it.
        kinds: Of `TASKS`.
        batch: Scenes that are denoised together.
        seed: Of scenes and noise.
        pictures: Edits of each kind that are kept as pictures.
        say: Is told how far it is.
        options: Of `localized_edit`, such as `dilate`, and of the pipeline's call, such as `num_inference_steps`, in
            place of those of `OPTIONS` and `CALL`.
    """
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipe = load_pipeline(device)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(device=device)
    options = options or {}
    start, results = time.perf_counter(), []
    for kind in kinds:
        result = Result(kind)
        drawing = tasks(kind, seed)
        while len(result.confined) < prompts and result.drawn < MOST_DRAWN * prompts:
            some = [next(drawing) for _ in range(min(batch, prompts))]
            _edit(pipe, judge, some, seed + result.drawn, result, prompts, pictures, options)
            result.drawn += len(some)
            say(f"{kind}: {len(result.confined)} of {prompts}, {time.perf_counter() - start:.0f} s")
        results.append(result)
    where = environment(torch.device(device), 0.0)
    return Measured(where, options, time.perf_counter() - start, results)


@torch.inference_mode()
def _edit(
    pipe: Any,
    judge: Judge,
    some: list[Task],
    seed: int,
    result: Result,
    prompts: int,
    pictures: int,
    given: dict[str, Any],
) -> None:
    """A batch of edits, with the mask and without."""
    sources, wanted = [caption(task.scene) for task in some], [caption(task.wanted) for task in some]
    noise = torch.cat([_noise(pipe, seed + i) for i in range(len(some))])
    given = {**CALL, **OPTIONS[some[0].kind], **given, "latents": noise, "output_type": "latent"}
    confined = localized_edit(
        pipe,
        sources,
        wanted,
        words=[task.words() for task in some],
        keep=[task.keep() for task in some],
        invert=some[0].kind == "background",
        **given,
    )
    free = localized_edit(pipe, sources, wanted, mask=torch.ones(1, 1, 1, 1, 1), **given)
    clips = [_decode(pipe, latents) for latents in (confined.source, confined.edited, free.edited)]
    for i, task in enumerate(some):
        source, edited, unconfined = (clip[i] for clip in clips)
        shown = judge.read(source[None])[0]
        order = _order(task.scene, shown.scene)
        if order is None or len(result.confined) == prompts:
            continue
        named = order[task.named]
        outcomes = [_outcome(task, named, shown, judge.read(x[None])[0], source, x) for x in (edited, unconfined)]
        outcomes[0].iou, outcomes[0].iou_tokens = _overlap(confined, i, shown.masks[named])
        result.confined.append(outcomes[0])
        result.free.append(outcomes[1])
        if len(result.pictures) < pictures:
            areas = (shown.masks[: len(order)] > 0.5).sum((2, 3)).amin(0)  # of the smaller shape, frame by frame
            result.pictures.append(_strip(int(areas.argmax()), source, confined.mask[i, 0], edited, unconfined))


def _noise(pipe: Any, seed: int) -> Tensor:
    shape = (1, pipe.transformer.config.in_channels, 1 + (FRAMES - 1) // 4, 16, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pipe.device)


def _decode(pipe: Any, latents: Tensor) -> Tensor:
    """Clips `(B, 3, T, H, W)` in [-1, 1]."""
    vae = pipe.vae
    mean, std = (
        torch.tensor(x, device=vae.device).view(1, -1, 1, 1, 1)
        for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents * std + mean, return_dict=False)[0].clamp(-1, 1)


def _order(scene: Scene, seen: Scene) -> list[int] | None:
    """Which of the seen shapes each of a scene's is; None if anything is not as it should be."""
    for order in ([0, 1], [1, 0]) if len(scene.shapes) == 2 else ([0],):
        if len(seen.shapes) != len(order):
            return None
        if dataclasses.replace(seen, shapes=tuple(seen.shapes[i] for i in order)) == scene:
            return order
    return None


def _outcome(task: Task, named: int, before: Reading, after: Reading, source: Tensor, edited: Tensor) -> Outcome:
    region = before.masks[named] > 0.5
    seen = after.scene
    if len(seen.shapes) != len(before.scene.shapes):
        return Outcome(changed=False, other_kept=False, rest_kept=False)
    # the edited shape is the one that stands where the named one stood
    at = max(range(len(seen.shapes)), key=lambda i: _iou(after.masks[i] > 0.5, region))
    was, now = before.scene.shapes[named], seen.shapes[at]
    stays = [name for name in ("background", "light") if name != task.kind]
    rest = all(getattr(seen, name) == getattr(before.scene, name) for name in stays)
    if task.kind == "background":
        # an edge's pixels are a mixture with the background, which is another now
        core = 1 - F.max_pool2d(1 - region[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0.5
        return Outcome(seen.background == task.wanted.background, now == was, rest, _psnr(source, edited, core))
    changed = getattr(now, task.kind) == getattr(task.wanted.shapes[task.named], task.kind)
    same = all(getattr(now, name) == getattr(was, name) for name in SHAPE_FACTORS if name != task.kind)
    other = seen.shapes[1 - at] == before.scene.shapes[1 - named]
    return Outcome(changed, other, rest and same, _psnr(source, edited, ~(region | (after.masks[at] > 0.5))))


def _psnr(a: Tensor, b: Tensor, where: Tensor) -> float | None:
    """Of pixels in [-1, 1], where a mask `(T, H, W)` is true."""
    error = ((a - b)[where.expand_as(a)] / 2).square().mean().item()
    return None if math.isnan(error) else -10 * math.log10(max(error, 1e-10))


def _iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum().clamp_min(1)).item()


def _overlap(made: LocalizedEdit, i: int, judged: Tensor) -> tuple[float, float]:
    """IoU with the judge's mask of the shape, of the mask before it is dilated, and of the attention's own map."""
    cells = F.avg_pool2d(judged[:, None].float(), judged.shape[-1] // made.source.shape[-1])[:, 0]
    # latent frame 0 holds the first frame alone, each later one four
    cells = torch.cat([cells[:1], cells[1:].unflatten(0, (-1, 4)).mean(1)]) >= TOUCHED
    maps, latents = made.maps[i][None], made.source[i : i + 1]
    sharp = attention_mask(maps, latents)[0, 0] > 0.5
    plain = F.interpolate(maps[:, :1], size=latents.shape[2:], mode="trilinear")[0, 0]
    low, high = plain.aminmax()
    return _iou(sharp, cells), _iou(plain > (low + high) / 2, cells)


def _strip(at: int, source: Tensor, mask: Tensor, edited: Tensor, free: Tensor) -> Tensor:
    """A frame: of the source, the mask on it, of the edit, and of the edit without a mask; uint8 `(H, 4W, 3)`."""
    frames = [((clip[:, at] + 1) * 127.5).round() for clip in (source, edited, free)]
    cells = F.interpolate(mask[None, None, (at + 3) // 4].float(), size=frames[0].shape[1:])[0]
    marked = frames[0] * cells + frames[0].mean(0) * 0.3 * (1 - cells)
    row = torch.cat([F.pad(x, (2, 2, 2, 2), value=255) for x in (frames[0], marked, *frames[1:])], 2)
    return row.to(torch.uint8).movedim(0, 2).cpu()


def ways(result: Result) -> dict[str, list[Outcome]]:
    """The two ways a task was done."""
    return {"mask of the attention": result.confined, "no mask": result.free}


def averages(outcomes: list[Outcome]) -> dict[str, float | None]:
    """Shares and means; of the PSNR also the least and the share of clips with at least 35 dB."""
    found: dict[str, float | None] = {}
    for name in (f.name for f in dataclasses.fields(Outcome)):
        values = [float(getattr(x, name)) for x in outcomes if getattr(x, name) is not None]
        found[name] = sum(values) / len(values) if values else None
    decibels = [x.psnr for x in outcomes if x.psnr is not None]
    found["psnr_least"] = min(decibels, default=None)
    found["psnr_35"] = sum(x >= 35 for x in decibels) / len(decibels) if decibels else None
    return found


HEADERS = (
    "edit", "confined by", "edits", "changed", "other shape kept", "rest kept", "PSNR of the rest", "least", "≥ 35 dB",
    "mask's IoU", "of tokens",
)  # fmt: skip


def lines(measured: Measured) -> list[list[str]]:
    """The table's cells: one line for each task and way."""

    def share(x: float | None) -> str:
        return "–" if x is None else f"{x:.1%}"

    def number(x: float | None, form: str) -> str:
        return "–" if x is None else format(x, form)

    found = []
    for result in measured.results:
        for way, outcomes in ways(result).items():
            mean = averages(outcomes)
            shares = [share(mean[name]) for name in ("changed", "other_kept", "rest_kept")]
            decibels = [number(mean["psnr"], ".1f"), number(mean["psnr_least"], ".1f"), share(mean["psnr_35"])]
            overlaps = [number(mean["iou"], ".3f"), number(mean["iou_tokens"], ".3f")]
            found.append([result.kind, way, str(len(outcomes)), *shares, *decibels, *overlaps])
    return found


def table(measured: Measured) -> Table:
    """For a terminal."""
    found = headed(HEADERS, 2)
    for line in lines(measured):
        found.add_row(*line)
    return found


def markdown(measured: Measured) -> str:
    """For a page."""
    rows = [HEADERS, ["---", "---", *["---:"] * (len(HEADERS) - 2)], *lines(measured)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
