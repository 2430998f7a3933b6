"""`casa-mech judge run` and `agreement`: another judge on stored replies, and how far a judge agrees with people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casa_mech.cli.app import Device, Dtype, Json, Seed, app, show

judge_app = typer.Typer(help="Judge stored replies again, and compare a judge with people.", no_args_is_help=True)
app.add_typer(judge_app, name="judge")


@judge_app.command(
    epilog="Example:  casa-mech judge run --replies results --judge yes-no --backend openai --judge-model NAME "
    "--out judged  (the key is read from OPENAI_API_KEY)"
)
def run(
    replies: Annotated[Path, typer.Option(help="Table of replies, or a folder of casa-mech evaluate.")],
    judge: Annotated[str, typer.Option(help="micro-world, keyword, classifier, yes-no, strong-reject, five-point, "
                                            "refusal, or a rubric's .json file.")],
    out: Annotated[Path, typer.Option(help="Folder for verdicts and rates; a stopped run in it is continued.")],
    backend: Annotated[str, typer.Option(help="Of rubrics: local, openai (and compatible) or anthropic.")] = "local",
    judge_model: Annotated[str, typer.Option(help="The judging model: hub id, directory, or the API's name.")] = "",
    base_url: Annotated[str, typer.Option(help="Address of the API, https://host/v1 [the vendor's].")] = "",
    key_env: Annotated[str, typer.Option(help="Environment variable of the key [the vendor's usual one].")] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    tries: Annotated[int, typer.Option(min=1, help="Requests for one reply before the judge counts as down.")] = 6,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds without an answer.")] = 60.0,
    input_price: Annotated[float | None, typer.Option(help="Dollars for a million input tokens.")] = None,
    output_price: Annotated[float | None, typer.Option(help="Dollars for a million output tokens.")] = None,
    positive: Annotated[list[str] | None, typer.Option(help="A classifier's label that means success.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="A classifier's least probability.")] = 0.5,
    prompt_column: Annotated[str, typer.Option(help="Column of requests.")] = "prompt",
    reply_column: Annotated[str, typer.Option(help="Column of replies.")] = "reply",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many replies.")] = None,
    retry_undecided: Annotated[bool, typer.Option(help="Ask again where the verdict was undecided.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Of a local judge.")] = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Judge replies that are stored; nothing is generated, and verdicts that are stored are not asked for again."""
    from casa_mech.judging import load_judge
    from casa_mech.study.rejudge import judge_replies

    http: dict[str, Any] = {
        "base_url": base_url, "key_env": key_env, "concurrency": concurrency, "tries": tries, "timeout": timeout,
        "input_price": input_price, "output_price": output_price,
    }  # fmt: skip
    local: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
    chosen = load_judge(judge, backend, judge_model, positive=positive or (), threshold=threshold, **local, **http)
    columns: dict[str, Any] = {"prompt_column": prompt_column, "reply_column": reply_column}
    found = judge_replies(
        replies, chosen, out, **columns, limit=limit, retry_undecided=retry_undecided, seed=seed, progress=True
    )
    show(found, as_json)


@judge_app.command(
    epilog="Example:  casa-mech judge agreement labels.csv --judge outcome --human ann --human ben --positive complied"
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
    from casa_mech.study.rejudge import judge_agreement

    found = judge_agreement(file, judge, human, positive=positive or (), level=level, cluster=cluster, seed=seed)
    show(found, as_json)
