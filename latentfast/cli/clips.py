"""The commands ``generate``, ``interpolate`` and ``edit``: one clip file each, whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from latentfast.cache import LatentCache
from latentfast.cli.errors import UserError
from latentfast.cli.latents import difference, latent_path, mix_prompts, outside_keeps_bits
from latentfast.cli.output import atomic_outputs, check_file_target
from latentfast.cli.progress import Bar
from latentfast.cli.request import Mask, Request, check_prompt
from latentfast.cli.sampler import Sampler
from latentfast.cli.video import encode_mp4, tile
from latentfast.session.record import RECORD, checksum, surroundings, tensors_to_bytes

if TYPE_CHECKING:
    from latentfast.integrations.diffusers import LocalizedEdit

__all__ = ["Output", "edit", "generate", "interpolate"]

SPACES = ("noise", "latent")


@dataclass(frozen=True)
class Output:
    """Where a clip goes: the mp4, its rate, and a safetensors file for its latents if wanted."""

    out: Path
    fps: int = 16
    save_latents: Path | None = None

    @property
    def record(self) -> Path:
        """Beside the clip: how it was made."""
        return self.out.with_suffix(f".{RECORD}")

    def targets(self) -> list[Path]:
        check_file_target("--out", self.out)
        targets = [self.out, self.record]
        if self.save_latents is None:
            return targets
        check_file_target("--save-latents", self.save_latents)
        for target, what in zip(targets, ("clip", "record"), strict=True):
            if self.save_latents.resolve() == target.resolve():
                raise UserError(f"--save-latents: {self.save_latents} is the {what}'s own file")
        return [*targets, self.save_latents]


def generate(request: Request, output: Output, *, prompt: str, seed: int, cache: Path | None = None) -> None:
    """Make one clip from a prompt."""
    prompt = check_prompt("PROMPT", prompt)
    with _Job(request, output, note={"command": "generate", "prompt": prompt, "seed": seed}) as job:
        latents = job.sample("denoising", prompt, seed, cache)
        job.finish(job.sampler.decode(latents)[0], {"latents": latents})


def interpolate(
    request: Request,
    output: Output,
    *,
    prompts: Sequence[str],
    seeds: tuple[int, int],
    count: int,
    space: str,
    columns: int | None,
) -> None:
    """Make clips on the way from one seed or prompt to another, side by side."""
    first, last = (check_prompt(name, text) for name, text in zip(("PROMPT_A", "PROMPT_B"), prompts, strict=True))
    if space not in SPACES:
        raise UserError(f"--space: expected {' or '.join(SPACES)}, got '{space}'")
    if first == last and seeds[0] == seeds[1]:
        raise UserError("both ends have the same prompt and seed: give PROMPT_B or two different --seeds")
    note = {
        "command": "interpolate",
        "prompts": [first, last],
        "seeds": list(seeds),
        "count": count,
        "space": space,
        "columns": columns,
    }
    with _Job(request, output, note=note, clips=count if space == "noise" else 2) as job:
        sampler = job.sampler
        noises = [sampler.noise(seed) for seed in seeds]
        if space == "noise":
            path = latent_path(noises[0], noises[1], count)
            conditions: Sequence[str] | Tensor = [first] * count
            if first != last:
                conditions = mix_prompts(sampler, [first, last], count)
            done = [
                job.denoise(f"denoising {i + 1} of {count}", conditions[i : i + 1], path[i : i + 1].contiguous())
                for i in range(count)
            ]
            latents = torch.cat(done)
        else:
            ends = [
                job.denoise(f"denoising end {i + 1}", [text], noise)
                for i, (text, noise) in enumerate(zip((first, last), noises, strict=True))
            ]
            latents = latent_path(ends[0], ends[1], count)
        clips = sampler.decode(latents)
        job.finish(tile(list(clips), columns=columns), {"latents": latents})


def edit(
    request: Request,
    output: Output,
    *,
    prompt: str,
    edit_prompt: str,
    seed: int,
    mask: str,
    words: Sequence[str] = (),
    keep: Sequence[str] = (),
    strength: float = 1.0,
    observe: float = 0.1,
    compare: bool = False,
) -> None:
    """Make a clip and change it towards another prompt inside a region only."""
    prompt, edit_prompt = check_prompt("PROMPT", prompt), check_prompt("EDIT_PROMPT", edit_prompt)
    if prompt == edit_prompt:
        raise UserError("EDIT_PROMPT equals PROMPT: there is nothing to edit")
    region = Mask.parse(mask)
    if not 0 < strength <= 1:
        raise UserError(f"--strength: expected a number above 0 and up to 1, got {strength}")
    if mask != "auto" and (words or keep):
        raise UserError(f"--words and --keep: they say where the attention is looked for, but --mask is {mask}")
    note = {
        "command": "edit",
        "compare": compare,
        "observe": observe,
        "prompt": prompt,
        "edit_prompt": edit_prompt,
        "seed": seed,
        "mask": mask,
        "words": list(words),
        "keep": list(keep),
        "strength": strength,
    }
    with _Job(request, output, note=note, clips=2) as job:
        sampler = job.sampler
        noise = sampler.noise(seed)
        sampler.frame_dim(noise)  # refuses latents without a grid, before the work
        given = region.on(sampler, noise)
        made = job.edit(
            "denoising source and edit",
            prompt,
            edit_prompt,
            noise,
            mask=difference(sampler, strength=strength, observe=observe) if region.difference else given,
            words=words or None,
            keep=keep,
            strength=strength,
            # a region of one's own asks nothing of the model's attention, so that any model will do
            **({} if mask == "auto" else {"structure": 0.0}),
        )
        source, edited = made.source, made.edited
        outside, kept = outside_keeps_bits(source, edited, made.mask)
        if kept != outside:
            raise RuntimeError(f"{outside - kept} of {outside} values outside the mask lost the source's bits")
        clips = sampler.decode(torch.cat([source, edited]))
        clip = tile(list(clips)) if compare else clips[1]
        share = 1 - outside / source.numel()
        job.say(f"mask: {share:.0%} of the latents; outside it {kept} of {outside} values keep the source's bits")
        job.finish(clip, {"source": source, "edited": edited, "mask": made.mask})


class _Job:
    """The frame around a command: scratch outputs first (a bad --out shows before the work), then model, bar, files."""

    def __init__(self, request: Request, output: Output, *, note: dict, clips: int = 1) -> None:
        self._request, self._output, self._note, self._clips = request, output, note, clips

    def __enter__(self) -> _Job:
        self._start = time.perf_counter()
        self._lines: list[str] = []
        with ExitStack() as stack:
            self._scratch = stack.enter_context(atomic_outputs(*self._output.targets()))
            self.sampler: Sampler = stack.enter_context(self._request.sampler())
            self._bar = stack.enter_context(Bar(self.sampler.steps * self._clips))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
        if error[0] is None:
            console = Console(highlight=False, soft_wrap=True)
            for line in self._lines:
                console.print(line, markup=False)

    def denoise(self, text: str, prompts: Sequence[str] | Tensor, noise: Tensor) -> Tensor:
        self._bar.stage(text)

        def watched(step: int, latents: Tensor) -> Tensor:
            self._bar.advance(len(noise))
            return latents

        return self.sampler.denoise(prompts, noise, on_step=watched)

    def sample(self, text: str, prompt: str, seed: int, cache: Path | None) -> Tensor:
        """One clip, of which a cache has what was made before."""
        self._bar.stage(text)
        with nullcontext() if cache is None else LatentCache(cache) as store:
            made = self.sampler.sample(prompt, seed, store, on_step=lambda *_: self._bar.advance())
        if cache is not None:
            self.say(f"{made.made} of {made.steps} steps were run, the others are from {cache}")
        return made.latents

    def edit(self, text: str, prompt: str, edit_prompt: str, noise: Tensor, **options: Any) -> LocalizedEdit:
        self._bar.stage(text)
        return self.sampler.edit(prompt, edit_prompt, noise, on_step=self._bar.advance, **options)

    def say(self, line: str) -> None:
        """A line for the terminal once the files are in place."""
        self._lines.append(line)

    def finish(self, clip: Tensor, latents: dict[str, Tensor]) -> None:
        """Write the clip, and the latents if wanted, to the scratch files."""
        self._bar.stage("writing")
        data = encode_mp4(clip, fps=self._output.fps)
        self._scratch[0].write_bytes(data)
        note = {**self._note, **asdict(self._request), "call": self.sampler.call}
        record = {
            "tool": f"latentfast {self._note['command']}",
            "arguments": {**self._note, **asdict(self._request), "fps": self._output.fps},
            "call": self.sampler.call,
            **surroundings(self.sampler.device, self._request.backend),
            "checksums": {
                "latents": {name: checksum(x) for name, x in latents.items()},
                "frames": checksum(clip),
                "files": {"mp4": checksum(data)},
            },
        }
        text = json.dumps(record, default=str, indent=2)
        self._scratch[1].write_text(text + "\n", encoding="utf-8")
        if self._output.save_latents is not None:
            text = json.dumps(note, default=str, sort_keys=True)
            self._scratch[2].write_bytes(tensors_to_bytes(latents, {"latentfast": text}))
            self._lines.append(f"{self._output.save_latents}  {', '.join(latents)}")
        frames, height, width, _ = clip.shape
        asked = self.sampler.setting("num_frames")
        if asked is not None and frames != asked:
            self._lines.append(f"the model makes {frames} frames of the {asked} asked for")
        seconds = time.perf_counter() - self._start
        self._lines.append(
            f"{self._output.out}  {frames} frames of {width}x{height}, {seconds:.1f} s, sha256 {checksum(data)[:16]}"
        )
