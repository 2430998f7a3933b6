"""`casa-mech compare`: every defence against every attack, with what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from casa_mech.cli.app import app, note
from casa_mech.cli.checks import check_backend, check_files
from casa_mech.cli.options import BenignData, Json, ModelOptions, command, parse_values
from casa_mech.cli.printing import show
from casa_mech.errors import InputError
from casa_mech.limits import GREATEST_SEED


@dataclass(frozen=True)
class GridOptions:
    """Rows and columns of the grid."""

    title: ClassVar[str] = "Grid"

    defenses: Annotated[
        str | None, typer.Option(help="Names with commas between; NAME+safety-prompt adds the prompt [all of them].")
    ] = None
    attacks: Annotated[
        str | None, typer.Option(help="Names with commas between [the study's, multi-turn and split].")
    ] = None
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of training and draws, as in 0,1,2 [0 to 4; ablations 0 to 2].")
    ] = None
    n: Annotated[int | None, typer.Option(min=1, help="Requests in each cell [200].")] = None
    queries_config: Annotated[
        Path | None,
        typer.Option(help="YAML file of sets, judge and training set, in place of --attacks and --n."),
    ] = None
    ablations: Annotated[bool, typer.Option("--ablations", help="The second grid: CASA with one thing changed.")] = (
        False
    )
    axes: Annotated[
        str | None,
        typer.Option(help="Of the second grid: prompt, form, rule, query, layer, positions, beta, size [all]."),
    ] = None
    timing_rounds: Annotated[int | None, typer.Option(min=0, help="Rounds of timing, 0 for none [3].")] = None


@dataclass(frozen=True)
class TrainedOptions:
    """How the rows that need it are trained."""

    title: ClassVar[str] = "Training"

    examples: Annotated[int | None, typer.Option(min=4, help="Training examples [2000].")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each training [200].")] = None
    benign: BenignData = None
    train_option: Annotated[
        list[str] | None, typer.Option(help="Option of every supervised training, NAME=VALUE; repeatable.")
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given. InputError for one that is no NAME=VALUE."""
        named = {"n_examples": self.examples, "max_steps": self.steps, "benign": self.benign}
        return _given({**named, **parse_values(self.train_option, "--train-option")})


@dataclass(frozen=True)
class CellOptions:
    """How the replies of a cell are generated."""

    title: ClassVar[str] = "Replies"

    batch_size: Annotated[int | None, typer.Option(min=1, help="Queries in one forward [64, or the file's].")] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Upper bound on a reply's tokens [24, or the file's].")
    ] = None


@command(
    app,
    example="casa-mech compare --defenses none,casa,coca --attacks plain,image --n 50 --out runs/small   At full size:"
    "  casa-mech compare --example > paper.yaml, then  casa-mech compare --model Qwen/Qwen2.5-Omni-3B --queries-config "
    "paper.yaml",
)
def compare(
    out: Annotated[
        Path | None, typer.Option(help="Folder, which grows from call to call [runs/compare-MODEL].")
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print a file for --queries-config: the paper's table.")
    ] = False,
    as_json: Json = False,
    grid: GridOptions = GridOptions(),
    training: TrainedOptions = TrainedOptions(),
    cells: CellOptions = CellOptions(),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Every defence against every attack on one model: attack success, over-refusal, cost, tests against CASA.

    Each cell is kept in --out under the hash of what determines it and is never computed twice. Tables are in summary
    there, figures with their numbers in figures. CoCA's alpha is chosen on calibration requests.
    """
    if example:
        from casa_mech.compare.config import example as shipped

        typer.echo(shipped(), nl=False)
        return
    model.check()
    if grid.axes is not None and not grid.ablations:
        raise InputError("--axes is of the second grid: give --ablations too, or leave it out")
    seeds, trained = _seeds(grid.seeds), training.given()
    if grid.queries_config is not None:
        check_files([grid.queries_config], "--queries-config")
    check_backend()
    from casa_mech.compare.command import Request
    from casa_mech.compare.command import compare as run
    from casa_mech.reports.comparison import draw

    generation = _given({"batch_size": cells.batch_size, "max_new_tokens": cells.max_new_tokens})
    request = Request(
        model=model.model, defenses=_names("--defenses", grid.defenses), attacks=_names("--attacks", grid.attacks),
        seeds=seeds, n=grid.n, config=grid.queries_config, ablations=grid.ablations,
        axes=_names("--axes", grid.axes), training=trained,
        generation=generation, rounds=grid.timing_rounds, device=model.device, dtype=model.dtype,
    )  # fmt: skip
    result = run(request, out, note=note, draw=draw)
    show(result if as_json else _readable(result), as_json)


def _readable(result: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison for a reader: rates and costs, the tests, and where the rest is."""
    from casa_mech.judging.estimate import Estimate

    root = Path(result["out"])
    tests = [
        {
            "defense": row["defense"],
            "metric": row["metric"],
            "n": row["n"],
            "rate": row["value"],
            row["against"]: row["value_against"],
            "difference": Estimate(row["difference"], row["low"], row["high"]).text(".3f"),
            "p": row["p"],
            "p (Holm)": row["p_holm"],
        }
        for row in result["against_casa"]
    ]
    cells = f"{result['cells']['computed']} computed, {result['cells']['found']} found"
    return {
        "model": result["model"],
        "judge": result["judge"],
        "seeds": result["seeds"],
        "cells": f"{cells}; n in the smallest: {result['n_cell']}",
        "defenses (percent with 95 % intervals)": [
            {name: value for name, value in row.items() if name != "model"} for row in result["defenses"]
        ],
        "alpha of CoCA, chosen on calibration requests": result["alpha"],
        "differences from CASA (shares with 95 % intervals, paired tests)": tests,
        "published": result["published"]["note"],
        "seconds": result["seconds"],
        "out": result["out"],
        "tables": sorted(str(path.relative_to(root)) for path in root.glob("summary/*")),
        "figures": [str(Path(path).relative_to(root)) for path in result["figures"]],
    }


def _names(option: str, text: str | None) -> list[str]:
    """The names in an option's value; none where it was not given. InputError for a value without any name."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:
        raise InputError(f"{option} is empty: give names with commas between, or leave it out for the default")
    return names


def _seeds(text: str | None) -> list[int]:
    try:
        seeds = [int(name) for name in _names("--seeds", text)]
    except InputError:
        raise
    except ValueError:
        raise InputError(f"--seeds {text}: write whole numbers with commas between, as in 0,1,2") from None
    if any(not 0 <= seed <= GREATEST_SEED for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text}: give each seed once, from 0 to {GREATEST_SEED}")
    return seeds


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
