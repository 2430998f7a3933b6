"""`casa-mech compare`: every defence against every attack, with what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casa_mech.cli.app import Device, Dtype, Json, Model, app, note, parse_options, show
from casa_mech.errors import InputError


@app.command(
    epilog="Example:  casa-mech compare --defenses none,casa,coca --attacks plain,image --n 50 --out runs/small   "
    "At full size:  casa-mech compare --example > paper.yaml, then  casa-mech compare --model Qwen/Qwen2.5-Omni-3B "
    "--queries-config paper.yaml"
)
def compare(
    model: Model = "organism",
    defenses: Annotated[str, typer.Option(help="Names with commas between; NAME+safety-prompt adds the prompt "
                                               "[all of them].")] = "",
    attacks: Annotated[str, typer.Option(help="Names with commas between [the study's, multi-turn and split].")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of training and draws, as in 0,1,2 [0].")] = "",
    n: Annotated[int | None, typer.Option(min=1, help="Requests in each cell [200].")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder, which grows from call to call "
                                                  "[runs/compare-MODEL].")] = None,
    queries_config: Annotated[Path | None, typer.Option(help="YAML file of public sets, judge and training set.")] = None,  # noqa: E501
    example: Annotated[bool, typer.Option("--example", help="Print such a file: the paper's table.")] = False,
    ablations: Annotated[bool, typer.Option("--ablations", help="The second grid: CASA with one thing changed.")] = False,  # noqa: E501
    axes: Annotated[str, typer.Option(help="Of the second grid: prompt, form, rule, query, layer, positions, beta, "
                                           "size [all].")] = "",
    examples: Annotated[int | None, typer.Option(min=4, help="Training examples [2000; ablations 600].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each training [200; ablations 60].")] = None,
    train_option: Annotated[list[str] | None, typer.Option(help="Option of every supervised training, NAME=VALUE; "
                                                                "repeatable.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Queries in one forward [64, or the file's].")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Upper bound on a reply [24, or the file's].")] = None,  # noqa: E501
    timing_rounds: Annotated[int | None, typer.Option(min=0, help="Rounds of timing, 0 for none [3].")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Every defence against every attack on one model: attack success, over-refusal, cost, tests against CASA.

    Each cell is kept in --out under the hash of what determines it and is never computed twice. Tables are in summary
    and tables there, figures with their numbers in figures.
    """
    if example:
        from casa_mech.compare.config import example as shipped

        typer.echo(shipped(), nl=False)
        return
    from casa_mech.compare.command import Request
    from casa_mech.compare.command import compare as run
    from casa_mech.reports.comparison import draw

    training = {"n_examples": examples, "max_steps": steps, **parse_options(train_option)}
    generation = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    request = Request(
        model=model, defenses=_names(defenses), attacks=_names(attacks), seeds=_seeds(seeds), n=n,
        config=queries_config, ablations=ablations, axes=_names(axes), training=_given(training),
        generation=_given(generation), rounds=timing_rounds, device=device, dtype=dtype,
    )  # fmt: skip
    show(run(request, out, note=note, draw=draw), as_json)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise InputError(f"--seeds {text}: write whole numbers with commas between, as in 0,1,2") from None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
