"""`casa-mech judge run` and `agreement`: another judge on stored replies, and how far a judge agrees with people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casa_mech.cli.app import app
from casa_mech.cli.checks import check_device, check_dtype
from casa_mech.cli.options import Device, Dtype, Json, JudgeName, JudgeOptions, Seed, command
from casa_mech.cli.printing import show

judge_app = typer.Typer(help="Judge stored replies again, and compare a judge with people.", no_args_is_help=True)
app.add_typer(judge_app, name="judge")


@command(
    judge_app,
    example="casa-mech judge run --replies results --judge yes-no --backend openai --judge-model NAME --out judged  "
    "(the key is read from OPENAI_API_KEY)",
)
def run(
    replies: Annotated[Path, typer.Option(help="Table of replies, or a folder of casa-mech evaluate.")],
    judge: JudgeName,
    out: Annotated[Path, typer.Option(help="Folder for verdicts and rates; a stopped run in it is continued.")],
    prompt_column: Annotated[str, typer.Option(help="Column of requests.")] = "prompt",
    reply_column: Annotated[str, typer.Option(help="Column of replies.")] = "reply",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many replies.")] = None,
    retry_undecided: Annotated[bool, typer.Option(help="Ask again where the verdict was undecided.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    judging: JudgeOptions = JudgeOptions(),
    batch_size: Annotated[int, typer.Option(min=1, help="Replies in one forward of a local judge.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Judge replies that are stored; nothing is generated, and verdicts that are stored are not asked for again."""
    check_device(device)
    check_dtype(dtype)
    from casa_mech.evaluation.rejudge import judge_replies

    summary = judge_replies(
        replies, judging.load(judge, device, dtype, batch_size), out, prompt_column=prompt_column,
        reply_column=reply_column, limit=limit, retry_undecided=retry_undecided, seed=seed, progress=True,
    )  # fmt: skip
    show(summary, as_json)


@command(
    judge_app,
    example="casa-mech judge agreement labels.csv --judge outcome --human ann --human ben --positive complied",
)
def agreement(
    file: Annotated[Path, typer.Argument(help="Table with the judge's and people's labels side by side.")],
    human: Annotated[list[str], typer.Option(help="Column of a person's labels; repeatable.")],
    judge: Annotated[str, typer.Option(help="Column of the judge's labels.")] = "outcome",
    positive: Annotated[list[str] | None, typer.Option(help="Label to set against all others; repeatable.")] = None,
    level: Annotated[str, typer.Option(help="Of Krippendorff's alpha: nominal, ordinal, interval.")] = "nominal",
    cluster: Annotated[str, typer.Option(help="Column that says which rows are one draw.")] = "",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Cohen's kappa, Krippendorff's alpha and the confusion of a judge with people, with bootstrap intervals."""
    from casa_mech.evaluation.rejudge import judge_agreement

    measured = judge_agreement(file, judge, human, positive=positive or (), level=level, cluster=cluster, seed=seed)
    show(measured, as_json)
