"""Clips of one's own: frames of a file, and the latents that a pipeline makes of them."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["encode", "noised", "read_frames"]


def read_frames(path: str | PathLike[str], count: int | None, height: int | None, width: int | None) -> Tensor:
    """The first frames of a video.

    Args:
        path: The file.
        count: How many; None: all.
        height: Pixels, to which the frames are scaled and, around their middle, cropped; None: as they are.
        width: As `height`.

    Returns:
        float32 `(1, 3, T, H, W)` in [-1, 1].

    Raises:
        ImportError: PyAV is not installed.
        ValueError: PyAV finds no video in it, or it has fewer frames.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("Session.from_video needs PyAV, which is not installed: pip install av") from error

    frames: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(frames) == count:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"path: {path} has no video that can be read ({error})") from error
    if not frames or len(frames) < (count or 1):
        raise ValueError(f"path: {path} must have {count or 1} frames, it has {len(frames)}")
    clip = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    if height is not None and width is not None:
        clip = _fitted(clip, height, width)
    return clip.transpose(0, 1)[None].contiguous()


def _fitted(clip: Tensor, height: int, width: int) -> Tensor:
    """Frames `(T, 3, H, W)` that fill a size, the rest of them cut off evenly."""
    h, w = clip.shape[-2:]
    if (h, w) == (height, width):
        return clip
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    clip = F.interpolate(clip, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return clip[..., top : top + height, left : left + width]


@torch.no_grad()
def encode(pipe: Any, frames: Tensor, like: Tensor) -> Tensor:
    """Clean latents of frames, as the pipeline's own: the mode of the VAE's distribution, normalised.

    Args:
        pipe: Its VAE encodes.
        frames: `(1, 3, T, H, W)` in [-1, 1].
        like: Latents of the loop, whose layout, dtype and device they get: `(B, C, T, H, W)`, `(B, T, C, H, W)`, or
            `(B, T·H·W, C)`.

    Raises:
        ValueError: the latents don't become of that layout.
    """
    vae = pipe.vae
    encoded = vae.encode(frames.to(vae.device, vae.dtype))
    found = getattr(encoded, "latents", None)
    latents = (encoded.latent_dist.mode() if found is None else found).float()
    mean, std = (_statistic(vae, name) for name in ("latents_mean", "latents_std"))
    factor = float(getattr(vae.config, "scaling_factor", None) or 1)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1, 1)
        latents = (latents - mean.to(latents).view(shape)) * factor / std.to(latents).view(shape)
    else:
        latents = (latents - float(getattr(vae.config, "shift_factor", None) or 0)) * factor
    tokens = latents.flatten(2).transpose(1, 2)
    for found in (latents, latents.transpose(1, 2), tokens):
        if found.shape[1:] == like.shape[1:]:
            return found.expand(like.shape).to(like)
    raise ValueError(
        f"pipe: latents {tuple(latents.shape)} of its VAE are not as its loop has them, {tuple(like.shape)}"
    )


def _statistic(vae: Any, name: str) -> Tensor | None:
    """A VAE's mean or standard deviation of latents, a number a channel: in its configuration, or a buffer."""
    value = getattr(vae.config, name, None)
    if value is None:
        value = getattr(vae, name, None)
    return None if value is None else torch.as_tensor(value)


def noised(pipe: Any, clean: Tensor, noise: Tensor, sigma: float) -> tuple[int, Tensor]:
    """Clean latents with the noise that they have before one of a pipeline's steps.

    Args:
        pipe: Its scheduler has the timesteps of the sampling.
        clean: The latents.
        noise: What the sampling would begin with.
        sigma: Of the noise level of the first step: the first step that is not above is taken.

    Returns:
        How many steps come before, and the latents.
    """
    scheduler = pipe.scheduler
    noise = noise / float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else noise
    levels = getattr(scheduler, "sigmas", scheduler.timesteps).double().cpu()[: len(scheduler.timesteps)]
    below = (levels <= sigma * levels[0] * (1 + 1e-6)).nonzero()
    if not len(below):
        raise ValueError(f"sigma: none of the {len(levels)} steps begins at or below {sigma}")
    step = int(below[0])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(step)
    add = getattr(scheduler, "scale_noise", None)
    time = scheduler.timesteps[step : step + 1]
    mixed = scheduler.add_noise(clean, noise, time) if add is None else add(clean, time, noise)
    return step, mixed
