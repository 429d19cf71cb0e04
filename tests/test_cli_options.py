"""Options that several commands have, as the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

typer = pytest.importorskip("typer")

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
