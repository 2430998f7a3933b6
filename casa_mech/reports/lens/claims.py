"""Notebook 09's claims: each computed from the tables, with its interval, its test and what would refute it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from casa_mech.evaluation.evaluate import CASA
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import label_permutation_test, paired_difference
from casa_mech.judging.results import value_row
from casa_mech.judging.stats import auroc_interval, aurocs_by_labels
from casa_mech.reports.claim import Claim
from casa_mech.reports.lens.tables import LensTables, best_heads
from casa_mech.study import Study
from casa_mech.study.settings import slug

TUNED, PLAIN = "tuned lens", "logit lens"


def depth_claim(study: Study, tables: LensTables, seed: int, draws: int = 999) -> Claim:
    """From which depth on the tokens tell harmful from benign text: chosen on seen topics, judged on others."""
    rows = tables.depth[(tables.depth["lens"] == TUNED) & (tables.depth["surface"] == "text")]
    seen, others = rows[rows["split"] == "seen"], rows[rows["split"] != "seen"]
    last = int(rows["depth"].max())
    first = last
    # The earliest depth from which every deeper one is above chance, the whole interval.
    for depth in range(last, -1, -1):
        if _auroc(seen[seen["depth"] == depth], seed)[1] <= 0.5:
            break
        first = depth
    part = others[others["depth"] == first]
    auroc = _auroc(part, seed)
    end = _auroc(others[others["depth"] == last], seed)[0]
    where = _place(str(part["site"].iloc[0]))
    statement = (
        f"{slug(study.settings.model)}: {where}, the safety tokens tell harmful from benign text on unseen topics with "
        f"AUROC {auroc.text()}; at the end with {end:.2f}"
    )
    return Claim(
        statement, "lens_depth", len(part), *auroc,
        f"labels permuted over topics, {draws} draws", _label_permutation(part, seed, draws),
        "on fresh unseen topics the interval at this depth holds 0.5, or an earlier depth does as well",
    )  # fmt: skip


def quality_claim(study: Study, tables: LensTables, seed: int) -> Claim:
    """What translators fitted on text change, in KL half-way through the model, on pictures and speech."""
    table = tables.quality
    middle = int(table["depth"].max()) // 2
    part = table[(table["depth"] == middle) & table["surface"].isin(["image", "audio"])]
    wide = part.pivot_table(index=["query_id", "topic"], columns="lens", values="kl").reset_index()
    change, p = paired_difference(wide[TUNED], wide[PLAIN], wide["topic"].tolist(), seed)
    means = wide[[PLAIN, TUNED]].mean()
    statement = (
        f"{slug(study.settings.model)}: {_place(str(part['site'].iloc[0]))}, translators fitted on text take the "
        f"lens's KL on pictures and speech\nfrom {means[PLAIN]:.2f} to {means[TUNED]:.2f} nats: a change of "
        + change.text()
    )
    return Claim(
        statement, "lens_quality", len(wide), *change, "paired permutation over topics", p,
        "on fresh pictures and speech the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def head_claim(study: Study, tables: LensTables, seed: int) -> Claim:
    """What the head chosen on seen topics does for the token difference on unseen ones."""
    ((layer, head),) = best_heads(tables.heads, 1)
    rows = tables.heads[(tables.heads["layer"] == layer) & (tables.heads["head"] == head)]
    part = rows[(rows["surface"] == "text") & (rows["split"] != "seen")]
    support, topics = part["support_logit"].to_numpy(), part["topic"].tolist()
    change, p = paired_difference(support, np.zeros_like(support), topics, seed)
    gate = float(part["support_v_s"].mean())
    statement = (
        f"{slug(study.settings.model)}: without head {head} of block {layer}, chosen on seen topics, requests on "
        f"others move\n{change.text()} of token logit from their own side, and {gate:.3f} of v_s"
    )
    return Claim(
        statement, "lens_heads", len(part), *change, "intact and ablated swapped by topic", p,
        "on fresh unseen topics the mean effect's interval holds 0, or a random head does as much",
    )  # fmt: skip


def attention_title(study: Study, data: pd.DataFrame) -> str:
    """The title of the attention figure: where the first of the heads looks on text."""
    first = data.iloc[0]
    part = data[(data["surface"] == "text") & (data["layer"] == first["layer"]) & (data["head"] == first["head"])]
    shares = part[part["role"] == "text"].set_index("label")["value"]
    return (
        f"{slug(study.settings.model)}: from the gate's position, head {first['head']} of block {first['layer']} gives "
        f"{shares['harmful']:.0%} of its attention to the words of harmful text and {shares['benign']:.0%} of benign"
    )


def lens_rows(study: Study, depth: pd.DataFrame, heads: pd.DataFrame) -> list[dict[str, object]]:
    """The figures' values in the result schema; `attack` holds the depth or the head."""
    shared: dict[str, Any] = {"model": study.settings.model, "defense": CASA, "seed": study.settings.seed}
    rows = [
        value_row(
            **shared, attack=f"{row.lens}, depth {row.depth}", surface=row.surface, label=row.label,
            metric=f"lens_{row.measure}", n=row.n, value=row.value, low=row.low, high=row.high,
        )
        for row in depth.itertuples()
    ]  # fmt: skip
    return rows + [
        value_row(
            **shared, attack=f"without head {row.layer}.{row.head}", surface=row.surface, label="both",
            metric=f"head_support_{row.measure}", n=row.n, value=row.mean, low=row.low, high=row.high,
        )
        for row in heads.itertuples()
    ]  # fmt: skip


def _auroc(part: pd.DataFrame, seed: int) -> Estimate:
    harmful = (part["label"] == "harmful").tolist()
    return auroc_interval(part["difference"].tolist(), harmful, part["topic"].tolist(), seed)


def _label_permutation(part: pd.DataFrame, seed: int, draws: int) -> float:
    """Two-sided p of the AUROC."""
    scores, harmful = part["difference"].to_numpy(), (part["label"] == "harmful").to_numpy()
    return label_permutation_test(
        lambda labels: np.abs(aurocs_by_labels(scores, labels) - 0.5), harmful, part["topic"], seed, draws
    )


def _place(site: str) -> str:
    return "before block 0" if site == "embeddings" else f"after block {site}"
