"""What a probe flags at its own threshold on surfaces that it was not fitted on, before and after their mean is moved.

An AUROC forgives a shift of all scores of a surface; a threshold that was set on text does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from casa_mech.judging.stats import auroc_interval, rate_interval
from probes.activations.memory import Activations
from probes.linear.validation import PENALTIES, cross_validate

AS_IT_IS, MOVED = "as it is", "mean moved onto text's"
HARMFUL_FLAGGED, BENIGN_FLAGGED, RANKING = "harmful flagged", "benign flagged", "auroc"


def threshold_table(
    activations: Activations, fit: str = "text", folds: int = 5, seed: int = 0, sites: Sequence[str] = ()
) -> pd.DataFrame:
    """Shares of harmful and benign requests that a logistic probe flags (score above 0) on each surface.

    The probe is fitted on the surface `fit` alone and judged on topics that it has not seen. On the other surfaces also
    after the difference of the two surfaces' means is added to the states. The means are over all requests, labels
    unknown: that is a fair correction as long as both surfaces have the same share of harmful requests.

    Args:
        activations: several surfaces; index column `surface`.
        fit: on which the probe is fitted.
        folds, seed: of the cross-validation; the seed also of the intervals.
        sites: which; all when not given.

    Returns:
        Columns `site, surface, states` ("as it is" or "mean moved onto text's", by the name of `fit`), `measure`
        ("harmful flagged", "benign flagged" or "auroc"), `n, value, low, high`; intervals over topics.

    Raises:
        InputError: one class only, fewer topics of a class than folds, or states that are not finite.
    """
    names = list(sites or activations.sites)
    own = activations.where(surface=fit)
    moved_onto = MOVED.replace("text", fit)
    cases = [(fit, AS_IT_IS, own, own.stacked(names))]
    for surface in (name for name in dict.fromkeys(activations.index["surface"]) if name != fit):
        there = activations.where(surface=surface)
        states = there.stacked(names)
        shift = own.stacked(names).mean(axis=1, keepdims=True) - states.mean(axis=1, keepdims=True)
        cases += [(surface, AS_IT_IS, there, states), (surface, moved_onto, there, states + shift)]
    others = [(states, there.topics) for _, _, there, states in cases[1:]]
    results = cross_validate(cases[0][3], own.harmful, own.topics, "logistic", PENALTIES, folds, seed, others)
    rows = []
    for (surface, moment, there, _), result in zip(cases, results, strict=True):
        for site, scores in zip(names, result.scores, strict=True):
            for measure, n, estimate in _measures(scores, there.harmful, list(there.topics), seed):
                where = {"site": site, "surface": surface, "states": moment, "measure": measure, "n": n}
                rows.append({**where, **estimate._asdict()})
    order = {site: place for place, site in enumerate(names)}
    table = pd.DataFrame(rows)
    return table.sort_values("site", key=lambda column: column.map(order), kind="stable").reset_index(drop=True)


def _measures(scores: np.ndarray, harmful: np.ndarray, topics: Sequence[str], seed: int) -> list[tuple]:
    flagged, groups = scores > 0, np.asarray(topics)
    rates = [
        (name, int(side.sum()), rate_interval(flagged[side], list(groups[side]), seed))
        for name, side in ((HARMFUL_FLAGGED, harmful), (BENIGN_FLAGGED, ~harmful))
    ]
    ranking = auroc_interval(list(scores), list(harmful), list(groups), seed)
    return [*rates, (RANKING, len(scores), ranking.widened())]
