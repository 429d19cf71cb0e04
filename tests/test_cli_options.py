"""Options of the command line: those that several commands have, as the fields of a dataclass, and their names."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import pytest

typer = pytest.importorskip("typer")

from typer.models import OptionInfo  # noqa: E402

from latentfast.cli.app import app as command_line  # noqa: E402
from latentfast.cli.options import grouped  # noqa: E402


@dataclass(frozen=True)
class Size:
    wide: Annotated[int, typer.Option(min=1, help="Pixels.")] = 3
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def invoke(*arguments: str) -> list[object]:
    seen: list[object] = []
    app = typer.Typer()

    @app.command()
    @grouped
    def command(word: str, size: Size, last: Annotated[bool, typer.Option("--last")] = False) -> None:
        seen.extend((word, size, last))

    typer.main.get_command(app).main([*arguments], standalone_mode=False)
    return seen


def test_fields_are_options_with_their_defaults() -> None:
    assert invoke("a") == ["a", Size(), False]


def test_options_arrive_in_the_dataclass() -> None:
    given = invoke("a", "--wide", "7", "--name", "x", "--name", "y", "--last")
    assert given == ["a", Size(7, ["x", "y"]), True]


def test_the_fields_limits_hold() -> None:
    with pytest.raises(typer.BadParameter) as refused:
        invoke("a", "--wide", "0")
    assert "--wide" in refused.value.format_message()


def functions(app: typer.Typer) -> Iterator[Callable[..., Any]]:
    """What stands behind the commands of an application and of those in it."""
    for registered in (app.registered_callback, *app.registered_commands):
        if registered is not None and registered.callback is not None:
            yield registered.callback
    for group in app.registered_groups:
        yield from functions(group.typer_instance)


def named_by_metavar(app: typer.Typer) -> list[str]:
    """Options without a name of their own whose metavar is their parameter's name in other letters.

    typer 0.27 takes the metavar for their name: ``--FOLDER`` for a parameter ``folder``.
    """
    found = []
    for function in functions(app):
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            for option in get_args(parameter.annotation)[1:]:
                if not isinstance(option, OptionInfo) or option.metavar is None:
                    continue
                # inside Annotated there is no default: what stands first is a name
                names = [name for name in (option.default, *(option.param_decls or ())) if isinstance(name, str)]
                if not names and option.metavar.replace("-", "_").lower() == parameter.name.lower():
                    found.append(f"{function.__name__}: {parameter.name}")
    return found


def test_no_option_is_named_by_its_metavar() -> None:
    assert named_by_metavar(command_line) == []


def test_an_option_that_is_named_by_its_metavar_is_found() -> None:
    app, group = typer.Typer(), typer.Typer()

    @app.callback()
    def root(at_most: Annotated[str, typer.Option(metavar="AT-MOST")] = "") -> None: ...

    @app.command()
    @grouped
    def first(size: Size, folder: Annotated[str, typer.Option("--folder", metavar="FOLDER")] = "") -> None: ...

    @group.command()
    def second(
        word: Annotated[str, typer.Argument(metavar="WORD")], out: Annotated[str, typer.Option()] = ""
    ) -> None: ...

    @group.command()
    def third(folder: Annotated[str | None, typer.Option(metavar="FOLDER")] = None) -> None: ...

    app.add_typer(group, name="more")
    assert named_by_metavar(app) == ["root: at_most", "third: folder"]


@pytest.mark.parametrize("arguments", [("recipe", "schema"), ("doctor",)])
def test_a_reader_that_has_gone_ends_it_quietly(arguments: tuple[str, ...]) -> None:
    """As `latentfast recipe schema | head -1` does."""
    command = [sys.executable, "-m", "latentfast", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, b"")
