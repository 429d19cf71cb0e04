"""Clips as bytes: raw, JPEG, animated WebP, mp4 and its segments. A clip is a uint8 tensor `(T, H, W, 3)`, RGB."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "Mp4Segments",
    "check_clip",
    "encode_jpeg",
    "encode_mp4",
    "encode_raw",
    "encode_webp",
    "images_of",
    "webp_of",
]


def check_clip(clip: Tensor) -> None:
    """Refuse anything but uint8 `(T, H, W, 3)`."""
    if clip.ndim != 4 or str(clip.dtype) != "torch.uint8" or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"clip: expected uint8 (T, H, W, 3), got {clip.dtype} {tuple(clip.shape)}")


def encode_raw(clip: Tensor) -> bytes:
    """The pixels as they are, frame by frame, row by row: the fastest where nothing is between encoder and screen."""
    check_clip(clip)
    return clip.contiguous().cpu().numpy().tobytes()


def encode_jpeg(clip: Tensor, *, quality: int = 85) -> list[bytes]:
    """Each frame as a JPEG picture, without chroma subsampling: a preview's small shapes keep their colours.

    Args:
        clip: uint8 `(T, H, W, 3)`.
        quality: 1 to 95.

    Raises:
        ValueError: a clip of another shape or dtype.
    """
    pictures = []
    for image in images_of(clip):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        pictures.append(buffer.getvalue())
    return pictures


def encode_webp(clip: Tensor, *, fps: float = 16, quality: int = 82, method: int = 4) -> bytes:
    """The whole clip as one WebP picture, animated without end if it has several frames.

    Args:
        clip: uint8 `(T, H, W, 3)`.
        fps: Frames a second.
        quality: 0 to 100.
        method: 0 (fast) to 6 (small).

    Raises:
        ValueError: a clip of another shape or dtype.
    """
    return webp_of(images_of(clip), fps=fps, quality=quality, method=method)


def webp_of(images: Sequence[Any], *, fps: float, quality: int, method: int = 4) -> bytes:
    """Pillow's pictures as one WebP picture, see `encode_webp`."""
    first, *others = images
    options = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0} if others else {}
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", quality=quality, method=method, **options)
    return buffer.getvalue()


def images_of(clip: Tensor) -> list[Any]:
    """Each frame as Pillow's picture."""
    from PIL import Image

    check_clip(clip)
    return [Image.fromarray(frame.contiguous().numpy(), "RGB") for frame in clip.cpu()]


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
    return _h264(clip, fps, {"crf": str(crf), "preset": "medium"})


def _h264(clip: Tensor, fps: int, encoder: dict[str, str], **container_options: str) -> bytes:
    import av

    check_clip(clip)
    frames, height, width, _ = clip.shape
    if height % 2 or width % 2:
        raise ValueError(f"clip: height and width must be even for 4:2:0 chroma, got {height}x{width}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact", **container_options}) as container:
        stream = container.add_stream("libx264", rate=fps, options={**encoder, "x264-params": "mbtree=0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # More threads split the picture differently, and so change the bytes.
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(clip[index].contiguous().cpu().numpy(), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


class Mp4Segments:
    """An endless mp4 stream in segments, for a browser's Media Source Extensions or HTTP streaming: clip after clip.

    Each segment begins with a key frame and no frame waits for a later one: it can be shown as soon as it is there.

    Args:
        fps: Frames a second.
        crf: x264's constant rate factor, 0 (lossless) to 51.

    Attributes:
        header: What comes before the first segment; empty until that is encoded.

    Example:
        >>> import torch
        >>> from latentfast.preview import Mp4Segments
        >>> stream = Mp4Segments(fps=8)
        >>> first, second = (stream.segment(torch.full((4, 16, 16, 3), shade, dtype=torch.uint8)) for shade in (0, 255))
        >>> video = stream.header + first + second  # eight frames, one second
    """

    def __init__(self, *, fps: int = 16, crf: int = 20) -> None:
        self._fps, self._crf = fps, crf
        self._count = 0
        self._time = 0  # in units of the track
        self._shape: tuple[int, ...] | None = None
        self.header = b""

    def segment(self, clip: Tensor) -> bytes:
        """The next clip `(T, H, W, 3)`, of the size of the first, as one segment.

        Raises:
            ValueError: a clip of another shape or dtype.
        """
        check_clip(clip)
        if self._shape not in (None, tuple(clip.shape[1:])):
            raise ValueError(f"clip: expected frames of {self._shape}, as before, got {tuple(clip.shape[1:])}")
        encoder = {"crf": str(self._crf), "preset": "veryfast", "tune": "zerolatency"}
        movie = _h264(clip, self._fps, encoder, movflags="frag_keyframe+empty_moov+default_base_moof")
        boxes = dict(_boxes(movie, 0, len(movie)))
        moof = boxes[b"moof"].start
        if self._shape is None:
            self._shape, self.header = tuple(clip.shape[1:]), movie[:moof]
        fragment = bytearray(movie[moof : boxes[b"mdat"].stop])
        self._count += 1
        self._place(fragment)
        self._time += clip.shape[0] * _timescale(movie, boxes[b"moov"]) // self._fps
        return bytes(fragment)

    def _place(self, fragment: bytearray) -> None:
        """Write number and time into a fragment, which its encoder took for the first (ISO/IEC 14496-12, 8.8)."""
        (_, moof), *_ = _boxes(fragment, 0, len(fragment))
        inner = dict(_boxes(fragment, moof.start + 8, moof.stop))
        struct.pack_into(">I", fragment, inner[b"mfhd"].start + 12, self._count)
        track = inner[b"traf"]
        time = dict(_boxes(fragment, track.start + 8, track.stop))[b"tfdt"].start
        wide = fragment[time + 8] == 1
        struct.pack_into(">Q" if wide else ">I", fragment, time + 12, self._time)


def _boxes(data: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[bytes, range]]:
    """The boxes of an mp4 file between two places: names, and where they are."""
    while start < stop:
        size, name = struct.unpack_from(">I4s", data, start)
        yield name, range(start, start + size)
        start += size


def _timescale(movie: bytes, moov: range) -> int:
    """Units a second of the only track's clock."""
    place = moov
    for name in (b"trak", b"mdia", b"mdhd"):
        place = dict(_boxes(movie, place.start + 8, place.stop))[name]
    wide = movie[place.start + 8] == 1
    return struct.unpack_from(">I", movie, place.start + (28 if wide else 20))[0]
