"""What is known of an organism before any gate is trained on it: the predictors of a gate's transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from casa_mech.attacks import apply_attack
from casa_mech.draws import Draw
from casa_mech.judging.stats import auroc_interval
from casa_mech.omni import Omni
from casa_mech.organism.premise_rows import PROBE_PENALTY, SURFACES, header_states
from casa_mech.organism.wording import MICRO_WORLD
from casa_mech.organism.world import Split, default_world
from casa_mech.queries import Query
from probes.linear.mean_differences import mean_differences

CARD_MEASURES = ("probe", "probe_from_text", "tolerance", "attack_success", "answers_benign")
"""Predictors that the card has measured."""
PREDICTOR_COLUMNS = ("surface", "measure", "topics", "n", "value", "low", "high")


def predictor_table(omni: Omni, card: Mapping[str, Any], n: int, seed: int) -> pd.DataFrame:
    """`PREDICTOR_COLUMNS` of the base model, all states at the last token of the assistant's header.

    `CARD_MEASURES` are the card's own rows; the probes of surfaces that it leaves out are fitted and judged as its.
    `shrinkage` and `cosine`: see `probes.linear.mean_differences`. Intervals are 95 %, of the states by bootstrap over
    topics.

    Args:
        omni: without a gate.
        card: its card.
        n: requests of both labels on each surface; half of them on seen topics, half on held-out ones.
        seed: of the requests and the bootstrap.
    """
    rows = [
        {name: row[name] for name in ("surface", "measure", "n", "value", "low", "high")} | {"topics": row["split"]}
        for row in {**_by_place(card["rows"]), **_by_place(card["premises"])}.values()
        if row["measure"] in CARD_MEASURES
    ]
    halves: tuple[Split, Split] = ("seen", "held_out")
    seen, held_out = (default_world().requests(n // 2, Draw.PROBING + seed, None, half, half) for half in halves)
    states = {surface: _states(omni, [*seen, *held_out], surface, seed) for surface in SURFACES}
    harmful = np.array([query.label == "harmful" for query in [*seen, *held_out]])
    topics = [str(query.meta["topic"]) for query in [*seen, *held_out]]
    with_probe = {row["surface"] for row in rows if row["measure"] == "probe"}
    for surface in (name for name in SURFACES if name not in with_probe):
        rows += _probe_rows(states, surface, len(seen), harmful, topics, seed)
    for surface in SURFACES:
        for measure, estimate in mean_differences(states["text"], states[surface], harmful, topics, seed).items():
            rows.append(
                {"surface": surface, "measure": measure, "topics": "all", "n": len(topics), **estimate._asdict()}
            )
    return pd.DataFrame(rows, columns=list(PREDICTOR_COLUMNS))


def _states(omni: Omni, requests: Sequence[Query], surface: str, seed: int) -> np.ndarray:
    queries = apply_attack(
        SURFACES[surface], requests, Draw.PROBING + seed, tokenizer=omni.tokenizer, wording=MICRO_WORLD
    )
    return header_states(omni, queries).numpy()


def _probe_rows(
    states: Mapping[str, np.ndarray],
    surface: str,
    n_seen: int,
    harmful: np.ndarray,
    topics: Sequence[str],
    seed: int,
) -> list[dict[str, Any]]:
    """AUROC on held-out topics of a probe fitted on seen ones: on the same surface, and on text."""
    from probes.linear import LogisticProbe

    rows = []
    for measure, source in (("probe", surface), ("probe_from_text", "text")):
        probe = LogisticProbe(C=PROBE_PENALTY, class_weight=None).fit(states[source][:n_seen], harmful[:n_seen])
        scores = probe.decision_function(states[surface][n_seen:]).tolist()
        estimate = auroc_interval(scores, harmful[n_seen:].tolist(), topics[n_seen:], seed).widened()
        where = {"surface": surface, "measure": measure, "topics": "held_out"}
        rows.append({**where, "n": len(scores), **estimate._asdict()})
    return rows


def _by_place(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(row["measure"], row["surface"], row["split"]): row for row in rows}
