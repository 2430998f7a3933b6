"""What is known of an organism before any gate is trained on it: the predictors of a gate's transfer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from casa_mech.attacks import apply_attack
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import bootstrap_interval, members
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import auroc_interval
from casa_mech.omni import Omni
from casa_mech.organism.premise_rows import PROBE_PENALTY, SURFACES, header_states
from casa_mech.organism.wording import MICRO_WORLD
from casa_mech.organism.world import Split, default_world
from casa_mech.queries import Query

CARD_MEASURES = ("probe", "probe_from_text", "tolerance", "attack_success", "answers_benign")
"""Predictors that the card has measured."""
PREDICTOR_COLUMNS = ("surface", "measure", "topics", "n", "value", "low", "high")
RESAMPLES = 1000


def predictor_table(omni: Omni, card: Mapping[str, Any], n: int, seed: int) -> pd.DataFrame:
    """`PREDICTOR_COLUMNS` of the base model, all states at the last token of the assistant's header.

    `CARD_MEASURES` are the card's own rows; the probes of surfaces that it leaves out are fitted and judged as its.
    `shrinkage` and `cosine`: see `mean_differences`. Intervals are 95 %, of the states by bootstrap over topics.

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


def mean_differences(
    text: np.ndarray, other: np.ndarray, harmful: np.ndarray, topics: Sequence[str], seed: int = 0
) -> dict[str, Estimate]:
    """How the difference of class means on a surface compares with that on text, by `shrinkage` and `cosine`.

    `shrinkage` is the ratio of their lengths (1: as long as text's), `cosine` that of the angle between them. Both
    surfaces show the same requests, every feature is divided by its spread on text, and the lengths are of the means
    without sampling noise: the topics that were drawn part two classes a little even where harm does not, and the same
    topics do so on every surface, so what the spread between topics explains is taken off the squared lengths and the
    inner product. A surface on which nothing is left has shrinkage 0 and no cosine (NaN).

    Args:
        text, other: states [request, d_model] of the same requests.
        harmful: bool [request].
        topics: of each request; what a bootstrap draws.
        seed: of the bootstrap.
    """
    spread = text.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    sides = [np.asarray(states, dtype=np.float64) / scale for states in (text, other)]
    sides = [states - states.mean(axis=0) for states in sides]
    noise = _noise(sides, harmful, members(topics, len(topics)))

    def products(weights: np.ndarray, times: int) -> np.ndarray:
        """Squared length on text, squared length there, inner product, [3, resample]; noise taken off `times`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            parts = [weights * label / (weights * label).sum(axis=1, keepdims=True) for label in (harmful, ~harmful)]
            first, second = ((parts[0] - parts[1]) @ states for states in sides)
        raw = [(first * first).sum(axis=1), (second * second).sum(axis=1), (first * second).sum(axis=1)]
        return np.stack(raw) - times * noise[:, None]

    estimates = {}
    for name, statistic in (("shrinkage", _shrinkage), ("cosine", _cosine)):
        value = float(statistic(products(np.ones((1, len(topics))), 1))[0])
        # A resample has the sampling noise twice: once drawn, once drawn again.
        again = partial(_of_resample, statistic, products)
        try:
            low, high = bootstrap_interval(again, topics, len(topics), seed, resamples=RESAMPLES)
            estimates[name] = Estimate(value, low, high).widened()
        except InputError:  # hardly a resample in which text parts the classes
            estimates[name] = Estimate(value, np.nan, np.nan)
    return estimates


def _of_resample(
    statistic: Callable[[np.ndarray], np.ndarray],
    products: Callable[[np.ndarray, int], np.ndarray],
    weights: np.ndarray,
) -> np.ndarray:
    return statistic(products(weights, 2))


def _noise(sides: Sequence[np.ndarray], harmful: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """What the drawn topics alone add to the three products of `mean_differences`: [text², other², inner product]."""
    total = np.zeros(3)
    for label in (harmful, ~harmful):
        present = np.unique(topic[label])
        shares = (topic[None, label] == present[:, None]).astype(np.float64) / max(1, label.sum())
        # How far each topic draws its class's mean: sums over its requests, [topic, d_model].
        first, second = (shares @ (states[label] - states[label].mean(axis=0)) for states in sides)
        correction = len(present) / max(1, len(present) - 1)
        total += correction * np.array([(first * first).sum(), (second * second).sum(), (first * second).sum()])
    return total


def _shrinkage(products: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.clip(products[1], 0, None) / products[0]
    return np.where(products[0] > 0, np.sqrt(np.abs(ratio)), np.nan)


def _cosine(products: np.ndarray) -> np.ndarray:
    positive = (products[0] > 0) & (products[1] > 0)
    size = np.sqrt(np.where(positive, products[0] * products[1], 1.0))
    return np.where(positive, np.clip(products[2] / size, -1, 1), np.nan)


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
