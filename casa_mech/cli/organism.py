"""`casa-mech organism build` and `card`: the embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casa_mech.cli.app import app
from casa_mech.cli.checks import check_choice
from casa_mech.cli.options import Json, Seed, command
from casa_mech.cli.printing import show

organism_app = typer.Typer(help="Build the embedded models, and measure their cards.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")


@command(organism_app, "build", example="casa-mech organism build organism --out my-organism")
def organism_build(
    name: Annotated[
        str, typer.Argument(help="organism, organism-split, organism-unasked, first, first-split.")
    ] = "organism",
    knob: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, on or off; repeatable. tolerance, safety_words, rules, alignment, unasked, letter_code, "
            "varied_benign."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the weights [organism-weights/NAME].")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train an embedded model from its micro-world (up to 40 minutes on two cores).

    A build that was stopped goes on when the same command is given again.
    """
    from casa_mech.organism import build
    from casa_mech.organism.premises import PRESETS

    check_choice("NAME", name, tuple(PRESETS))
    target = out or Path("organism-weights") / name
    premises = PRESETS[name].changed(knob or ())
    _print_build(build(name, out=target, premises=premises, seed=seed)["build"], name, target, as_json)


def _print_build(record: dict[str, Any], name: str, target: Path, as_json: bool) -> None:
    show({"name": name, "out": str(target), **record}, as_json)


@command(organism_app, "card", example="casa-mech organism card organism-split --n 300 --json")
def organism_card(
    name: Annotated[str, typer.Argument(help="organism, organism-split or the folder of a built one.")] = "organism",
    n: Annotated[int, typer.Option(min=1, help="Draws for each row.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Folder for card.json and card.md [current folder].")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure what an embedded model can do on fresh draws, with intervals."""
    from casa_mech.organism import card

    target = out or Path()
    rows = card(name, n=n, seed=seed, out=target)["rows"]
    show({"name": name, "seed": seed, "out": str(target), "rows": rows}, as_json)
