"""The commands of ``latentfast bench`` that each measure one whole thing, and print one short table.

Their modules in latentfast.benchmarks have ``measure(device, ...)``, whose result has ``to_json()``, and
``table(result)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from latentfast.cli.errors import UserError
from latentfast.cli.machine import Device, Quick, console, device_of

__all__ = ["app"]

app = typer.Typer()

Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the measurement there, as one line of JSON.")
]

#: Names of commands, which are their modules', and what they measure.
_MEASUREMENTS = {
    "share-of-step": "what share of a real sampling step the arithmetic between the model's calls is",
    "scheduler-steps": "the steps of diffusers' schedulers and of latentfast's in their place",
    "sampling-loop": "what a Wan sampling loop costs outside of the transformer: plain diffusers, and accelerated",
    "vae-decode": "Wan's VAE in tiles against diffusers: the seams alone, and a decode with and without CUDA graphs",
    "resume": "what an edit in mid-sampling costs beside the whole sampling, and a request that was made before",
    "capture-cost": "what attention capture adds to a forward of a full-size model",
    "recipe": "what moving a slider of a stack of ten edits costs, with the states between them in a cache",
    "preview-engine": "the preview engine: from a move to frames on the host, and what it costs a sampling run",
    "plan-preview": "a plan's slider moved, an edit added: until the pixels are on the host, beside torch.compile",
}


def _module(name: str) -> Any:
    return importlib.import_module(f"latentfast.benchmarks.{name.replace('-', '_')}")


def _finish(module: Any, found: Any, out: Path | None) -> None:
    console().print(module.table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.to_json() + "\n", encoding="utf-8")
    if wrong := getattr(found, "wrong", ""):
        console().print(f"wrong result: {wrong}")
        raise typer.Exit(1)


def _measuring(name: str) -> Callable[..., None]:
    def command(device: Device = "auto", quick: Quick = False, out: Out = None) -> None:
        module = _module(name)
        _finish(module, module.measure(device_of(device), quick=quick), out)

    return command


for _name, _what in _MEASUREMENTS.items():
    app.command(_name, help=f"Measure {_what}.")(_measuring(_name))


@app.command("cache-io")
def cache_io(
    device: Device = "auto",
    quick: Quick = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", metavar="FOLDER", exists=True, file_okay=False, help="On the disk that is to be measured."
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Measure what the latent cache costs: saving, loading, asking again, and a loop that saves its steps."""
    module = _module("cache-io")
    _finish(module, module.measure(device_of(device), quick=quick, folder=folder), out)


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
    structure: Annotated[
        float | None, typer.Option(help="Share of the steps with the source's queries and keys; default: by kind.")
    ] = None,
    dilate: Annotated[int | None, typer.Option(min=0, help="Cells that are added around the mask.")] = None,
    look: Annotated[
        bool | None, typer.Option("--look/--grow", help="A run of the source first, or masks that grow.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of scenes and noise.")] = 0,
    out: Out = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Gets a picture of some edits of each kind.")
    ] = None,
) -> None:
    """Measure on the embedded model, by its judge, whether edits stay where the attention looks."""
    module = _module("localized-edit")
    for name in kind or ():
        if name not in module.TASKS:
            raise UserError(f"--kind: expected one of {', '.join(module.TASKS)}, got '{name}'")
    options = {
        "strength": strength,
        "structure": structure,
        "dilate": dilate,
        "look": look,
        "num_inference_steps": steps,
    }
    found = module.measure(
        device_of(device),
        prompts,
        kinds=tuple(kind or module.TASKS),
        batch=batch,
        seed=seed,
        say=console().print,
        options={name: value for name, value in options.items() if value is not None},
    )
    _finish(module, found, out)
    if out is not None:
        out.with_suffix(".md").write_text(module.markdown(found), encoding="utf-8")
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
