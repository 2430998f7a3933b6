"""Records of options: one definition each, defaults by command, and help in groups."""

import inspect
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import pytest
import typer
from helpers.command import run
from typer.main import get_command
from typer.testing import CliRunner

from casa_mech.cli import attack, compare, judge, model, organism, study
from casa_mech.cli.app import app
from casa_mech.cli.options import JudgeOptions, ModelOptions, command


@dataclass(frozen=True)
class Lamp:
    title: ClassVar[str] = "Lamp"

    colour: Annotated[str, typer.Option(help="Of the light.")] = "red"
    watts: Annotated[int, typer.Option(min=1, help="Of the bulb.")] = 5


@dataclass(frozen=True)
class Room:
    title: ClassVar[str] = "Room"

    name: Annotated[str, typer.Option(help="Of the room.")]


def _application() -> tuple[typer.Typer, list[Any]]:
    application, calls = typer.Typer(rich_markup_mode=None), []

    @command(application, example="shine hall")
    def shine(room: Room, loud: bool = False, lamp: Lamp = Lamp(watts=40)) -> None:
        """Shine."""
        calls.append((room, loud, lamp))

    return application, calls


def test_a_record_becomes_an_option_for_each_field_and_comes_back_whole() -> None:
    application, calls = _application()
    assert CliRunner().invoke(application, ["--name", "hall"]).exit_code == 0
    assert CliRunner().invoke(application, ["--name", "hall", "--colour", "blue", "--loud"]).exit_code == 0
    assert calls == [(Room("hall"), False, Lamp("red", 40)), (Room("hall"), True, Lamp("blue", 40))]


@pytest.mark.parametrize("arguments", [[], ["--name", "hall", "--watts", "0"], ["--name", "hall", "--colour"]])
def test_a_field_without_a_default_is_required_and_bounds_hold(arguments: list[str]) -> None:
    application, calls = _application()
    assert CliRunner().invoke(application, arguments).exit_code == 2 and not calls


def test_help_lists_the_options_of_a_record_under_its_title() -> None:
    printed = CliRunner().invoke(_application()[0], ["--help"]).output
    lines = [line.strip() for line in printed.splitlines()]
    assert [line for line in lines if line.endswith(":")] == ["Room:", "Options:", "Lamp:"]
    watts = next(line for line in lines if line.startswith("--watts"))
    assert lines.index("Lamp:") < lines.index(watts) and "Of the bulb.  [default: 40; x>=1]" in watts
    assert lines[-1] == "Example:  shine hall"


def test_commands_take_their_shared_options_from_one_definition(capsys: pytest.CaptureFixture[str]) -> None:
    judging = {field.name: _help_of("evaluate")[field.name] for field in fields(JudgeOptions)}
    assert judging == {name: _help_of("judge", "run")[name] for name in judging} and all(judging.values())
    names = [field.name for field in fields(ModelOptions)]
    where = [("run",), ("generate",), ("train",), ("evaluate",), ("compare",), ("doctor",), ("bench",)]
    helps = [{name: _help_of(*path)[name] for name in names} for path in where]
    assert all(texts == helps[0] for texts in helps)
    code, printed, _ = run(capsys, "evaluate", "--help")
    titles = ("Queries:", "Options:", "Defence:", "Replies:", "Judge:", "Model:")
    assert code == 0 and [line for line in printed.splitlines() if line in titles] == list(titles)


def _help_of(*path: str) -> dict[str, str]:
    subcommand: Any = get_command(app)
    for name in path:
        subcommand = subcommand.commands[name]
    return {parameter.name: parameter.help for parameter in subcommand.params}


def test_no_command_takes_many_parameters() -> None:
    for module in (attack, compare, judge, model, organism, study):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                assert len(inspect.signature(function).parameters) <= 13, name
