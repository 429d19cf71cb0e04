"""Encoders of previews: what other decoders read back of them."""

import io

import av
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from latentfast.preview import Mp4Segments, encode_jpeg, encode_mp4, encode_raw, encode_webp


@pytest.fixture
def clip() -> Tensor:
    """Five frames of a square that moves on a slope of two colours, 32 x 48."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    frames = torch.stack([x * 5, y * 7, torch.full_like(x, 90)], -1).repeat(5, 1, 1, 1)
    for t in range(5):
        frames[t, 8:16, 8 * t : 8 * t + 8] = torch.tensor([250, 40, 40])
    return frames.to(torch.uint8)


def of_pictures(images) -> Tensor:
    rows = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in images]
    return torch.stack(rows).view(len(rows), images[0].height, images[0].width, 3)


def of_movie(data: bytes) -> tuple[Tensor, list[float]]:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in frames]), [f.time for f in frames]


def error(found: Tensor, clip: Tensor) -> float:
    assert found.shape == clip.shape
    return (found.float() - clip.float()).square().mean().sqrt().item()


def test_raw(clip: Tensor) -> None:
    data = encode_raw(clip.flip(2).flip(2))
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(clip.shape), clip)


def test_jpeg(clip: Tensor) -> None:
    pictures = encode_jpeg(clip, quality=90)
    assert len(pictures) == 5
    # sharp edges of full colour at quality 90: a few levels of 255
    assert error(of_pictures([Image.open(io.BytesIO(picture)) for picture in pictures]), clip) < 5
    assert sum(map(len, encode_jpeg(clip, quality=30))) < sum(map(len, pictures))


@pytest.mark.parametrize("frames", [1, 5])
def test_webp(clip: Tensor, frames: int) -> None:
    with Image.open(io.BytesIO(encode_webp(clip[:frames], fps=10, quality=95))) as image:
        found = [frame.copy() for frame in ImageSequence.Iterator(image)]
        assert getattr(image, "n_frames", 1) == frames
        if frames > 1:
            assert image.info["loop"] == 0
    # WebP halves the chroma's resolution: the square's edges bleed
    assert error(of_pictures(found), clip[:frames]) < 16


def test_mp4(clip: Tensor) -> None:
    found, times = of_movie(encode_mp4(clip, fps=8))
    assert error(found, clip) < 16  # 4:2:0, as above
    assert times == [t / 8 for t in range(5)]
    assert encode_mp4(clip, fps=8) == encode_mp4(clip, fps=8)


def test_mp4_segments_play_one_after_another(clip: Tensor) -> None:
    stream = Mp4Segments(fps=8)
    assert stream.header == b""
    segments = [stream.segment(x) for x in (clip, clip.flip(0), clip[:3])]
    found, times = of_movie(stream.header + b"".join(segments))
    assert error(found, torch.cat([clip, clip.flip(0), clip[:3]])) < 16
    assert times == [t / 8 for t in range(13)]
    late, times = of_movie(stream.header + segments[2])  # who comes late needs the header and any segment
    assert late.shape[0] == 3
    assert times[0] == pytest.approx(10 / 8)


def test_segments_are_of_one_size(clip: Tensor) -> None:
    stream = Mp4Segments()
    stream.segment(clip)
    with pytest.raises(ValueError, match=r"clip: expected frames of \(32, 48, 3\), as before, got \(16, 48, 3\)"):
        stream.segment(clip[:, :16])


@pytest.mark.parametrize("encode", [encode_raw, encode_jpeg, encode_webp, encode_mp4, Mp4Segments().segment])
def test_other_shapes_are_refused(encode) -> None:
    for bad in (torch.zeros(4, 4, 3), torch.zeros(2, 4, 4, 3), torch.zeros(0, 4, 4, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"clip: expected uint8 \(T, H, W, 3\)"):
            encode(bad)
