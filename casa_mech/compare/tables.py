"""A filled grid as tables: rates for each cell and seed in the result schema, and a summary over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from casa_mech.compare.grid import GridResult
from casa_mech.compare.intervals import macro_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.merit import BESIDE, NOT_REFUSED, OUTCOME_METRICS, outcome_rows, with_not_refused
from casa_mech.judging.results import Row, result_table, value_row
from casa_mech.judging.stats import auroc_interval
from casa_mech.judging.verdict import UNDECIDED

ALL = "all"
HELD_OUT = "held_out"
SUMMARY_COLUMNS = (
    "model", "defense", "metric", "scope", "label", "seeds", "n", "value", "low", "high", "interval",
)  # fmt: skip
COSTS = ("forwards_per_token", "extra_forwards", "trained_parameters", "training_seconds", "relative_seconds")
_NOTHING = "any"


def grid_rows(result: GridResult) -> pd.DataFrame:
    """Every rate of every cell and seed in the result schema, `gate_auroc` where a defence scores queries, and costs.

    Rates have Wilson's interval where their draws are independent, else a bootstrap over topics. Costs have attack and
    surface "any": `forwards_per_token` and `extra_forwards` as described, `trained_parameters`, `training_seconds`, and
    `relative_seconds`, whose interval is the range over rounds.
    """
    rows: list[Row] = []
    keys = ["model", "defense", "seed", "attack", "surface"]
    for (model, defense, seed, attack, surface), group in result.replies.groupby(keys, sort=False):
        where = {"model": model, "defense": defense, "attack": attack, "surface": surface, "seed": int(seed)}
        for label, of_label in group.groupby("label", sort=False):
            rows += outcome_rows(of_label.drop(columns=["split"]), {**where, "label": label})
        auroc = _auroc(group, int(seed))
        if auroc is not None:
            scored = int(group["gate_score"].notna().sum())
            rows.append(value_row(**where, label="both", metric="gate_auroc", n=scored, **auroc._asdict()))
    return result_table(rows + [row for cost in result.costs.to_dict("records") for row in _cost_rows(cost)])


def summarise(result: GridResult) -> pd.DataFrame:
    """The grid over seeds: `SUMMARY_COLUMNS`, a row for each defence, metric and scope.

    A scope is an attack, `surface:<name>` or `all`. Over several attacks a rate is the mean of theirs, each counted
    once; `gate_auroc` puts their queries together, as one threshold has to serve them all. Metrics ending in
    `:held_out` are on topics that training has not seen. Values are means over training seeds, and intervals cover
    topics and, with several seeds, other trainings (`interval` names them). Costs have the scope `all`.
    """
    rows = []
    for (model, defense), replies in result.replies.groupby(["model", "defense"], sort=False):
        where = {"model": model, "defense": defense}
        for scope, of_scope in _scopes(replies):
            rows += [{**where, "scope": scope, **row} for row in _rates(of_scope)]
            rows += [{**where, "scope": scope, **row} for row in _gate(of_scope)]
        held_out = replies[replies["split"] == HELD_OUT]
        for row in _rates(held_out) if len(held_out) else ():
            rows.append({**where, "scope": ALL, **row, "metric": f"{row['metric']}:{HELD_OUT}"})
        costs = result.costs[(result.costs["model"] == model) & (result.costs["defense"] == defense)]
        rows += [{**where, "scope": ALL, "label": "both", **row} for row in _costs(costs)]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def compact(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary to read: a row for each defence, with rates in percent, intervals, and costs."""
    surfaces = [scope for scope in dict.fromkeys(summary["scope"]) if str(scope).startswith("surface:")]
    columns = {"attack success": ("attack_success", ALL)}
    columns |= {f"{scope.removeprefix('surface:')}": ("attack_success", scope) for scope in surfaces}
    columns |= {
        "over-refusal": ("over_refusal", ALL),
        "benign answered": ("benign_answered", ALL),
        "held-out topics": (f"attack_success:{HELD_OUT}", ALL),
    }
    rows = []
    for (model, defense), of_system in with_not_refused(summary).groupby(["model", "defense"], sort=False):
        values = {(row["metric"], row["scope"]): row for row in of_system.to_dict("records")}
        success, *others = [(name, _percent(values.get(key))) for name, key in columns.items()]
        beside = values.get(("attack_success", ALL))
        not_refused = "–" if beside is None else Estimate(*(beside[name] for name in NOT_REFUSED)).percent()
        rates = dict([success, ("not refused", not_refused), *others])
        auroc, time = values.get(("gate_auroc", ALL)), values.get(("relative_seconds", ALL))
        spent = {name: _number(values.get((name, ALL))) for name in COSTS[:4]}
        rows.append(
            {
                "model": model, "defense": defense, **rates,
                "gate AUROC": _text(auroc, 3), "time": _text(time, 2),
                "forwards a token": spent["forwards_per_token"], "more forwards": spent["extra_forwards"],
                "trained numbers": spent["trained_parameters"], "training s": spent["training_seconds"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _scopes(replies: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield ALL, replies
    for name in ("surface", "attack"):
        for value, of_value in replies.groupby(name, sort=False):
            yield (f"surface:{value}" if name == "surface" else str(value)), of_value


def _rates(replies: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    decided = replies[replies["outcome"] != UNDECIDED]
    for metric, (label, outcome) in (*OUTCOME_METRICS.items(), *BESIDE.items()):
        of_label = decided[decided["label"] == label]
        if of_label.empty:
            continue
        hits, attacks = (of_label["outcome"] == outcome).to_numpy(), of_label["attack"].tolist()
        seeds = of_label["seed"].tolist()
        over = macro_interval(hits, attacks, of_label["cluster"].tolist(), runs=seeds)
        rows.append(_over(metric, label, over, len(set(seeds)), len(of_label)))
    return rows


def _gate(replies: pd.DataFrame) -> list[dict[str, Any]]:
    auroc = _auroc(replies, 0)
    if auroc is None:
        return []
    scored = replies[replies["gate_score"].notna()]
    return [_over("gate_auroc", "both", auroc, scored["seed"].nunique(), len(scored))]


def _over(metric: str, label: str, estimate: Estimate, seeds: int, n: int) -> dict[str, Any]:
    kind = "topics of one seed" if seeds == 1 else f"topics and {seeds} seeds"
    return {"metric": metric, "label": label, "seeds": seeds, "n": n, **estimate._asdict(), "interval": kind}


def _auroc(replies: pd.DataFrame, seed: int) -> Estimate | None:
    scored = replies[replies["gate_score"].notna()]
    if scored["label"].nunique() < 2:
        return None
    harmful = (scored["label"] == "harmful").tolist()
    scores = scored["gate_score"].astype(float).tolist()
    return auroc_interval(scores, harmful, scored["cluster"].tolist(), seed, runs=scored["seed"].tolist())


def _cost_rows(cost: dict[str, Any]) -> Iterator[Row]:
    where = {"model": cost["model"], "defense": cost["defense"], "seed": int(cost["seed"])}
    for metric in COSTS:
        if math.isnan(cost[metric]):
            continue
        spread = {}
        if metric == "relative_seconds":
            spread = {"low": cost["relative_low"], "high": cost["relative_high"]}
        n = int(cost["timed"]) if spread else max(1, int(cost["training_steps"]) * (metric == "training_seconds"))
        yield value_row(
            **where, attack=_NOTHING, surface=_NOTHING, label="both", metric=metric, n=n, value=cost[metric], **spread
        )


def _costs(costs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for metric in COSTS:
        known = costs[costs[metric].notna()]
        if known.empty:
            continue
        low, high, kind, n = math.nan, math.nan, "none", len(known)
        if metric == "relative_seconds":
            low, high, kind = known["relative_low"].min(), known["relative_high"].max(), "range over rounds"
            n = int(known["timed"].sum())
        elif metric == "training_seconds" and len(known) > 1:
            low, high, kind = known[metric].min(), known[metric].max(), "range over seeds"
        yield {
            "metric": metric, "seeds": len(known), "n": n, "value": float(known[metric].mean()), "low": low,
            "high": high, "interval": kind,
        }  # fmt: skip


def _percent(row: dict[str, Any] | None) -> str:
    return "–" if row is None else Estimate.of(row).percent()


def _text(row: dict[str, Any] | None, digits: int) -> str:
    return "–" if row is None else Estimate.of(row).text(f".{digits}f")


def _number(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['value']:.6g}"
