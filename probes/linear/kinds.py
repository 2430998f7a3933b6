"""Probes on kinds of harm that they have not met: a whole category is left out, not only its topics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from casa_mech.errors import InputError
from casa_mech.judging.stats import auroc_interval
from probes.activations.memory import Activations
from probes.linear.validation import PENALTIES, Rows, chance_of, chance_p, cross_validate, make_folds

ALL = "all"


def left_out_kinds(
    activations: Activations, fit: str = "text", seed: int = 0, sites: Sequence[str] = ()
) -> pd.DataFrame:
    """AUROC of logistic probes on categories of harmful and benign requests that they were not fitted on.

    The categories are dealt into as many folds as the class with fewer of them has, one of its categories in each; the
    probe of a fold sees none of the fold's categories, harmful or benign, on any surface.

    Args:
        activations: several surfaces; index columns `surface` and `category`.
        fit: the surface that probes are fitted on.
        seed: of the folds and the intervals.
        sites: which; all when not given.

    Returns:
        Columns `site, surface, kind, auroc, low, high, n, p`. For a kind of harm: its requests against the benign ones
        of its fold, interval and labels' permutation over topics. For "all": all requests, both over kinds, and probes
        fitted anew to the permuted labels.

    Raises:
        InputError: fewer than three kinds of a label, or states that are not finite.
    """
    names = list(sites or activations.sites)
    own = activations.where(surface=fit)
    kinds = _kinds(own)
    count = min(len(np.unique(kinds[own.harmful])), len(np.unique(kinds[~own.harmful])))
    if count < 3:
        raise InputError(f"to leave a kind of harm out takes 3 categories of each label, not {count}: add queries")
    surfaces = [fit, *(name for name in dict.fromkeys(activations.index["surface"]) if name != fit)]
    others = [activations.where(surface=surface) for surface in surfaces[1:]]
    results = cross_validate(
        own.stacked(names), own.harmful, kinds, "logistic", PENALTIES, count, seed,
        [(there.stacked(names), _kinds(there)) for there in others],
    )  # fmt: skip
    sides = [Rows(side.stacked(names), side.harmful, _kinds(side), _units(side)) for side in (own, *others)]
    chances = chance_of(sides[0], sides[1:], folds=count, seed=seed)
    fold_of = dict(zip(kinds, make_folds(own.harmful, kinds, count, seed).fold, strict=True))
    rows = []
    for surface, there, result, chance in zip(surfaces, [own, *others], results, chances, strict=True):
        here = _kinds(there)
        fold = np.array([fold_of.get(kind, count) for kind in here])
        for site, scores, p_value in zip(names, result.scores, chance.p_value, strict=True):
            where = {"site": site, "surface": surface}
            rows.append({**where, "kind": ALL, **_auroc(scores, there.harmful, here, seed), "p": float(p_value)})
            for kind in sorted(set(here[there.harmful]) & set(fold_of)):
                judged = (here == kind) | (~there.harmful & (fold == fold_of[kind]))
                labels, topics = there.harmful[judged], there.topics[judged]
                # No label of these rows went into the probe that judges them, so they can be dealt to its scores.
                p = chance_p(scores[judged], labels, topics, seed)
                rows.append({**where, "kind": kind, **_auroc(scores[judged], labels, topics, seed), "p": p})
    return pd.DataFrame(rows)


def _kinds(activations: Activations) -> np.ndarray:
    return activations.index["category"].to_numpy(dtype=str)


def _auroc(scores: np.ndarray, harmful: np.ndarray, clusters: np.ndarray, seed: int) -> dict[str, float]:
    auroc, low, high = auroc_interval(list(scores), list(harmful), list(clusters), seed).widened()
    return {"auroc": auroc, "low": low, "high": high, "n": len(scores)}


def _units(activations: Activations) -> np.ndarray:
    return (activations.index["label"] + " " + activations.index["query_id"]).to_numpy(dtype=str)
