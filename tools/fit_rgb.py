"""Fits the RGB factors of the embedded model's previews, measures them on clips of other prompts, draws a picture.

    python -m tools.fit_rgb

Clips are made as a user makes them: prompts in free word order, the recommended settings, diffusers' own pipeline and
VAE. The factors go to latentfast/tiny/weights/rgb_factors.json, with the errors; the picture, decoded frames beside
their previews, to docs/images/preview.png. Four minutes on one free core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor

import latentfast
from latentfast import tiny
from latentfast.tiny.caption import caption
from latentfast.tiny.scene import random_scenes

ROOT = Path(__file__).resolve().parent.parent
FACTORS = ROOT / "latentfast" / "tiny" / "weights" / "rgb_factors.json"
PICTURE = ROOT / "docs" / "images" / "preview.png"
#: Seeds of the prompts: neither the training's nor those of the model card's measurements.
FIT_SEED, HELD_OUT_SEED = 5001, 6001


def decoded(pipe, latents: Tensor) -> Tensor:
    """A pipeline's latents as frames (B, 3, T', H', W') in [-1, 1], the way `WanPipeline` decodes them."""
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(v).view(shape) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    with torch.no_grad():
        return pipe.vae.decode(latents * std + mean).sample.clamp(-1, 1)


def make_clips(pipe, count: int, seed: int) -> tuple[list[str], Tensor, Tensor]:
    """Prompts, latents (count, C, T, H, W) and frames of `count` clips."""
    words = random.Random(seed)
    scenes = random_scenes(count, generator=torch.Generator().manual_seed(seed))
    prompts = [caption(scene, words) for scene in scenes]
    latents, frames = [], []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + i)
        z = pipe(prompt, generator=generator, output_type="latent", **tiny.RECOMMENDED).frames
        latents.append(z)
        frames.append(decoded(pipe, z))
        print(f"{i + 1}/{count} {prompt}", flush=True)
    return prompts, torch.cat(latents), torch.cat(frames)


def psnr(rms: float) -> float:
    """Decibels of an error in [-1, 1]."""
    return 20 * math.log10(2 / rms)


def errors(latents: Tensor, frames: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    """PSNR in dB of the previews of clips: at the latents' resolution, against the frames' means there; the most that
    any factors reach on these very clips; and enlarged, against the middle frame of each latent frame's group, which
    includes what one position for 8x8 pixels cannot show.
    """
    best = latentfast.fit_rgb(latents, frames).error.psnr
    rgb = latentfast.latent_to_rgb(latents, weight, bias, dtype=torch.float32)
    coarse = torch.nn.functional.avg_pool2d(frames.movedim(2, 1).flatten(0, 1), frames.shape[-1] // latents.shape[-1])
    coarse = coarse.unflatten(0, (frames.shape[0], -1))
    step = (coarse.shape[1] - 1) // (rgb.shape[1] - 1)
    grouped = torch.cat((coarse[:, :1], coarse[:, 1:].unflatten(1, (-1, step)).mean(2)), 1).movedim(2, -1)
    large = latentfast.latent_to_rgb(latents, weight, bias, size=frames.shape[-2:], dtype=torch.float32)
    middle = _middles(frames, latents.shape[2]).movedim(1, -1)
    return {
        "latent_grid_db": round(psnr(float((rgb - grouped).square().mean().sqrt())), 2),
        "latent_grid_best_db": round(best, 2),
        "enlarged_db": round(psnr(float((large - middle).square().mean().sqrt())), 2),
    }


def _middles(frames: Tensor, count: int) -> Tensor:
    """The frame in the middle of each latent frame's group, (B, 3, count, H', W')."""
    step = (frames.shape[2] - 1) // (count - 1)
    return frames[:, :, [0, *(1 + step * i + step // 2 for i in range(count - 1))]]


def draw(prompts: list[str], latents: Tensor, frames: Tensor, weight: Tensor, bias: Tensor, path: Path) -> None:
    """A picture: for each clip, three decoded frames and their previews."""
    from matplotlib import pyplot

    shown = [1, latents.shape[2] // 2, latents.shape[2] - 1]
    pictures = latentfast.latent_to_rgb(latents, weight, bias, size=frames.shape[-2:])
    middle = _middles(frames, latents.shape[2]).movedim(1, -1)
    pixels = ((middle + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    rows = len(prompts)
    figure, axes = pyplot.subplots(rows, 2 * len(shown), figsize=(2 * len(shown) * 1.6, rows * 1.85), squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.04, hspace=0.2)
    for row, prompt in enumerate(prompts):
        for column, t in enumerate(shown):
            axes[row][2 * column].imshow(pixels[row, t].numpy())
            axes[row][2 * column + 1].imshow(pictures[row, t].numpy())
            axes[row][2 * column].set_title(f"decoded, latent frame {t}" if row == 0 else "", fontsize=9)
            axes[row][2 * column + 1].set_title("latent_to_rgb" if row == 0 else "", fontsize=9)
        axes[row][0].text(0, 146, prompt, fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16, help="clips to fit to")
    parser.add_argument("--held-out", type=int, default=6, help="clips to measure on")
    options = parser.parse_args()
    start = time.perf_counter()
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    _, latents, frames = make_clips(pipe, options.clips, FIT_SEED)
    weight, bias, error = latentfast.fit_rgb(latents, frames)
    prompts, others, other_frames = make_clips(pipe, options.held_out, HELD_OUT_SEED)
    held_out = errors(others, other_frames, weight, bias)
    found = {
        "weight": [[round(x, 6) for x in row] for row in weight.tolist()],
        "bias": [round(x, 6) for x in bias.tolist()],
        "fit": {"clips": options.clips, "rms": round(error.rms, 5), "psnr_db": round(error.psnr, 2)},
        "held_out": {"clips": options.held_out, **held_out},
    }
    FACTORS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(prompts[:4], others[:4], other_frames[:4], weight, bias, PICTURE)
    print(json.dumps({k: found[k] for k in ("fit", "held_out")}), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
