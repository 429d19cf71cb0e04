"""The commands of ``latentfast recipe``: what a file of a recipe says, whether it is one, and what two differ in."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfast.cli.errors import UserError, one_line
from latentfast.cli.machine import console

if TYPE_CHECKING:
    from latentfast.recipe import Recipe

__all__ = ["app"]

app = typer.Typer(name="recipe", help="Show, check and compare files of recipes: stacks of edits as JSON.")

Import = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="A Python module that registers edits of your own (repeatable)."),
]
RecipeFile = Annotated[Path, typer.Argument(metavar="FILE", help="A recipe, as Recipe.save writes it.")]


@app.command()
def show(file: RecipeFile, modules: Import = None) -> None:
    """Show the steps of a recipe and the tensors that it names."""
    from rich.table import Table

    _import(modules)
    recipe = _loaded(file)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("step", "edit", "parameters"):
        table.add_column(header, overflow="fold")
    for number, edit in enumerate(recipe, 1):
        data = edit.to_data()
        table.add_row(str(number), data.pop("edit"), "  ".join(f"{name}={_shown(data[name])}" for name in data))
    screen = console()
    screen.print(table)
    screen.print(f"digest {recipe.digest}, tensors: {len(recipe.references)}", soft_wrap=True)
    for reference in recipe.references:
        screen.print(f"  {reference}", soft_wrap=True)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Recipes.")],
    modules: Import = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A latent cache that must have the tensors too.")
    ] = None,
) -> None:
    """Say for each file whether it is a recipe, and which step is wrong if not; exit with 1 if one is wrong."""
    _import(modules)
    wrong = False
    for file in files:
        try:
            recipe = _loaded(file)
        except (UserError, OSError) as error:
            wrong = True
            console().print(one_line(error), soft_wrap=True)
            continue
        missing = [] if cache is None else _missing(recipe, cache)
        wrong |= bool(missing)
        state = f"{len(recipe)} edits, digest {recipe.digest[:16]}…"
        console().print(
            f"{file}: {state}" if not missing else f"{file}: not in {cache}: {', '.join(missing)}", soft_wrap=True
        )
    raise typer.Exit(1 if wrong else 0)


@app.command()
def diff(before: RecipeFile, after: RecipeFile, modules: Import = None) -> None:
    """Show what two recipes differ in, line by line; exit with 1 if they differ."""
    _import(modules)
    found = _loaded(before).diff(_loaded(after), (str(before), str(after)))
    console().print(found, end="", soft_wrap=True)
    raise typer.Exit(1 if found else 0)


@app.command()
def schema(modules: Import = None) -> None:
    """Print the JSON Schema of recipes."""
    _import(modules)
    from latentfast.recipe import Recipe

    console().print(json.dumps(Recipe.schema(), indent=2, ensure_ascii=False), soft_wrap=True)


def _import(modules: list[str] | None) -> None:
    if modules:
        sys.path.append("")  # where the command is given
    for name in modules or ():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UserError(f"--import: there is no module '{name}'") from None


def _loaded(path: Path) -> Recipe:
    from latentfast.recipe import Recipe

    try:
        return Recipe.load(path)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def _missing(recipe: Recipe, folder: Path) -> list[str]:
    from latentfast.cache import LatentCache
    from latentfast.recipe import is_kept

    if not folder.is_dir():
        raise UserError(f"--cache: there is no folder {folder}")
    with LatentCache(folder) as cache:
        return [reference for reference in recipe.references if not is_kept(cache, reference)]


def _shown(value: Any) -> str:
    """A parameter on one line, digests shortened."""
    if isinstance(value, dict):
        return "{" + " ".join(f"{name}={_shown(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value[:15]}…" if isinstance(value, str) and value.startswith("sha256:") else str(value)
