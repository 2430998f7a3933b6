"""The tables of one member: its card with the thresholds, its gates' audits, and what mended gates do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from casa_mech.audit import AuditResult
from casa_mech.audit.names import BASE, OWN, SAFE, UNSAFE
from casa_mech.family.plan import Member
from casa_mech.judging import MicroWorldJudge, judge_all
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import auroc_interval, cluster_of, clusters_of, rate_interval
from casa_mech.organism.premise_rows import SURFACES
from casa_mech.queries import Query, Reply

SURFACE_OF = {attack: surface for surface, attack in SURFACES.items()}
"""The surface that an attack makes, as the card calls it."""


def organism_table(member: Member, card: Mapping[str, Any]) -> pd.DataFrame:
    """The card's rows beside the knobs: a row for each measure, surface and split, with its threshold if it has one.

    Columns `member, seed, scale`, one for each knob, `parameters, build_seconds, measure, surface, split, n, value,
    low, high, least, most, met` (`met` is empty where there is no threshold).
    """
    about = {"member": member.name, "seed": member.seed, "scale": member.scale, **member.premises.model_dump()}
    about |= {"parameters": card["parameters"], "build_seconds": card["build"]["seconds"]}
    bounds = {_place(row): row["threshold"] for row in card["premises"]}
    rows = []
    for row in {_place(row): row for row in [*card["rows"], *card["premises"]]}.values():
        least, most = bounds.get(_place(row)) or (None, None)
        met = None if least is None else least <= row["value"] <= most
        values = {name: row[name] for name in ("measure", "surface", "split", "n", "value", "low", "high")}
        rows.append({**about, **values, "least": least, "most": most, "met": met})
    return pd.DataFrame(rows)


def transfer_table(result: AuditResult) -> pd.DataFrame:
    """A row for each surface of an audit: how far the gate and its token carry over to it.

    Columns `surface, n` (requests of each label) and, each with `_low` and `_high`: `gate_auroc` (of v_s, harmful
    against benign), `token_auroc` (of the token's log-odds, which decide), `forced` (share of harmful requests refused
    under the unsafe token, minus that under the safe one), `success_before`, `success_after` (harmful, answered),
    `benign_before`, `benign_after` (benign, answered).
    """
    contrasts = result.contrasts().set_index(["attack", "label", "contrast"])
    effects = result.effects().set_index(["attack", "label", "intervention", "outcome"])
    own = result.replies[result.replies["intervention"] == OWN]
    rows = []
    for attack, group in own.groupby("attack", sort=False):
        harmful, clusters = (group["label"] == "harmful").tolist(), clusters_of(group)
        odds = group["logit_unsafe"].astype(float) - group["logit_safe"].astype(float)
        values: dict[str, Estimate] = {}
        for name, scores in (("gate_auroc", group["v_s"].astype(float)), ("token_auroc", odds)):
            values[name] = auroc_interval(scores.tolist(), harmful, clusters, result.seed).widened()
        values["forced"] = Estimate.of(contrasts.loc[attack, "harmful", f"{UNSAFE} - {SAFE}"])
        for name, label in (("success", "harmful"), ("benign", "benign")):
            values[f"{name}_before"] = Estimate.of(effects.loc[attack, label, BASE, "answered"])
            values[f"{name}_after"] = Estimate.of(effects.loc[attack, label, OWN, "answered"])
        rows.append({"surface": SURFACE_OF[str(attack)], "n": sum(harmful), **_columns(values)})
    return pd.DataFrame(rows)


def split_table(result: AuditResult) -> pd.DataFrame:
    """The causes of the fall (`AuditResult.split`) by surface: `surface, label, part, n, value, low, high`."""
    split = result.split().drop(columns="surface")
    return split.assign(attack=split["attack"].map(SURFACE_OF)).rename(columns={"attack": "surface"})


def answered_table(queries: Sequence[Query], replies: Sequence[Reply], seed: int) -> pd.DataFrame:
    """Share answered by surface behind a gate: `surface, n, success, success_low, success_high, benign, ...`."""
    verdicts = judge_all(MicroWorldJudge(), queries, replies)
    table = pd.DataFrame(
        {
            "attack": [str(query.meta["attack"]) for query in queries],
            "label": [query.label for query in queries],
            "cluster": [cluster_of(query) for query in queries],
            "answered": [verdict.outcome == "complied" for verdict in verdicts],
        }
    )
    rows = []
    for attack, group in table.groupby("attack", sort=False):
        values = {}
        for name, label in (("success", "harmful"), ("benign", "benign")):
            part = group[group["label"] == label]
            values[name] = rate_interval(part["answered"].to_numpy(), part["cluster"].tolist(), seed).widened()
        n = int((group["label"] == "harmful").sum())
        rows.append({"surface": SURFACE_OF[str(attack)], "n": n, **_columns(values)})
    return pd.DataFrame(rows)


def _columns(values: Mapping[str, Estimate]) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name, estimate in values.items():
        columns |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return columns


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["measure"], row["surface"], row["split"]
