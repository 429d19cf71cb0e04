"""The benchmarks' machinery: cases, rows, tables, picture. No test here looks at a speed."""

import dataclasses
import math
import re

import pytest
import torch

import latentfast
from benchmarks import accuracy, peers, plot, rows, table, targets
from benchmarks.cases import STEMS, select
from benchmarks.harness import Effort, Variant, device_times, host_times, percentiles
from benchmarks.measure import Options, backends_on, measure
from benchmarks.operation import SIZES, moved_bytes, tensors

CPU = torch.device("cpu")
ENVIRONMENT = rows.Environment("a card", "1.0", "2.13.0", "3.8.0", "3.11", "0.1.0", "abc", "2026-01-01", 2, 3.0)


def measured_rows(only: str = "slerp-tiny_b3") -> list[rows.Row]:
    """Rows of a tiny case, as a run makes them."""
    options = Options(CPU, Effort.quick(), compile=False, quick=True)
    found = [measure(case, options, ENVIRONMENT) for case in select(CPU, True, only)]
    assert found and not any(failures for _, failures in found)
    return [row for made, _ in found for row in made]


TINY = [case for case in select(CPU, True) if case.dtype == torch.bfloat16]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_field_expression_computes_the_same(case):
    torch.manual_seed(1)
    inputs = tuple(x.detach().float().requires_grad_(x.requires_grad) for x in case.draw(CPU))
    for got, expected in zip(
        tensors(case.operation.field.call(*inputs)), tensors(case.operation.reference.call(*inputs)), strict=True
    ):
        # float32 with another order of operations on a few thousand elements: a few dozen roundings of 6e-8
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_available_backends_are_right_on_every_case(case):
    torch.manual_seed(2)
    inputs = case.draw(CPU)
    for name in backends_on(CPU):
        with latentfast.use_backend(name):
            assert accuracy.check(case.operation, case.operation.ours, inputs).correct


@pytest.mark.parametrize("spoil", ["scale", "one element", "nan", "other sample"])
def test_a_wrong_result_is_called_wrong(spoil):
    case = next(c for c in TINY if c.id.startswith("slerp-tiny_b3"))
    torch.manual_seed(3)
    inputs = case.draw(CPU)

    def wrong(*args):
        out = case.operation.ours(*args)
        if spoil == "scale":
            return out * 1.01
        if spoil == "other sample":
            return out.roll(1, 0)
        out.view(-1)[17] = math.nan if spoil == "nan" else out.view(-1)[17] * 1.5 + 0.1
        return out

    assert not accuracy.check(case.operation, wrong, inputs).correct


def test_moved_bytes_count_each_input_and_output_once():
    a, mask = torch.zeros(2, 3, 4), torch.zeros(2, 1, 4, dtype=torch.bfloat16)
    assert moved_bytes((a, mask), (torch.zeros(()), a.clone())) == 96 + 16 + 4 + 96


def test_sizes_and_cases_of_the_issue_are_there():
    assert SIZES["wan480"] == (16, 21, 60, 104) and SIZES["wan720"] == (16, 21, 90, 160)
    gpu = [case for stem in STEMS for case in stem.CASES]
    cpu = [case for stem in STEMS for case in stem.CPU_CASES]
    assert len({case.id for case in gpu}) == len(gpu) and len({case.id for case in cpu}) == len(cpu)
    for target, cases in [(t, gpu) for t in targets.GPU] + [(t, cpu) for t in targets.CPU]:
        wanted = (target.op, target.variant, target.workload, target.dtype)
        assert any(
            (c.operation.name, c.operation.variant, c.workload, str(c.dtype).removeprefix("torch.")) == wanted
            for c in cases
        ), wanted


def test_percentiles_are_measured_values():
    assert percentiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.0, 5.0)
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_failing_variant_leaves_a_note_and_the_others_times():
    def fail(x):
        raise RuntimeError("no such kernel\nand a long story")

    good, bad = Variant("good", lambda x: x + 1), Variant("bad", fail)
    inputs = (torch.zeros(4),)
    on_device = device_times([good, bad], [inputs], CPU, Effort.quick())
    on_host = host_times([good, bad], inputs, CPU, Effort.quick(), slow=False)
    assert on_device["bad"] is None and on_host["bad"] is None
    assert min(on_device["good"]) > 0 and list(on_host["good"]) == sorted(on_host["good"])
    assert bad.problems == [f"{clock} time: RuntimeError: no such kernel" for clock in ("device", "host")]


def test_rows_survive_their_file(tmp_path):
    made = measured_rows()
    path = tmp_path / "results" / "cpu.jsonl"
    rows.save(made, path)
    read = rows.load(path)
    assert [row.case for row in read] == [row.case for row in made]
    rows.save(read, tmp_path / "again.jsonl")
    assert rows.load(tmp_path / "again.jsonl") == read
    row = read[0]
    assert row.correct and row.quick and row.device_us and row.device_us == sorted(row.device_us)
    assert row.floor_share == pytest.approx(row.floor_us / row.device_us[1], rel=1e-4)  # five digits are written
    assert set(row.baselines) == {"eager", "field_eager"}  # as asked: no compilation
    assert rows.load_all(path.parent) == []  # a smoke run is no result


def test_a_row_of_another_shape_is_refused():
    line = measured_rows()[0].to_json()
    with pytest.raises(ValueError, match="surprise"):
        rows.Row.from_json(line.replace('{"op"', '{"surprise": 1, "op"', 1))


def _large(made: list[rows.Row]) -> list[rows.Row]:
    return [dataclasses.replace(row, quick=False) for row in made]


def test_targets_are_judged_by_the_rows():
    row = dataclasses.replace(
        measured_rows()[0],
        op="slerp",
        workload="wan480_b1",
        dtype="bfloat16",
        backend="cuda",
        host_us=[9.0, 10.0, 11.0],
        add_us=6.0,
        baselines={"compiled": rows.Times(None, [48.0, 49.0, 50.0]), "eager": rows.Times(None, [90.0, 100.0, 110.0])},
    )
    lines = targets.report([row, dataclasses.replace(row, backend="triton", host_us=[1.0, 1.0, 1.0])], targets.GPU)
    verdicts = {m[2]: m[1].strip() for m in re.finditer(r"^(.{12}) slerp {20}.{23}(host.+?)  ", lines, re.M)}
    assert verdicts == {"host time / add_": "met", "host, × torch.compile": "NOT MET", "host, × eager": "met"}
    assert "not measured edit N=1" in lines


def test_table_replaces_what_stands_between_the_markers():
    made = _large(measured_rows())
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    new = table.inserted(readme, table.markdown(made))
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert f"**{table.number(made[0].device_us[1])}**" in new and "`slerp`" in new
    assert table.inserted(new, table.markdown(made)) == new
    with pytest.raises(ValueError, match="benchmarks:begin"):
        table.inserted("no markers", "")


def test_readme_holds_the_committed_rows():
    committed = rows.load_all()
    if not table.README.exists() or table.BEGIN not in table.README.read_text(encoding="utf-8") or not committed:
        pytest.skip("no README with markers, or no rows yet")
    text = table.README.read_text(encoding="utf-8")
    assert table.inserted(text, table.markdown(committed)) == text, "run `python -m benchmarks.table`"


def test_committed_rows_are_complete_and_right():
    for row in rows.load_all():
        assert row.correct and row.environment.commit != "unknown", row
        assert {"eager", "compiled"} <= set(row.baselines), row


def test_picture_shows_the_panels_that_have_rows(tmp_path):
    pytest.importorskip("matplotlib")
    made = _large(measured_rows())
    gpu = [dataclasses.replace(row, host_us=[9.0, 10.0, 11.0], batch=b, add_us=5.0) for row in made for b in (1, 8)]
    cpu = [dataclasses.replace(r, environment=dataclasses.replace(ENVIRONMENT, driver="none")) for r in made]
    for name, some in (("gpu", gpu), ("cpu", cpu), ("all", gpu + cpu)):
        plot.draw(some, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # the faster of a baseline's two forms is the one that is drawn
    values = next(iter(plot.times_of(gpu, "device_us").values()))
    forms = [gpu[0].baselines[name].device_us[1] for name in ("eager", "field_eager")]
    assert values["eager"] == min(forms)
    with pytest.raises(ValueError, match="one GPU"):
        plot.draw([], tmp_path / "none.png")


def test_slerp_peer_takes_one_or_many_t():
    a, b = torch.randn(2, 2, 3, 4, 5, 6)
    one, many = torch.tensor(0.25), torch.tensor([0.25, 0.5])
    assert torch.equal(peers.slerp_acos(a, b, one), peers.slerp_acos(a, b, many)[0])
