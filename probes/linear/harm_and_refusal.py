"""Harmfulness and the model's own refusal as separate directions, at the user's last token and after the header.

Zhao et al., "LLMs Encode Harmfulness and Refusal Separately" (arXiv 2507.11878), find the one at the instruction's last
token and the other at the template's. There each is a difference of means of groups that may differ in both; here each
is taken with the other held fixed, so that neither can stand in for the other:

* harm: harmful requests that the model answers, minus benign ones that it answers;
* refusal: harmful requests that it refuses, minus harmful ones that it answers.

The same two pairs of groups are the contrasts that both directions are judged on, on topics that no direction has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import bootstrap_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import PERMUTATIONS
from casa_mech.judging.stats import auroc_interval
from probes.activations.memory import Activations
from probes.linear.validation import auroc_of

HARM, REFUSAL = "harm", "refusal"
DIRECTIONS = (HARM, REFUSAL)
Contrast = tuple[np.ndarray, np.ndarray]
"""The requests of a positive and of a negative group, bool [row] each."""


def contrasts(harmful: np.ndarray, outcomes: np.ndarray) -> dict[str, Contrast]:
    """The groups of `DIRECTIONS`, from labels bool [row] and outcomes str [row] of the model's own replies.

    Requests with other outcomes than "complied" and "refused", and benign ones that are refused, are in no group.
    """
    answered, refused = outcomes == "complied", outcomes == "refused"
    return {HARM: (harmful & answered, ~harmful & answered), REFUSAL: (harmful & refused, harmful & answered)}


def held_out_coordinates(states: np.ndarray, contrast: Contrast, topics: np.ndarray) -> np.ndarray:
    """Coordinate [row] along the difference of two groups' means, which are taken over all other topics than the row's.

    Zero is halfway between the means; one unit is as long as one of `states` [row, d_model]. NaN throughout where a
    group has fewer than two topics.
    """
    names, member = np.unique(topics, return_inverse=True)
    if any(len(np.unique(member[group])) < 2 for group in contrast):
        return np.full(len(states), np.nan)
    exact = states.astype(np.float64)
    means = []
    for group in contrast:
        of_topic = (member[None] == np.arange(len(names))[:, None]) & group
        counts = group.sum() - of_topic.sum(axis=1, keepdims=True)
        means.append((exact[group].sum(axis=0) - of_topic @ exact) / counts)  # [topic, d_model]
    difference, middle = means[0] - means[1], (means[0] + means[1]) / 2
    length = np.linalg.norm(difference, axis=1, keepdims=True)
    unit = np.divide(difference, length, out=np.zeros_like(difference), where=length > 0)
    coordinates: np.ndarray = ((exact - middle[member]) * unit[member]).sum(axis=1)
    return coordinates


def direction_table(activations: Activations, outcomes: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """AUROC of both directions on both contrasts, at every site and surface, on unseen topics.

    Args:
        activations: states at one choice of positions; index column `surface`.
        outcomes: str [query], of the model's own replies.
        seed: of the bootstrap over topics.

    Returns:
        Columns `site, surface, direction, contrast, auroc, low, high, n, positive` (how many of the `n` are in the
        positive group); NaN where a group has fewer than two topics.
    """
    rows = []
    for surface in dict.fromkeys(activations.index["surface"]):
        there = activations.where(surface=surface)
        groups = contrasts(there.harmful, outcomes[(activations.index["surface"] == surface).to_numpy()])
        for site in there.sites:
            for direction in DIRECTIONS:
                scores = held_out_coordinates(there.at(site), groups[direction], there.topics)
                for contrast, (positive, negative) in groups.items():
                    judged = positive | negative
                    rows.append(
                        {
                            "site": site, "surface": surface, "direction": direction, "contrast": contrast,
                            **_auroc(scores[judged], positive[judged], there.topics[judged], seed),
                            "n": int(judged.sum()), "positive": int(positive.sum()),
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Dissociation:
    """How far each of two directions is the better one on its own contrast, in AUROC."""

    harm: Estimate
    """AUROC of the harm direction minus that of the refusal direction, in whichever sense this one reads more; answered
    requests, harmful against benign."""
    refusal: Estimate
    """AUROC of the refusal direction minus that of the harm direction, in whichever sense this one reads more; harmful
    requests, refused against answered."""
    p_value: float
    """That both are above 0: the larger of their two one-sided p."""
    n: int
    """Requests in either contrast."""

    @property
    def weaker(self) -> Estimate:
        """The smaller of the two; a double dissociation needs it above 0."""
        return min(self.harm, self.refusal)


def double_dissociation(
    coordinates: Mapping[str, np.ndarray], groups: Mapping[str, Contrast], topics: np.ndarray, seed: int = 0
) -> Dissociation:
    """Both directions against each other on both contrasts.

    Args:
        coordinates: of each of `DIRECTIONS` the rows' held-out coordinates [row], read wherever that direction is.
        groups: of `contrasts`.
        topics: str [row].
        seed: of the bootstrap and the permutations, both by topic.

    Raises:
        InputError: a direction without coordinates, because a group has fewer than two topics.
    """
    if not all(np.isfinite(scores).all() for scores in coordinates.values()):
        raise InputError(
            "a group of requests has fewer than two topics: no direction without it, ask for more requests"
        )
    estimates, p_values = {}, []
    for own, other in ((HARM, REFUSAL), (REFUSAL, HARM)):
        positive, negative = groups[own]
        judged = positive | negative
        first, second = coordinates[own][judged], coordinates[other][judged]
        estimates[own] = auroc_advantage(first, second, positive[judged], topics[judged], seed)
        p_values.append(swap_test(first, second, positive[judged], topics[judged], seed))
    judged = np.logical_or.reduce([side for groups_of in groups.values() for side in groups_of])
    return Dissociation(estimates[HARM], estimates[REFUSAL], max(p_values), int(judged.sum()))


def auroc_advantage(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, topics: Sequence[str] | np.ndarray, seed: int = 0
) -> Estimate:
    """How much better `first` [row] ranks labels bool [row] than `second` [row] does in either sense.

    AUROC of the first minus the greater of the second's and one minus the second's, with a bootstrap over topics: a
    direction that ranks the labels the wrong way round reads them all the same, and is no proof that they are apart.
    """
    wins = [_wins(scores, labels) for scores in (first, second)]

    def difference(weights: np.ndarray) -> np.ndarray:
        harmful, benign = weights[:, labels].astype(np.float64), weights[:, ~labels].astype(np.float64)
        with np.errstate(invalid="ignore"):
            aurocs = [
                ((harmful @ pairs) * benign).sum(axis=1) / (harmful.sum(axis=1) * benign.sum(axis=1)) for pairs in wins
            ]
        return _advantage(*aurocs)

    low, high = bootstrap_interval(difference, list(topics), len(labels), seed)
    return Estimate(float(difference(np.ones((1, len(labels))))[0]), low, high).widened()


def swap_test(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    topics: Sequence[str] | np.ndarray,
    seed: int = 0,
    draws: int = PERMUTATIONS,
) -> float:
    """One-sided p of `auroc_advantage`.

    Under the null the two rankings can be exchanged for any topic: the ranks of all its requests change sides together.
    """
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(first), rankdata(second)])
    _, member = np.unique(np.asarray(topics), return_inverse=True)
    swap = np.random.default_rng(seed).integers(2, size=(draws, member.max() + 1)).astype(bool)[:, member]
    own = _advantage(*(auroc_of(side, labels) for side in ranks))
    dealt = _advantage(*(auroc_of(np.where(swap, ranks[1 - side], ranks[side]), labels) for side in (0, 1)))
    return float((1 + (dealt >= own - 1e-12).sum()) / (1 + draws))


def _advantage(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """An AUROC minus another's, in whichever sense this one is greater."""
    return first - np.maximum(second, 1 - second)


def _auroc(scores: np.ndarray, labels: np.ndarray, topics: np.ndarray, seed: int) -> dict[str, float]:
    if not np.isfinite(scores).all() or labels.all() or not labels.any():
        return dict.fromkeys(("auroc", "low", "high"), np.nan)
    auroc, low, high = auroc_interval(list(scores), list(labels), list(topics), seed).widened()
    return {"auroc": auroc, "low": low, "high": high}


def _wins(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where a positive row scores above a negative one, half for a tie, [positive, negative]."""
    wins: np.ndarray = (np.sign(scores[labels][:, None] - scores[~labels][None]) + 1) / 2
    return wins
