"""Measures a trained model the way a user runs it: diffusers' own ``WanPipeline``, float16 weights, float32
arithmetic.

Prompts and scenes are drawn from seeds that training does not use. Guidance and scheduler are compared on
validation prompts; the figures of the model card are then measured on other prompts with the shipped scheduler
and ``RECOMMENDED``.
"""

from __future__ import annotations

import json
import platform
import random
import time
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from latentfast.tiny import scene
from latentfast.tiny.caption import caption
from latentfast.tiny.judge import Judge, agreement
from latentfast.tiny.pipeline import RECOMMENDED
from tools.train_tiny.common import Log, psnr
from tools.train_tiny.models import make_scheduler
from tools.train_tiny.train_judge import share_right
from tools.train_tiny.train_vae import held_out

VALIDATION_SEED, TEST_SEED = 1001, 2002
TEST_PROMPTS, VALIDATION_PROMPTS, BATCH = 256, 64, 64
GUIDANCE = (1.0, 1.5, 2.0, 3.0)


def prompts(n: int, shapes: int, seed: int) -> tuple[list[scene.Scene], list[str]]:
    """Scenes with ``shapes`` shapes, and captions in free word order that mention every factor."""
    generator = torch.Generator().manual_seed(seed + shapes)
    scenes = scene.random_scenes(n, two=float(shapes - 1), generator=generator)
    rng = random.Random(seed + shapes)
    return scenes, [caption(s, rng) for s in scenes]


@torch.no_grad()
def generate(pipe: WanPipeline, texts: list[str], seed: int, **options: object) -> Tensor:
    """Clips (N, 3, 25, 128, 128) in [-1, 1] on the CPU; each prompt has a seed of its own, so the batch size
    does not matter.
    """
    clips = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        video = pipe(part, generator=generators, output_type="pt", **(RECOMMENDED | options)).frames
        clips.append(video.movedim(2, 1).float().cpu() * 2 - 1)
    return torch.cat(clips)


def judged(pipe: WanPipeline, judge: Judge, n: int, shapes: int, seed: int, **options: object) -> dict[str, float]:
    scenes, texts = prompts(n, shapes, seed)
    readings = judge.read(generate(pipe, texts, seed, **options))
    return share_right([agreement(s, r.scene) for s, r in zip(scenes, readings, strict=True)])


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
    pipe = load(folder, "cpu")
    times = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        pipe("a small red circle moving left on a dark background in bright light", **RECOMMENDED, output_type="pt")
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


def evaluate(folder: Path, judge: Judge, log: Log, device: str, *, sweep: bool = True, smoke: bool = False) -> None:
    """Writes ``metrics.json`` beside the log; the parts that take longest come last, so that a cut run
    leaves the others.
    """
    path = log.folder / "metrics.json"
    pipe = load(folder, device)
    options: dict[str, object] = (
        {"height": 128, "width": 128, "num_inference_steps": 1, "num_frames": 5} if smoke else {}
    )
    n, some = (2, 2) if smoke else (TEST_PROMPTS, VALIDATION_PROMPTS)
    card = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    save_metrics(path, measured_on={"device": card, "torch": torch.__version__}, recommended=RECOMMENDED)
    save_metrics(path, reconstruction=(value := reconstruction(pipe, device, smoke)))
    log("reconstruction:", value)
    for name, shapes in (("one_shape", 1), ("two_shapes", 2)):
        began = time.time()
        value = judged(pipe, judge, n, shapes, TEST_SEED, **options)
        save_metrics(path, **{name: value | {"prompts": n}})
        log(f"{n} prompts, {name}, {time.time() - began:.1f} s:", rounded(value))
        _, texts = prompts(8, shapes, VALIDATION_SEED)
        sheet(generate(pipe, texts[: 2 if smoke else 8], VALIDATION_SEED, **options), log.folder / f"{name}.png")
        log(f"{name}.png shows:", *(f"\n    {t}" for t in texts))
    value = judged(pipe, judge, n, 1, TEST_SEED, max_sequence_length=64, **options)
    save_metrics(path, one_shape_length_64=value | {"prompts": n})
    log(f"{n} prompts, one shape, padded to 64:", rounded(value))
    if sweep:
        table = []
        shipped = pipe.scheduler
        for kind in ("euler", "unipc"):
            pipe.scheduler = make_scheduler(kind)
            for guidance in GUIDANCE[: 1 if smoke else None]:
                row: dict[str, object] = {"scheduler": kind, "guidance_scale": guidance}
                for name, shapes in (("one_shape", 1), ("two_shapes", 2)):
                    row[name] = judged(pipe, judge, some, shapes, VALIDATION_SEED, guidance_scale=guidance, **options)
                table.append(row)
                log(
                    "validation:",
                    kind,
                    guidance,
                    {k: rounded(row[k], ("binding", "all")) for k in ("one_shape", "two_shapes")},
                )
                save_metrics(path, sweep={"prompts": some, "rows": table})
        pipe.scheduler = shipped


def rounded(value: dict[str, float], keys: tuple[str, ...] | None = None) -> dict[str, float]:
    return {k: round(v, 3) for k, v in value.items() if keys is None or k in keys}
