"""`latentfast cache`: what is in a cache's folder, whether it is whole, and less of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfast.cli.errors import UserError
from latentfast.cli.machine import console

if TYPE_CHECKING:
    from latentfast.cache.disk import Disk

__all__ = ["app", "parse_bytes"]

app = typer.Typer(name="cache", help="Look after the folder of a latent cache.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The cache's folder.")]
Policy = Annotated[str, typer.Option(metavar="[lru|cost]", help="The order in which entries go.")]

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def parse_bytes(option: str, text: str) -> int:
    """A number of bytes such as 0, 500MB, 1.5GiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found.group(2).upper() not in _UNITS:
        raise UserError(f"{option}: expected bytes such as 0, 500MB or 1.5GiB, got '{text}'")
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()])


@contextmanager
def _opened(folder: Path, policy: str = "lru") -> Iterator[Disk]:
    from latentfast.cache.disk import Disk
    from latentfast.cache.index import POLICIES

    if policy not in POLICIES:
        raise UserError(f"--policy: expected {', '.join(POLICIES)}, got '{policy}'")
    if not (folder / "entries").is_dir():
        raise UserError(f"FOLDER: {folder} is not the folder of a latent cache")
    disk = Disk(folder, 0, policy)  # nothing is put, so that no budget is needed
    try:
        yield disk
    finally:
        disk.close()


@app.command()
def ls(
    folder: Folder,
    policy: Policy = "lru",
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each entry.")] = False,
) -> None:
    """List the entries, the one that would go last first."""
    with _opened(folder, policy) as disk:
        entries = disk.entries()
    if as_json:
        for entry in entries:
            fields = {name: getattr(entry, name) for name in ("digest", "bytes", "seconds", "created", "uses")}
            print(json.dumps(fields | {"description": json.loads(entry.description)}))
        return
    from latentfast.benchmarks.table import headed, memory

    table = headed(("entry", "description", "size", "made in s", "uses", "made"), 2)
    table.columns[1].overflow = "ellipsis"
    table.columns[1].no_wrap = True
    for entry in entries:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created))
        cells = (memory(entry.bytes), f"{entry.seconds:.3g}", str(entry.uses), made)
        table.add_row(entry.digest[:12], entry.description, *cells)
    if entries:
        console().print(table)
    console().print(f"{len(entries)} entries, {memory(sum(entry.bytes for entry in entries))}")


@app.command()
def show(
    folder: Folder,
    entry: Annotated[str, typer.Argument(metavar="ENTRY", help="The beginning of its digest, as `ls` prints it.")],
) -> None:
    """Print what an entry was made from, and its tensors, as JSON."""
    with _opened(folder) as disk:
        matching = [each.digest for each in disk.entries() if each.digest.startswith(entry.lower())]
        if len(matching) != 1:
            raise UserError(f"ENTRY: {len(matching) or 'no'} entries begin with '{entry}'")
        header = disk.header(matching[0])
    if header is None:
        raise UserError(f"ENTRY: {matching[0]} can't be read; `latentfast cache verify` says more")
    pieces = sorted(header.layout.pieces, key=lambda piece: piece.name)
    tensors = {p.name: {"dtype": str(p.dtype).removeprefix("torch."), "shape": list(p.shape)} for p in pieces}
    print(
        json.dumps(
            {
                "digest": header.key.digest,
                "bytes": header.file_bytes,
                "seconds": header.seconds,
                "created": header.created,
                "checksum": header.checksum,
                "tensors": tensors,
                "description": header.key.description,
            },
            indent=2,
        )
    )


@app.command()
def verify(folder: Folder) -> None:
    """Read every entry and check it; what is not whole goes into quarantine. Status 1 if there was any."""
    with _opened(folder) as disk:
        found = disk.verify()
    for name, why in found.bad.items():
        console().print(f"{name}: {why}")
    console().print(f"{found.good} entries are whole, {len(found.bad)} were not")
    if found.bad:
        raise typer.Exit(1)


@app.command()
def prune(
    folder: Folder,
    to: Annotated[str, typer.Option(metavar="BYTES", help="What may stay, such as 0, 500MB, 1.5GiB.")],
    policy: Policy = "lru",
) -> None:
    """Let entries go until the rest is small enough."""
    from latentfast.benchmarks.table import memory

    limit = parse_bytes("--to", to)
    with _opened(folder, policy) as disk:
        if not disk.writable:
            raise UserError(f"FOLDER: {folder} can't be written")
        gone = disk.shrink(limit)
        count, nbytes = disk.total()
    console().print(f"{gone} entries went, {count} are left with {memory(nbytes)}")
