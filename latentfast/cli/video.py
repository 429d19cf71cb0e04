"""Clips as files and pictures: h264, WebP, data URIs. A clip is a uint8 tensor ``(T, H, W, 3)``, RGB."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["animation", "data_uri", "encode_mp4", "filmstrip", "psnr", "tile"]


def encode_mp4(clip: Tensor, *, fps: int = 16, crf: int = 14) -> bytes:
    """Encode a clip as H.264 in an mp4 container.

    The same frames give the same bytes: one encoder thread, no clock in the metadata, and none of x264's macroblock
    tree, which on small pictures reads memory that it has not written (with AVX-512, 64x64, x264 as in PyAV 18: 150
    encodings of one clip in a busy heap gave many different files with it, one without).

    Args:
        clip: uint8 ``(T, H, W, 3)``, RGB; H and W even, as 4:2:0 chroma demands.
        fps: frames a second.
        crf: x264's constant rate factor, 0 (lossless) to 51.

    Raises:
        ValueError: a clip of another shape or dtype.
    """
    import av

    _check(clip)
    frames, height, width, _ = clip.shape
    if height % 2 or width % 2:
        raise ValueError(f"clip: height and width must be even for 4:2:0 chroma, got {height}x{width}")
    buffer = io.BytesIO()
    options = {"fflags": "+bitexact"}
    with av.open(buffer, "w", format="mp4", options=options) as container:
        encoder = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=encoder)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # More threads split the picture differently, and so change the bytes.
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(clip[index].contiguous().numpy(), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def tile(clips: Sequence[Tensor], *, columns: int | None = None, gap: int = 4, shade: int = 255) -> Tensor:
    """Lay clips of one shape out on a grid, row by row; empty places and gaps have the gray level ``shade``."""
    for clip in clips:
        _check(clip)
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
    _check(clip)
    picks = torch.linspace(0, len(clip) - 1, min(count, len(clip))).round().long()
    strip = tile([frame[None] for frame in clip[picks]], gap=2, shade=136)[0]
    return _webp([_image(strip, max_height)], quality=88)


def animation(clip: Tensor, *, fps: int = 16, max_height: int = 256) -> bytes:
    """The whole clip as an endless animated WebP picture."""
    _check(clip)
    return _webp([_image(frame, max_height) for frame in clip], quality=82, duration=round(1000 / fps), loop=0)


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as a ``data:`` address, for a page that needs no other file."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def psnr(clip: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio of 8-bit clips in dB: ``10 log10(255² / mean squared difference)``."""
    error = (clip.double() - clean.double()).square().mean()
    return float(10 * torch.log10(255.0**2 / error))


def _check(clip: Tensor) -> None:
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"clip: expected uint8 (T, H, W, 3), got {clip.dtype} {tuple(clip.shape)}")


def _image(frame: Tensor, max_height: int):
    from PIL import Image

    image = Image.fromarray(frame.contiguous().numpy(), "RGB")
    if image.height > max_height:
        image = image.resize((max(1, image.width * max_height // image.height), max_height), Image.Resampling.LANCZOS)
    return image


def _webp(images: list, **options) -> bytes:
    buffer = io.BytesIO()
    images[0].save(buffer, "WEBP", save_all=len(images) > 1, append_images=images[1:], method=4, **options)
    return buffer.getvalue()
