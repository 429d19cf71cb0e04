"""`latentfast demo` end to end on a random pipeline: what it makes, that it repeats, that it never half-writes."""

import errno
import functools
import hashlib
import json
import re
from pathlib import Path

import av
import pytest
import torch
from cli_helpers import SIZE, tree
from safetensors.torch import load_file

from latentfast.cli import demo, main, timing
from latentfast.session.record import checksum

pytest_plugins = ("cli_fixtures",)

CLIPS = ("clip", "path", "edit", "mend")


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is tested here does not depend on how long the operations are timed, nor on how large.
    monkeypatch.setattr(demo, "time_operations", functools.partial(timing.time_operations, seconds=0.01))
    monkeypatch.setattr(demo, "WAN_480P", (1, 16, 2, 6, 10))


def run(model: Path, out: Path, *options: str) -> int:
    return main(["demo", "--model", str(model), *SIZE, "--out", str(out), *options])


def test_demo(wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert run(wan_folder, out, "--seed", "5") == 0
    said = capsys.readouterr()
    assert str(out / "report.html") in said.out
    kept = [f"{clip}{suffix}" for clip in CLIPS for suffix in (".mp4", ".safetensors")]
    files = sorted([*kept, "report.html", "run.json"])
    assert sorted(tree(out)) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]

    record = json.loads((out / "run.json").read_text())
    check_record(record, out)
    check_edit(record, out)
    check_mend(record)
    check_report((out / "report.html").read_text(encoding="utf-8"), record)

    # Once more in the same place: the folder is replaced, the checksums stay, the times may not.
    (out / "stale.txt").write_text("left by hand")
    assert run(wan_folder, out, "--seed", "5") == 0
    assert sorted(tree(out)) == files
    again = json.loads((out / "run.json").read_text())
    assert again["checksums"] == record["checksums"]
    assert again["results"] == record["results"]

    assert run(wan_folder, tmp_path / "other", "--seed", "6") == 0
    other = json.loads((tmp_path / "other" / "run.json").read_text())
    for kind in ("latents", "frames", "files"):
        assert not set(other["checksums"][kind].values()) & set(record["checksums"][kind].values())


def check_record(record: dict, out: Path) -> None:
    assert record["arguments"]["seed"] == 5 and record["seeds"]["clip"] == 5
    assert record["versions"]["torch"] == torch.__version__
    assert record["backend"] in {"native-cpu", "eager"}
    assert len(record["checksums"]["files"]) == 8
    for name, value in record["checksums"]["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == value
    for clip in CLIPS:
        assert checksum(load_file(out / f"{clip}.safetensors")["latents"]) == record["checksums"]["latents"][clip]
        with av.open(str(out / f"{clip}.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
    assert {row["operation"].split(",")[0] for row in record["times"]["operations"]} == {
        "slerp", "slerp_path", "edit", "blend", "temporal_loss_and_grad",
    }  # fmt: skip
    work = record["times"]["by_work_s"]
    assert set(work) == {"denoising", "decoding", "latentfast", "writing", "timing"}
    assert 0 < sum(work.values()) <= record["times"]["total_s"]


def check_edit(record: dict, out: Path) -> None:
    source, edited = load_file(out / "edit.safetensors")["latents"].chunk(2)
    equal = int((source == edited).sum())
    result = record["results"]["edit"]
    assert result["values_outside_mask"] == result["values_with_source_bits"] > 0
    assert result["values_outside_mask"] <= equal < source.numel()


def check_mend(record: dict) -> None:
    losses = record["results"]["mend"]["losses"]
    assert len(losses) == demo.MEND_STEPS + 1
    assert losses[-1] < losses[0] / 2


def check_report(page: str, record: dict) -> None:
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) > 20
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert "http://" not in page and "https://" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page and "prefers-reduced-motion: reduce" in page
    for value in record["checksums"]["files"].values():
        assert value in page
    assert page.count('class="ratio') == len(record["times"]["operations"])


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failing_demo_leaves_what_was_there(
    earlier: bool, wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    if earlier:
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"tool": "latentfast demo"}))
    before = tree(tmp_path)
    write = Path.write_text

    def full(path: Path, *arguments: object, **options: object) -> int:
        if path.name == "report.html":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    assert run(wan_folder, out) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"latentfast: error: cannot write {out}: No space left on device; nothing was left behind"
    assert tree(tmp_path) == before


def test_demo_refuses_a_place_that_is_taken(
    wan_folder: Path, ltx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "holiday.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"")
    before = tree(tmp_path)
    cases = [
        (wan_folder, mine, "holds other files than a demo's"),
        (wan_folder, tmp_path / "file", "exists and is not a folder"),
        (wan_folder, tmp_path / "file" / "out", "Not a directory"),
        (ltx_folder, tmp_path / "out", "LTXPipeline packs its latents"),
    ]
    for model, out, expected in cases:
        assert run(model, out) == 2
        captured = capsys.readouterr()
        assert expected in captured.err.splitlines()[-1]
        assert tree(tmp_path) == before
