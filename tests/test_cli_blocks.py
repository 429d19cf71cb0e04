"""The command line's building blocks: outputs, clips as files, samplers of any pipeline, what is done with latents."""

import errno
import io
import random
from pathlib import Path

import av
import pytest
import torch
from cli_helpers import tree
from PIL import Image

import latentfast
from latentfast.cache.environment import active_backend
from latentfast.cli import report, video
from latentfast.cli.errors import UserError
from latentfast.cli.latents import changed_region, disturb, latent_path, mend, outside_keeps_bits
from latentfast.cli.loading import load_pipeline
from latentfast.cli.output import atomic_outputs
from latentfast.cli.sampler import Sampler
from latentfast.cli.timing import time_operations
from latentfast.session.record import checksum

pytest_plugins = ("cli_fixtures",)

CALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3}
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ outputs


def test_outputs_appear_together_at_the_end(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "parents" / "a.bin", tmp_path / "b.bin"
    second.write_bytes(b"old")
    with atomic_outputs(first, second) as (a, b):
        a.write_bytes(b"one")
        b.write_bytes(b"two")
        assert not first.parent.exists()
        assert second.read_bytes() == b"old"
    assert tree(tmp_path) == {"new": None, "new/parents": None, "new/parents/a.bin": b"one", "b.bin": b"two"}


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_bytes(b"")
    with atomic_outputs(target) as (scratch,):
        scratch.mkdir()
        (scratch / "fresh").write_bytes(b"new")
    assert tree(tmp_path) == {"out": None, "out/fresh": b"new"}


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_bytes(b"old")
    before = tree(tmp_path)
    with pytest.raises(type(error)), atomic_outputs(target, tmp_path / "deep" / "file") as (folder, file):
        folder.mkdir()
        (folder / "half").write_bytes(b"ha")
        file.write_bytes(b"lf")
        raise error
    assert tree(tmp_path) == before


def test_a_full_disk_names_the_target(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"cannot write .*clip\.mp4: No space left on device"),
        atomic_outputs(tmp_path / "clip.mp4") as (scratch,),
    ):
        scratch.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert tree(tmp_path) == {}


def test_an_error_of_another_file_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights"), atomic_outputs(tmp_path / "clip.mp4"):
        (tmp_path / "weights").read_bytes()


def test_no_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes(b"text")
    with pytest.raises(UserError, match="Not a directory"), atomic_outputs(tmp_path / "file.txt" / "out"):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"file.txt": b"text"}


# ------------------------------------------------------------------------------------------------------ clips as files


def moving_square(frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    clip = torch.full((frames, height, width, 3), 40, dtype=torch.uint8)
    for t in range(frames):
        clip[t, 8:24, 4 * t : 4 * t + 16] = torch.tensor([220, 60, 30], dtype=torch.uint8)
    return clip


def read_mp4(data: bytes) -> tuple[torch.Tensor, str, str, float]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        return torch.stack(frames), stream.codec_context.name, stream.pix_fmt, float(stream.average_rate)


def test_mp4_holds_the_frames() -> None:
    clip = moving_square()
    frames, codec, pixels, rate = read_mp4(video.encode_mp4(clip, fps=12, crf=0))
    assert (frames.shape, codec, pixels, rate) == (clip.shape, "h264", "yuv420p", 12.0)
    # The encoder is lossless at crf 0; what is left is chroma at half resolution, wrong only along the square's edges.
    assert video.psnr(frames, clip) > 30
    assert (frames[:, 30:, :].int() - clip[:, 30:, :].int()).abs().max() <= 2  # flat gray: one rounding to YUV and back


def test_mp4_is_repeatable() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (128 + 40 * torch.randn(9, 64, 64, 3, generator=generator)).clamp(0, 255).to(torch.uint8)
    sizes = random.Random(0)
    encodings = set()
    for _ in range(16):
        # What an encoder reads without having written it shows only if the heap holds something else every time: with
        # x264's macroblock tree this gave five different files of 16.
        blocks = [bytearray([sizes.randrange(256)]) * sizes.randrange(16, 300_000) for _ in range(200)]
        sizes.shuffle(blocks)
        del blocks[::2]
        encodings.add(video.encode_mp4(noise))
    assert len(encodings) == 1


@pytest.mark.parametrize(
    "clip", [moving_square(height=47), moving_square().float(), moving_square()[0], moving_square()[:0]]
)
def test_mp4_refuses_other_clips(clip: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="clip: "):
        video.encode_mp4(clip)


def test_tile_places_clips_by_rows() -> None:
    clips = [torch.full((2, 4, 6, 3), shade, dtype=torch.uint8) for shade in (10, 20, 30)]
    grid = video.tile(clips, columns=2, gap=2, shade=99)
    assert grid.shape == (2, 10, 14, 3)
    assert [int(grid[0, y, x, 0]) for y, x in ((0, 0), (0, 8), (6, 0), (6, 8), (4, 0), (0, 6))] == [
        10,
        20,
        30,
        99,
        99,
        99,
    ]


def test_pictures_of_a_clip() -> None:
    clip = moving_square(frames=9)
    moving = Image.open(io.BytesIO(video.animation(clip, fps=10)))
    assert (moving.n_frames, moving.size) == (9, (64, 48))
    strip = Image.open(io.BytesIO(video.filmstrip(clip, count=3)))
    assert strip.size == (3 * 64 + 2 * 2, 48)
    # The last of the three frames is the clip's last: its square is 32 pixels further right.
    assert strip.convert("RGB").getpixel((2 * 66 + 40, 16))[0] > 180


def test_psnr_of_a_known_error() -> None:
    clean = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    assert video.psnr(clean + 255, clean) == 0.0
    assert video.psnr(clean + 1, clean) == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("kind", ["wan_folder", "ltx_folder"])
def test_sampler_gives_the_pipelines_own_pixels(kind: str, request: pytest.FixtureRequest) -> None:
    pipeline = load_pipeline(request.getfixturevalue(kind), CPU, torch.float32)
    sampler = Sampler(pipeline, CALL)
    generator = torch.Generator().manual_seed(3)
    expected = pipeline("a red circle", generator=generator, output_type="pt", **CALL).frames[0]
    expected = (expected.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    seen: list[int] = []

    def watch(step: int, latents: torch.Tensor) -> torch.Tensor:
        seen.append(step)
        return latents

    latents = sampler.denoise(["a red circle"], sampler.noise(3), on_step=watch)
    assert torch.equal(sampler.decode(latents)[0], expected)
    assert seen == [0, 1, 2]


def test_sampler_refuses_what_the_pipeline_refuses(wan_folder: Path) -> None:
    pipeline = load_pipeline(wan_folder, CPU, torch.float32)
    sampler = Sampler(pipeline, {**CALL, "height": 70})
    with pytest.raises(UserError, match=r"the pipeline refuses: .*70"):
        sampler.denoise(["a"], sampler.noise(0))
    with pytest.raises(UserError, match="WanPipeline takes no 'colour'"):
        Sampler(pipeline, {"colour": "red"})


# -------------------------------------------------------------------------------------------------------------- latents


def test_region_is_where_latents_differ() -> None:
    torch.manual_seed(0)
    a = torch.randn(1, 16, 3, 12, 12)
    b = a + 0.01 * torch.randn_like(a)
    b[:, :, 1, 4:7, 5:8] += 2.0
    region = changed_region(a, b, grow=0)
    assert region.shape == (1, 1, 3, 12, 12)
    assert set(region.unique().tolist()) == {0.0, 1.0}
    assert region[0, 0, 1, 5, 6] == 1
    assert region[0, 0, 1].sum() == region.sum()  # nothing in the frames that did not change
    rows, columns = region[0, 0, 1].nonzero().unbind(1)
    # The smoothing reaches one cell around the 3x3 cells that changed, not further.
    assert rows.min() >= 3 and rows.max() <= 7 and columns.min() >= 4 and columns.max() <= 8
    moved = changed_region(a.transpose(1, 2), b.transpose(1, 2), frame_dim=1, grow=0)
    assert torch.equal(moved.transpose(1, 2), region)


def test_outside_counts_lost_bits() -> None:
    source = torch.zeros(1, 2, 1, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 1, 2, 2)
    edited = source.clone()
    edited[..., 0, 0] = 5
    assert outside_keeps_bits(source, edited, mask) == (6, 6)
    edited[0, 1, 0, 1, 1] = -0.0  # equal as a number, another bit
    assert outside_keeps_bits(source, edited, mask) == (6, 5)


def test_latent_path_keeps_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 16, 3, 8, 8, generator=generator)
    path = latent_path(a, b, 5)
    assert path.shape == (5, 16, 3, 8, 8)
    assert torch.equal(path[:1], a) and torch.equal(path[-1:], b)
    lengths = path.flatten(1).norm(dim=1)
    low, high = sorted([float(a.norm()), float(b.norm())])
    # Between Gaussian ends, whose angle is near 90 degrees, slerp's length can't leave theirs by more than the cosine.
    cosine = abs(float((a * b).sum() / (a.norm() * b.norm())))
    assert lengths.min() >= low * (1 - cosine) and lengths.max() <= high * (1 + cosine)
    assert float(latentfast.lerp(a, b, 0.5).norm()) < 0.8 * low  # what the path avoids


def passing_shape() -> tuple[torch.Tensor, torch.Tensor]:
    """A still background with a bright patch passing over it, and where the patch never comes: (clip, still rows)."""
    torch.manual_seed(0)
    clip = torch.randn(1, 16, 1, 16, 16).repeat(1, 1, 7, 1, 1)
    for t in range(7):
        clip[:, :, t, 6:9, 2 * t : 2 * t + 3] = 3.0
    untouched = torch.ones(16, dtype=torch.bool)
    untouched[6:9] = False
    return clip, untouched


def test_mend_calms_still_regions_and_spares_the_moving_one() -> None:
    clean, untouched = passing_shape()
    shaken = disturb(clean, seed=1, flicker=0.4, jitter=0.4)
    mended = mend(shaken, steps=40)
    before = (shaken - clean).square()
    after = (mended.latents - clean).square()
    # The mean of 7 frames has a seventh of the error's variance; the data term keeps it from going all the way.
    assert after[..., untouched, :].mean() < before[..., untouched, :].mean() / 4
    assert after.mean() < before.mean() / 2
    # The patch is still there and still moves: its middle is nearer to 3 than to the background, in every frame.
    for t in range(7):
        assert mended.latents[:, :, t, 7, 2 * t + 1].mean() > 2
    assert len(mended.losses) == 41
    assert mended.losses[-1] < mended.losses[0] / 10


def test_mend_of_one_frame_changes_nothing() -> None:
    clip = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mend(clip, steps=3).latents, clip)


def test_mend_takes_frames_in_dimension_one() -> None:
    clean, _ = passing_shape()
    shaken = disturb(clean, seed=1, flicker=0.4, jitter=0.4)
    swapped = mend(shaken.transpose(1, 2).contiguous(), steps=5, frame_dim=1)
    straight = mend(shaken, steps=5)
    # The sums run over the same values in another order; 5 steps from there.
    torch.testing.assert_close(swapped.latents.transpose(1, 2), straight.latents, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- report and record


def test_mask_picture_follows_the_latent_frames() -> None:
    clip = torch.full((25, 16, 16, 3), 200, dtype=torch.uint8)
    mask = torch.zeros(1, 7, 2, 2)
    mask[0, 1, 0, 0] = 1  # latent frame 1 holds the frames 1 to 4
    shown = report.show_mask(clip, mask, 2)
    kept = (shown[:, 0, 0, 0] == 200).nonzero().flatten().tolist()
    assert kept == [1, 2, 3, 4]
    assert int(shown[2, 0, 8, 0]) == 60  # outside: gray at 30%


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5 µs"), (12.34, "12.3 µs"), (4321.0, "4.32 ms"), (2.5e6, "2.5 s")]
)
def test_durations(value: float, text: str) -> None:
    assert report.duration(value) == text


def test_chart_runs_from_corner_to_corner() -> None:
    points = [tuple(map(float, point.split(","))) for point in report.Chart("", [100.0, 10.0, 1.0]).points.split()]
    assert points == [(0.0, 4.0), (280.0, 60.0), (560.0, 116.0)]


def test_checksum_is_of_the_values() -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert checksum(values.t().contiguous().t()) == checksum(values)  # another memory order, the same values
    assert checksum(values + 1) != checksum(values)
    assert checksum(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_active_backend_is_one_that_can_run() -> None:
    available = {backend.name for backend in latentfast.backends() if backend.available}
    assert active_backend(None, CPU) in available - {"cuda"}
    assert active_backend("eager", CPU) == "eager"


def test_timings_compare_equal_results() -> None:
    timings = time_operations((1, 4, 3, 6, 6), CPU, seconds=0.0)
    assert [timing.operation.split(",")[0] for timing in timings] == [
        "slerp",
        "slerp_path",
        "edit",
        "blend",
        "temporal_loss_and_grad",
    ]
    for timing in timings:
        assert timing.ours_us > 0 and timing.eager_us > 0
        # Sums of up to 432 values near 1 in another order; edit adds four products of that size.
        assert timing.difference < 1e-5
