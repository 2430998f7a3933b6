"""`casa-mech organism build` and `card`: the embedded models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from casa_mech.cli.app import Json, Seed, check_choice, organism_app, show


@organism_app.command("build", epilog="Example:  casa-mech organism build organism --out my-organism")
def organism_build(
    name: Annotated[str, typer.Argument(help="organism or organism-split.")] = "organism",
    out: Annotated[Path | None, typer.Option(help="Folder for the weights [organism-weights/NAME].")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train an embedded model from its micro-world (up to 40 minutes on two cores)."""
    from casa_mech.organism import build

    check_choice("NAME", name, ("organism", "organism-split"))
    target = out or Path("organism-weights") / name
    build(name, out=target, seed=seed)
    show({"name": name, "out": str(target), "seed": seed}, as_json)


@organism_app.command("card", epilog="Example:  casa-mech organism card organism-split --n 300 --json")
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
    found = card(name, n=n, seed=seed, out=target)
    rows = found["rows"] if isinstance(found, dict) else json.loads((target / "card.json").read_text())["rows"]
    show({"name": name, "seed": seed, "out": str(target), "rows": rows}, as_json)
