"""What a probe flags at its own threshold on surfaces that it was not fitted on, before and after their mean is moved.

An AUROC forgives a shift of all scores of a surface; a threshold that was set on text does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from casa_mech.judging.stats import auroc_interval, rate_interval
from probes.activations.memory import Activations
from probes.linear.validation import PENALTIES, cross_validate

AS_IT_IS, MOVED = "as it is", "mean moved"
HARMFUL_FLAGGED, BENIGN_FLAGGED, RANKING = "harmful flagged", "benign flagged", "auroc"


def carried_scores(
    activations: Activations, fit: str = "text", folds: int = 5, seed: int = 0, sites: Sequence[str] = ()
) -> pd.DataFrame:
    """Scores on every surface of a logistic probe of one, each request's topic unseen; what is above 0 is flagged.

    On the other surfaces also after the difference of the two surfaces' means is added to the states ("mean moved").
    The means are over all requests, labels unknown: a fair correction as long as both surfaces have the same share of
    harmful requests.

    Args:
        activations: several surfaces; index column `surface`.
        fit: on which the probe is fitted.
        folds, seed: of the cross-validation.
        sites: which; all when not given.

    Returns:
        One row a site, request and state: `site, surface, states` ("as it is" or "mean moved"), `query_id, label,
        topic, score`.

    Raises:
        InputError: one class only, fewer topics of a class than folds, or states that are not finite.
    """
    names = list(sites or activations.sites)
    own = activations.where(surface=fit)
    fitted = own.stacked(names)
    cases = [(fit, AS_IT_IS, own, fitted)]
    for surface in (name for name in dict.fromkeys(activations.index["surface"]) if name != fit):
        there = activations.where(surface=surface)
        states = there.stacked(names)
        shift = fitted.mean(axis=1, keepdims=True) - states.mean(axis=1, keepdims=True)
        cases += [(surface, AS_IT_IS, there, states), (surface, MOVED, there, states + shift)]
    others = [(states, there.topics) for _, _, there, states in cases[1:]]
    results = cross_validate(fitted, own.harmful, own.topics, "logistic", PENALTIES, folds, seed, others)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "site": site, "surface": surface, "states": moment, "query_id": there.index["query_id"],
                    "label": there.index["label"], "topic": there.topics, "score": scores,
                }
            )
            for (surface, moment, there, _), result in zip(cases, results, strict=True)
            for site, scores in zip(names, result.scores, strict=True)
        ],
        ignore_index=True,
    )  # fmt: skip


def threshold_table(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Shares of harmful and benign requests that are flagged, and the AUROC that goes with them, over topics.

    Args:
        scores: of `carried_scores`.
        seed: of the bootstrap over topics.

    Returns:
        Columns `site, surface, states`, `measure` ("harmful flagged", "benign flagged" or "auroc"), `n, value, low,
        high`.
    """
    rows = []
    for where, part in scores.groupby(["site", "surface", "states"], sort=False):
        harmful = part["label"] == "harmful"
        for measure, side in ((HARMFUL_FLAGGED, part[harmful]), (BENIGN_FLAGGED, part[~harmful]), (RANKING, part)):
            if measure == RANKING:
                estimate = auroc_interval(part["score"].tolist(), harmful.tolist(), part["topic"].tolist(), seed)
            else:
                estimate = rate_interval((side["score"] > 0).to_numpy(), side["topic"].tolist(), seed)
            names = dict(zip(("site", "surface", "states"), where, strict=True))
            rows.append({**names, "measure": measure, "n": len(side), **estimate.widened()._asdict()})
    return pd.DataFrame(rows)
