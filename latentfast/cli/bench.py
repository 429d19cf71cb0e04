"""The commands of ``latentfast bench``: how fast every operation is on this machine, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from latentfast.cli import measurements
from latentfast.cli.errors import UserError
from latentfast.cli.machine import Device, Quick, console, device_of
from latentfast.cli.options import grouped

__all__ = ["app"]

app = typer.Typer(
    name="bench",
    help="Measure the operations against eager PyTorch, torch.compile, the peers and the machine's limits.",
)
app.add_typer(measurements.app)

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Choice:
    """Which cases, and where."""

    stem: Annotated[
        list[str] | None, typer.Option("--stem", metavar="STEM", help="Only this family of operations (repeatable).")
    ] = None
    device: Device = "auto"
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="Not the cases' own but this one.")] = "auto"
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Each operation once at this public model's latents, such as wan21_14b_720p (repeatable).",
        ),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="With --model: samples.")] = 1
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only cases whose name contains this.")] = ""
    quick: Quick = False


Results = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Of the rows; default: those that come with latentfast.")
]


@app.command("list")
@grouped
def list_cases(choice: Choice) -> None:
    """List the cases that `run` with the same options measures."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("stem", "case", "shape", "peer"):
        table.add_column(header, overflow="fold")
    for case in _selection(choice, measured=False).cases():
        operation = case.operation
        peer = operation.peer.note if operation.peer else "–"
        table.add_row(operation.stem, case.id, "x".join(map(str, case.shape)), peer)
    console().print(table)


@app.command()
@grouped
def run(
    choice: Choice,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the rows go, one JSON object a line.")] = Path(
        "latentfast-bench"
    ),
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="The torch.compile baselines.")] = True,
    compile_jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile beforehand; default: half the cores, at most 10.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every way to compute on the CPU.")] = 2,
    seconds_limit: Annotated[
        float | None, typer.Option(min=0, help="Start no further case after so many seconds.")
    ] = None,
) -> None:
    """Measure: every backend and baseline of each case, interleaved, checked against float64."""
    from latentfast.benchmarks.rows import RowsError
    from latentfast.benchmarks.run import default_jobs
    from latentfast.benchmarks.run import run as measure_all

    selection = _selection(choice)
    screen = console()
    for name in selection.without_size():
        screen.print(f"! {name} has no size for {', '.join(selection.models)}")
    try:
        status = measure_all(
            selection,
            out,
            screen,
            compile=compile,
            jobs=compile_jobs or default_jobs(),
            threads=threads,
            seconds_limit=seconds_limit,
        )
    except RowsError as error:  # where the rows would have gone
        raise UserError(str(error)) from None
    raise typer.Exit(status)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.jsonl", help="Rows of an earlier run.")],
    after: Annotated[Path, typer.Argument(metavar="B.jsonl", help="Rows of a later one.")],
    slower_than: Annotated[
        float, typer.Option(min=1.0, help="Exit with 1 if a time grew by more than this factor and the noise.")
    ] = 1.05,
) -> None:
    """Say what got slower or faster from one file of rows to another; exit with 1 if something got slower."""
    from latentfast.benchmarks.compare import compare as compare_rows
    from latentfast.benchmarks.compare import table

    a, b = _rows_of(before), _rows_of(after)
    try:
        found = compare_rows(a, b, slower_than)
    except ValueError as error:
        raise UserError(f"{before} and {after}: {error}") from None
    screen = console()
    screen.print(table(found))
    for line in found.remarks:
        screen.print(line, soft_wrap=True)
    raise typer.Exit(1 if found.worse else 0)


@app.command()
def plot(
    results: Results = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Gets roofline.png and speedups.png.")] = Path("."),
    card: Annotated[str, typer.Option(help="A part of the GPU's name, if there are rows of several.")] = "",
) -> None:
    """Draw the rows: shares of the machine's limit, and speed-ups over eager PyTorch, torch.compile and the peers."""
    from latentfast.benchmarks.plot import draw
    from latentfast.cli.output import atomic_outputs

    rows = [row for row in _committed(results) if not row.on_gpu or card in row.environment.card]
    try:
        pictures = draw(rows)
    except ValueError as error:
        raise UserError(str(error)) from None
    targets = [out / name for name in pictures]
    with atomic_outputs(*targets) as scratch:
        for path, data in zip(scratch, pictures.values(), strict=True):
            path.write_bytes(data)
    for target in targets:
        console().print(str(target), soft_wrap=True)


@app.command()
def table(
    results: Results = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Put the tables between this file's markers; default: only show the rows."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 if the tables differ.")] = False,
) -> None:
    """Show the rows, or write their tables into a page."""
    from latentfast.benchmarks.table import inserted, markdown, terminal

    rows = _committed(results)
    if page is None:
        console().print(terminal(rows))
        return
    try:
        old = page.read_text(encoding="utf-8")
        new = inserted(old, markdown(rows))
    except (OSError, ValueError) as error:
        raise UserError(f"--page: {error}") from None
    if not check:
        page.write_text(new, encoding="utf-8")
    elif new != old:
        console().print(f"{page}: the tables are not those of the rows", soft_wrap=True)
        raise typer.Exit(1)


def _selection(choice: Choice, measured: bool = True) -> Any:
    from latentfast.benchmarks.cases import STEMS, Selection
    from latentfast.benchmarks.operation import MODELS

    stems, models = tuple(choice.stem or ()), tuple(choice.model or ())
    for option, known, values in (
        ("--stem", tuple(STEMS), stems),
        ("--model", tuple(MODELS), models),
        ("--dtype", DTYPES, (choice.dtype,)),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"{option}: expected one of {', '.join(known)}, got '{value}'")
    dtype = "" if choice.dtype == "auto" else choice.dtype
    where = device_of(choice.device, measured)
    selection = Selection(where, stems, choice.only, models, choice.batch, dtype, choice.quick)
    if not selection.cases():
        raise UserError(f"no case is left: --only '{choice.only}' is in no name (see `latentfast bench list`)")
    return selection


def _rows_of(path: Path) -> list:
    from latentfast.benchmarks.rows import RowsError, load

    try:
        return load(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except RowsError as error:
        raise UserError(str(error)) from None


def _committed(folder: Path | None) -> list:
    from latentfast.benchmarks.rows import RESULTS

    where = folder or RESULTS
    rows = [row for path in sorted(where.glob("*.jsonl")) for row in _rows_of(path) if not row.quick]
    if not rows:
        raise UserError(f"no rows in {where} (those of smoke runs do not count)")
    return rows
