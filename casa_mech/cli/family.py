"""`casa-mech family`: the map of when a gate trained on text carries over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casa_mech.cli.app import app, note
from casa_mech.cli.options import Json, command
from casa_mech.cli.printing import show
from casa_mech.errors import InputError


@command(app, example="casa-mech family --out runs/family   A part of it: --members all,unasked-off")
def family(
    out: Annotated[Path | None, typer.Option(help="Folder of the map, which grows from call to call.")] = None,
    plan: Annotated[str, typer.Option(help="default, smoke, or a YAML file of members and sizes.")] = "default",
    members: Annotated[str, typer.Option(help="Names with commas between [all of the plan's].")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Members at a time, each in a process of one thread.")] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the weights of organisms and gates.")] = False,
    mends: Annotated[bool, typer.Option(help="Also try what mends a gate, on the plan's members for it.")] = True,
    example: Annotated[bool, typer.Option("--example", help="Print the default plan: a file for --plan.")] = False,
    as_json: Json = False,
) -> None:
    """Build organisms that differ in one premise, read them, then train and audit gates on each (about three hours).

    The same command after a stop goes on, and several may share a folder. Tables are in --out; what predicts a gate's
    transfer is written before the gate is trained, and plan.json says in which order things ran.
    """
    if example:
        from casa_mech.family.plan import plan_text

        typer.echo(plan_text("default"), nl=False)
        return
    if out is None:
        raise InputError("--out: give the folder of the map")
    from casa_mech.family.plan import read_plan

    chosen = read_plan(plan)
    names = tuple(name.strip() for name in members.split(",") if name.strip())
    chosen.named(names)
    from casa_mech.family.command import Request
    from casa_mech.family.command import family as run

    show(run(Request(chosen, out, names, jobs, keep, mends), progress=True, note=note), as_json)
