"""Packets of frames: what a browser is sent of clips and masks, and where in time each frame belongs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentfast.preview import Preview, RGBRenderer, encode_jpeg, encode_raw
from latentfast.studio.model import Model
from latentfast.studio.protocol import packet

__all__ = ["FPS", "NO_MASK", "Timing", "clip_packet", "edited_packet", "mask_packet", "payload", "places", "projected"]

FPS = 16
#: Bytes of a clip's pixels that are sent as they are; beyond, encoding takes less time than the browser's unpacking.
RAW = 2 << 20
NO_MASK = packet({"clip": "mask", "codec": "gray", "width": 0, "height": 0, "places": []}, b"")


@dataclass(frozen=True)
class Timing:
    """How long a model's clips are.

    Attributes:
        length: Frames of a finished clip.
        latent_frames: Of its latents.
        shape: Width over height.
    """

    length: int
    latent_frames: int
    shape: float

    @classmethod
    def of(cls, model: Model) -> Timing:
        return cls(model.frames, model.latent_frames, model.size[1] / model.size[0])

    def header(self) -> dict[str, Any]:
        """What a packet says of it."""
        return {"length": self.length, "fps": FPS, "shape": self.shape}

    def places(self, every: int = 1) -> list[float]:
        """Those of each so many-th latent frame, see `places`."""
        return places(self.latent_frames, self.length, every)


def places(latent_frames: int, frames: int, every: int = 1) -> list[float]:
    """Where in a clip of so many frames each so many-th latent frame is: in the middle of what it decodes to.

    Causal VAEs (Wan, HunyuanVideo) make one frame of the first latent frame and r of each further one.
    """
    if latent_frames > 1 and (frames - 1) % (latent_frames - 1) == 0:
        ratio = (frames - 1) // (latent_frames - 1)
        found = [0.0, *(ratio * i - (ratio - 1) / 2 for i in range(1, latent_frames))]
    else:
        ratio = math.ceil(frames / max(1, latent_frames))
        found = [ratio * i + (ratio - 1) / 2 for i in range(latent_frames)]
    return found[::every]


def payload(frames: Tensor) -> tuple[dict[str, Any], bytes]:
    """Frames `(1, T, H, W, 3)` as bytes, and what a packet's header says of them."""
    clip = frames[0]
    header: dict[str, Any] = {"width": clip.shape[2], "height": clip.shape[1]}
    if clip.numel() <= RAW:
        return {**header, "codec": "rgb"}, encode_raw(clip)
    pictures = encode_jpeg(clip)
    return {**header, "codec": "jpeg", "sizes": [len(picture) for picture in pictures]}, b"".join(pictures)


def edited_packet(preview: Preview, timing: Timing, **more: Any) -> bytes:
    """A preview whose `encoded` is its `payload`."""
    header, data = preview.encoded
    count = preview.frames.shape[1]
    spots = list(range(count)) if preview.exact else timing.places(preview.every)[:count]
    about = {"clip": "edited", "number": preview.number, "exact": preview.exact, "places": spots}
    return packet({**about, **more, **timing.header(), **header}, data)


def clip_packet(name: str, frames: Tensor, spots: Sequence[float], timing: Timing) -> bytes:
    """Frames `(1, T, H, W, 3)` under a name."""
    header, data = payload(frames)
    return packet({"clip": name, "places": list(spots), **timing.header(), **header}, data)


def mask_packet(mask: Tensor, timing: Timing) -> bytes:
    """A mask `(1, 1, T, H, W)` in levels of gray."""
    gray = (mask[0, 0].float() * 255).round().to(torch.uint8).cpu().contiguous()
    header = {"clip": "mask", "codec": "gray", "width": gray.shape[2], "height": gray.shape[1]}
    return packet({**header, "places": timing.places()}, gray.numpy().tobytes())


def projected(latents: Tensor, model: Model, factors: tuple[Tensor, Tensor]) -> Tensor:
    """Latents by RGB factors, on the host: `(1, T, H', W', 3)`."""
    height, width = (size * model.scale for size in latents.shape[3:])
    frames = torch.empty((1, latents.shape[2], height, width, 3), dtype=torch.uint8, device=latents.device)
    RGBRenderer(*factors).render(latents, None, every=1, out=frames)
    return frames.cpu()
