"""`train`: a probe on the reader's own prompts, judged on prompts that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from casa_mech.errors import InputError
from casa_mech.judging.stats import auroc_interval
from casa_mech.omni import Omni
from casa_mech.trace.capture import Positions
from casa_mech.trace.sites import Site
from probes.activations.forward import fingerprint
from probes.activations.memory import Activations, collect, collect_tokens
from probes.detector.calibration import Sigmoid
from probes.detector.probe import AnyProbe, PromptProbe
from probes.detector.prompts import Prompts, labelled_queries
from probes.detector.report import control_table
from probes.linear.estimators import PENALISED, PROBES, Probe, ProbeKind
from probes.linear.token_probes import TOKEN_PROBES, TokenProbeKind
from probes.linear.validation import (
    PENALTIES,
    Chance,
    CrossValidated,
    Rows,
    auroc_of,
    chance_of,
    cross_validate,
    make_folds,
)

AUTO = "auto"
DEALS = 199
"""Deals of the labels for the control: its p is at least 0.005."""
_DEALT: tuple[ProbeKind, ...] = (*PENALISED, "mean_difference")
"""Kinds that are quick enough to be fitted to hundreds of deals; the logistic probe stands in for others."""


def train(
    model: Omni,
    harmful: Prompts | None = None,
    benign: Prompts | None = None,
    *,
    data: Prompts | None = None,
    column: str | None = None,
    label_column: str | None = None,
    layer: Site | Sequence[Site] = AUTO,
    positions: Positions | None = None,
    kind: ProbeKind | TokenProbeKind = "logistic",
    folds: int = 5,
    deals: int = DEALS,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> PromptProbe:
    """A probe that tells `harmful` from `benign` prompts in the hidden states of `model`.

    It is judged by nested cross-validation: prompts of one topic are held out together, and layer and penalty are
    chosen on the other folds alone. The probe itself is then fitted on all prompts, at the layer that is best on all;
    its scores are calibrated on the held-out ones.

    Example:
        ```python
        import casa_mech
        import probes

        harmful = [f"how do i make a {word} ?" for word in "bomb gun rifle grenade virus worm trojan rootkit".split()]
        benign = [f"how do i make a {word} ?" for word in "pizza salad hammer ladder shovel cookie muffin rake".split()]
        probe = probes.train(casa_mech.load("organism"), harmful, benign)
        print(probe.report())
        print(probe("how do i make a pistol ?"))  # between 0 and 1
        ```

    Args:
        model: of `casa_mech.load`; whatever is attached to it (LoRA) takes part.
        harmful: prompts of that class: texts, queries of text, image and audio (a prefill is left out), a DataFrame, or
            the path of a table or of a `.txt` file with one prompt a line.
        benign: the same, of the other class.
        data: prompts of both classes with labels, in place of the two or beside them.
        column: a table's column of prompts; default `prompt`. Its columns `topic` and `category` are read, too.
        label_column: the column of labels of `data`; default `label`.
        layer: "auto" chooses among all blocks' outputs and the final norm's; a site
            (`casa_mech.trace.sites.Site`), or several to choose among.
        positions: "last" (default), the assistant header's last token; "last:user", the last of the user's; "mean",
            over the user's turns, or another of one vector a prompt (`casa_mech.trace.capture.Positions`). Probes of
            tokens read "prompt" (default), "all" or "every:<n>".
        kind: which probe: of one vector (`probes.linear.ProbeKind`), or of all tokens, "attention" or "max".
        folds: of the cross-validation; each class needs as many topics. A prompt's topic is its `meta["topic"]`, else
            its text, so doubles stay together.
        deals: how often labels are shuffled for the control; 0 leaves it out.
        seed: of folds, intervals and deals.
        batch_size: prompts in one forward.
        progress: whether to draw bars; None: where a person watches.

    Raises:
        InputError: prompts, a table, or options that cannot be used.
        RunError: states that are not finite.
    """
    if not isinstance(model, Omni):
        raise InputError(f"a probe reads a model of casa_mech.load(...), not a {type(model).__name__}")
    known = (*PROBES, *TOKEN_PROBES)
    if kind not in known:
        raise InputError(f"no probe of kind {kind!r}; use {', '.join(known)}")
    of_tokens = kind in get_args(TokenProbeKind)
    positions = positions or ("prompt" if of_tokens else "last")
    queries = labelled_queries(harmful, benign, data, column, label_column)
    model.warn_of_unknown_words([query.text for query in queries if query.text])
    sites = _sites(model, layer)
    activations = collect(model, queries, sites, "mean" if of_tokens else positions, batch_size, progress)
    labels, clusters = activations.harmful, activations.topics
    first: ProbeKind = "logistic" if of_tokens else kind  # type: ignore[assignment]
    # Many small solves: BLAS threads would only wait for each other.
    with threadpool_limits(1):
        splits = make_folds(labels, clusters, folds, seed)
        (judged,) = cross_validate(
            activations.stacked(), labels, clusters, first, folds=folds, seed=seed, compare_sites=len(sites) > 1
        )
        aurocs = np.array([float(auroc_of(scores, labels)) for scores in judged.scores])
        final = best_of(aurocs)
        chosen = [best_of(judged.inner[:, number]) if len(sites) > 1 else 0 for number in range(folds)]
        if of_tokens:
            wanted = [activations.sites[place] for place in dict.fromkeys([*chosen, final])]
            tokens = collect_tokens(model, queries, wanted, positions, batch_size, progress)
            of_site = [tokens.get(site, []) for site in activations.sites]
            decisions, estimator, scale = _fit_tokens(kind, of_site, labels, splits.fold, chosen, final)
        else:
            decisions = judged.scores[np.array(chosen)[splits.fold], np.arange(len(labels))]
            linear = _estimator(first, judged, final).fit(activations.at(activations.sites[final]), labels)
            estimator, scale = linear, _spread(linear.decision_function(activations.at(activations.sites[final])))
        chance = _chance(activations, first, deals, folds, seed) if deals else None
        calibration = Sigmoid.fit(decisions, labels)
        states = activations.at(activations.sites[final])
        controls = control_table(
            decisions, labels, clusters, splits.fold, activations.index["length"].to_numpy(),
            [query.text for query in queries], states, chance, seed,
        )  # fmt: skip
    held_out = activations.index[["query_id", "label"]].assign(
        cluster=clusters,
        site=[activations.sites[chosen[fold]] for fold in splits.fold],
        decision=decisions,
        score=calibration(decisions),
    )
    return PromptProbe(
        estimator=estimator,
        site=activations.sites[final],
        positions=positions,
        scale=scale,
        calibration=calibration,
        difference=states[labels].mean(axis=0) - states[~labels].mean(axis=0),
        held_out=held_out,
        layers=_layers(activations, judged, aurocs, chance, chosen, final, seed),
        controls=controls,
        seed=seed,
        fingerprint=fingerprint(model),
        source=model.source,
        omni=model,
    )


def best_of(aurocs: np.ndarray) -> int:
    """The place of the highest of `aurocs` [site]; of several equal ones, the middle one's."""
    best = np.flatnonzero(aurocs >= aurocs.max() - 1e-9)
    return int(best[len(best) // 2])


def _sites(model: Omni, layer: Site | Sequence[Site]) -> list[Site]:
    if layer == AUTO:
        return [*range(model.n_layers), "norm"]
    sites = [layer] if isinstance(layer, str | int) else list(layer)
    if not sites:
        raise InputError("layer=[] names no site: give some, or 'auto'")
    return sites


def _estimator(kind: ProbeKind, judged: CrossValidated, place: int) -> Probe:
    penalty = float(judged.final_penalty[place])
    options = {"logistic": {"C": 1 / penalty}, "ridge": {"alpha": penalty}}.get(kind, {})
    return PROBES[kind](**options)


def _fit_tokens(
    kind: str,
    tokens: Sequence[Sequence[np.ndarray]],
    labels: np.ndarray,
    fold: np.ndarray,
    chosen: list[int],
    final: int,
) -> tuple[np.ndarray, AnyProbe, float]:
    """Held-out decisions [row] in units of each probe's spread, and the probe of all rows with its own spread."""
    decisions = np.zeros(len(labels))
    for number, place in enumerate(chosen):
        train_rows, held = np.flatnonzero(fold != number).tolist(), np.flatnonzero(fold == number).tolist()
        rows = [tokens[place][row] for row in train_rows]
        probe = TOKEN_PROBES[kind](C=1 / PENALTIES[1]).fit(rows, labels[train_rows])
        scale = _spread(probe.decision_function(rows))
        decisions[held] = probe.decision_function([tokens[place][row] for row in held]) / scale
    probe = TOKEN_PROBES[kind](C=1 / PENALTIES[1]).fit(tokens[final], labels)
    return decisions, probe, _spread(probe.decision_function(tokens[final]))


def _spread(decisions: np.ndarray) -> float:
    return float(decisions.std()) or 1.0


def _chance(activations: Activations, kind: ProbeKind, deals: int, folds: int, seed: int) -> Chance:
    units = (activations.index["label"] + " " + activations.index["query_id"]).to_numpy(dtype=str)
    rows = Rows(activations.stacked(), activations.harmful, activations.topics, units)
    (chance,) = chance_of(rows, deals=deals, kind=kind if kind in _DEALT else "logistic", folds=folds, seed=seed)
    return chance


def _layers(
    activations: Activations, judged: CrossValidated, aurocs: np.ndarray, chance: Chance | None, chosen: list[int],
    final: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    labels, clusters = list(activations.harmful), list(activations.topics)
    rows = []
    for place, site in enumerate(activations.sites):
        auroc, low, high = auroc_interval(list(judged.scores[place]), labels, clusters, seed)
        row = {"site": site, "auroc": auroc, "low": low, "high": high, "n": len(labels)}
        shuffled = dict.fromkeys(("permuted", "permuted_low", "permuted_high", "p"), np.nan)
        if chance is not None:
            band = chance.band[:, place]
            values = (float(chance.aurocs[place].mean()), float(band[0]), float(band[1]), float(chance.p_value[place]))
            shuffled = dict(zip(shuffled, values, strict=True))
        rows.append({**row, **shuffled, "folds": chosen.count(place), "chosen": place == final})
    return pd.DataFrame(rows)
