"""`latentfast cache`: what it lists, shows, verifies and prunes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentfast.cache import Key, LatentCache

pytest.importorskip("typer")
pytest.importorskip("rich")

from latentfast.cli import main
from latentfast.cli.cache import parse_bytes
from latentfast.cli.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three entries; the first of them was used last."""
    with LatentCache(tmp_path / "cache") as cache:
        for i in range(3):
            cache.put(Key.of({"prompt": "a red circle", "seed": i}), {"latents": torch.ones(100 * i, 2)}, seconds=2.5)
        cache.flush()
        cache.get(Key.of({"prompt": "a red circle", "seed": 0}))
    return tmp_path / "cache"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["cache", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_ls_lists_in_the_order_in_which_entries_stay(folder: Path, capsys) -> None:
    status, out, _ = run(capsys, "ls", folder)
    seeds = [line for line in out.splitlines() if '"seed":' in line]
    assert status == 0 and "3 entries" in out
    assert [f'"seed":{i}' in line for i, line in zip((0, 2, 1), seeds, strict=True)] == [True] * 3
    status, out, _ = run(capsys, "ls", folder, "--json", "--policy", "cost")
    entries = [json.loads(line) for line in out.splitlines()]
    # the small ones cost as much and save as much
    assert status == 0 and [entry["description"]["seed"] for entry in entries] == [0, 1, 2]
    assert entries[0]["seconds"] == 2.5 and entries[0]["uses"] == 2


def test_show_prints_what_an_entry_was_made_from(folder: Path, capsys) -> None:
    digest = Key.of({"prompt": "a red circle", "seed": 2}).digest
    status, out, _ = run(capsys, "show", folder, digest[:10].upper())
    found = json.loads(out)
    assert status == 0 and found["digest"] == digest
    assert found["description"] == {"prompt": "a red circle", "seed": 2}
    assert found["tensors"] == {"latents": {"dtype": "float32", "shape": [200, 2]}}


def test_verify_ends_with_1_if_something_was_damaged(folder: Path, capsys) -> None:
    status, out, _ = run(capsys, "verify", folder)
    assert status == 0 and "3 entries are whole, 0 were not" in out
    path = max((folder / "entries").iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    status, out, _ = run(capsys, "verify", folder)
    assert status == 1 and f"{path.name}: its checksum is wrong" in out and "2 entries are whole, 1 were not" in out
    assert run(capsys, "verify", folder)[0] == 0


def test_prune_keeps_what_fits(folder: Path, capsys) -> None:
    status, out, _ = run(capsys, "prune", folder, "--to", "1kB")
    assert status == 0 and "2 entries went, 1 are left" in out
    assert [path.stem for path in (folder / "entries").iterdir()] == [
        Key.of({"prompt": "a red circle", "seed": 0}).digest
    ]


def test_refusals_name_the_argument(folder: Path, tmp_path: Path, capsys) -> None:
    for arguments, expected in [
        (["ls", tmp_path / "nowhere"], "FOLDER:"),
        (["verify", tmp_path], "is not the folder of a latent cache"),
        (["show", folder, "xyz"], "ENTRY: no entries begin with 'xyz'"),
        (["show", folder, ""], "ENTRY: 3 entries begin"),
        (["prune", folder], "--to"),
        (["prune", folder, "--to", "much"], "--to: expected bytes such as"),
        (["ls", folder, "--policy", "fifo"], "--policy: expected lru, cost, got 'fifo'"),
    ]:
        status, _, err = run(capsys, *arguments)
        assert status == 2 and expected in err.splitlines()[-1], arguments
    assert not (tmp_path / "nowhere").exists()


def test_bytes_are_read_as_people_write_them() -> None:
    texts = {"0": 0, "1.5 GiB": 3 << 29, "500MB": 500_000_000, "7kb": 7000, "12": 12, "2B": 2}
    assert {text: parse_bytes("--to", text) for text in texts} == texts
    for text in ("", "-1", "1XB", "1e3", "GB"):
        with pytest.raises(UserError, match="--to"):
            parse_bytes("--to", text)
