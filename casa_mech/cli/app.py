"""The `casa-mech` application; subcommands register themselves on it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

INTERRUPTED = 130

COMMANDS = (
    "run", "generate", "train", "calibrate", "evaluate", "attack", "judge", "compare", "audit", "family", "datasets",
    "organism", "figstep", "doctor", "bench",
)  # fmt: skip
"""The subcommands in the order of the help."""


class _Ordered(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: COMMANDS.index(name) if name in COMMANDS else len(COMMANDS))


app = typer.Typer(
    name="casa-mech",
    cls=_Ordered,
    help="Study how CASA's internal safety decision defends an omni-modal model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("casa-mech"))
        raise typer.Exit


def note(message: str) -> None:
    """Print a line for the user on standard error; standard output is for results."""
    print(f"casa-mech: {message}", file=sys.stderr)
