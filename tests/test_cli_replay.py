"""`latentfast replay`, and what `generate --cache` does not make again."""

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import SIZE

from latentfast.cli import main
from latentfast.cli.loading import load_pipeline
from latentfast.session import Session

pytest_plugins = ("cli_fixtures",)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command line in this process."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


COMMANDS = {
    "generate": ["generate", "a red circle", "--seed", 3],
    "interpolate": ["interpolate", "a red circle", "a blue circle", "--count", 2, "--space", "latent"],
    "edit": ["edit", "a red circle", "a blue circle", "--mask", "0,0,32,64", "--strength", 0.7, "--compare"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_clip_is_made_again(name: str, wan_folder: Path, tmp_path: Path, capsys) -> None:
    status, _, err = run(capsys, *COMMANDS[name], "--model", wan_folder, *SIZE, "--out", tmp_path / "clip.mp4")
    assert status == 0, err
    file = tmp_path / "clip.run.json"
    record = json.loads(file.read_text())
    assert record["tool"] == f"latentfast {name}" and set(record["checksums"]) == {"latents", "frames", "files"}
    status, out, err = run(capsys, "replay", file)
    assert status == 0, err
    assert f"latentfast {name}: the same bits" in out

    record["checksums"]["frames"] = "0"
    record["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(record))
    status, out, _ = run(capsys, "replay", file)
    assert status == 1
    assert f"latentfast {name}: other bits" in out
    assert f"versions.torch: 1.0 then, {torch.__version__.split('+')[0]}" in out and "frames: 0 then" in out


def test_a_trajectory_is_made_again(wan_folder: Path, tmp_path: Path, capsys) -> None:
    pipe = load_pipeline(wan_folder, torch.device("cpu"), torch.float32)
    session = Session(pipe)
    small = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3}
    first = session.generate("a red circle", seed=3, **small)
    session.save(session.resume(first, 1, prompt="a blue circle"), tmp_path / "run")
    for where in (tmp_path / "run", tmp_path / "run" / "run.json"):
        status, out, err = run(capsys, "replay", where)
        assert status == 0, err
        assert out == "latentfast session: the same bits\n"
    other = load_pipeline(wan_folder, torch.device("cpu"), torch.float32)
    other.transformer.proj_out.bias.data.add_(1)
    other.save_pretrained(tmp_path / "other")
    status, out, _ = run(capsys, "replay", tmp_path / "run", "--model", tmp_path / "other")
    assert status == 1
    assert "other bits" in out and "pipeline.components.transformer.weights" in out


def test_what_was_interrupted_goes_on(wan_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    common = ["generate", "a red circle", "--model", wan_folder, *SIZE, "--seed", 3]
    status, _, err = run(capsys, *common, "--out", tmp_path / "whole.mp4")
    assert status == 0, err
    cached = [*common, "--cache", tmp_path / "cache", "--out", tmp_path / "clip.mp4"]
    with monkeypatch.context() as patch:
        from latentfast.cli.progress import Bar

        advanced: list[int] = []

        def stop(self: Bar, units: int = 1) -> None:
            advanced.append(units)
            if len(advanced) == 2:
                raise KeyboardInterrupt

        patch.setattr(Bar, "advance", stop)
        status, _, err = run(capsys, *cached)
        assert status == 130 and not (tmp_path / "clip.mp4").exists()
    for line in ("1 of 3 steps were run", "0 of 3 steps were run"):
        status, out, err = run(capsys, *cached)
        assert status == 0, err
        assert line in out
        assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_refusals(tmp_path: Path, capsys) -> None:
    (tmp_path / "text").write_text("no json")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "other").write_text('{"tool": "x", "arguments": {}}')
    for name, message in {
        "nothing": "No such file",
        "text": "is no JSON",
        "list": "is no record of latentfast",
        "other": "it was made by 'x'",
    }.items():
        status, out, err = run(capsys, "replay", tmp_path / name)
        assert status == 2 and out == ""
        assert err.splitlines()[-1].startswith("latentfast: error: RUN: ") and message in err
