"""Clips as files and pictures: h264, WebP, data URIs. A clip is a uint8 tensor ``(T, H, W, 3)``, RGB."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch
from torch import Tensor

from latentfast.preview.encoders import check_clip, encode_mp4, images_of, webp_of

__all__ = ["animation", "data_uri", "encode_mp4", "filmstrip", "psnr", "tile"]


def tile(clips: Sequence[Tensor], *, columns: int | None = None, gap: int = 4, shade: int = 255) -> Tensor:
    """Lay clips of one shape out on a grid, row by row; empty places and gaps have the gray level ``shade``."""
    for clip in clips:
        check_clip(clip)
    frames, height, width, _ = clips[0].shape
    columns = columns or len(clips)
    rows = -(-len(clips) // columns)
    size = (rows * height + (rows - 1) * gap, columns * width + (columns - 1) * gap)
    canvas = torch.full((frames, *size, 3), shade, dtype=torch.uint8)
    for index, clip in enumerate(clips):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = clip
    return canvas


def filmstrip(clip: Tensor, *, count: int = 7, max_height: int = 160) -> bytes:
    """``count`` frames, evenly spread from the first to the last, side by side in one WebP picture."""
    check_clip(clip)
    picks = torch.linspace(0, len(clip) - 1, min(count, len(clip))).round().long()
    strip = tile([frame[None] for frame in clip[picks]], gap=2, shade=136)[0]
    return webp_of(_scaled(strip[None], max_height), fps=1, quality=88)


def animation(clip: Tensor, *, fps: int = 16, max_height: int = 256) -> bytes:
    """The whole clip as an endless animated WebP picture."""
    return webp_of(_scaled(clip, max_height), fps=fps, quality=82)


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as a ``data:`` address, for a page that needs no other file."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def psnr(clip: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio of 8-bit clips in dB: ``10 log10(255² / mean squared difference)``."""
    error = (clip.double() - clean.double()).square().mean()
    return float(10 * torch.log10(255.0**2 / error))


def _scaled(clip: Tensor, max_height: int) -> list:
    from PIL import Image

    images = images_of(clip)
    width, height = images[0].size
    if height <= max_height:
        return images
    size = (max(1, width * max_height // height), max_height)
    return [image.resize(size, Image.Resampling.LANCZOS) for image in images]
