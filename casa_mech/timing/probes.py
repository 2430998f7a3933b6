"""Collecting activations against a bare forward, their memory, and all-layer probes against a scikit-learn loop.

Both sides of a ratio do the same work in one process and take turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from casa_mech.attacks import apply_attack
from casa_mech.omni import Omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.timing.paired import Side, time_ratio
from probes.activations import Activations, ActivationStore, collect
from probes.linear.validation import PENALTIES, auroc_of, cross_validate, make_folds

QUERIES, BATCH = 300, 32
SLOWDOWN = 1 / 0.95
"""Most that collecting may take of a bare forward's time: 0.95 of its throughput."""
SHARE_OF_LOOP = 1 / 20
"""Most that the batched probes may take of the loop's time."""
AGREEMENT = 0.005
"""Most that an AUROC may differ between the two."""
GROWTH_MB = 64.0
"""Most that the process may grow over the last nine tenths of the batches."""


def measure_probes(omni: Omni, repeats: int = 5, batches: int = 1000) -> dict[str, Any]:
    """Ratios and memory of collecting and probing, on requests of the micro-world.

    Returns:
        `collect`: seconds of `ActivationStore.collect` at every block and the final norm, last position, of requests
        as text, picture and speech, written to disk, against encoding them and a bare Hugging Face forward. `memory`:
        megabytes that the process grew by over the last nine tenths of so many batches. `probes`: seconds of nested
        five-fold logistic probes at every site against a loop over scikit-learn's pipeline on the same folds and
        penalties, and the largest difference between their AUROCs.
    """
    queries = _requests(QUERIES)
    mixed = [query for attack in ("plain", "image", "audio") for query in apply_attack(attack, queries, seed=1)]
    return {
        "collect": time_ratio(("store", "bare"), _collecting(omni, mixed), repeats, omni.device, SLOWDOWN),
        "memory": measure_memory(omni, batches),
        "probes": _probing(omni, collect(omni, queries, positions="last"), repeats),
    }


def measure_memory(omni: Omni, batches: int = 1000, batch_size: int = 4) -> dict[str, float]:
    """Megabytes by which the process grew while `batches` batches went into a store, from a tenth of them on."""
    tenth = max(1, batches // 10)
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(10):
            queries = _requests(tenth * batch_size, seed=100 + number)
            ActivationStore.collect(
                omni, queries, None, "last", Path(folder) / "store", batch_size=batch_size, shard_mb=1
            )
            sizes.append(_resident_mb())
    grown = round(sizes[-1] - sizes[0], 1)
    return {"batches": 10 * tenth, "first_mb": round(sizes[0], 1), "grown_mb": grown, "allowed_mb": GROWTH_MB}


def sklearn_loop(states: np.ndarray, labels: np.ndarray, clusters: np.ndarray, seed: int = 0) -> np.ndarray:
    """What `cross_validate` does, one scikit-learn pipeline after the other: held-out scores [site, row].

    Args:
        states: [site, row, d_model]. labels: bool [row]. clusters: str [row]. seed: of the folds.
    """
    splits = make_folds(labels, clusters, seed=seed)
    scores = np.empty(states.shape[:2])
    for site, rows in enumerate(states):
        for number, train in enumerate(splits.training()):
            quality = [
                np.mean([_inner(rows, labels, train, held, penalty) for held in splits.inner[number]])
                for penalty in PENALTIES
            ]
            best = len(PENALTIES) - 1 - int(np.argmax(quality[::-1]))
            decision = _pipeline(PENALTIES[best]).fit(rows[train], labels[train]).decision_function(rows)
            scores[site, ~train] = decision[~train] / decision[train].std()
    return scores


def _probing(omni: Omni, activations: Activations, repeats: int) -> dict[str, float]:
    states, labels, topics = activations.stacked(), activations.harmful, activations.topics
    with threadpool_limits(1):
        sides: tuple[Side, Side] = (
            lambda: cross_validate(states, labels, topics),
            lambda: sklearn_loop(states, labels, topics),
        )
        measured = time_ratio(("batched", "loop"), sides, repeats, omni.device, SHARE_OF_LOOP)
        (batched,) = cross_validate(states, labels, topics)
        loop = sklearn_loop(states, labels, topics)
    gaps = [
        abs(float(auroc_of(ours, labels)) - roc_auc_score(labels, theirs))
        for ours, theirs in zip(batched.scores, loop, strict=True)
    ]
    gap = {"auroc_difference": round(max(gaps), 5), "allowed_difference": AGREEMENT}
    return {**measured, "times_faster": round(1 / max(measured["ratio"], 1e-9), 1), **gap}


def _collecting(omni: Omni, queries: list[Query]) -> tuple[Side, Side]:
    def store() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ActivationStore.collect(omni, queries, None, "last", Path(folder) / "store", batch_size=BATCH)

    def bare() -> None:
        for group in omni.batches(queries, BATCH):
            batch = omni.encode([queries[place] for place in group], prefill=False)
            with torch.no_grad():
                omni.model(**batch.inputs, use_cache=False)

    return store, bare


def _requests(n: int, seed: int = 1) -> list[Query]:
    return default_world().requests(n, seed=seed)


def _inner(rows: np.ndarray, labels: np.ndarray, train: np.ndarray, held: np.ndarray, penalty: float) -> float:
    model = _pipeline(penalty).fit(rows[train & ~held], labels[train & ~held])
    return float(roc_auc_score(labels[held], model.decision_function(rows[held])))


def _pipeline(penalty: float) -> Pipeline:
    fit = LogisticRegression(C=1 / penalty, max_iter=2000, class_weight="balanced")
    return make_pipeline(StandardScaler(), fit)


def _resident_mb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)
