"""Measures a trained model the way a user runs it: diffusers' own ``WanPipeline``, float16 weights, float32
arithmetic.

Prompts and scenes are drawn from seeds that training does not use. Guidance and scheduler are compared on
validation prompts, where the guidance to recommend is chosen; the figures of the model card are then measured on
other prompts with the shipped scheduler and that guidance. Several processes share the work.
"""

from __future__ import annotations

import json
import platform
import random
import time
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from latentfast.tiny import scene
from latentfast.tiny.caption import caption
from latentfast.tiny.judge import Judge, agreement
from latentfast.tiny.pipeline import recommended
from tools.train_tiny.common import Log, psnr
from tools.train_tiny.models import make_scheduler
from tools.train_tiny.train_judge import share_right
from tools.train_tiny.train_vae import held_out
from tools.train_tiny.world import World

VALIDATION_SEED, TEST_SEED = 1001, 2002
TEST_PROMPTS, VALIDATION_PROMPTS, BATCH = 256, 96, 96
GUIDANCE = (1.5, 2.0, 2.5, 3.0)
KINDS = {"one_shape": 1, "two_shapes": 2}
ONE_SHAPE_FLOOR = 0.93  # share of one-shape clips that are all right, which no gain on two shapes may cost


def prompts(n: int, shapes: int, seed: int) -> tuple[list[scene.Scene], list[str]]:
    """Scenes with ``shapes`` shapes, and captions in free word order that mention every factor."""
    generator = torch.Generator().manual_seed(seed + shapes)
    scenes = scene.random_scenes(n, two=float(shapes - 1), generator=generator)
    rng = random.Random(seed + shapes)
    return scenes, [caption(s, rng) for s in scenes]


@torch.no_grad()
def generate(pipe: WanPipeline, texts: list[str], seeds: list[int], **options: object) -> Tensor:
    """Clips (N, 3, 25, 128, 128) in [-1, 1] on the CPU; each prompt has a seed of its own, so neither the batch
    size nor the number of processes changes its noise.
    """
    clips = []
    for start in range(0, len(texts), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        video = pipe(texts[part], generator=generators, output_type="pt", **options).frames
        clips.append(video.movedim(2, 1).float().cpu() * 2 - 1)
    return torch.cat(clips)


def agreements(
    pipe: WanPipeline, judge: Judge, n: int, shapes: int, seed: int, share: World, **options: object
) -> list[dict[str, bool]]:
    """What is right in the clips of this process's share of ``n`` prompts."""
    scenes, texts = prompts(n, shapes, seed)
    mine = range(share.rank, n, share.size)
    readings = judge.read(generate(pipe, [texts[i] for i in mine], [seed + i for i in mine], **options))
    return [agreement(scenes[i], r.scene) for i, r in zip(mine, readings, strict=True)]


def judged(
    pipe: WanPipeline, judge: Judge, n: int, shapes: int, seed: int, world: World, **options: object
) -> dict[str, float]:
    parts = world.gather(agreements(pipe, judge, n, shapes, seed, world, **options))
    return share_right([a for part in parts for a in part])


def compare(
    pipe: WanPipeline, judge: Judge, n: int, guidance: tuple[float, ...], world: World, options: dict[str, object]
) -> list[dict]:
    """One row for each scheduler and guidance on ``n`` validation prompts of each kind; each process takes whole
    rows' halves.
    """
    shipped, alone = pipe.scheduler, World(device=world.device)
    tasks = [(kind, g, name) for kind in ("euler", "unipc") for g in guidance for name in KINDS]
    mine = {}
    for kind, g, name in tasks[world.rank :: world.size]:
        pipe.scheduler = make_scheduler(kind)
        settings = options | {"guidance_scale": g}
        mine[kind, g, name] = judged(pipe, judge, n, KINDS[name], VALIDATION_SEED, alone, **settings)
    pipe.scheduler = shipped
    done = {task: value for part in world.gather(mine) for task, value in part.items()}
    return [
        {"scheduler": kind, "guidance_scale": g} | {name: done[kind, g, name] for name in KINDS}
        for kind in ("euler", "unipc")
        for g in guidance
    ]


def choose(rows: list[dict]) -> float:
    """The guidance with the best mean of all factors of one shape and shape and colour of two, among those that
    hold ``ONE_SHAPE_FLOOR``; if none does, the one that comes nearest to it.
    """
    holding = [r for r in rows if r["one_shape"]["all"] >= ONE_SHAPE_FLOOR]
    if not holding:
        return max(rows, key=lambda r: r["one_shape"]["all"])["guidance_scale"]
    return max(holding, key=lambda r: r["one_shape"]["all"] + r["two_shapes"]["binding"])["guidance_scale"]


def reconstruction(pipe: WanPipeline, device: str, smoke: bool) -> dict[str, float]:
    clips = held_out(8 if smoke else 64, device, smoke)
    values = []
    with torch.no_grad():
        for clip in clips.split(8):
            got = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample
            values += [psnr(a, b) for a, b in zip(got, clip, strict=True)]
    # The mean of the errors, not of the decibels: the stricter of the two.
    mean = -10 * torch.log10(torch.tensor([10 ** (-v / 10) for v in values]).mean()).item()
    return {"psnr_db": mean, "worst_clip_db": min(values), "clips": len(values)}


def cpu_seconds(folder: Path, threads: int = 2, repeats: int = 3) -> dict[str, object]:
    """Seconds from a prompt to pixels on ``threads`` CPU threads, after one clip to warm up."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    pipe, settings = load(folder, "cpu"), recommended(folder)
    times = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        pipe("a small red circle moving left on a dark background in bright light", **settings, output_type="pt")
        if i:
            times.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return {"seconds": sorted(times)[len(times) // 2], "all": times, "threads": threads, "torch": torch.__version__}


def load(folder: Path, device: str) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sheet(clips: Tensor, path: Path) -> None:
    """A picture of every sixth frame, one row a clip."""
    from PIL import Image

    frames = clips[:, :, ::6]
    n, _, t, h, w = frames.shape
    rows = ((frames.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 3, 2, 4, 1).reshape(n * h, t * w, 3)
    Image.fromarray(rows.numpy()).save(path)


def save_metrics(path: Path, **values: object) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    known.update(values)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def evaluate(
    folder: Path, judge: Judge, log: Log, device: str, world: World, *, sweep: bool = True, smoke: bool = False
) -> None:
    """Writes ``metrics.json`` beside the log, and the chosen guidance to ``recommended.json`` in ``folder``."""

    def save(**values: object) -> None:
        if world.rank == 0:
            save_metrics(log.folder / "metrics.json", **values)

    pipe = load(folder, device)
    n, some = (2, 2) if smoke else (TEST_PROMPTS, VALIDATION_PROMPTS)
    card = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    save(measured_on={"device": card, "devices": world.size, "torch": torch.__version__})
    settings: dict[str, object] = dict(recommended(folder))
    if smoke:
        settings |= {"num_inference_steps": 1, "num_frames": 5}
    if sweep:
        began = time.time()
        rows = compare(pipe, judge, some, GUIDANCE[: 1 if smoke else None], world, settings)
        for row in rows:
            told = {k: rounded(row[k], ("binding", "all")) for k in KINDS}
            log("validation:", row["scheduler"], row["guidance_scale"], told)
        shipped = "unipc" if isinstance(pipe.scheduler, UniPCMultistepScheduler) else "euler"
        settings["guidance_scale"] = choose([r for r in rows if r["scheduler"] == shipped])
        save(sweep={"prompts": some, "rows": rows})
        if world.rank == 0:
            advice = {"guidance_scale": settings["guidance_scale"]}
            (folder / "recommended.json").write_text(json.dumps(advice) + "\n")
        log(f"chosen in {time.time() - began:.1f} s: {shipped}, guidance {settings['guidance_scale']}")
    save(recommended=settings)
    for name, shapes in KINDS.items():
        began = time.time()
        value = judged(pipe, judge, n, shapes, TEST_SEED, world, **settings)
        save(**{name: value | {"prompts": n}})
        log(f"{n} prompts, {name}, {time.time() - began:.1f} s:", rounded(value))
    value = judged(pipe, judge, n, 1, TEST_SEED, world, max_sequence_length=64, **settings)
    save(one_shape_length_64=value | {"prompts": n})
    log(f"{n} prompts, one shape, padded to 64:", rounded(value))
    if world.rank:
        return
    save(reconstruction=(value := reconstruction(pipe, device, smoke)))
    log("reconstruction:", value)
    for name, shapes in KINDS.items():
        _, texts = prompts(8, shapes, VALIDATION_SEED)
        texts = texts[: 2 if smoke else 8]
        sheet(
            generate(pipe, texts, [VALIDATION_SEED + i for i in range(len(texts))], **settings),
            log.folder / f"{name}.png",
        )
        log(f"{name}.png shows:", *(f"\n    {t}" for t in texts))


def rounded(value: dict[str, float], keys: tuple[str, ...] | None = None) -> dict[str, float]:
    return {k: round(v, 3) for k, v in value.items() if keys is None or k in keys}
