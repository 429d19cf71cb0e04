"""`latentfast recipe`: what it shows, checks and compares, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from latentfast.cache import LatentCache
from latentfast.cli import main
from latentfast.recipe import AttentionMask, Directions, LerpTowards, Recipe, ToneMap, keep, registered

A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    capsys.readouterr()
    status = main(["recipe", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.json"
    mask = AttentionMask(B, quantile=0.9)
    Recipe([LerpTowards(A, 0.25), Directions(A, (0.1, -0.5), mask=mask), ToneMap(0.5)]).save(path)
    return path


def test_show_names_steps_and_tensors(file: Path, capsys) -> None:
    status, out, _ = run(capsys, "show", file)
    lines = out.splitlines()
    assert status == 0
    assert lines[1].split() == ["1", "lerp_towards", "target=sha256:aaaaaaaa…", "t=0.25"]
    assert "strengths=[0.1, -0.5]" in lines[2] and "mask={heat=sha256:bbbbbbbb… group=0 quantile=0.9" in lines[2]
    assert lines[4] == f"digest {Recipe.load(file).digest}, tensors: 2" and lines[5:] == [f"  {A}", f"  {B}"]


def test_check_names_what_is_wrong(file: Path, tmp_path: Path, capsys) -> None:
    assert run(capsys, "check", file)[:2] == (0, f"{file}: 3 edits, digest {Recipe.load(file).digest[:16]}…\n")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(file.read_text().replace('"compression": 0.5', '"compression": 5'))
    status, out, _ = run(capsys, "check", wrong, file, tmp_path / "none.json")
    lines = out.splitlines()
    assert status == 1 and len(lines) == 3
    assert lines[0] == f"{wrong}: recipe step 3 (tone_map): compression must be a number in [0, 1], got 5.0"
    assert lines[1].startswith(f"{file}: 3 edits") and "none.json" in lines[2]


def test_check_looks_into_a_cache(tmp_path: Path, capsys) -> None:
    file, folder = tmp_path / "a.json", tmp_path / "cache"
    with LatentCache(folder) as cache:
        reference = keep(cache, torch.randn(3))
    Recipe([LerpTowards(reference, 0.5)]).save(file)
    assert run(capsys, "check", file, "--cache", folder)[0] == 0
    Recipe([LerpTowards(reference, 0.5), LerpTowards(A, 0.5)]).save(file)
    status, out, _ = run(capsys, "check", file, "--cache", folder)
    assert status == 1 and out == f"{file}: not in {folder}: {A}\n"
    status, _, err = run(capsys, "check", file, "--cache", tmp_path / "none")
    assert status == 2 and "--cache: there is no folder" in err


def test_diff(file: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "b.json"
    Recipe.load(file).replace(2, ToneMap(0.75)).save(other)
    assert run(capsys, "diff", file, file) == (0, "", "")
    status, out, _ = run(capsys, "diff", file, other)
    assert status == 1 and out.splitlines()[:2] == [f"--- {file}", f"+++ {other}"]
    assert '-      "compression": 0.5\n+      "compression": 0.75\n' in out


def test_the_schema_with_edits_of_ones_own(file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cli_recipe_edits.py").write_text(
        "from dataclasses import dataclass\n"
        "from latentfast.recipe import Edit, register\n"
        "@register('test/from_a_module')\n"
        "@dataclass(frozen=True)\n"
        "class FromAModule(Edit):\n"
        "    amount: float = 1.0\n"
    )
    file.write_text('{"format": "latentfast.recipe", "version": 1, "edits": [{"edit": "test/from_a_module"}]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    status, _, err = run(capsys, "show", file)
    assert status == 2 and "recipe step 1: edit must be one of adain" in err and "Traceback" not in err
    status, out, _ = run(capsys, "show", file, "--import", "cli_recipe_edits")
    assert status == 0 and "amount=1.0" in out
    status, out, _ = run(capsys, "schema")
    assert status == 0 and set(json.loads(out)["$defs"]) == set(registered())
    status, _, err = run(capsys, "show", file, "--import", "no_such_module")
    assert status == 2 and "--import: there is no module 'no_such_module'" in err


def test_bench_recipe(tmp_path: Path, capsys) -> None:
    pytest.importorskip("rich")
    capsys.readouterr()
    out = tmp_path / "recipe.json"
    assert main(["bench", "recipe", "--device", "cpu", "--quick", "--out", str(out)]) == 0
    assert "recipe and cache, last slider moved" in capsys.readouterr().out
    for stack in json.loads(out.read_text())["stacks"]:
        alone, *others = stack["ways"]
        assert stack["same_bits"] and alone["times_one_edit"] == [1.0, 1.0]
        for way in others:
            waited = way["waited_us"][1] / alone["waited_us"][1]
            assert way["times_one_edit"] == pytest.approx([waited, way["in_row_us"][1] / alone["in_row_us"][1]])
