"""``latentfast demo``: four scenes on real clips, the measured times, and a record that another run repeats."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import latentfast
from latentfast.cli import report
from latentfast.cli.errors import UserError
from latentfast.cli.latents import disturb, latent_path, mend, outside_keeps_bits
from latentfast.cli.output import atomic_outputs
from latentfast.cli.progress import Bar, Stopwatch
from latentfast.cli.request import Request
from latentfast.cli.sampler import Sampler
from latentfast.cli.timing import WAN_480P, Timing, time_operations
from latentfast.cli.video import encode_mp4, psnr, tile
from latentfast.session.record import RECORD, checksum, surroundings, tensors_to_bytes

__all__ = ["run_demo"]

PROMPT = "a big red circle moving right on a dark background in bright light"
SOURCE = "a big red circle moving left and a small yellow star moving right on a gray background in bright light"
EDITED = "a big blue circle moving left and a small yellow star moving right on a gray background in bright light"
WORDS, KEEP = ["big red circle"], ["small yellow star"]
PATH_CLIPS = 5
FLICKER, JITTER = 0.4, 0.4  # of latents with a standard deviation near 1
MEND_STEPS = 40
FPS = 12

# Units of the progress bar; a denoising step of one clip is 1, and the rest is in about that time.
LOADING, DECODING, TIMING = 15, 8, 20

TOOL = "latentfast demo"


def run_demo(request: Request, *, out: Path, seed: int) -> None:
    """Make the demo's folder.

    Args:
        request: model, device, sampling.
        out: the folder; an earlier demo's folder is replaced, any other that holds something is refused.
        seed: of the first clip; the others' are counted from it.
    """
    start = time.perf_counter()
    _check_folder(out)
    with atomic_outputs(out) as (scratch,):
        scratch.mkdir()
        with request.sampler() as sampler:
            demo = _Demo(sampler, scratch, seed)
            with demo.bar:
                demo.run()
            seconds = time.perf_counter() - start
            demo.write_report(request, seconds)
    _summary(out, demo, seconds)


def _check_folder(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out: {out} exists and is not a folder")
    if any(out.iterdir()) and not _is_ours(out):
        raise UserError(f"--out: {out} holds other files than a demo's: choose another folder or empty it")


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))["tool"] == TOOL
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Demo:
    """The scenes, in order; each leaves clips in the folder, checksums in the record and a section for the report."""

    def __init__(self, sampler: Sampler, folder: Path, seed: int) -> None:
        self.sampler, self.folder, self.seed = sampler, folder, seed
        self.watch = Stopwatch()
        denoised = (PATH_CLIPS + 2) * sampler.steps
        self.bar = Bar(LOADING + denoised + (PATH_CLIPS + 4) * DECODING + MEND_STEPS + TIMING)
        self.sections: list[report.Section] = []
        self.timings: list[Timing] = []
        self.seeds: dict[str, int | list[int]] = {}
        self.checksums: dict[str, dict[str, str]] = {"latents": {}, "frames": {}, "files": {}}
        self.measured: dict[str, Any] = {}

    def run(self) -> None:
        self.bar.advance(LOADING)
        noise = self.sampler.noise(self.seed)
        self.sampler.frame_dim(noise)  # refuses a model whose latents have no frames, before the work
        latents, clip = self.clip_from_a_prompt(noise)
        self.path_between_seeds(noise, latents, clip)
        self.edit_in_a_mask()
        self.mend_a_clip(latents, clip)
        self.time_the_operations(tuple(latents.shape))

    def clip_from_a_prompt(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        self.seeds["clip"] = self.seed
        latents = self._denoise("a clip from a prompt", [PROMPT], noise)
        clip = self._decode(latents)[0]
        self._keep("clip", latents, clip)
        self.sections.append(
            report.Section(
                title="A clip from a prompt",
                text="Noise from a seed, denoised under a text, decoded.",
                panels=[report.Panel.of(f"“{PROMPT}”, seed {self.seed}", clip, FPS)],
                facts=[
                    ("denoising steps", str(self.sampler.steps)),
                    ("guidance", str(self.sampler.setting("guidance_scale"))),
                    ("latents", " × ".join(map(str, latents.shape))),
                ],
            )
        )
        return latents, clip

    def path_between_seeds(self, noise: Tensor, latents: Tensor, clip: Tensor) -> None:
        last_seed = self.seed + 1
        self.seeds["path"] = [self.seed, last_seed]
        last = self.sampler.noise(last_seed)
        with self.watch("latentfast"):
            path = latent_path(noise, last, PATH_CLIPS)
            straight = latentfast.lerp(noise, last, 0.5)
        if not torch.equal(path[:1], noise):
            raise RuntimeError("slerp at t = 0 did not return its first end's bits")
        # The path starts at the first clip's own noise, so that clip is its first and need not be made again.
        points, clips = [latents], [clip]
        for index in range(1, PATH_CLIPS):
            points.append(self._denoise(f"path, clip {index + 1} of {PATH_CLIPS}", [PROMPT], path[index : index + 1]))
            clips.append(self._decode(points[-1])[0])
        self._keep("path", torch.cat(points), tile(clips))
        ts = [index / (PATH_CLIPS - 1) for index in range(PATH_CLIPS)]
        length = float(noise.norm())
        self.sections.append(
            report.Section(
                title="A path between two seeds",
                text="The noises of two seeds, mixed on the great circle by slerp_path in one call, each then denoised "
                "under the same prompt. Half way on a straight line the noise would be too short for any denoiser.",
                panels=[
                    report.Panel.of(_point(t, self.seed, last_seed), made, FPS)
                    for t, made in zip(ts, clips, strict=True)
                ],
                facts=[
                    ("length half way, slerp", f"{float(path[PATH_CLIPS // 2].norm()) / length:.3f} of the start's"),
                    ("length half way, lerp", f"{float(straight.norm()) / length:.3f} of the start's"),
                ],
                columns=PATH_CLIPS,
            )
        )

    def edit_in_a_mask(self) -> None:
        seed = self.seed + 2
        self.seeds["edit"] = seed
        self.bar.stage("an edit where the attention looks")
        with self.watch("denoising"):
            made = self.sampler.edit(
                SOURCE, EDITED, self.sampler.noise(seed), on_step=self.bar.advance, words=WORDS, keep=KEEP
            )
        both = torch.cat([made.source, made.edited])
        outside, kept = outside_keeps_bits(made.source, made.edited, made.mask)
        if kept != outside:
            raise RuntimeError(f"{outside - kept} of {outside} values outside the mask lost the source's bits")
        clips = self._decode(both)
        region = report.show_mask(clips[0], made.mask[0], self.sampler.frame_dim(both))
        self._keep("edit", both, tile([clips[0], region, clips[1]]))
        self.measured["edit"] = {"values_outside_mask": outside, "values_with_source_bits": kept}
        self.sections.append(
            report.Section(
                title="An edit inside a mask",
                text="Source and edit are denoised side by side from one noise. Where the attention to "
                f"“{WORDS[0]}” looks is what the edit is about: blend confines it to that region, step by step.",
                panels=[
                    report.Panel.of(f"source: “{SOURCE}”", clips[0], FPS),
                    report.Panel.of("the region that was found", region, FPS),
                    report.Panel.of(f"edit: “{EDITED}”", clips[1], FPS),
                ],
                facts=[
                    ("region", f"{1 - outside / made.source.numel():.1%} of the latents"),
                    ("values outside it", f"{outside:,}"),
                    ("with the source's bits", f"{kept:,}, all of them"),
                ],
                columns=3,
            )
        )

    def mend_a_clip(self, latents: Tensor, clip: Tensor) -> None:
        seed = self.seed + 3
        self.seeds["disturbance"] = seed
        frame_dim = self.sampler.frame_dim(latents)
        shaken = disturb(latents, seed=seed, flicker=FLICKER, jitter=JITTER, frame_dim=frame_dim)
        self.bar.stage("mending a disturbed clip")
        with self.watch("latentfast"):
            mended = mend(shaken, steps=MEND_STEPS, frame_dim=frame_dim, on_step=self.bar.advance)
        before, after = self._decode(torch.cat([shaken, mended.latents]))
        gains = psnr(before, clip), psnr(after, clip)
        self._keep("mend", torch.cat([shaken, mended.latents]), tile([clip, before, after]))
        self.measured["mend"] = {"losses": mended.losses, "psnr_before_db": gains[0], "psnr_after_db": gains[1]}
        self.sections.append(
            report.Section(
                title="A disturbed clip, mended",
                text=f"Every latent frame of the first clip was shaken: an offset a channel and noise on every value. "
                f"{MEND_STEPS} gradient steps on temporal_loss_and_grad pull still regions together; a mask spares "
                f"what moves and a data term keeps the clip from freezing. The clean clip only measures the result.",
                panels=[
                    report.Panel.of("clean, for comparison", clip, FPS),
                    report.Panel.of(f"disturbed, {gains[0]:.1f} dB", before, FPS),
                    report.Panel.of(f"mended, {gains[1]:.1f} dB", after, FPS),
                ],
                facts=[
                    ("PSNR to the clean clip", f"{gains[0]:.1f} → {gains[1]:.1f} dB"),
                    ("objective", f"{mended.losses[0]:.3f} → {mended.losses[-1]:.3f}"),
                    ("counted as still", f"{float(mended.still.mean()):.0%} of the latents"),
                ],
                columns=3,
                chart=report.Chart("objective after each gradient step", mended.losses),
            )
        )

    def time_the_operations(self, shape: tuple[int, ...]) -> None:
        self.bar.stage("timing the operations")
        for size in (shape, WAN_480P):
            with self.watch("timing"):
                self.timings += time_operations(size, self.sampler.device)
            self.bar.advance(TIMING // 2)

    def write_report(self, request: Request, seconds: float) -> None:
        device = self.sampler.device
        record = {
            "tool": TOOL,
            "arguments": {**asdict(request), "model": _model_name(request), "seed": self.seed},
            "call": self.sampler.call,
            "prompts": {"clip": PROMPT, "edit_source": SOURCE, "edit": EDITED},
            "seeds": self.seeds,
            **surroundings(device, request.backend),
            "checksums": self.checksums,
            "results": self.measured,
            "times": {
                "total_s": round(seconds, 2),
                "by_work_s": {kind: round(value, 3) for kind, value in self.watch.seconds.items()},
                "operations": [{**asdict(timing), "eager_over_ours": timing.ratio} for timing in self.timings],
            },
        }
        page = report.render(record=record, sections=self.sections, timings=self.timings)
        (self.folder / "report.html").write_text(page, encoding="utf-8")
        (self.folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _denoise(self, text: str, prompts: list[str], noise: Tensor) -> Tensor:
        self.bar.stage(text)

        def watched(step: int, latents: Tensor) -> Tensor:
            self.bar.advance(len(noise))
            return latents

        with self.watch("denoising"):
            return self.sampler.denoise(prompts, noise, on_step=watched)

    def _decode(self, latents: Tensor) -> Tensor:
        with self.watch("decoding"):
            clips = self.sampler.decode(latents)
        self.bar.advance(DECODING * len(latents))
        return clips

    def _keep(self, name: str, latents: Tensor, clip: Tensor) -> None:
        with self.watch("writing"):
            video = encode_mp4(clip, fps=FPS)
            tensors = tensors_to_bytes({"latents": latents}, {"latentfast": name})
            for file, data in ((f"{name}.mp4", video), (f"{name}.safetensors", tensors)):
                (self.folder / file).write_bytes(data)
                self.checksums["files"][file] = checksum(data)
            self.checksums["latents"][name] = checksum(latents)
            self.checksums["frames"][name] = checksum(clip)


def _point(t: float, first: int, last: int) -> str:
    return {0.0: f"t = 0, seed {first}", 1.0: f"t = 1, seed {last}"}.get(t, f"t = {t:g}")


def _model_name(request: Request) -> str:
    return "embedded" if request.model is None else str(request.model)


def _summary(out: Path, demo: _Demo, seconds: float) -> None:
    console = Console(highlight=False)
    table = Table(title="operations on this machine, least time of a call", title_justify="left", box=None)
    table.add_column("")
    table.add_column("latents")
    for column in ("latentfast", "eager", ""):
        table.add_column(column, justify="right")
    for timing in demo.timings:
        size = "×".join(map(str, timing.shape))
        ours, eager = report.duration(timing.ours_us), report.duration(timing.eager_us)
        table.add_row(timing.operation, size, ours, eager, f"{timing.ratio:.1f}×")
    console.print(table)
    edit, mended = demo.measured["edit"], demo.measured["mend"]
    console.print(
        f"\nedit: {edit['values_with_source_bits']} of {edit['values_outside_mask']} latents outside the mask keep the "
        f"source's bits\nmend: {mended['psnr_before_db']:.1f} → {mended['psnr_after_db']:.1f} dB\n"
        f"done in {seconds:.0f} s: {out / 'report.html'}",
        soft_wrap=True,
        markup=False,
    )
