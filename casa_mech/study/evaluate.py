"""Queries through a model, with or without its gate: a table of replies, and the rates in the result schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from casa_mech.errors import InputError
from casa_mech.files import writing_folder
from casa_mech.judging import KeywordJudge, MicroWorldJudge, auroc_interval, rate_row, value_row, write_table
from casa_mech.judging.results import Row
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.omni.media import load_audio, load_image
from casa_mech.queries import AudioPart, ImagePart, Query, Reply

if TYPE_CHECKING:
    from casa_mech.casa import Casa
    from casa_mech.casa.generation import Order
    from casa_mech.judging import Judge

PRETRAINED, CASA = "pretrained", "CASA"
UNLABELLED = "unlabelled"
RESAMPLES = 200
"""Bootstrap draws for an AUROC's interval: enough for two digits, and a table holds dozens."""
REPLY_COLUMNS = (
    "model", "defense", "attack", "surface", "label", "split", "topic", "source", "query_id", "prompt", "prefill",
    "reply", "outcome", "judge", "safety_token", "v_s", "logit_safe", "logit_unsafe", "tokens", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """replies: one row a query, `REPLY_COLUMNS`. rows: the rates, one result row each."""

    replies: pd.DataFrame
    rows: list[Row]


def evaluate(
    omni: Omni,
    casa: Casa | None,
    queries: Sequence[Query],
    judge: Judge | None = None,
    *,
    defense: str | None = None,
    settings: GenerationSettings | None = None,
    order: Order = "A",
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Generate, judge and count.

    Args:
        omni: the model; with `casa=None`, whatever is attached to it takes part all the same.
        casa: the gate, or None for the model as it is.
        queries: any mixture of text, image and audio.
        judge: default `judge_for(queries)`.
        defense: name in the tables; default `CASA` or `pretrained`.
        settings: how replies are generated.
        order: for queries with a prefill, "A": the gate, then attacker tokens; "B": attacker tokens, then the gate.
        seed: for the intervals of AUROCs.
        progress: whether to draw a bar.

    Raises:
        InputError: no queries, or media that cannot be read; nothing has been generated then.
    """
    if not queries:
        raise InputError("there are no queries to evaluate: give at least one")
    check_media(queries)
    judge = judge or judge_for(queries)
    settings = settings or GenerationSettings()
    defense = defense or (PRETRAINED if casa is None else CASA)
    if casa is None:
        replies = omni.generate(queries, settings, progress=progress)
    else:
        replies = casa.generate(queries, settings, order=order, progress=progress)
    table = _reply_table(omni.source, defense, queries, replies, judge)
    return Evaluation(table, result_rows(table, seed))


def judge_for(queries: Iterable[Query]) -> Judge:
    """The exact judge when every query is of the micro-world, else the keyword judge (an upper bound)."""
    known = all("compliance" in query.meta and "topic" in query.meta for query in queries)
    return MicroWorldJudge() if known else KeywordJudge()


def check_media(queries: Iterable[Query]) -> None:
    """Open every picture and clip that is a file, so that a bad one stops a run before it begins.

    Raises:
        InputError: the first that is missing, unreadable, empty or silent, with its query's id.
    """
    for query in queries:
        for part in query.parts:
            if isinstance(part, ImagePart) and isinstance(part.image, Path):
                load_image(part, f"query {query.id}")
            elif isinstance(part, AudioPart) and isinstance(part.audio, Path):
                load_audio(part, f"query {query.id}")


def result_rows(replies: pd.DataFrame, seed: int = 0) -> list[Row]:
    """Rates with Wilson intervals for each model, defense, attack, surface and label, and AUROCs of v_s.

    Metrics: `attack_success` (harmful, complied), `over_refusal` (benign, refused), `benign_answered` (benign,
    complied), `flagged` (given the unsafe token), each also by the topic's split where known (`flagged:held_out`);
    `gate_auroc` (v_s, harmful against benign, of the same attack; interval by bootstrap over topics).
    """
    rows: list[Row] = []
    keys = ["model", "defense", "attack", "surface"]
    for (model, defense, attack, surface), group in replies.groupby(keys, sort=False, dropna=False):
        where: dict[str, Any] = {"model": model, "defense": defense, "attack": attack, "surface": surface, "seed": seed}
        for label, part in group.groupby("label", sort=False):
            rows += _rates(part, {**where, "label": label})
        scored = group[group["v_s"].notna() & (group["label"] != UNLABELLED)]
        if scored["label"].nunique() == 2:
            clusters = scored["topic"].where(scored["topic"] != "", scored["query_id"])
            harmful = (scored["label"] == "harmful").to_numpy()
            scores = scored["v_s"].to_numpy(dtype=float)
            value, low, high = auroc_interval(list(scores), list(harmful), list(clusters), seed, resamples=RESAMPLES)
            interval: Row = {"value": value, "low": low, "high": high}
            rows.append(value_row(**where, label="both", metric="gate_auroc", n=len(scored), **interval))
    return rows


def save_evaluation(evaluation: Evaluation, folder: Path | str) -> None:
    """Write `replies.parquet`, `replies.csv`, `results.parquet` and `results.csv` into `folder`, whole or not at all.

    Raises:
        RunError: the folder holds other files, or cannot be written to.
    """
    with writing_folder(folder) as temporary:
        evaluation.replies.to_parquet(temporary / "replies.parquet")
        evaluation.replies.to_csv(temporary / "replies.csv", index=False)
        for suffix in ("parquet", "csv"):
            write_table(evaluation.rows, temporary / f"results.{suffix}")


def _rates(part: pd.DataFrame, where: dict[str, Any]) -> list[Row]:
    counted: dict[str, pd.Series] = {}
    if where["label"] == "harmful":
        counted["attack_success"] = part["outcome"] == "complied"
    elif where["label"] == "benign":
        counted["over_refusal"] = part["outcome"] == "refused"
        counted["benign_answered"] = part["outcome"] == "complied"
    if part["safety_token"].notna().all():
        counted["flagged"] = part["safety_token"] == "unsafe"
    rows = []
    for metric, hits in counted.items():
        rows.append(rate_row(**where, metric=metric, k=int(hits.sum()), n=len(hits)))
        for split in ("seen", "held_out"):
            chosen = hits[part["split"] == split]
            if len(chosen):
                rows.append(rate_row(**where, metric=f"{metric}:{split}", k=int(chosen.sum()), n=len(chosen)))
    return rows


def _reply_table(
    model: str, defense: str, queries: Sequence[Query], replies: Sequence[Reply], judge: Judge
) -> pd.DataFrame:
    records = []
    for query, reply in zip(queries, replies, strict=True):
        verdict = judge.judge(query, reply)
        fields = reply.model_dump(include={"safety_token", "v_s", "logit_safe", "logit_unsafe", "tokens", "seconds"})
        records.append(
            {
                "model": model,
                "defense": defense,
                "attack": query.meta.get("attack", "none"),
                "surface": query.meta.get("surface", "+".join(sorted(query.modalities))),
                "label": query.label or UNLABELLED,
                "split": query.meta.get("split", ""),
                "topic": query.meta.get("topic", ""),
                "source": query.source,
                "query_id": query.id,
                "prompt": query.text,
                "prefill": query.prefill,
                "reply": reply.text,
                "outcome": verdict.outcome,
                "judge": verdict.judge,
                **fields,
            }
        )
    return pd.DataFrame(records, columns=list(REPLY_COLUMNS))
