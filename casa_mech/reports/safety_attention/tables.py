"""Notebook 07: tables of the gate's decisions and of what they rest on; what takes long is kept in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from casa_mech.casa import Casa
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.stats import cluster_of, rate_interval
from casa_mech.reports.safety_attention.patch_tables import patched_surfaces
from casa_mech.study.study import LABELS, Study
from casa_mech.trace.sites import Site
from probes.activations import Activations, collect
from probes.gate.attribution import Attribution, attribute_token_difference
from probes.gate.calibration import Reliability, reliability
from probes.gate.patching import ablate_directions
from probes.gate.removal import PERMUTED, minimal_sets, sets_table
from probes.gate.safety_attention import AttentionMap, attention_maps, attention_shares, cosine_table, gate_directions
from probes.linear.control_directions import equal_variance_directions, permuted_differences
from probes.linear.estimators import LogisticProbe
from probes.linear.refusal_direction import RefusalDirection, find_refusal_direction

CONTROL_DIRECTIONS = 10
"""Directions of each control of an ablation."""
RUNS = ("nothing", "refusal direction", "gated model's own", "random, equal variance", "of permuted labels")
"""What is ablated. The random directions are those along which states vary as much as along the refusal direction; the
last are made as the gated model's own, with labels that are dealt anew."""


def v_s_by_attack(study: Study) -> pd.DataFrame:
    """The gate on every attack of both labels: `attack, label, query_id, topic, split, v_s, unsafe`."""

    def build() -> pd.DataFrame:
        casa = study.casa()
        tables = [_readings(study, casa, attack, label) for attack in study.benign_attacks for label in LABELS]
        return pd.concat(tables, ignore_index=True)

    return study.gate_table("v_s-by-attack", {"n": study.sizes.n_probe}, build)


def maps_by_surface(study: Study, n: int) -> dict[str, list[AttentionMap]]:
    """Safety attention over `n` harmful and `n` benign requests of each surface."""
    casa = study.casa()
    return {
        surface: attention_maps(
            casa, [query for label in LABELS for query in study.queries(attack, label, n, Draw.GATE_MEASUREMENT)]
        )
        for surface, attack in study.surfaces.items()
    }


def examples(maps: Mapping[str, Sequence[AttentionMap]]) -> list[AttentionMap]:
    """One harmful and one benign request of each surface to draw: those with the median v_s of their class."""
    medians = []
    for of_surface in maps.values():
        for label in LABELS:
            ranked = sorted((entry for entry in of_surface if entry.label == label), key=lambda entry: entry.v_s)
            medians.append(ranked[len(ranked) // 2])
    return medians


def example_data(maps: Sequence[AttentionMap]) -> pd.DataFrame:
    """The numbers of the drawn examples: `query_id, label, topic, v_s, position, token, role, weight`."""
    tables = [
        pd.DataFrame(
            {
                "query_id": attention.query_id,
                "label": attention.label,
                "topic": attention.topic,
                "v_s": attention.v_s,
                "position": np.arange(len(attention.tokens)),
                "token": attention.tokens,
                "role": attention.roles,
                "weight": attention.weights,
            }
        )
        for attention in maps
    ]
    return pd.concat(tables, ignore_index=True)


def share_data(maps: Mapping[str, Sequence[AttentionMap]], seed: int) -> pd.DataFrame:
    """Share of safety attention by `surface, span, label`, with intervals; a span that a request lacks has none."""
    rows = []
    for surface, of_surface in maps.items():
        shares = attention_shares(of_surface)
        for (label, span), group in shares.groupby(["label", "span"], sort=False):
            mean, low, high = mean_interval(group["share"].to_numpy(), group["topic"].tolist(), seed, limits=(0.0, 1.0))
            where = {"surface": surface, "span": span, "label": label, "n": len(group)}
            rows.append({**where, "mean": mean, "low": low, "high": high, "even": group["even"].mean()})
    return pd.DataFrame(rows)


def removals(study: Study, n: int) -> pd.DataFrame:
    """Minimal sets of the harmful requests that the gate flags, `n` requests at most a surface: the columns of
    `sets_table` and `surface`; empty where the gate flags none."""

    def build() -> pd.DataFrame:
        casa = study.casa()
        tables = []
        for surface, attack in patched_surfaces(study).items():
            queries = study.queries(attack, "harmful", study.sizes.n_probe, Draw.GATE_MEASUREMENT)
            flagged = [
                query
                for query, reply in zip(queries, casa.decide(queries), strict=True)
                if reply.safety_token == "unsafe"
            ][:n]
            if flagged:
                tables.append(sets_table(minimal_sets(casa, flagged, seed=study.settings.seed)).assign(surface=surface))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    key = {"n": n, "flagged_of": study.sizes.n_probe, "control": PERMUTED}
    return study.gate_table("minimal-sets", key, build)


def states_for_directions(study: Study, sites: Sequence[Site]) -> Activations:
    """Plain requests' states at the gate's position, the gate's LoRA at work; drawn apart from what is measured."""
    study.casa()
    queries = [
        query for label in LABELS for query in study.queries("plain", label, study.sizes.n_probe, Draw.GATE_DIRECTIONS)
    ]
    return collect(study.omni(), queries, sites, "last", study.sizes.batch_size)


def refusals(study: Study) -> tuple[str, ...]:
    """Refusals in the words of the plan."""
    return study.data.refusals


def refusal_direction(study: Study) -> RefusalDirection:
    """The refusal direction of the model before CASA (its gate disabled), found by the rules of docs/method.md §5.4.

    Where no candidate meets them all it is the best one; where the model refuses too little to tell, the difference in
    means before the middle block. `rules_met` says so. It is found on requests of its own.
    """
    casa, size = study.casa(), study.sizes.n_probe
    n_val = max(2, min(32, size // 5))
    sizes = {"n_train": min(128, size - n_val), "n_val": n_val, "seed": study.settings.seed}

    def build(folder: Path) -> None:
        harmful, harmless = (study.queries("plain", label, size, Draw.GATE_DIRECTIONS) for label in LABELS)
        with casa.disabled() as omni:
            try:
                direction = find_refusal_direction(
                    omni, harmful, harmless, refusals(study), **sizes, relax=True
                ).direction
            except InputError:
                middle = omni.n_layers // 2
                states = collect(omni, [*harmful, *harmless], [f"pre.{middle}"], "last", study.sizes.batch_size)
                direction = RefusalDirection(_mean_difference(states, f"pre.{middle}"), middle, 0, rules_met=False)
        direction.save(folder / "direction.safetensors", {"fingerprint": study.omni().fingerprint()})

    key = {**study.model_key(), **sizes}
    folder = study.folder.artifact("analysis", "refusal-direction", key, build)
    return RefusalDirection.load(folder / "direction.safetensors", study.omni().fingerprint())


def _mean_difference(activations: Activations, site: str) -> np.ndarray:
    """Difference in means, float64 [d_model], harmful minus benign."""
    states = activations.states[site].astype(np.float64)
    gap: np.ndarray = states[activations.harmful].mean(axis=0) - states[~activations.harmful].mean(axis=0)
    return gap


def cosines(study: Study) -> pd.DataFrame:
    """Cosines of the gate's directions (see `cosine_table`) with the difference in means and a logistic probe at the
    gate's layer, and with the model's own refusal direction, as the final norm weighs it."""
    casa = study.casa()
    layer, refusal = casa.config.layer, refusal_direction(study)
    activations = states_for_directions(study, [layer])
    norm = study.omni().norm.weight.detach().float().cpu().numpy()
    states = activations.states[str(layer)]
    others = {
        "logistic probe": LogisticProbe().fit(states, activations.harmful).coef_[0],
        f"refusal direction before block {refusal.layer}": refusal.unit * (norm if layer == "norm" else 1.0),
    }
    topics = list(activations.topics)
    return cosine_table(gate_directions(casa), others, states, activations.harmful, topics, study.settings.seed)


def ablation(study: Study, n: int) -> pd.DataFrame:
    """Decisions of the gate with a direction projected out of every write to the residual stream.

    The directions: the refusal direction that the model had before CASA, the one that separates the classes in the
    gated model after its middle block, and `CONTROL_DIRECTIONS` of each kind of control (`RUNS`). The variance that a
    random direction is matched in is that of the states at the gate's position after the middle block, of both classes.

    Returns:
        The columns of `ablate_directions`, `surface` and `run`, one of `RUNS`.
    """

    def build() -> pd.DataFrame:
        casa, middle = study.casa(), study.omni().n_layers // 2
        activations, refusal = states_for_directions(study, [middle]), refusal_direction(study).unit
        states, harmful = activations.states[str(middle)].astype(np.float64), activations.harmful
        rng = np.random.default_rng(study.settings.seed)
        random = equal_variance_directions(states, refusal, CONTROL_DIRECTIONS, rng)
        permuted = permuted_differences(states, harmful, list(activations.topics), CONTROL_DIRECTIONS, rng)
        directions = np.vstack([refusal, _mean_difference(activations, str(middle)), random, permuted])
        runs = [RUNS[0], *RUNS[1:3], *RUNS[3:4] * CONTROL_DIRECTIONS, *RUNS[4:] * CONTROL_DIRECTIONS]
        tables = [
            ablate_directions(casa, study.queries(attack, label, n, Draw.GATE_MEASUREMENT), directions).assign(
                surface=surface
            )
            for surface, attack in patched_surfaces(study).items()
            for label in LABELS
        ]
        table = pd.concat(tables, ignore_index=True)
        return table.assign(run=[runs[index + 1] for index in table["ablated"]])

    return study.gate_table("ablation", {"n": n, "controls": CONTROL_DIRECTIONS, "runs": list(RUNS)}, build)


def ablation_data(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Share of requests given the unsafe token, by surface, label and run.

    `least` and `most`: the lowest and highest share under one of a run's directions.
    """
    rows = []
    for (surface, label, run), group in table.groupby(["surface", "label", "run"], sort=False):
        share = rate_interval(group["unsafe"].to_numpy(), group["topic"].tolist(), seed)
        where = {"surface": surface, "label": label, "run": run, "n": group["query_id"].nunique()}
        each = group.groupby("ablated")["unsafe"].mean()
        rows.append({**where, **share._asdict(), "least": each.min(), "most": each.max()})
    return pd.DataFrame(rows)


def attribution(study: Study, n: int) -> Attribution:
    """The token difference of `n` harmful and `n` benign plain requests in its parts."""
    queries = [query for label in LABELS for query in study.queries("plain", label, n, Draw.GATE_MEASUREMENT)]
    return attribute_token_difference(study.casa(), queries)


def calibration(study: Study, readings: pd.DataFrame, attacks: Sequence[str] = ()) -> dict[str, Reliability]:
    """Calibration of v_s on each attack, as many harmful as benign requests."""
    calibrations = {}
    for attack in attacks or study.benign_attacks:
        rows = readings[readings["attack"] == attack]
        harmful, topics = (rows["label"] == "harmful").to_numpy(), rows["topic"].tolist()
        calibrations[attack] = reliability(rows["v_s"].to_numpy(), harmful, topics, seed=study.settings.seed)
    return calibrations


def curve_data(calibrations: Mapping[str, Reliability]) -> pd.DataFrame:
    """The reliability curves as one table, with each attack's scores."""
    tables = []
    for attack, entry in calibrations.items():
        scores = {name: getattr(entry, name)[0] for name in ("brier", "ece", "bias")}
        tables.append(entry.curve.assign(attack=attack, **scores))
    return pd.concat(tables, ignore_index=True)


def _readings(study: Study, casa: Casa, attack: str, label: Any) -> pd.DataFrame:
    queries = study.queries(attack, label, study.sizes.n_probe, Draw.GATE_MEASUREMENT)
    replies = casa.decide(queries)
    return pd.DataFrame(
        {
            "attack": attack,
            "label": label,
            "query_id": [query.id for query in queries],
            "topic": [str(cluster_of(query)) for query in queries],
            "split": [query.meta.get("split", "") for query in queries],
            "v_s": [reply.v_s for reply in replies],
            "unsafe": [reply.safety_token == "unsafe" for reply in replies],
        }
    )
