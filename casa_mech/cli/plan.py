"""`casa-mech plan`: what a study is about, checked before anything runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from casa_mech.cli.app import app
from casa_mech.cli.options import Json, command
from casa_mech.cli.printing import show
from casa_mech.errors import InputError

plan_app = typer.Typer(help="What a study is about: prompts, attacks, training set, judge.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")


@command(plan_app, "check", example="casa-mech plan check english")
def plan_check(
    plan: Annotated[str, typer.Argument(help="english or a .yaml file.")],
    as_json: Json = False,
) -> None:
    """Read every set of a plan and print counts, overlaps and what notebooks would leave out; no model is loaded."""
    from casa_mech.plan.check import checked_plan

    show(checked_plan(plan, lambda line: print(line, file=sys.stderr)), as_json)


@command(plan_app, "show", example="casa-mech plan show english > study.yaml")
def plan_show(plan: Annotated[str, typer.Argument(help="The name of a shipped plan.")] = "english") -> None:
    """Print a shipped plan, to be changed."""
    from casa_mech.plan.records import WORLD, plan_names, plan_text

    if plan not in plan_names() or plan == WORLD:
        named = ", ".join(name for name in plan_names() if name != WORLD)
        raise InputError(f"no plan {plan!r} to print; there are {named}")
    print(plan_text(plan), end="")
