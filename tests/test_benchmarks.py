"""The benchmarks' machinery: cases, rows, tables, picture. No test here looks at a speed."""

import dataclasses
import math
import re

import pytest
import torch
from torch.utils._pytree import tree_map

import latentfast
from latentfast.benchmarks import accuracy, peers, plot, rows, table, targets
from latentfast.benchmarks.cases import STEMS, Selection
from latentfast.benchmarks.compare import compare
from latentfast.benchmarks.harness import (
    Effort,
    Variant,
    count_operators,
    device_times,
    host_times,
    matrix_rate,
    measure_peaks,
    percentiles,
)
from latentfast.benchmarks.measure import Options, backends_on, measure
from latentfast.benchmarks.operation import MODELS, SIZES, Baseline, Case, Operation, moved_bytes, tensors

CPU = torch.device("cpu")
ENVIRONMENT = rows.Environment("a card", "1.0", "2.13.0", "3.8.0", "3.11", "0.1.0", "abc", "2026-01-01", 2, 3.0)


def measured_rows(only: str = "slerp-tiny_b3") -> list[rows.Row]:
    """Rows of a tiny case, as a run makes them."""
    options = Options(CPU, Effort.quick(), compile=False, quick=True)
    found = [measure(case, options, ENVIRONMENT) for case in Selection(quick=True, only=only).cases()]
    assert found and not any(failures for _, failures in found)
    return [row for made, _ in found for row in made]


TINY = Selection(quick=True).cases()


def as_float32(x):
    """A case's argument for a comparison in float32; what is no floating tensor stays."""
    is_floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.detach().float().requires_grad_(x.requires_grad) if is_floating else x


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_field_expression_computes_the_same(case):
    torch.manual_seed(1)
    inputs = tree_map(as_float32, case.draw(CPU))
    for got, expected in zip(
        tensors(case.operation.field.call(*inputs)), tensors(case.operation.reference.call(*inputs)), strict=True
    ):
        if not got.is_floating_point():  # levels of a picture: a tie may be rounded either way
            assert got.int().sub(expected.int()).abs().max() <= 1
            continue
        # float32 with another order of operations on a few thousand elements: a few dozen roundings of 6e-8
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in TINY if case.operation.peer], ids=lambda case: case.id)
def test_peer_computes_the_same(case):
    pytest.importorskip("diffusers")
    torch.manual_seed(1)
    inputs = tree_map(as_float32, case.draw(CPU))
    results = (tensors(way.call(*inputs)) for way in (case.operation.peer, case.operation.reference))
    for got, expected in zip(*results, strict=True):
        # A peer rounds in its own places, to halves too; what computes something else is off by far more.
        distance = (got.double() - expected.double()).norm() / expected.double().norm()
        assert distance < 1e-2


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


@pytest.mark.parametrize("spoil", ["two steps", "many by one"])
def test_wrong_bytes_are_called_wrong(spoil):
    case = next(c for c in TINY if c.id.startswith("latent_to_rgb[8x]-tiny"))
    torch.manual_seed(3)
    inputs = case.draw(CPU)

    def wrong(*args):
        out = case.operation.ours(*args)
        if spoil == "two steps":
            inner = ((out > 10) & (out < 240)).nonzero()[0]
            out[tuple(inner)] += 2
            return out
        return torch.where(torch.arange(out.numel()).view(out.shape) % 20 == 0, out ^ 1, out)

    assert not accuracy.check(case.operation, wrong, inputs).correct


def test_moved_bytes_count_each_input_and_output_once():
    a, mask = torch.zeros(2, 3, 4), torch.zeros(2, 1, 4, dtype=torch.bfloat16)
    assert moved_bytes((a, mask), (torch.zeros(()), a.clone())) == 96 + 16 + 4 + 96


def test_sizes_and_cases_of_the_issue_are_there():
    assert SIZES["wan480"] == (16, 21, 60, 104) and SIZES["wan720"] == (16, 21, 90, 160)
    gpu = [case for stem in STEMS.values() for case in stem.CASES]
    cpu = [case for stem in STEMS.values() for case in stem.CPU_CASES]
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
    on_host = host_times([good, bad], inputs, CPU, Effort.quick())
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
    if not table.PAGE.exists() or table.BEGIN not in table.PAGE.read_text(encoding="utf-8") or not committed:
        pytest.skip("no page with markers, or no rows yet")
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.inserted(text, table.markdown(committed)) == text, (
        "run `latentfast bench table --page docs/benchmarks.md`"
    )


def test_committed_rows_are_complete_and_right():
    for row in rows.load_all():
        assert row.correct and row.environment.commit != "unknown", row
        assert {"eager", "compiled"} <= set(row.baselines), row


def _on_cpu(made: list[rows.Row]) -> list[rows.Row]:
    return [dataclasses.replace(r, environment=dataclasses.replace(ENVIRONMENT, driver="none")) for r in made]


def test_pictures_show_the_panels_that_have_rows():
    pytest.importorskip("matplotlib")
    made = _large(measured_rows())
    gpu = [
        dataclasses.replace(row, host_us=[9.0, 10.0, 11.0], batch=b, workload=f"b{b}") for row in made for b in (1, 8)
    ]
    heights = {}
    for name, some in (("gpu", gpu), ("cpu", _on_cpu(made)), ("all", gpu + _on_cpu(made))):
        pictures = plot.draw(some)
        assert set(pictures) == {"roofline.png", "speedups.png"}
        assert all(data.startswith(b"\x89PNG") for data in pictures.values())
        heights[name] = {key: int.from_bytes(data[20:24], "big") for key, data in pictures.items()}  # of IHDR
    for key in ("roofline.png", "speedups.png"):
        assert heights["all"][key] > max(heights["gpu"][key], heights["cpu"][key])
    with pytest.raises(ValueError, match="one GPU"):
        plot.draw([])


def test_the_faster_of_a_baselines_forms_is_drawn():
    times = {"eager": 40.0, "field_eager": 30.0, "compiled": 8.0, "peer_eager": 50.0}
    baselines = {name: rows.Times([x, x, x], [2 * x] * 3) for name, x in times.items()}
    row = dataclasses.replace(measured_rows()[0], device_us=[9.0, 10.0, 11.0], host_us=None, baselines=baselines)
    assert plot.speedups(row, "device_us") == {"eager": 3.0, "compiled": 0.8, "peer": 10.0}  # the peer: a caller's wait


def test_shares_are_of_the_floor_and_the_fastest_form():
    times = {"eager": 40.0, "field_eager": 80.0, "compiled": 8.0}
    baselines = {name: rows.Times([x, x, x]) for name, x in times.items()}
    first = dataclasses.replace(
        measured_rows()[0], backend="cuda", floor_us=4.0, floor_share=0.4, baselines=baselines, device_us=[10.0] * 3
    )
    second = dataclasses.replace(first, backend="triton", floor_share=0.2, baselines={})
    assert plot.shares([second, first]) == {"native": 0.4, "triton": 0.2, "eager": 0.1, "compiled": 0.5}


def test_slerp_peer_takes_one_or_many_t():
    a, b = torch.randn(2, 2, 3, 4, 5, 6)
    one, many = torch.tensor(0.25), torch.tensor([0.25, 0.5])
    assert torch.equal(peers.slerp_acos(a, b, one), peers.slerp_acos(a, b, many)[0])


# ------------------------------------------------------------------------------- what an operation may be made of


def _sum_of_list(parts, weights):
    return sum(w * x for w, x in zip(weights, parts, strict=True))


def _levels(parts, weights):
    total = _sum_of_list([x.float() if x.dtype != torch.float64 else x for x in parts], weights)
    return [((total + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), total]


def _operation(call, **more) -> Operation:
    """Two tensors in a list, and numbers; a picture and a tensor in a list, with a peer."""
    return Operation(
        stem="edit",
        name="levels",
        variant="",
        inputs=lambda shape, dtype, device: (
            [torch.rand(shape, device=device, dtype=dtype) for _ in range(2)],
            [0.5, 0.25],
        ),
        batch_dims=(0, None),
        outputs=(0, 0),
        ours=call,
        reference=Baseline(_levels, "reference"),
        field=Baseline(_levels, "field"),
        peer=Baseline(_levels, "a peer's function"),
        sizes={"flat": (7, 9)},
        **more,
    )


def test_lists_integers_and_a_peer():
    operation = _operation(_levels, flops=lambda inputs: 10**9, moved=lambda inputs, result: 1234)
    case = Case(operation, "flat", 3, torch.float32)
    assert case.shape == (3, 7, 9) and operation.batch(case.draw(CPU)) == 3
    here = dataclasses.replace(ENVIRONMENT, matrix_tflops=2.0)
    (row,), failures = measure(case, Options(CPU, Effort.quick(), compile=False, quick=True), here)
    assert not failures and row.correct and row.error_ulp < 1
    assert row.bytes == 1234 and row.flops == 10**9 and row.floor_us == pytest.approx(500)  # 10^9 at 2 TFLOP/s
    assert row.tflops == pytest.approx(1e3 / row.device_us[1])
    assert row.peer_note == "a peer's function" and row.speedup("peer_eager", "call_us") > 0
    # two products and their sum with Python's 0, then the picture: + 1, * 127.5, round, clamp, to uint8
    assert row.launches == row.baselines["peer_eager"].launches == 9
    assert row.peak_bytes is None  # the CPU's allocator does not count
    assert "× peer" in table.markdown([row]) and "a peer's function" not in table.markdown([row])
    assert "× peer" not in table.markdown(measured_rows())


@pytest.mark.parametrize(("spoil", "correct"), [("no", True), ("a tie", True), ("all by one", False), ("two", False)])
def test_pictures_may_be_off_by_one_level_where_the_value_lies_between(spoil, correct):
    def call(parts, weights):
        picture, total = _levels(parts, weights)
        flat = picture.view(-1)
        if spoil == "a tie":
            flat[5] += 1
        if spoil == "two":
            flat[5] -= 2
        return [picture + 1 if spoil == "all by one" else picture, total]

    torch.manual_seed(4)
    operation = dataclasses.replace(_operation(call), sizes={"picture": (60, 80)})
    inputs = Case(operation, "picture", 2, torch.float32).draw(CPU)
    verdict = accuracy.check(operation, call, inputs)
    assert verdict.correct is correct
    assert verdict.error.ulp == pytest.approx({"no": 0.5, "a tie": 1, "all by one": 1, "two": 2}[spoil], abs=0.5)


def test_operators_are_counted_without_views_and_allocations():
    def call(x):
        out = torch.empty_like(x)
        return torch.add(x.view(-1), 1, out=out.view(-1)).mul_(2).view_as(x)

    variant, native = Variant("call", call), Variant("ours", lambda x: latentfast.lerp(x, x, 0.25))
    count_operators([variant, native], (torch.zeros(2, 3),))
    assert variant.launches == 2
    with latentfast.use_backend(backends_on(CPU)[0]):
        count_operators([native], (torch.zeros(2, 3),))
    assert native.launches == 1 or backends_on(CPU) == ["eager"]


def test_matrix_rate_is_that_of_a_product():
    assert 1e6 < matrix_rate(CPU, Effort.quick(), 64) < 1e15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_graph_counts_launches_and_the_allocator_memory():
    device, x = torch.device("cuda"), torch.ones(1 << 20, device="cuda")
    ways = [
        Variant("one", lambda x: x + 1),
        Variant("three", lambda x: (x + 1).mul_(2).sub_(1)),
        Variant("temporary", lambda x: (x + 1).sum()),
        Variant("waits", lambda x: x * x.sum().item()),
    ]
    measure_peaks(ways, (x,), device)
    on_device = device_times(ways, [(x,)], device, Effort.quick())
    on_host = host_times(ways, (x,), device, Effort.quick())
    one, three, temporary, waits = ways
    assert (one.launches, three.launches) == (1, 3) and temporary.launches >= 2
    assert one.peak_bytes == three.peak_bytes == x.nbytes
    assert x.nbytes < temporary.peak_bytes < 1.1 * x.nbytes
    # What waits for the device cannot be captured: it has its host time, a note, and the others theirs.
    assert on_device["waits"] is None and on_host["waits"] and waits.problems and not one.problems
    assert on_device["one"] and on_device["three"]


def test_selection_takes_models_dtypes_and_stems():
    chosen = Selection(device="cuda", stems=("edit",), models=("ltx_480p", "svd_xt"), batch=2, dtype="float16")
    cases = chosen.cases()
    assert Selection.from_json(chosen.to_json()) == chosen
    assert {case.operation.stem for case in cases} == {"edit"} and {case.dtype for case in cases} == {torch.float16}
    assert {case.shape for case in cases} == {(2, *MODELS["ltx_480p"]), (2, *MODELS["svd_xt"])}
    assert len({case.id for case in cases}) == len(cases)


# ------------------------------------------------------------------------------------------------ two files of rows


def _timed(row: rows.Row, p20: float, p50: float, p80: float) -> rows.Row:
    return dataclasses.replace(row, device_us=[p20, p50, p80], host_us=None)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((103.0, 104.0, 105.0), "same"),  # less than 1.05
        ((109.0, 110.0, 111.0), "slower"),
        ((90.0, 110.0, 130.0), "same"),  # as much, but its own repeats scatter by more
        ((89.0, 90.0, 91.0), "faster"),
    ],
)
def test_a_change_counts_beyond_the_noise(after, verdict):
    row = measured_rows()[0]
    found = compare([_timed(row, 99.0, 100.0, 101.0)], [_timed(row, *after)])
    assert [change.verdict for change in found.changes] == [verdict]
    assert found.worse is (verdict == "slower")


def test_compare_names_what_is_in_one_file_only_and_wrong_results():
    row = _timed(measured_rows()[0], 99.0, 100.0, 101.0)
    other = dataclasses.replace(row, op="another")
    busy = compare([row], [dataclasses.replace(row, notes=["the machine was busy"])])
    assert "! the second file says: the machine was busy" in busy.remarks
    found = compare([row, other], [dataclasses.replace(row, correct=False)])
    assert found.worse and any("only in the first file: another" in line for line in found.remarks)
    assert any("wrong result now" in line for line in found.remarks)
    with pytest.raises(ValueError, match="more than one row"):
        compare([row, row], [row])
    with pytest.raises(ValueError, match="in common"):
        compare([row], [other])
