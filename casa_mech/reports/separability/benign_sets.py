"""Notebook 01: harm told from several benign sets, by a probe, by words and length alone, and by the gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.draws import Draw
from casa_mech.figures import MARKERS, SERIES, error_bars, named_rows, style, titled
from casa_mech.identity import key_digest
from casa_mech.judging.gate_aurocs import mean_auroc
from casa_mech.judging.hypothesis import label_permutation_test
from casa_mech.judging.stats import auroc_interval, aurocs_by_labels, cluster_of
from casa_mech.queries import Query
from casa_mech.reports.claim import Claim
from casa_mech.reports.separability.baselines import LENGTH, WORDS, baselines
from casa_mech.reports.separability.tables import depth_site
from casa_mech.study import Study
from casa_mech.study.study import ProbePositions
from probes.activations import collect
from probes.linear.estimators import LogisticProbe

PROBE, GATE = "probe", "v_s"
NAMES = {PROBE: "probe", WORDS: "words alone", LENGTH: "length alone", GATE: "CASA's v_s"}
FIGURE = "benign_sets"
POSITIONS: ProbePositions = "mean"
"""Where the probe reads: nearest to what safety attention reads."""
_SHARE = 4
"""Training prompts of each label for one that is judged."""


def benign_set_data(study: Study) -> pd.DataFrame:
    """AUROC of each of `NAMES` on the harmful probing set against each benign one, as plain text.

    The probe reads the mean over the prompt, after the block where two thirds of them have run; it, and the classifier
    of words (TF-IDF), are fitted on the plan's training prompts, the gates are trained on them.

    Returns:
        Columns `benign_set, score, n, value, low, high, p` (of AUROC 0.5, labels permuted over topics). Of the gates
        the mean, with the interval over topics and gates.
    """
    n, seed = study.sizes.n_probe, study.settings.seed
    harmful = study.queries("plain", "harmful", n, Draw.PROBING)
    sets = {name: study.data.benign_set(name, n, Draw.PROBING + seed) for name in study.data.benign_sets}
    key = {**study.model_key(), "n": n, "positions": POSITIONS, "share": _SHARE}

    def build() -> pd.DataFrame:
        return _scores(study, [*harmful, *(query for queries in sets.values() for query in queries)])

    scores = study.table("analysis", "benign-sets", key, build).set_index("query_id")
    key["gates"] = [key_digest(study.gate_key(gate=gate)) for gate in study.gate_numbers]
    readings = study.table("analysis", "benign-sets-gates", key, lambda: _readings(study, harmful, sets))
    rows = []
    for name, queries in sets.items():
        both = [*harmful, *queries]
        labels, topics = [query.label == "harmful" for query in both], [cluster_of(query) for query in both]
        where = {"benign_set": name, "n": len(both)}
        for score in (PROBE, WORDS, LENGTH):
            values = scores.loc[[query.id for query in both], score].to_numpy()
            rows.append({**where, "score": score, **_auroc(values, labels, topics, seed)})
        of_set = readings[(readings["benign_set"] == name)]
        auroc, p = mean_auroc(of_set, seed)
        estimate = dict(zip(("value", "low", "high"), auroc, strict=True))
        rows.append({**where, "score": GATE, **estimate, "p": p})
    return pd.DataFrame(rows)


def _scores(study: Study, queries: Sequence[Query]) -> pd.DataFrame:
    """Scores of probe, words and length for each query: `query_id` and their names."""
    training = study.data.texts(2 * _SHARE * study.sizes.n_probe, Draw.PROBE_TRAINING + study.settings.seed)
    site = depth_site(study.activations(POSITIONS))
    with study.without_gate() as omni:
        fitted = collect(omni, training, [int(site)], POSITIONS, study.sizes.batch_size)
        read = collect(omni, list(queries), [int(site)], POSITIONS, study.sizes.batch_size)
    probe = LogisticProbe().fit(fitted.states[site], fitted.harmful)
    prompts = [query.text for query in queries]
    return pd.DataFrame(
        {
            "query_id": [query.id for query in queries],
            PROBE: probe.decision_function(read.states[site]),
            **{name: score(prompts) for name, score in baselines(training).items()},
        }
    )


def _readings(study: Study, harmful: Sequence[Query], sets: dict[str, list[Query]]) -> pd.DataFrame:
    """v_s of every gate on all prompts: `benign_set` and what `mean_auroc` reads."""
    tables = []
    for gate, casa in study.gates():
        v_s = {
            query.id: reply.v_s
            for queries in (harmful, *sets.values())
            for query, reply in zip(queries, casa.decide(list(queries)), strict=True)
        }
        for name, queries in sets.items():
            both = [*harmful, *queries]
            columns: dict[str, Any] = {
                "query_id": [query.id for query in both],
                "label": [query.label for query in both],
                "topic": [str(cluster_of(query)) for query in both],
                "v_s": [v_s[query.id] for query in both],
            }
            tables.append(
                pd.DataFrame(columns).assign(benign_set=name, surface="text", gate_seed=study.gate_seed(gate))
            )
    return pd.concat(tables, ignore_index=True)


def _auroc(values: np.ndarray, labels: Sequence[bool], topics: Sequence[Any], seed: int) -> dict[str, float]:
    def away(dealt: np.ndarray) -> np.ndarray:
        return np.abs(aurocs_by_labels(values, dealt) - 0.5)

    estimate = auroc_interval(values.tolist(), list(labels), list(topics), seed).widened()
    return {**estimate._asdict(), "p": label_permutation_test(away, np.array(labels), topics, seed)}


def benign_set_claim(study: Study, data: pd.DataFrame) -> Claim:
    """How much of the probe's separation holds on the benign set where it holds least, beside words and length."""
    rows = data.set_index(["score", "benign_set"])
    probe = rows.loc[PROBE]
    least, most = probe["value"].idxmin(), probe["value"].idxmax()
    weakest = probe.loc[least]
    numbers = "; ".join(
        f"{name} " + " / ".join(f"{rows.loc[(score, name), 'value']:.2f}" for score in NAMES) for name in probe.index
    )
    return Claim(
        f"{study.title}: against {most} a probe tells harm with AUROC {probe.at[most, 'value']:.2f}, against {least} "
        f"with {weakest['value']:.2f}",
        f"One harmful set, fitted on other prompts. By benign set, {' / '.join(NAMES.values())}: {numbers}. What words "
        f"or length alone reach says nothing of harm. {len(study.gate_numbers)} gate(s).",
        FIGURE, int(weakest["n"]), float(weakest["value"]), float(weakest["low"]), float(weakest["high"]),
        "labels permuted over prompts, 999 draws", float(weakest["p"]),
        "on fresh prompts of this benign set the interval holds 0.5, or lies elsewhere",
    )  # fmt: skip


def plot_benign_sets(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """AUROC by benign set of probe, words, length and gates, with 95 % intervals.

    Args:
        data: of `benign_set_data`. title: the claim. caption: what stands behind it.
    """
    names = list(dict.fromkeys(data["benign_set"]))
    with style():
        figure, axes = plt.subplots(figsize=(8, 1.6 + 0.6 * len(names)))
        for number, (score, label) in enumerate(NAMES.items()):
            rows = data[data["score"] == score].set_index("benign_set").reindex(names)
            shift = 0.18 * (number - (len(NAMES) - 1) / 2)
            error_bars(axes, rows, np.arange(len(names)) + shift, SERIES[number], MARKERS[number], label, scale=1)
        axes.axvline(0.5, color="grey", linewidth=0.8)
        axes.set(xlabel="AUROC, harmful against this benign set", xlim=(-0.02, 1.02))
        named_rows(axes, names)
        return titled(figure, title, f"{caption} Bars: 95 % intervals.", legend_of=(axes,))
