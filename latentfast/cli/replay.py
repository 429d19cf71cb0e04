"""`latentfast replay`: a recorded result made again, and compared."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from latentfast.cli import clips
from latentfast.cli.demo import TOOL as DEMO
from latentfast.cli.demo import run_demo
from latentfast.cli.errors import UserError
from latentfast.cli.loading import load_pipeline, resolve_device, resolve_dtype
from latentfast.cli.progress import Bar
from latentfast.cli.request import Request
from latentfast.session import Session
from latentfast.session.files import TOOL as SESSION
from latentfast.session.files import read_record
from latentfast.session.record import RECORD, differences

__all__ = ["replay"]

#: Of a record: what was made, and where.
_CHECKSUMS, _WHERE = "checksums", ("backend", "machine", "versions")


def replay(run: Path, *, model: Path | None = None, device: str | None = None) -> bool:
    """Make a recorded result again.

    Args:
        run: The record, or its folder.
        model: The pipeline's folder, if it is not where it was.
        device: Where to make it, if not where the record says.

    Returns:
        Whether all checksums are the same. What differs is printed.
    """
    try:
        record = read_record(run)
    except ValueError as error:
        raise UserError(f"RUN: {error}") from error
    tool = record["tool"]
    again = {SESSION: _session, DEMO: _demo}.get(tool, _clip)
    try:
        lines, same = again(run, record, model, device)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"RUN: {run} can't be made again: {error}") from error
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{tool}: {'the same bits' if same else 'other bits'}", markup=False)
    for line in lines:
        console.print(f"  {line}", markup=False)
    if not same and not lines:
        console.print("  nothing else is different: versions, machine and settings are those of the record")
    return same


_Found = tuple[list[str], bool]


def _session(run: Path, record: Mapping[str, Any], model: Path | None, device: str | None) -> _Found:
    known = record["model"]
    folder = None if model is None and known["source"] == "embedded" else model or Path(known["source"])
    where = resolve_device(device or record["machine"]["device"])
    pipe = load_pipeline(folder, where, resolve_dtype(known["dtype"], where))
    if record["chain"][0]["request"]["pipeline"]["components"]["scheduler"]["latentfast"]:
        from latentfast.integrations.diffusers import accelerate

        accelerate(pipe)
    last = record["chain"][-1]
    with Bar(sum(link["steps"] - link["begin"] for link in record["chain"])) as bar:
        bar.stage("sampling")
        found = Session(pipe, keep=last["steps"]).replay(run, on_step=lambda *_: bar.advance())
    return list(found.differences), found.same


def _demo(run: Path, record: Mapping[str, Any], model: Path | None, device: str | None) -> _Found:
    arguments = dict(record["arguments"])
    asked = _request({**arguments, "model": None if arguments["model"] == "embedded" else arguments["model"]})
    with tempfile.TemporaryDirectory() as scratch:
        run_demo(_elsewhere(asked, model, device), out=Path(scratch) / "demo", seed=arguments["seed"])
        return _compared(record, read_record(Path(scratch) / "demo" / RECORD))


def _clip(run: Path, record: Mapping[str, Any], model: Path | None, device: str | None) -> _Found:
    arguments = dict(record["arguments"])
    commands: dict[str, Callable[..., None]] = {
        "generate": clips.generate,
        "interpolate": clips.interpolate,
        "edit": clips.edit,
    }
    command = commands.get(arguments.pop("command", ""))
    if command is None:
        raise ValueError(f"it was made by {record['tool']!r}")
    asked = _elsewhere(_request(arguments), model, device)
    fps = arguments.pop("fps")
    own = {
        name: x for name, x in arguments.items() if name not in {field.name for field in dataclasses.fields(Request)}
    }
    with tempfile.TemporaryDirectory() as scratch:
        output = clips.Output(Path(scratch) / "clip.mp4", fps)
        command(asked, output, **own)
        return _compared(record, read_record(output.record))


def _request(arguments: Mapping[str, Any]) -> Request:
    """The options that the commands share, from a record."""
    known = {field.name: arguments[field.name] for field in dataclasses.fields(Request)}
    return Request(**{**known, "model": None if known["model"] is None else Path(known["model"])})


def _elsewhere(asked: Request, model: Path | None, device: str | None) -> Request:
    return dataclasses.replace(asked, model=model or asked.model, device=device or asked.device)


def _compared(then: Mapping[str, Any], now: Mapping[str, Any]) -> _Found:
    sums = differences(then[_CHECKSUMS], now[_CHECKSUMS])
    where = differences({name: then.get(name) for name in _WHERE}, {name: now.get(name) for name in _WHERE})
    return where + sums, not sums
