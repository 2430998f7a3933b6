"""Notebook 07: tables of the gate's decisions and of what they rest on; what takes long is kept in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from casa_mech.attacks import apply_to_pairs
from casa_mech.attacks.seeding import query_rng
from casa_mech.casa import Casa
from casa_mech.casa.casa import REFUSAL
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.judging import MicroWorldJudge
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.stats import rate_interval
from casa_mech.organism.wording import MICRO_WORLD
from casa_mech.organism.world import Topic, default_world
from casa_mech.queries import Query, TextPart
from casa_mech.study.study import BENIGN_ATTACKS, LABELS, SURFACES, Study
from casa_mech.trace.sites import Site
from probes.activations import Activations, collect
from probes.gate.attribution import Attribution, attribute_token_difference
from probes.gate.calibration import Reliability, reliability
from probes.gate.pairs import MatchedPair, aligned_pairs
from probes.gate.patching import INSERT, PatchEffects, ablate_directions, patch_effects
from probes.gate.removal import minimal_sets, sets_table
from probes.gate.safety_attention import AttentionMap, attention_maps, attention_shares, cosine_table, gate_directions
from probes.linear.estimators import LogisticProbe
from probes.linear.refusal_direction import RefusalDirection, find_refusal_direction

PATCHED = {"text": "plain", "image": "image", "audio": "audio"}
"""Surfaces on which states are exchanged, and their attacks."""
RANDOM_DIRECTIONS = 5
WHOLE = "whole prompt"
"""The span of a patch that exchanges all of them."""
RUNS = ("nothing", "refusal direction", "gated model's own", "random direction")
"""What is ablated."""


def v_s_by_attack(study: Study) -> pd.DataFrame:
    """The gate on every attack of both labels: `attack, label, query_id, topic, split, v_s, unsafe`."""

    def build() -> pd.DataFrame:
        casa = study.casa()
        tables = [_readings(study, casa, attack, label) for attack in BENIGN_ATTACKS for label in LABELS]
        return pd.concat(tables, ignore_index=True)

    return study.gate_table("v_s-by-attack", {"n": study.sizes.n_probe}, build)


def matched_pairs(study: Study, attack: str, n: int, tries: int = 8) -> list[MatchedPair]:
    """Up to `n` harmful requests under `attack`, each with a benign counterpart that differs in the key word alone.

    The two prompts have the same layout: phrasing, verb, article, and on a picture or in a clip as many tokens.

    Raises:
        InputError: no request has such a counterpart.
    """
    omni = study.omni()
    # Half of the clips or more have no counterpart of as many tokens.
    requests = study.queries("plain", "harmful", 2 * n, Draw.GATE_MEASUREMENT)
    waiting = list(requests)
    pairs: dict[str, MatchedPair] = {}
    for attempt in range(tries):
        proposed = [(query, other) for query in waiting if (other := _counterpart(query, attempt)) is not None]
        if not proposed:
            break
        harmful, benign = (list(side) for side in zip(*proposed, strict=True))
        options = {"tokenizer": omni.tokenizer, "wording": MICRO_WORLD}
        both = apply_to_pairs(attack, harmful, benign, study.settings.seed, **options)
        candidates = [MatchedPair(*pair) for pair in zip(*both, strict=True)]
        try:
            pairs |= {pair.harmful.id: pair for pair in aligned_pairs(omni, candidates)}
        except InputError:
            continue
        waiting = [query for query in waiting if query.id not in pairs]
    if not pairs:
        raise InputError(f"no request under {attack!r} has a benign counterpart of the same layout: add requests")
    return [pairs[query.id] for query in requests if query.id in pairs][:n]


def patching(study: Study, n: int) -> pd.DataFrame:
    """`PatchEffects` of every surface in `PATCHED`, `n` pairs at most each: its columns and `surface`."""

    def build() -> pd.DataFrame:
        casa = study.casa()
        tables = [
            patch_effects(casa, matched_pairs(study, attack, n)).effects.assign(surface=surface)
            for surface, attack in PATCHED.items()
        ]
        return pd.concat(tables, ignore_index=True)

    return study.gate_table("patching", {"n": n}, build)


def patch_summary(study: Study, effects: pd.DataFrame) -> pd.DataFrame:
    """Mean effects with intervals, surface by surface (see `PatchEffects.summary`)."""
    tables = [
        PatchEffects(rows).summary(study.settings.seed).assign(surface=surface)
        for surface, rows in effects.groupby("surface", sort=False)
    ]
    return pd.concat(tables, ignore_index=True)


def residual_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of a patching summary that exchange the residual stream."""
    sites = summary["site"].str.fullmatch(r"embeddings|\d+")
    return summary[sites & (summary["span"] != WHOLE)].reset_index(drop=True)


def head_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows that put one head of the harmful run into the benign one."""
    return summary[(summary["head"] >= 0) & (summary["direction"] == INSERT)].reset_index(drop=True)


def maps_by_surface(study: Study, n: int) -> dict[str, list[AttentionMap]]:
    """Safety attention over `n` harmful and `n` benign requests of each surface."""
    casa = study.casa()
    return {
        surface: attention_maps(
            casa, [query for label in LABELS for query in study.queries(attack, label, n, Draw.GATE_MEASUREMENT)]
        )
        for surface, attack in SURFACES.items()
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


def word_shares(attention: AttentionMap) -> tuple[list[str], np.ndarray]:
    """Each token that may be read with its share of safety attention; the positions of a medium are one entry."""
    names: list[str] = []
    weights: list[float] = []
    for token, role, weight in zip(attention.tokens, attention.roles, attention.weights, strict=True):
        if role in ("image", "audio") and names and names[-1] == f"[{role}]":
            weights[-1] += float(weight)
        elif role not in ("padding", "other"):
            names.append(f"[{role}]" if role in ("image", "audio") else token)
            weights.append(float(weight))
    return names, np.array(weights) / max(attention.weights.sum(), 1e-12)


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
    `sets_table` and `surface`."""

    def build() -> pd.DataFrame:
        casa = study.casa()
        tables = []
        for surface, attack in PATCHED.items():
            queries = study.queries(attack, "harmful", study.sizes.n_probe, Draw.GATE_MEASUREMENT)
            flagged = [
                query
                for query, reply in zip(queries, casa.decide(queries), strict=True)
                if reply.safety_token == "unsafe"
            ][:n]
            if flagged:
                tables.append(sets_table(minimal_sets(casa, flagged, seed=study.settings.seed)).assign(surface=surface))
        if not tables:
            raise InputError("the gate flags no harmful request, so there is no decision to take away; train it longer")
        return pd.concat(tables, ignore_index=True)

    return study.gate_table("minimal-sets", {"n": n, "flagged_of": study.sizes.n_probe}, build)


def states_for_directions(study: Study, sites: Sequence[Site]) -> Activations:
    """Plain requests' states at the gate's position, the gate's LoRA at work; drawn apart from what is measured."""
    study.casa()
    queries = [
        query for label in LABELS for query in study.queries("plain", label, study.sizes.n_probe, Draw.GATE_DIRECTIONS)
    ]
    return collect(study.omni(), queries, sites, "last", study.sizes.batch_size)


def refusals(study: Study) -> tuple[str, ...]:
    """Refusals in the words of the model under study: the micro-world's, or common openings for any other model."""
    if isinstance(study.judge(), MicroWorldJudge):
        return default_world().refusals
    return (
        REFUSAL,
        "I'm sorry, but I can't help with that.",
        "I cannot assist with that.",
        "I apologize, but I cannot.",
    )


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

    key = {"model": study.omni().fingerprint(), **sizes}
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
    gated model after its middle block, and random ones.

    Returns:
        The columns of `ablate_directions`, `surface` and `run`, one of `RUNS`.
    """

    def build() -> pd.DataFrame:
        casa, middle = study.casa(), study.omni().n_layers // 2
        own = _mean_difference(states_for_directions(study, [middle]), str(middle))
        random = np.random.default_rng(study.settings.seed).standard_normal((RANDOM_DIRECTIONS, len(own)))
        directions = np.vstack([refusal_direction(study).unit, own, random])
        tables = [
            ablate_directions(casa, study.queries(attack, label, n, Draw.GATE_MEASUREMENT), directions).assign(
                surface=surface
            )
            for surface, attack in PATCHED.items()
            for label in LABELS
        ]
        table = pd.concat(tables, ignore_index=True)
        return table.assign(run=[RUNS[min(index, 2) + 1] for index in table["ablated"]])

    return study.gate_table("ablation", {"n": n, "random": RANDOM_DIRECTIONS, "runs": list(RUNS)}, build)


def ablation_data(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Share of requests given the unsafe token, by surface, label and run."""
    rows = []
    for (surface, label, run), group in table.groupby(["surface", "label", "run"], sort=False):
        share = rate_interval(group["unsafe"].to_numpy(), group["topic"].tolist(), seed)
        where = {"surface": surface, "label": label, "run": run, "n": group["query_id"].nunique()}
        rows.append({**where, **share._asdict()})
    return pd.DataFrame(rows)


def attribution(study: Study, n: int) -> Attribution:
    """The token difference of `n` harmful and `n` benign plain requests in its parts."""
    queries = [query for label in LABELS for query in study.queries("plain", label, n, Draw.GATE_MEASUREMENT)]
    return attribute_token_difference(study.casa(), queries)


def calibration(
    study: Study, readings: pd.DataFrame, attacks: Sequence[str] = BENIGN_ATTACKS
) -> dict[str, Reliability]:
    """Calibration of v_s on each attack, as many harmful as benign requests."""
    calibrations = {}
    for attack in attacks:
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
            "topic": [query.meta["topic"] for query in queries],
            "split": [query.meta["split"] for query in queries],
            "v_s": [reply.v_s for reply in replies],
            "unsafe": [reply.safety_token == "unsafe" for reply in replies],
        }
    )


def _counterpart(query: Query, attempt: int) -> Query | None:
    """`query` about a benign topic with the same article and, where there is one, as many letters; another one at each
    `attempt`. None when there are no more."""
    world = default_world()
    topic = next(entry for entry in world.topics if entry.word == query.meta["topic"])
    fitting = [entry for entry in world.topics_of("all", "benign") if entry.article == topic.article]
    order = query_rng(query, 0, "twin").permutation(len(fitting))
    ranked: list[Topic] = sorted(
        (fitting[place] for place in order), key=lambda entry: abs(len(entry.word) - len(topic.word))
    )
    if attempt >= len(ranked):
        return None
    other = ranked[attempt]
    answer = world.answer("request", other, query.meta["verb"])
    changed = {"topic": other.word, "category": other.category, "danger": "no", "split": other.split}
    meta = {**query.meta, **changed, "answer": answer, "compliance": answer}
    words = [other.word if word == topic.word else word for word in query.text.split(" ")]
    parts = (TextPart(text=" ".join(words)),)
    return query.model_copy(update={"id": f"{query.id}-twin", "label": "benign", "parts": parts, "meta": meta})
