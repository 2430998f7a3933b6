"""Queries through a model, with or without its gate: tables of replies and verdicts, and rates in the result schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from casa_mech.defenses.base import Defense
from casa_mech.display import table_html
from casa_mech.errors import InputError, RunError
from casa_mech.evaluation.reply_parts import BATCHES_A_PART, LEAST_A_PART, ReplyParts
from casa_mech.files import writing
from casa_mech.identity import weights_digest
from casa_mech.judging import KeywordJudge, MicroWorldJudge, Verdict, VerdictStore, judge_all, write_table
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.merit import fpr_row, outcome_rows
from casa_mech.judging.results import Row, value_row
from casa_mech.judging.stats import auroc_difference, auroc_interval, clusters_of, runs_of
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply
from casa_mech.queries.media import check_media
from casa_mech.queries.tables import defused

if TYPE_CHECKING:
    from casa_mech.casa import Casa
    from casa_mech.casa.generation import Order
    from casa_mech.judging import Judge

PRETRAINED, CASA = "pretrained", "CASA"
UNLABELLED = "unlabelled"
PAIRS = ("logit_safe", "logit_unsafe", "raw_logit_safe", "raw_logit_unsafe")
"""The safety tokens' logits in a reply: as the gate rewrites them, and as the language model gives them."""
REPLY_COLUMNS = (
    "model", "defense", "attack", "surface", "label", "split", "topic", "source", "query_id", "prompt", "prefill",
    "reply", "outcome", "judge", "safety_token", "v_s", *PAIRS, "tokens", "seconds", "score", "meta",
)  # fmt: skip
VERDICT_COLUMNS = ("row", "query_id", "judge", "outcome", "score", "reason", "input_tokens", "output_tokens")
PARTS, VERDICTS = "parts", "verdicts.jsonl"
_JUDGED = ("outcome", "judge", "score")


@dataclass(frozen=True)
class Evaluation:
    """The tables of one evaluation."""

    replies: pd.DataFrame
    """One row a query, `REPLY_COLUMNS`; `meta` is the query's, as JSON."""
    rows: list[Row]
    """The rates, one result row each."""
    verdicts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(VERDICT_COLUMNS)))
    """One row a reply, `VERDICT_COLUMNS`; `row` is its place in `replies`."""

    def __repr__(self) -> str:
        return f"Evaluation: {self._system}, {len(self.rows)} rates"

    def _repr_html_(self) -> str:
        shown = ("attack", "surface", "label", "metric", "n")
        rates = [
            {**{name: row[name] for name in shown}, "value [95 % interval]": Estimate.of(row).text()}
            for row in self.rows
        ]
        return table_html(pd.DataFrame(rates), self._system, index=False)

    @property
    def _system(self) -> str:
        systems = " and ".join(
            f"{defense} on {model}" for model, defense in self.replies.groupby(["model", "defense"], sort=False).groups
        )
        return f"{systems}: {len(self.replies)} replies"


def evaluate(
    omni: Omni,
    casa: Casa | Defense | None,
    queries: Sequence[Query],
    judge: Judge | None = None,
    *,
    defense: str | None = None,
    settings: GenerationSettings | None = None,
    order: Order = "gate_first",
    seed: int = 0,
    progress: bool = False,
    store: Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Replies of a system to queries, judged, and the rates over them.

    Args:
        omni: the model; with `casa=None`, whatever is attached to it takes part all the same.
        casa: the gate, any other defence, or None for the model as it is.
        queries: any mixture of text, image and audio.
        judge: default `judge_for(queries)`.
        defense: name in the tables; default `CASA`, the other defence's name, or `pretrained`.
        settings: how replies are generated.
        order: for queries with a prefill, "gate_first": the gate decides before it; "prefill_first": after it (for a
            `Casa`; other defences bring theirs along).
        seed: for the intervals of AUROCs.
        progress: whether to draw a bar.
        store: folder in which replies are kept in parts, and verdicts, while the run is on; the same call after a stop
            goes on from there.
        identity: JSON values that say what the replies of a `Defense` depend on, beside the model's weights and the
            settings. Without it they are not kept. Needless for a `Casa` or the bare model.

    Raises:
        InputError: no queries, media that cannot be read, or a prompt beyond the model's positions; nothing has been
            generated then.
        RunError: the judge is down, or the store cannot be used; what was finished is kept in it.
    """
    if not queries:
        raise InputError("there are no queries to evaluate: give at least one")
    check_media(queries)
    judge = judge or judge_for(queries)
    settings = settings or GenerationSettings()
    omni.check_lengths(queries, settings.system)
    defense = defense or _default_name(casa)
    replies = _replies(omni, casa, queries, settings, order, progress, store, identity)
    verdicts = judge_all(judge, queries, replies, store and VerdictStore(store / VERDICTS), progress=progress)
    table = reply_table(omni.source, defense, queries, replies, verdicts)
    return Evaluation(table, result_rows(table, seed), verdict_table(verdicts))


def _default_name(casa: Casa | Defense | None) -> str:
    if casa is None:
        return PRETRAINED
    return str(getattr(casa, "label", CASA))


def _replies(
    omni: Omni,
    casa: Casa | Defense | None,
    queries: Sequence[Query],
    settings: GenerationSettings,
    order: Order,
    progress: bool,
    store: Path | None,
    identity: Mapping[str, Any] | None,
) -> list[Reply]:
    from casa_mech.casa import Casa

    def generate(group: Sequence[Query], seed: int, bar: bool = False) -> list[Reply]:
        seeded = settings.model_copy(update={"seed": seed})
        if casa is None:
            return omni.generate(group, seeded, progress=bar)
        if isinstance(casa, Casa):
            return casa.generate(group, seeded, order=order, progress=bar)
        return casa.generate(group, seeded, progress=bar)

    if store is None or not (casa is None or isinstance(casa, Casa) or identity):
        return generate(queries, settings.seed, progress)
    modules: list[nn.Module] = [omni.model]
    system: dict[str, Any] = {"system": dict(identity or {}), "settings": settings.model_dump(mode="json")}
    if isinstance(casa, Casa):
        system |= {"casa": casa.config.model_dump(mode="json"), "order": order}
        if casa.calibration.digest:
            system["calibration"] = casa.calibration.digest
        # Rows of their own: two of many thousand in the embedding, a sample of its values would miss them.
        attention = casa.safety_gate.attention
        modules += [casa.parts.tokens.rows, *([attention] if attention is not None else [])]
    parts = ReplyParts(store / PARTS, {**system, "weights": weights_digest(modules)})
    return parts.collect(queries, generate, _groups(omni, settings), settings.seed, progress)


def _groups(omni: Omni, settings: GenerationSettings) -> Callable[[Sequence[Query]], Iterator[list[int]]]:
    # A whole number of batches, so that a stored run has the batches of one that is not stored.
    batches = max(BATCHES_A_PART, -(-LEAST_A_PART // settings.batch_size))
    return lambda queries: omni.batches(queries, settings.batch_size * batches)


def judge_for(queries: Iterable[Query]) -> Judge:
    """The exact judge when every query is of the micro-world, else the keyword judge (an upper bound)."""
    readable = all("compliance" in query.meta and "topic" in query.meta for query in queries)
    return MicroWorldJudge() if readable else KeywordJudge()


def result_rows(replies: pd.DataFrame, seed: int = 0) -> list[Row]:
    """Rates for each model, defense, attack, surface and label, and AUROCs of v_s and of the token's log-odds.

    Metrics: `attack_success` (harmful, complied), `over_refusal` (benign, refused), `benign_answered` (benign,
    complied), all over the replies that the judge decided; `undecided`, the share that it did not decide, and where
    there are any `attack_success_upper` and `over_refusal_upper`, which count them against the system; `flagged` (given
    the unsafe token); `judge_score` (a rubric's mean score). Rates also by the topic's split where known
    (`flagged:held_out`). `gate_auroc` and `gate_fpr_at_95tpr` (v_s, harmful against benign, of the same attack;
    bootstrap over clusters); `token_auroc`, the same of the safety token's log-odds, which decide; `raw_token_auroc`,
    of the log-odds that the language model gives before v_s rewrites them; and `token_auroc_gain`, the former minus the
    latter, on the same resamples. Intervals count requests about one topic as one draw and cover the training runs of
    a gate, see `merit.outcome_rows`.
    """
    rows: list[Row] = []
    keys = ["model", "defense", "attack", "surface"]
    for (model, defense, attack, surface), group in replies.groupby(keys, sort=False, dropna=False):
        where: dict[str, Any] = {"model": model, "defense": defense, "attack": attack, "surface": surface, "seed": seed}
        for label, labelled in group.groupby("label", sort=False):
            rows += outcome_rows(labelled, {**where, "label": label})
        if "v_s" in group:
            rows += _gate_rows(group, {**where, "label": "both"})
    return rows


def _gate_rows(group: pd.DataFrame, where: dict[str, Any]) -> list[Row]:
    labelled = group[group["label"].isin(["harmful", "benign"])]
    rows = _auroc_rows(labelled, labelled["v_s"].astype(float), "gate_auroc", where)
    if rows:
        rows.append(fpr_row(labelled[labelled["v_s"].notna()], where))
    pairs = {
        metric: labelled[f"{prefix}unsafe"].astype(float) - labelled[f"{prefix}safe"].astype(float)
        for metric, prefix in (("token_auroc", "logit_"), ("raw_token_auroc", "raw_logit_"))
        if f"{prefix}unsafe" in labelled
    }
    for metric, log_odds in pairs.items():
        rows += _auroc_rows(labelled, log_odds, metric, where)
    if len(pairs) == 2:
        rows += _gain_rows(labelled, pairs["token_auroc"], pairs["raw_token_auroc"], where)
    return rows


def _gain_rows(labelled: pd.DataFrame, token: pd.Series, raw: pd.Series, where: dict[str, Any]) -> list[Row]:
    """What the gate adds to the raw pair's AUROC: one row, or none where not both labels have both scores."""
    scored = token.notna() & raw.notna()
    rows = labelled[scored]
    if rows["label"].nunique() < 2:
        return []
    harmful, scores = (rows["label"] == "harmful").tolist(), (token[scored].tolist(), raw[scored].tolist())
    gain = auroc_difference(*scores, harmful, clusters_of(rows), where["seed"], runs=runs_of(rows))
    return [value_row(**where, metric="token_auroc_gain", n=len(rows), **gain._asdict())]


def _auroc_rows(labelled: pd.DataFrame, scores: pd.Series, metric: str, where: dict[str, Any]) -> list[Row]:
    """One row, or none where not both labels have a score."""
    scored = labelled[scores.notna()]
    if scored["label"].nunique() < 2:
        return []
    harmful = (scored["label"] == "harmful").tolist()
    clusters, runs = clusters_of(scored), runs_of(scored)
    auroc = auroc_interval(scores.dropna().tolist(), harmful, clusters, where["seed"], runs=runs)
    return [value_row(**where, metric=metric, n=len(scored), **auroc._asdict())]


def save_evaluation(evaluation: Evaluation, folder: Path | str) -> None:
    """Write `replies`, `verdicts` and `results` into `folder`, each as parquet and CSV, each file whole or not at all.

    Replies and verdicts are two tables, so that another judge's verdicts can stand beside the same replies;
    `read_evaluation` puts them together.

    Raises:
        RunError: the folder cannot be written to.
    """
    bare = evaluation.replies.drop(columns=list(_JUDGED))
    for name, table in (("replies", bare), ("verdicts", evaluation.verdicts)):
        write_both(table, Path(folder) / name)
    for suffix in ("parquet", "csv"):
        write_table(evaluation.rows, Path(folder) / f"results.{suffix}")


def write_both(table: pd.DataFrame, path: Path) -> None:
    """Write `table` as `path` with the suffixes .parquet and .csv (see `defused`), each whole or not at all."""
    with writing(path.with_suffix(".parquet")) as temporary:
        table.to_parquet(temporary)
    with writing(path.with_suffix(".csv")) as temporary:
        defused(table).to_csv(temporary, index=False)


def read_evaluation(folder: Path | str) -> pd.DataFrame:
    """The replies in a folder of `save_evaluation` with their verdicts beside them: `REPLY_COLUMNS`.

    A column that an older version did not write is empty.

    Raises:
        RunError: a table is missing or does not belong to the other.
    """
    tables = []
    for name in ("replies", "verdicts"):
        path = Path(folder) / f"{name}.parquet"
        try:
            tables.append(pd.read_parquet(path))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({type(error).__name__}): evaluate again") from None
    replies, verdicts = tables
    if list(verdicts["row"]) != list(range(len(replies))) or list(verdicts["query_id"]) != list(replies["query_id"]):
        raise RunError(f"{folder}: verdicts.parquet does not belong to replies.parquet; evaluate again")
    joined = replies.assign(**{name: verdicts[name] for name in _JUDGED})
    return joined.reindex(columns=list(REPLY_COLUMNS))


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """`VERDICT_COLUMNS` of verdicts on replies, in the order of the replies."""
    records = [{"row": row, **verdict.model_dump()} for row, verdict in enumerate(verdicts)]
    return pd.DataFrame(records, columns=list(VERDICT_COLUMNS)).astype({"score": "float64"})


def reply_table(
    model: str, defense: str, queries: Sequence[Query], replies: Sequence[Reply], verdicts: Sequence[Verdict]
) -> pd.DataFrame:
    """`REPLY_COLUMNS`, one row a query."""
    records = []
    for query, reply, verdict in zip(queries, replies, verdicts, strict=True):
        fields = reply.model_dump(include={"safety_token", "v_s", *PAIRS, "tokens", "seconds"})
        records.append(
            {
                "model": model,
                "defense": defense,
                "attack": query.meta.get("attack", "none"),
                "surface": query.surface,
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
                "score": verdict.score,
                "meta": json.dumps(dict(query.meta)),
                **fields,
            }
        )
    return pd.DataFrame(records, columns=list(REPLY_COLUMNS)).astype({"score": "float64"})
