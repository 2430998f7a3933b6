"""Probes on kinds of harm that they have not met: a whole category is left out, not only its topics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from casa_mech.errors import InputError
from casa_mech.judging.stats import auroc_interval
from probes.activations.memory import Activations
from probes.linear.validation import PENALTIES, chance_p, cross_validate, make_folds

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
        of its fold, interval and labels' permutation over topics. For "all": all requests, both over kinds.

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
    fold_of = dict(zip(kinds, make_folds(own.harmful, kinds, count, seed).fold, strict=True))
    rows = []
    for surface, there, result in zip(surfaces, [own, *others], results, strict=True):
        here = _kinds(there)
        fold = np.array([fold_of.get(kind, count) for kind in here])
        for site, scores in zip(names, result.scores, strict=True):
            where = {"site": site, "surface": surface}
            rows.append({**where, "kind": ALL, **_auroc(scores, there.harmful, here, seed)})
            for kind in sorted(set(here[there.harmful]) & set(fold_of)):
                judged = (here == kind) | (~there.harmful & (fold == fold_of[kind]))
                measured = _auroc(scores[judged], there.harmful[judged], there.topics[judged], seed)
                rows.append({**where, "kind": kind, **measured})
    return pd.DataFrame(rows)


def _kinds(activations: Activations) -> np.ndarray:
    return activations.index["category"].to_numpy(dtype=str)


def _auroc(scores: np.ndarray, harmful: np.ndarray, clusters: np.ndarray, seed: int) -> dict[str, float]:
    auroc, low, high = auroc_interval(list(scores), list(harmful), list(clusters), seed).widened()
    p_value = chance_p(scores, harmful, clusters, seed)
    return {"auroc": auroc, "low": low, "high": high, "n": len(scores), "p": p_value}
