"""The commands of ``latentfast bench``: how fast every operation is on this machine, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfast.cli.errors import UserError
from latentfast.cli.options import grouped

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app"]

app = typer.Typer(
    name="bench",
    help="Measure the operations against eager PyTorch, torch.compile, the peers and the machine's limits.",
)

DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("auto", "float32", "bfloat16", "float16", "float64")

Device = Annotated[str, typer.Option(metavar="[auto|cpu|cuda]", help="auto: the GPU if there is one.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, few rounds: checks that everything runs.")]


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
    _console().print(table)


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
    from latentfast.benchmarks.run import default_jobs
    from latentfast.benchmarks.run import run as measure_all

    selection = _selection(choice)
    console = _console()
    for name in selection.without_size():
        console.print(f"! {name} has no size for {', '.join(selection.models)}")
    status = measure_all(
        selection,
        out,
        console,
        compile=compile,
        jobs=compile_jobs or default_jobs(),
        threads=threads,
        seconds_limit=seconds_limit,
    )
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
    console = _console()
    console.print(table(found))
    for line in found.remarks:
        console.print(line, soft_wrap=True)
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
        _console().print(str(target), soft_wrap=True)


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
        _console().print(terminal(rows))
        return
    try:
        old = page.read_text(encoding="utf-8")
        new = inserted(old, markdown(rows))
    except (OSError, ValueError) as error:
        raise UserError(f"--page: {error}") from None
    if not check:
        page.write_text(new, encoding="utf-8")
    elif new != old:
        _console().print(f"{page}: the tables are not those of the rows", soft_wrap=True)
        raise typer.Exit(1)


@app.command("share-of-step")
def share_of_step(
    device: Device = "auto",
    quick: Quick = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the measurement there, as one line of JSON.")
    ] = None,
) -> None:
    """Measure what share of a real sampling step the arithmetic between the model's calls is."""
    from latentfast.benchmarks.share_of_step import measure
    from latentfast.benchmarks.share_of_step import table as share_table

    found = measure(_device(device), quick=quick)
    _console().print(share_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.to_json() + "\n", encoding="utf-8")


@app.command("sampling-loop")
def sampling_loop(
    device: Device = "auto",
    quick: Quick = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the measurement there, as one line of JSON.")
    ] = None,
) -> None:
    """Measure what a Wan sampling loop costs outside of the transformer: plain diffusers, and accelerated."""
    from latentfast.benchmarks.sampling_loop import measure
    from latentfast.benchmarks.sampling_loop import table as loop_table

    found = measure(_device(device), quick=quick)
    _console().print(loop_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.to_json() + "\n", encoding="utf-8")


@app.command("vae-decode")
def vae_decode(
    device: Device = "auto",
    quick: Quick = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the measurement there, as one line of JSON.")
    ] = None,
) -> None:
    """Measure Wan's VAE in tiles against diffusers: the seams alone, and a decode with and without CUDA graphs."""
    from latentfast.benchmarks.vae_decode import measure
    from latentfast.benchmarks.vae_decode import table as vae_table

    found = measure(_device(device), quick=quick)
    _console().print(vae_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.to_json() + "\n", encoding="utf-8")
    if not all(way.same_bits for part in found.parts for way in part.ways):
        _console().print("wrong result: not the bits of diffusers")
        raise typer.Exit(1)


@app.command("capture-cost")
def capture_cost(
    device: Device = "auto",
    quick: Quick = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the measurement there, as one line of JSON.")
    ] = None,
) -> None:
    """Measure what attention capture adds to a forward of a full-size model."""
    from latentfast.benchmarks.capture_cost import measure
    from latentfast.benchmarks.capture_cost import table as cost_table

    found = measure(_device(device), quick=quick)
    _console().print(found.title())
    _console().print(cost_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.to_json() + "\n", encoding="utf-8")


@app.command("localized-edit")
def localized_edit(
    device: Device = "auto",
    prompts: Annotated[int, typer.Option(min=1, help="Edits of each kind.")] = 128,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", metavar="[colour|shape|background]", help="Only these (repeatable).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Scenes that are denoised together.")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the model's.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Share of the steps in which the edit acts; default: by kind.")
    ] = None,
    dilate: Annotated[int, typer.Option(min=0, help="Cells that are added around the mask.")] = 1,
    look: Annotated[bool, typer.Option("--look/--grow", help="A run of the source first, or masks that grow.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of scenes and noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the measurement there, as one line of JSON.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Gets a picture of some edits of each kind.")
    ] = None,
) -> None:
    """Measure on the embedded model, by its judge, whether edits stay where the attention looks."""
    from latentfast.benchmarks.localized_edit import TASKS, measure
    from latentfast.benchmarks.localized_edit import table as edits_table

    for name in kind or ():
        if name not in TASKS:
            raise UserError(f"--kind: expected one of {', '.join(TASKS)}, got '{name}'")
    console = _console()
    found = measure(
        _device(device),
        prompts,
        kinds=tuple(kind or TASKS),
        batch=batch,
        seed=seed,
        say=console.print,
        options={"dilate": dilate, "look": look} | ({} if strength is None else {"strength": strength}),
        call={} if steps is None else {"num_inference_steps": steps},
    )
    console.print(edits_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.to_json() + "\n", encoding="utf-8")
    if pictures is not None:
        _save_pictures(pictures, {result.kind: result.pictures for result in found.results})


def _save_pictures(folder: Path, rows: dict[str, list]) -> None:
    """Each kind's rows, one below the other, as localized-edit-KIND.png."""
    import torch
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, strips in rows.items():
        if strips:
            Image.fromarray(torch.cat(strips).numpy()).save(folder / f"localized-edit-{name}.png", optimize=True)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a log: nothing is gained by folding it
        console.width = 240
    return console


def _device(name: str, measured: bool = True) -> str:
    import torch

    if name not in DEVICES:
        raise UserError(f"--device: expected {', '.join(DEVICES)}, got '{name}'")
    if name == "cuda" and measured and not torch.cuda.is_available():
        raise UserError("--device: torch sees no CUDA device")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


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
    where = _device(choice.device, measured)
    selection = Selection(where, stems, choice.only, models, choice.batch, dtype, choice.quick)
    if not selection.cases():
        raise UserError(f"no case is left: --only '{choice.only}' is in no name (see `latentfast bench list`)")
    return selection


def _rows_of(path: Path) -> list:
    from latentfast.benchmarks.rows import load

    try:
        return load(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a file of rows: {error}") from None


def _committed(folder: Path | None) -> list:
    from latentfast.benchmarks.rows import RESULTS

    where = folder or RESULTS
    rows = [row for path in sorted(where.glob("*.jsonl")) for row in _rows_of(path) if not row.quick]
    if not rows:
        raise UserError(f"no rows in {where} (those of smoke runs do not count)")
    return rows
