"""Where a benchmark runs, and where it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from latentfast.cli.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DEVICES", "Device", "Quick", "console", "device_of"]

DEVICES = ("auto", "cpu", "cuda")

Device = Annotated[str, typer.Option(metavar="[auto|cpu|cuda]", help="auto: the GPU if there is one.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, few rounds: checks that everything runs.")]


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    made = Console(highlight=False, markup=False)
    if not made.is_terminal:  # a log: nothing is gained by folding it
        made.width = 240
    return made


def device_of(name: str, measured: bool = True) -> str:
    """The device of an option: one that is here, if it is to be measured."""
    import torch

    if name not in DEVICES:
        raise UserError(f"--device: expected {', '.join(DEVICES)}, got '{name}'")
    if name == "cuda" and measured and not torch.cuda.is_available():
        raise UserError("--device: torch sees no CUDA device")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
