"""Trains the autoencoder on clips that are rendered inside the training step.

Two stages share one cosine: first many small windows of nine frames around a shape, then whole clips.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from latentfast.tiny import scene
from tools.train_tiny.common import Budget, Log, MuonAdamW, Snapshot, amp, captured, millions, psnr, synchronize
from tools.train_tiny.grounding import coverage
from tools.train_tiny.models import LATENT_NOISE, make_vae, seal_vae
from tools.train_tiny.norm_silu import check as check_norm_silu
from tools.train_tiny.vae_walk import decode_raw, encode_mean

RATE, WARMUP, DECAY = 2e-3, 60, 1e-4
WINDOWS_SHARE = 0.4  # of the budget goes to windows, the rest to whole clips
MEAN_WEIGHT = 3e-4  # of the latent's mean square: keeps its scale near 1
HELD_OUT_SEED = 12345
CHECK_EVERY = 10  # steps between looks at the clock and the loss


def training_clips(n: int, frames: int, window: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """``n`` clips of ``frames`` consecutive frames, a window of the picture near a shape, and the shapes'
    coverage (N, 1, ...).

    Small and moving shapes, the hardest, are more frequent than in the scenes that captions describe.
    """
    table = scene.random_table(n, two=0.6, device=device)
    pick = torch.rand(n, 2, 2, device=device) < 0.35
    moving = torch.randint(0, len(scene.MOTIONS), (n, 2), device=device)
    for k in range(2):
        there = table[:, 4 * k] >= 0
        size_column, motion_column = 4 * k + 2, 4 * k + 3
        table[:, size_column] = torch.where(there & pick[:, k, 0], 0, table[:, size_column])
        still = there & pick[:, k, 1] & (table[:, motion_column] == scene.NOWHERE)
        table[:, motion_column] = torch.where(still, moving[:, k], table[:, motion_column])
    layout = scene.random_layout(table)
    total = scene.FRAMES if frames <= scene.FRAMES else frames
    first = (torch.rand(n, 1, device=device) * (total - frames + 1)).floor()
    times = (first + torch.arange(frames, device=device)) / (total - 1)
    corner = None
    if window < size:
        middle = scene.positions(table, layout, times)[:, :, frames // 2]
        second = ((table[:, 4] >= 0) & (torch.rand(n, device=device) < 0.5))[:, None]
        target = torch.where(second, middle[:, 1], middle[:, 0])
        scatter = (torch.rand(n, 2, device=device) - 0.5) * (0.7 * window)
        corner = (target * size - window / 2 + scatter).round().clamp(0, size - window)
    clips = scene.draw(table, layout, size=size, times=times, window=window, corner=corner)
    return clips.video, clips.masks.sum(1, keepdim=True)


def held_out(n: int, device: str, smoke: bool = False) -> Tensor:
    """Clips that no training step draws: the generator is another one."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    table = scene.random_table(n, two=0.5, generator=generator)
    size, frames = (32, 5) if smoke else (scene.SIZE, scene.FRAMES)
    return scene.render(table, size=size, num_frames=frames, generator=generator, device=device).video


def reconstruction_loss(got: Tensor, wanted: Tensor, cover: Tensor) -> Tensor:
    error = got - wanted
    weight = 1 + cover
    loss = (weight * ((error * error + 1e-6).sqrt() + error * error)).mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return loss + edges


def train(budget: Budget, log: Log, device: str, smoke: bool = False) -> AutoencoderKLWan:
    """Trains, measures, seals and saves ``vae.pt``; returns the autoencoder in float32."""
    log(check_norm_silu(device))
    vae = make_vae(smoke).to(device)
    log(f"vae: {millions(vae):.2f}M parameters")
    rate = torch.full((), 1e-5, device=device)
    noise = torch.zeros((), device=device)
    optimizer = MuonAdamW(
        vae.named_parameters(),
        rate,
        decay=DECAY,
        betas=(0.9, 0.95),
        adamw_names=("conv_in", "decoder.conv_out", "quant"),
    )
    size = 32 if smoke else scene.SIZE
    stages = [(2, 5, 16), (1, 5, 32)] if smoke else [(32, 9, 64), (12, scene.FRAMES, size)]

    def make_step(n: int, frames: int, window: int):
        def step() -> Tensor:
            video, cover = training_clips(n, frames, window, size, device)
            with amp(device):
                mean = encode_mean(vae, video)
                got = decode_raw(vae, mean + noise * torch.randn_like(mean))
            got = got.float()
            loss = reconstruction_loss(got, video, cover) + MEAN_WEIGHT * mean.float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return torch.stack([(got.detach() - video).square().mean(), mean.detach().float().square().mean()])

        return step

    began = time.time()
    steps = [captured(make_step(*stage), log, device) for stage in stages]
    synchronize(device)
    log(f"vae: captured in {time.time() - began:.1f} s")
    test = held_out(8 if smoke else 32, device, smoke)
    safe, restarts = Snapshot(optimizer.params), 0
    budget.restart()
    step, fraction, told, counts, result = 0, 0.0, time.time(), [0, 0], torch.zeros(2)
    while True:
        if step % CHECK_EVERY == 0:
            synchronize(device)
            fraction = budget.fraction(step)
            if step:
                error, square = result.tolist()
                if not math.isfinite(error) or not math.isfinite(square):
                    restarts += 1
                    log(f"vae: DIVERGED at step {step}; back to the last good weights")
                    if restarts > 5:
                        raise RuntimeError("the autoencoder's training diverged six times")
                    safe.restore()
                    optimizer.reset()
                elif step % (10 * CHECK_EVERY) == 0:
                    safe.take()
                if time.time() - told > 12 or fraction >= 1:
                    told = time.time()
                    log(
                        f"vae: step {step} {counts} of {100 * fraction:.0f}%, training "
                        f"{-10 * math.log10(max(error, 1e-9) / 4):.2f} dB, latent rms {square**0.5:.2f}, "
                        f"held out {fast_psnr(vae, test, device):.2f} dB"
                    )
            if fraction >= 1:
                break
        stage = int(fraction >= WINDOWS_SHARE)
        slope = min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * fraction))
        rate.fill_(RATE * 0.5**restarts * slope + 1e-6)
        noise.fill_(LATENT_NOISE * min(1.0, 2 * fraction))
        result = steps[stage]()
        counts[stage] += 1
        step += 1
    del steps
    seal_vae(vae, *latent_statistics(vae, 16 if smoke else 4096, device, smoke))
    torch.save({"weights": vae.state_dict(), "config": dict(vae.config)}, log.folder / "vae.pt")
    value = library_psnr(vae, test)
    log(f"vae: {step} steps; held out through the library's own walk {value:.2f} dB")
    log.record("vae", steps=step, million_parameters=millions(vae), psnr_fp32=value)
    return vae


def load(path: Path, device: str, smoke: bool = False) -> AutoencoderKLWan:
    saved = torch.load(path, map_location=device, weights_only=False)
    vae = make_vae(smoke).to(device)
    vae.load_state_dict(saved["weights"])
    vae.register_to_config(**{k: saved["config"][k] for k in ("latents_mean", "latents_std")})
    return vae.eval()


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKLWan, table: Tensor, device: str, smoke: bool = False, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """For one rendered clip for each row of the table: the latent's mean, not yet normalised, and the shapes'
    ``coverage`` of its tokens.
    """
    size, frames = (32, 5) if smoke else (scene.SIZE, scene.FRAMES)
    latents, cover = [], []
    for part in table.split(chunk):
        clips = scene.render(part, size=size, num_frames=frames)
        with amp(device):
            latents.append(encode_mean(vae, clips.video).float())
        cover.append(coverage(clips.masks))
    return torch.cat(latents), torch.cat(cover)


def latent_statistics(vae: AutoencoderKLWan, n: int, device: str, smoke: bool) -> tuple[Tensor, Tensor]:
    z, _ = encode_pool(vae, scene.random_table(n, two=0.6, device=device), device, smoke)
    return z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))


@torch.no_grad()
def fast_psnr(vae: AutoencoderKLWan, clips: Tensor, device: str) -> float:
    with amp(device):
        got = [decode_raw(vae, encode_mean(vae, c)).float() for c in clips.split(16)]
    return psnr(torch.cat(got), clips)


@torch.no_grad()
def library_psnr(vae: AutoencoderKLWan, clips: Tensor) -> float:
    return psnr(torch.cat([vae.decode(vae.encode(c).latent_dist.mode()).sample for c in clips.split(16)]), clips)
