"""`latentfast bench`: what it lists, measures, compares and draws, and what it refuses. No test looks at a speed."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from latentfast.benchmarks import rows
from latentfast.cli import main

TINY = ["--device", "cpu", "--quick", "--no-compile", "--only"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `latentfast bench` in this process."""
    capsys.readouterr()
    status = main(["bench", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, _, err = run(capsys, *arguments)
    assert status in (1, 2) and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a smoke run of one case."""
    out = tmp_path_factory.mktemp("rows")
    threads = torch.get_num_threads()
    assert main(["bench", "run", *TINY, "slerp-tiny_b1", "--out", str(out), "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    return out / "cpu-quick.jsonl"


def test_run_writes_rows_and_says_what_it_saw(tmp_path: Path, capsys) -> None:
    status, out, _ = run(capsys, "run", "--stem", "edit", *TINY, "blend", "--out", tmp_path / "new")
    found = rows.load(tmp_path / "new" / "cpu-quick.jsonl")
    assert status == 0 and {row.op for row in found} == {"blend"} and all(row.quick for row in found)
    assert "TB/s" in out and "blend" in out and f"{len(found)} rows in" in out
    status, *_ = run(capsys, "run", *TINY, "lerp-tiny_b1", "--out", tmp_path / "half", "--dtype", "float16")
    assert status == 0 and {row.dtype for row in rows.load(tmp_path / "half" / "cpu-quick.jsonl")} == {"float16"}


def test_a_run_leaves_the_rows_of_other_cases(tmp_path: Path, capsys) -> None:
    for only in ("blend-tiny_b1", "slerp-tiny_b1"):
        status, out, _ = run(capsys, "run", *TINY, only, "--out", tmp_path)
        assert status == 0
    assert "older ones" in out
    before = rows.load(tmp_path / "cpu-quick.jsonl")
    assert {row.op for row in before} == {"blend", "slerp"}
    status, out, _ = run(capsys, "run", *TINY, "blend-tiny_b1", "--out", tmp_path)
    after = rows.load(tmp_path / "cpu-quick.jsonl")
    assert [row.key for row in after] == [row.key for row in before]  # each in its place
    for old, new in zip(before, after, strict=True):
        assert (old == new) == (old.op == "slerp")


def test_a_file_that_holds_no_rows_is_not_overwritten(tmp_path: Path, capsys) -> None:
    file = tmp_path / "cpu-quick.jsonl"
    file.write_text("{}\n")
    status, _, err = run(capsys, "run", *TINY, "blend-tiny_b1", "--out", tmp_path)
    assert status != 0 and str(file) in err and "row" in err
    assert file.read_text() == "{}\n"


def test_a_case_that_was_not_measured_is_told_of(tmp_path: Path, capsys) -> None:
    arguments = ["run", *TINY, "tiny_b1", "--stem", "edit", "--out", tmp_path, "--seconds-limit", "0.001"]
    status, out, _ = run(capsys, *arguments)
    assert status == 1 and "not measured, 0.001 s were over" in out


def test_a_wrong_result_ends_with_an_error(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentfast.benchmarks import bench_edit

    wrong = dataclasses.replace(bench_edit.BLEND, ours=lambda base, edited, mask: base * 1.5)
    monkeypatch.setattr(bench_edit, "CASES", [dataclasses.replace(bench_edit.CASES[0], operation=wrong)])
    status, out, _ = run(capsys, "run", "--stem", "edit", *TINY, "", "--out", tmp_path)
    assert status == 1 and "wrong result" in out


def test_list_names_cases_models_and_peers(capsys) -> None:
    status, out, _ = run(capsys, "list", "--device", "cuda")
    assert status == 0 and "slerp-wan720_b64-bfloat16" in out and "edit[N=4]-wan720_b32-bfloat16" in out
    model = ["--model", "ltx_480p", "--batch", 2, "--dtype", "float16"]
    status, out, _ = run(capsys, "list", "--device", "cpu", "--stem", "edit", *model)
    assert status == 0 and "blend-ltx_480p_b2-float16" in out and "2x128x16x15x22" in out and "slerp" not in out


def test_refusals_name_the_option(capsys, tmp_path: Path) -> None:
    for arguments, expected in [
        (["run", "--stem", "nothing"], "--stem: expected one of"),
        (["run", "--model", "wan99"], "--model: expected one of wan21_1_3b_480p"),
        (["run", "--dtype", "int8"], "--dtype: expected one of auto, float32"),
        (["run", "--device", "tpu"], "--device: expected auto, cpu, cuda, got 'tpu'"),
        ([], "Missing command"),
        (["list", "--only", "no such case"], "no case is left"),
        (["plot", "--results", tmp_path], f"no rows in {tmp_path}"),
        (["compare", tmp_path / "a", tmp_path / "b"], f"cannot read {tmp_path / 'a'}"),
        (["table", "--page", tmp_path / "none.md"], "--page:"),
    ]:
        assert expected in refused(capsys, *arguments), arguments
    words = tmp_path / "words.jsonl"
    for text in ("not a row", "[]", '{"op": "slerp"}'):
        words.write_text(text)
        assert f"{words} is not a file of rows" in refused(capsys, "compare", words, words)
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in refused(capsys, "run", "--device", "cuda")


@pytest.mark.parametrize(("factor", "options", "status"), [(1.0, [], 0), (3.0, [], 1), (3.0, ["--slower-than", 4], 0)])
def test_compare_ends_by_what_got_slower(factor, options, status, measured: Path, tmp_path: Path, capsys) -> None:
    (row,) = rows.load(measured)
    files = []
    for name, p50 in (("a", 100.0), ("b", 100.0 * factor)):
        files.append(tmp_path / f"{name}.jsonl")
        rows.save([dataclasses.replace(row, device_us=[0.99 * p50, p50, 1.01 * p50], host_us=None)], files[-1])
    found, out, _ = run(capsys, "compare", *files, *options)
    assert found == status
    assert ("slower" in out.splitlines()[1]) is (status == 1)
    assert f"{factor:.2f}" in out and "1 times of 1 rows" in out


def test_compare_names_rows_of_one_file_only(measured: Path, tmp_path: Path, capsys) -> None:
    (row,) = rows.load(measured)
    rows.save([row, dataclasses.replace(row, op="gone")], tmp_path / "a.jsonl")
    status, out, _ = run(capsys, "compare", tmp_path / "a.jsonl", measured)
    assert status == 0 and "only in the first file: gone" in out
    other = tmp_path / "other.jsonl"
    rows.save([dataclasses.replace(row, op="another")], other)
    assert "no case and backend in common" in refused(capsys, "compare", measured, other)


def test_plot_writes_both_pictures(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    status, out, _ = run(capsys, "plot", "--out", tmp_path / "pictures")  # of the rows that come with latentfast
    assert status == 0 and "speedups.png" in out
    for name in ("roofline.png", "speedups.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_one_line(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(capsys, "plot", "--out", tmp_path)
    assert line == "latentfast: error: the package matplotlib is not installed: pip install 'latentfast[bench]'"
    assert not list(tmp_path.iterdir())


def test_table_writes_and_checks_a_page(tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\nb\n")
    assert run(capsys, "table", "--page", page, "--check")[0] == 1
    assert run(capsys, "table", "--page", page)[0] == 0
    assert run(capsys, "table", "--page", page, "--check")[0] == 0
    assert "| `slerp` |" in page.read_text() and page.read_text().endswith("b\n")
    status, out, _ = run(capsys, "table")
    assert status == 0 and "temporal_loss_and_grad" in out


@pytest.mark.slow
def test_capture_cost(tmp_path: Path, capsys) -> None:
    status, out, _ = run(capsys, "capture-cost", "--device", "cpu", "--quick", "--out", tmp_path / "cost.json")
    assert status == 0 and "AttentionCapture" in out and "time added" in out
    written = json.loads((tmp_path / "cost.json").read_text())
    plain, *captures = written["ways"]
    assert plain["added_time"] == 0 and all(way["same"] for way in written["ways"])
    for way in captures:
        assert way["added_time"] == pytest.approx(way["ms"][1] / plain["ms"][1] - 1)
        # scores of bfloat16, and the other arithmetic rounds masses of a few hundredths to bfloat16 as well
        assert way["off"] < 1e-3
    here = importlib.util.find_spec("attention_map_diffusers") is not None
    assert written["absent"] == ({} if here else {"attention-map-diffusers": "not installed"})
    assert ("attention-map-diffusers" in [way["name"] for way in captures]) == here == ("not installed" not in out)


@pytest.mark.slow
def test_plan_preview(tmp_path: Path, capsys) -> None:
    status, out, _ = run(capsys, "plan-preview", "--device", "cpu", "--quick", "--out", tmp_path / "plan.json")
    assert status == 0 and "a slider moved, 50 times" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["quick"] and written["recompiled"] is None
    for name in ("moved", "rebuilt", "changed"):
        assert written[name] == sorted(written[name]) and written[name][0] > 0
    assert all(rebuilt <= changed for rebuilt, changed in zip(written["rebuilt"], written["changed"], strict=True))


@pytest.mark.slow
def test_localized_edit(tmp_path: Path, capsys) -> None:
    options = ["--prompts", 1, "--batch", 1, "--steps", 6, "--kind", "shape"]
    out = tmp_path / "new" / "edits.json"
    status, said, _ = run(capsys, "localized-edit", "--device", "cpu", *options, "--out", out, "--pictures", tmp_path)
    assert status == 0 and "mask of the attention" in said and "no mask" in said
    (task,) = json.loads(out.read_text())["tasks"]
    assert task["task"] == "shape" and task["drawn"] == 1
    assert task["mask of the attention"]["mean"]["iou"] > 0.5 and task["no mask"]["mean"]["iou"] is None
    assert (tmp_path / "localized-edit-shape.png").stat().st_size > 1000
    line = refused(capsys, "localized-edit", "--kind", "size")
    assert line.endswith("--kind: expected one of colour, shape, background, got 'size'")


@pytest.mark.parametrize("kind", ["colour", "shape", "background"])
def test_localized_edits_are_judged(kind: str) -> None:
    """Rendered clips in place of generated ones: what was asked for, nothing, too much."""
    from latentfast.benchmarks import localized_edit as edits
    from latentfast.tiny import Judge, render

    task = next(edits.tasks(kind, 5))
    assert task.scene != task.wanted and all(word in edits.caption(task.scene) for word in task.words() + task.keep())
    other = dataclasses.replace(task.wanted, light="dim" if task.scene.light == "bright" else "bright")
    scenes = (task.scene, task.wanted, other)
    source, wanted, dimmed = (render(x, generator=torch.Generator().manual_seed(2)).video for x in scenes)
    judge = Judge()
    before = judge.read(source)[0]
    order = edits._order(task.scene, before.scene)
    assert order is not None and edits._order(task.wanted, before.scene) is None
    for clip, seen in ((wanted, (True, True, True)), (source, (False, True, True)), (dimmed, (True, True, False))):
        found = edits._outcome(task, order[task.named], before, judge.read(clip)[0], source[0], clip[0])
        assert (found.changed, found.other_kept, found.rest_kept) == seen
        assert (found.psnr > 40) == (clip is not dimmed)


def test_share_of_step(tmp_path: Path, capsys) -> None:
    pytest.importorskip("diffusers")
    status, out, _ = run(capsys, "share-of-step", "--device", "cpu", "--quick", "--out", tmp_path / "share.json")
    assert status == 0 and "two calls of the transformer" in out
    written = json.loads((tmp_path / "share.json").read_text())
    for step in written["steps"]:
        calls, *arithmetic = step["parts"]
        assert {"diffusers: CFG, UniPC step"} < {part["name"] for part in arithmetic}
        for part in arithmetic:
            us = part["us"][1]
            assert part["share"] == pytest.approx(us / (us + calls["us"][1]))


def test_cache_io(tmp_path: Path, capsys) -> None:
    pytest.importorskip("safetensors")
    arguments = ["--device", "cpu", "--quick", "--folder", tmp_path, "--out", tmp_path / "io.json"]
    status, out, _ = run(capsys, "cache-io", *arguments)
    assert status == 0 and "load: cache, from the disk, checked" in out and "loop: nothing saved" in out
    written = json.loads((tmp_path / "io.json").read_text())
    seconds = {timing["name"]: timing["seconds"][1] for timing in written["timings"]}
    compared = [timing for timing in written["timings"] if timing["against"]]
    assert len(compared) == 6 and not written["wrong"]
    for timing in compared:
        assert timing["ratio"] == pytest.approx(timing["seconds"][1] / seconds[timing["against"]])
    assert [path.name for path in tmp_path.iterdir()] == ["io.json"]


@pytest.mark.slow
def test_resume(tmp_path: Path, capsys) -> None:
    pytest.importorskip("diffusers")
    status, out, _ = run(capsys, "resume", "--device", "cpu", "--quick", "--out", tmp_path / "resume.json")
    assert status == 0 and "edited after 2 steps" in out and "asked for again" in out
    cases = json.loads((tmp_path / "resume.json").read_text())["cases"]
    assert len(cases) == 2 and all(case["same_bits"] for case in cases)
    for case in cases:
        assert case["again_share"] == pytest.approx(case["again"] / case["first"])
        for edit in case["edits"]:
            left = (case["steps"] - edit["step"]) / case["steps"]
            assert edit["excess"] == pytest.approx(edit["seconds"] / case["plain"] - left)


def test_vae_decode(tmp_path: Path, capsys) -> None:
    pytest.importorskip("diffusers")
    status, out, _ = run(capsys, "vae-decode", "--device", "cpu", "--quick", "--out", tmp_path / "vae.json")
    assert status == 0 and "seams alone" in out and "of it no seams" in out
    seams, *decodes = json.loads((tmp_path / "vae.json").read_text())["parts"]
    parent, ours = (way["ms"][1] for way in seams["ways"])
    assert seams["ways"][1]["faster"] == pytest.approx(parent / ours)
    assert decodes[0]["ways"][1]["faster_seams"] is None
    assert [part["name"] for part in decodes] == ["whole clip", "in tiles"]
    assert all(way["same_bits"] for part in (seams, *decodes) for way in part["ways"])


@pytest.mark.slow
def test_sampling_loop(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    # on a CPU the guidance of a clip as small as this does not wait for the step
    monkeypatch.setattr("latentfast.integrations.diffusers.guidance.LEAST_ON_CPU", 0)
    status, out, _ = run(capsys, "sampling-loop", "--device", "cpu", "--quick", "--out", tmp_path / "loop.json")
    assert status == 0 and "ready predictions" in out
    written = json.loads((tmp_path / "loop.json").read_text())
    assert [loop["pipeline"] for loop in written["loops"]] == ["diffusers", "latentfast"] * 2
    for before, now in zip(written["loops"][::2], written["loops"][1::2], strict=True):
        assert now["launches"] <= 4 < 50 < before["launches"]
        assert now["outside_us"] == pytest.approx(now["step_us"][1] - 2 * now["forward_us"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_scheduler_steps(tmp_path: Path, capsys) -> None:
    pytest.importorskip("diffusers")
    status, out, _ = run(capsys, "scheduler-steps", "--device", "cpu", "--quick", "--out", tmp_path / "steps.json")
    assert status == 0 and "UniPC, order 2" in out
    written = json.loads((tmp_path / "steps.json").read_text())
    ours = [step for step in written["steps"] if step["ours"]]
    drawing = {"DPM-Solver++ 2M SDE": 1, "Euler, ancestral": 1, "DPM-Solver++ of CogVideoX": 2, "LCM": 1}
    assert len(ours) == len(written["steps"]) / 2 > 10
    for step in ours:
        assert 1 <= step["launches"] <= 1 + drawing.get(step["scheduler"], 0), step


def test_preview_engine(tmp_path: Path, capsys) -> None:
    pytest.importorskip("diffusers")
    arguments = ["--device", "cpu", "--quick", "--out", tmp_path / "previews.json"]
    status, out, _ = run(capsys, "preview-engine", *arguments)
    assert status == 0 and "move to frames" in out
    written = json.loads((tmp_path / "previews.json").read_text())
    (moves,) = written["moves"]
    assert 0 < moves["median_ms"] <= moves["p99_ms"]
    assert moves["per_second"] > 0
    (attached,) = written["attached"]
    assert attached["same_bits"] and attached["cost"] == attached["watched"] / attached["alone"] - 1
