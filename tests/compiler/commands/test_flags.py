"""Groups of flags, spread over a command and handed to it as one value."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from moec.compiler.commands.flags import Group, with_groups


@dataclass(frozen=True)
class Size(Group):
    width: Annotated[int, typer.Option(help="In columns.")] = 80
    height: Annotated[int, typer.Option(help="In lines.")] = 24


@dataclass(frozen=True)
class Word(Group):
    letters: Annotated[str, typer.Option(help="What it is made of.")] = "ab"

    def value(self) -> str:
        return self.letters.upper()


def show(size: Size, word: Annotated[str, Word], name: Annotated[str, typer.Argument()], **options: Any) -> Any:
    """Shows it."""
    return size, word, name, options


def test_a_command_is_given_its_groups_as_one_value_each() -> None:
    command = with_groups(show)
    assert command(name="x", width=9, height=24, letters="cd", other=1) == (Size(9, 24), "CD", "x", {"other": 1})


def test_typer_sees_the_fields_after_the_arguments_of_the_command_itself() -> None:
    command = with_groups(show)
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["name", "width", "height", "letters", "options"]
    assert parameters["width"].default == 80
    assert parameters["width"].annotation.__metadata__[0].help == "In columns."
    assert command.__annotations__["letters"] == parameters["letters"].annotation


def test_a_command_without_groups_stays_as_it_is() -> None:
    def plain(name: str = "x") -> str:
        return name

    assert list(inspect.signature(with_groups(plain)).parameters) == ["name"]
    assert with_groups(plain)(name="y") == "y"
