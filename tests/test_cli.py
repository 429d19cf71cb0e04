"""The commands as a user meets them: what they make, what they say, and what they leave behind when they fail."""

import errno
import json
import resource
import signal
import sys
from pathlib import Path

import av
import pytest
import torch
from cli_helpers import SIZE, spawn, tree
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from latentfast.cli import main

pytest_plugins = ("cli_fixtures",)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command line in this process."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def made(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refusal prints."""
    status, out, err = run(capsys, *arguments)
    assert status in (1, 2)
    assert out == ""
    lines = err.splitlines()
    assert lines[-1].startswith("latentfast: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


# ------------------------------------------------------------------------------------------------------ what is made


@pytest.mark.parametrize("kind", ["wan_folder", "ltx_folder"])
def test_generate(kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys) -> None:
    model = request.getfixturevalue(kind)
    first, again, other = tmp_path / "a" / "clip.mp4", tmp_path / "again.mp4", tmp_path / "other.mp4"
    out = made(capsys, "generate", "a red circle", "--model", model, *SIZE, "--out", first, "--seed", 3)
    assert str(first) in out and "9 frames of 64x64" in out
    assert frames_of(first).shape == (9, 64, 64, 3)
    made(capsys, "generate", "a red circle", "--model", model, *SIZE, "--out", again, "--seed", 3)
    made(capsys, "generate", "a red circle", "--model", model, *SIZE, "--out", other, "--seed", 4)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    files = ["a/clip.mp4", "a/clip.run.json", "again.mp4", "again.run.json", "other.mp4", "other.run.json"]
    assert sorted(tree(tmp_path)) == ["a", *files]


def test_generate_keeps_the_latents(wan_folder: Path, tmp_path: Path, capsys) -> None:
    latents = tmp_path / "z.safetensors"
    arguments = ["--model", wan_folder, *SIZE, "--out", tmp_path / "clip.mp4", "--save-latents", latents]
    made(capsys, "generate", "a red circle", *arguments, "--seed", 7)
    assert load_file(latents)["latents"].shape == (1, 16, 3, 8, 8)
    with safe_open(latents, "pt") as file:
        note = json.loads(file.metadata()["latentfast"])
    assert (note["prompt"], note["seed"], note["call"]["num_inference_steps"]) == ("a red circle", 7, 3)


def test_interpolate_ends_are_the_clips_of_its_seeds(wan_folder: Path, tmp_path: Path, capsys) -> None:
    common = ["--model", wan_folder, *SIZE]
    ends = []
    for seed in (5, 9):
        kept = tmp_path / f"{seed}.safetensors"
        made(
            capsys,
            "generate",
            "a red circle",
            *common,
            "--seed",
            seed,
            "--out",
            tmp_path / "e.mp4",
            "--save-latents",
            kept,
        )
        ends.append(load_file(kept)["latents"])
    for space in ("noise", "latent"):
        kept, clip = tmp_path / f"{space}.safetensors", tmp_path / f"{space}.mp4"
        options = ["--seeds", 5, 9, "--count", 3, "--space", space, "--out", clip, "--save-latents", kept]
        made(capsys, "interpolate", "a red circle", *common, *options)
        path = load_file(kept)["latents"]
        assert path.shape == (3, 16, 3, 8, 8)
        assert torch.equal(path[:1], ends[0]) and torch.equal(path[2:], ends[1])
        assert not torch.equal(path[1:2], ends[0]) and not torch.equal(path[1:2], ends[1])
        assert frames_of(clip).shape == (9, 64, 3 * 64 + 2 * 4, 3)


def test_interpolate_mixes_prompts(wan_folder: Path, ltx_folder: Path, tmp_path: Path, capsys) -> None:
    kept = tmp_path / "path.safetensors"
    prompts = ["a red circle moving left", "blue square"]
    options = ["--seeds", 2, 2, "--count", 4, "--columns", 2, "--out", tmp_path / "path.mp4"]
    made(capsys, "interpolate", *prompts, "--model", wan_folder, *SIZE, *options, "--save-latents", kept)
    path = load_file(kept)["latents"].flatten(1)
    assert len(path.unique(dim=0)) == 4
    assert frames_of(tmp_path / "path.mp4").shape == (9, 132, 132, 3)
    line = refused(capsys, "interpolate", *prompts, "--model", ltx_folder, *SIZE, *options)
    assert "use --space latent" in line
    made(capsys, "interpolate", *prompts, "--model", ltx_folder, *SIZE, *options, "--space", "latent")


def test_edit_in_a_box(wan_folder: Path, tmp_path: Path, capsys) -> None:
    kept, clip = tmp_path / "edit.safetensors", tmp_path / "edit.mp4"
    options = ["--mask", "8,16,32,40", "--out", clip, "--save-latents", kept, "--compare"]
    out = made(capsys, "edit", "a red circle", "a blue square", "--model", wan_folder, *SIZE, *options)
    saved = load_file(kept)
    expected = torch.zeros(1, 1, 1, 8, 8)
    expected[..., 2:5, 1:4] = 1  # pixels 16 to 40 down and 8 to 32 across, in cells of 8
    assert torch.equal(saved["mask"], expected)
    inside = expected.bool().expand_as(saved["source"])
    assert torch.equal(saved["edited"][~inside], saved["source"][~inside])
    assert (saved["edited"][inside] != saved["source"][inside]).float().mean() > 0.9
    assert f"{int((~inside).sum())} of {int((~inside).sum())} values" in out
    assert frames_of(clip).shape == (9, 64, 132, 3)


def test_edit_in_a_region_found_or_painted(wan_folder: Path, tmp_path: Path, capsys) -> None:
    common = ["edit", "a red circle", "a blue square", "--model", wan_folder, *SIZE, "--out", tmp_path / "edit.mp4"]
    kept = tmp_path / "edit.safetensors"
    for mask in ((), ("--words", "circle", "--keep", "red"), ("--mask", "difference")):
        made(capsys, *common, *mask, "--save-latents", kept)
        saved = load_file(kept)
        assert saved["mask"].shape == (1, 1, 3, 8, 8)
        outside = (saved["mask"] == 0).expand_as(saved["source"])
        assert 0 < outside.float().mean() < 1
        assert torch.equal(saved["edited"][outside], saved["source"][outside])
        assert not torch.equal(saved["edited"][~outside], saved["source"][~outside])

    picture = Image.new("L", (64, 64))
    picture.paste(255, (0, 0, 16, 8))
    picture.save(tmp_path / "mask.png")
    made(capsys, *common, "--mask", tmp_path / "mask.png", "--save-latents", kept)
    assert load_file(kept)["mask"].nonzero()[:, 3:].tolist() == [[0, 0], [0, 1]]


def test_a_weaker_edit_stays_nearer(wan_folder: Path, tmp_path: Path, capsys) -> None:
    kept = tmp_path / "edit.safetensors"
    distances = []
    for strength in (0.2, 1.0):
        options = ["--mask", "0,0,64,64", "--strength", strength, "--out", tmp_path / "e.mp4", "--save-latents", kept]
        made(capsys, "edit", "a red circle", "a blue square", "--model", wan_folder, *SIZE, *options)
        saved = load_file(kept)
        distances.append(float((saved["edited"] - saved["source"]).norm()))
    assert 0 < distances[0] < distances[1]


def test_a_rounded_frame_count_is_said(wan_folder: Path, tmp_path: Path, capsys) -> None:
    size = ["--height", 64, "--width", 64, "--frames", 8, "--steps", 1]
    out = made(capsys, "generate", "a", "--model", wan_folder, *size, "--out", tmp_path / "clip.mp4")
    assert "5 frames of the 8 asked for" in out


def test_the_backend_is_forced(wan_folder: Path, tmp_path: Path, capsys) -> None:
    kept = tmp_path / "eager.safetensors"
    options = ["--space", "latent", "--out", tmp_path / "path.mp4", "--save-latents", kept, "--backend", "eager"]
    made(capsys, "interpolate", "a red circle", "--model", wan_folder, *SIZE, *options)
    with safe_open(kept, "pt") as file:
        assert json.loads(file.metadata()["latentfast"])["backend"] == "eager"


# ------------------------------------------------------------------------------------------------------ what is refused


def test_refusals_before_any_work(wan_folder: Path, tmp_path: Path, capsys) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}')
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "model_index.json").write_text("[]")
    (tmp_path / "words.txt").write_text("not a picture")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    clip = tmp_path / "clip.mp4"
    generate = ["generate", "a", "--model", wan_folder, *SIZE, "--out", clip]
    interpolate = ["interpolate", "a", "--model", wan_folder, *SIZE, "--out", clip]
    edit = ["edit", "a", "b", "--model", wan_folder, *SIZE, "--out", clip]
    cases = [
        (["nonsense"], "nonsense"),
        (["generate"], "PROMPT"),
        ([*generate, "--colour", "red"], "--colour"),
        ([*generate, "--steps", "0"], "--steps"),
        ([*generate, "--steps", "many"], "--steps"),
        ([*generate, "--seed", "-1"], "--seed"),
        (["generate", "  ", "--out", clip], "PROMPT: the prompt is empty"),
        (["generate", "a", "--out", clip, "--model", tmp_path / "none"], "--model: no such folder"),
        (["generate", "a", "--out", clip, "--model", empty], "holds no model_index.json"),
        (["generate", "a", "--out", clip, "--model", nameless], "names no pipeline class"),
        (["generate", "a", "--out", clip, "--model", broken], f"--model: cannot load {broken} as WanPipeline"),
        ([*generate, "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ([*generate, "--device", "cuda:99"], "--device: 'cuda:99'"),
        ([*generate, "--dtype", "int8"], "--dtype: expected auto, float32"),
        ([*generate, "--backend", "abacus"], "--backend: expected native-cpu, cuda, triton, eager, got 'abacus'"),
        ([*generate, "--height", "70"], "divisible by 16"),
        ([*generate, "--save-latents", clip], "--save-latents"),
        ([*generate, "--out", tmp_path], "is not a regular file"),
        ([*generate, "--out", "/dev/null"], "/dev/null exists and is not a regular file"),
        ([*generate, "--out", tmp_path / "words.txt" / "clip.mp4"], "Not a directory"),
        ([*interpolate, "--count", "1"], "--count"),
        ([*interpolate, "--space", "outer"], "--space: expected noise or latent, got 'outer'"),
        ([*interpolate, "--seeds", "4", "4"], "same prompt and seed"),
        (["interpolate", "a", "", "--out", clip], "PROMPT_B: the prompt is empty"),
        (["edit", "a", "a", "--out", clip], "EDIT_PROMPT equals PROMPT"),
        ([*edit, "--mask", "somewhere"], "--mask: expected auto, difference, a box"),
        ([*edit, "--mask", "1,2,3,x"], "four whole numbers"),
        ([*edit, "--mask", "9,0,4,4"], "0 <= x0 < x1"),
        ([*edit, "--mask", "0,0,65,64"], "leaves the picture of 64x64"),
        ([*edit, "--mask", tmp_path / "words.txt"], "not a readable picture"),
        ([*edit, "--mask", tmp_path / "black.png"], "no white pixel"),
        ([*edit, "--words", "green"], "words must be in the prompt: 'green' is not among its words: a"),
        ([*edit, "--words", "a", "--mask", "difference"], "--words and --keep: they say where"),
        ([*edit, "--keep", "green"], "'green' is not among its words"),
        ([*edit, "--strength", "0"], "--strength"),
        ([*edit, "--strength", "nan"], "--strength"),
    ]
    before = tree(tmp_path)
    for arguments, expected in cases:
        assert expected in refused(capsys, *arguments), arguments
        assert tree(tmp_path) == before, arguments


def test_a_folder_of_another_kind_of_pipeline(tmp_path: Path, capsys) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    line = refused(capsys, "generate", "a", "--model", tmp_path / "ddpm", "--out", tmp_path / "clip.mp4")
    assert "DDPMPipeline" in line and "is not a latent text-to-video pipeline" in line


def test_packed_latents_have_no_regions(ltx_folder: Path, tmp_path: Path, capsys) -> None:
    line = refused(capsys, "edit", "a", "b", "--model", ltx_folder, *SIZE, "--out", tmp_path / "clip.mp4")
    assert "LTXPipeline packs its latents" in line
    assert tree(tmp_path) == {}


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such folder"):
        main(["--debug", "generate", "a", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "clip.mp4")])


def test_a_bug_keeps_its_traceback(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr("latentfast.cli.clips.encode_mp4", broken)
    with pytest.raises(ZeroDivisionError, match="bug"):
        main(["generate", "a", "--model", str(wan_folder), *SIZE, "--out", str(tmp_path / "clip.mp4")])
    assert tree(tmp_path) == {}


# --------------------------------------------------------------------------------------------- what fails on the way


def test_a_disk_that_fills_up(wan_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, latents = tmp_path / "clip.mp4", tmp_path / "z.safetensors"
    clip.write_bytes(b"an earlier clip")
    before = tree(tmp_path)
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".safetensors":
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    options = ["--model", wan_folder, *SIZE, "--out", clip, "--save-latents", latents]
    line = refused(capsys, "generate", "a", *options)
    assert "No space left on device" in line and str(clip) in line
    assert tree(tmp_path) == before


def test_a_write_cut_short_by_the_system(wan_folder: Path, tmp_path: Path, capsys) -> None:
    # A real failing write, not a mocked one: the system allows this process files of 4 KiB, the latents need 12.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = ["--out", tmp_path / "clip.mp4", "--save-latents", tmp_path / "z.safetensors"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        line = refused(capsys, "generate", "a", "--model", wan_folder, *SIZE, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write " in line and "File too large" in line
    assert tree(tmp_path) == {}


def test_ctrl_c_leaves_nothing(wan_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentfast.cli.progress.Bar.advance", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        status, out, err = run(capsys, "generate", "a", "--model", wan_folder, *SIZE, "--out", tmp_path / "clip.mp4")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "latentfast: interrupted; nothing was left behind"
    assert tree(tmp_path) == {}


def test_sigterm_leaves_nothing(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentfast.cli.progress.Bar.advance", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        main(["generate", "a", "--model", str(wan_folder), *SIZE, "--out", str(tmp_path / "clip.mp4")])
    assert left.value.code == 143
    assert tree(tmp_path) == {}
    assert signal.getsignal(signal.SIGTERM) is before


# --------------------------------------------------------------------------------------------------- the surroundings


EXTRAS = [
    ("typer", "typer"),
    ("av", "av"),
    ("PIL", "pillow"),
    ("diffusers", "diffusers"),
    ("safetensors.torch", "safetensors"),
]


@pytest.mark.parametrize(("module", "package"), EXTRAS)
def test_a_missing_extra_is_one_line(
    module: str, package: str, wan_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    monkeypatch.delitem(sys.modules, "latentfast.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    options = [
        "--mask",
        tmp_path / "mask.png",
        "--out",
        tmp_path / "c.mp4",
        "--save-latents",
        tmp_path / "z.safetensors",
    ]
    line = refused(capsys, "edit", "a", "b", "--model", wan_folder, *SIZE, *options)
    assert line == f"latentfast: error: the package {package} is not installed: pip install 'latentfast[cli]'"
    assert sorted(tree(tmp_path)) == ["mask.png"]


def test_help_and_doctor(capsys) -> None:
    for arguments in ([], ["--help"]):
        out = made(capsys, *arguments)
        assert all(command in out for command in ("demo", "generate", "interpolate", "edit", "doctor", "bench"))
    for command, option in (("demo", "--out"), ("generate", "--seed"), ("interpolate", "--space"), ("edit", "--mask")):
        assert option in made(capsys, command, "--help")
    assert "native-cpu" in made(capsys, "doctor")
    assert "compare" in made(capsys, "bench", "--help") and "--model" in made(capsys, "bench", "run", "--help")


def test_the_entry_point_imports_no_extra() -> None:
    code = (
        "import sys; import latentfast.cli; "
        "print([m for m in ('typer', 'rich', 'diffusers', 'transformers', 'av') if m in sys.modules])"
    )
    out, _ = spawn(code=code).communicate(timeout=120)
    assert out.strip() == "[]"


def test_nothing_is_fetched_and_nothing_is_noisy(wan_folder: Path, tmp_path: Path) -> None:
    # Any socket, and any warning that reaches the terminal, would show.
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from latentfast.cli import main; sys.exit(main())"
    )
    clip = tmp_path / "clip.mp4"
    process = spawn("generate", "a red circle", "--model", str(wan_folder), *SIZE, "--out", str(clip), code=code)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    ours = [
        line for line in err.splitlines() if "runs on backend" not in line
    ]  # the library's own notice of a fallback
    assert ours == ["denoising", "writing"]
