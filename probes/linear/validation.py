"""Judging probes: nested cross-validation by query, calibration, and controls (permuted labels, prompt length).

Folds keep queries about one topic together (`Activations.topics`, the rule of `casa_mech.judging.stats.cluster_of`), so
a probe is always judged on topics that it has not seen. Penalties are chosen on the training folds only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from casa_mech.errors import InputError
from casa_mech.judging.hypothesis import label_permutation_test, permuted_labels
from casa_mech.judging.stats import auroc_interval, aurocs_by_labels
from probes.linear.estimators import PENALISED, Kind, fit_batch

PENALTIES = (3.0, 30.0, 300.0)
"""Penalties (`1 / C`) that are tried."""
INNER = 3
"""Folds within the training folds, on which the penalty is chosen."""


@dataclass(frozen=True)
class Folds:
    """How rows are split. fold: int [row], the fold in which a row is held out. inner: for each fold bool [inner, row],
    the rows held out within its training rows."""

    fold: np.ndarray
    inner: tuple[np.ndarray, ...]

    @property
    def number(self) -> int:
        """How many outer folds there are."""
        return len(self.inner)

    def training(self) -> np.ndarray:
        """bool [fold, row]: the rows that each fold trains on."""
        return self.fold[None] != np.arange(self.number)[:, None]


def make_folds(labels: np.ndarray, clusters: np.ndarray, folds: int = 5, seed: int = 0, inner: int = INNER) -> Folds:
    """Stratified folds that keep clusters together.

    Args:
        labels: bool [row]. clusters: [row], what stays together. folds, inner: how many. seed: of the split.

    Raises:
        InputError: one class only, or fewer clusters of a class than folds.
    """
    if labels.all() or not labels.any():
        only = "harmful" if labels.all() else "benign"
        raise InputError(f"all {len(labels)} queries are {only}: a probe needs both classes")
    least = min(len(np.unique(clusters[labels])), len(np.unique(clusters[~labels])))
    if least < folds:
        raise InputError(f"{folds} folds need {folds} topics of each class, not {least}: add queries or ask for fewer")
    rng = np.random.default_rng(seed)
    outer = _deal(labels, clusters, folds, rng)
    nested = []
    for number in range(folds):
        train = np.flatnonzero(outer != number)
        within = _deal(labels[train], clusters[train], max(inner, 1), rng)
        masks = np.zeros((inner, len(labels)), dtype=bool)
        for place in range(inner):
            masks[place, train[within == place]] = True
        nested.append(masks)
    return Folds(outer, tuple(nested))


@dataclass(frozen=True)
class CrossValidated:
    """What nested cross-validation found. scores: [site, row], each from a probe that saw no query of the row's
    cluster, in units of their spread on the training rows. penalty: [site, fold], the one chosen."""

    scores: np.ndarray
    penalty: np.ndarray


def cross_validate(
    states: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    kind: Kind = "logistic",
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
    others: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    device: str = "cpu",
) -> list[CrossValidated]:
    """Nested cross-validation of a probe at every site, in one solve.

    Args:
        states: [site, row, d_model], real numbers. labels: bool [row]. clusters: str [row].
        kind: which probe. penalties: what to choose from, for kinds that take one.
        folds: outer folds. seed: of the splits.
        others: more (states, clusters) to score, such as the same queries as pictures. A row whose cluster is held out
            in a fold is scored by that fold's probe, a row of a new cluster by the probe fitted on everything.
        device: where to solve.

    Returns:
        One for the states themselves, then one for each of `others`.

    Raises:
        InputError: states that are not finite, one class, or fewer clusters of a class than folds.
    """
    splits = make_folds(labels, clusters, folds, seed)
    grid = list(penalties) if kind in PENALISED else [1.0]
    tensor = torch.as_tensor(states, dtype=torch.float32, device=device)
    problems = _Problems.of(splits, grid)
    weights, truth = (torch.tensor(array, device=tensor.device) for array in (problems.weights, labels))
    models = fit_batch(kind, tensor, truth, weights, problems.penalty(tensor))
    own = models.scores(tensor).cpu().numpy()
    chosen = problems.choose(own, labels)
    scale = problems.spread(own, chosen)
    penalty = np.asarray(grid)[chosen[:, :folds]]
    results = [CrossValidated(_held_out(problems.pick(own, chosen) / scale, splits.fold), penalty)]
    place_of = dict(zip(clusters, splits.fold, strict=True))
    for other, names in others:
        found = models.scores(torch.as_tensor(other, dtype=torch.float32, device=device)).cpu().numpy()
        where = np.array([place_of.get(name, folds) for name in names])
        results.append(CrossValidated(_held_out(problems.pick(found, chosen) / scale, where), penalty))
    return results


def permuted_aurocs(
    states: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    penalty: float = PENALTIES[1],
    repeats: int = 20,
    kind: Kind = "logistic",
    folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Held-out AUROC [site, repeat] of the same probe on labels dealt anew among clusters: what chance gives.

    Args:
        states: [site, row, d_model]. labels: bool [row]. clusters: str [row]. penalty: for kinds that take one.
        repeats: how many deals; all of them are one solve. folds, seed: as in `cross_validate`.
    """
    rng = np.random.default_rng(seed)
    deals, weights, places = [], [], []
    for repeat, dealt in enumerate(permuted_labels(labels, clusters, repeats, rng)):
        splits = make_folds(dealt, clusters, folds, seed + repeat, inner=0)
        deals += [dealt] * folds
        weights.append(splits.training())
        places.append(splits.fold)
    tensor = torch.as_tensor(states, dtype=torch.float32)
    models = fit_batch(
        kind, tensor, torch.from_numpy(np.stack(deals)), torch.from_numpy(np.concatenate(weights)), penalty
    )
    scores = models.scores(tensor).numpy().reshape(len(states), repeats, folds, len(labels))
    held = np.stack([scores[:, repeat, places[repeat], np.arange(len(labels))] for repeat in range(repeats)], axis=1)
    return np.stack([auroc_of(held[:, repeat], deals[repeat * folds]) for repeat in range(repeats)], axis=1)


def auroc_of(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC [...] of scores [..., row] for labels bool [row]; ties count half."""
    n_pos = int(labels.sum())
    ranks = rankdata(scores, axis=-1)[..., labels].sum(axis=-1)
    return (ranks - n_pos * (n_pos + 1) / 2) / (n_pos * (len(labels) - n_pos))


def chance_p(scores: np.ndarray, labels: np.ndarray, clusters: np.ndarray, seed: int = 0, draws: int = 999) -> float:
    """One-sided p of the AUROC of `scores` [row], by dealing the labels anew among clusters."""
    return label_permutation_test(lambda dealt: aurocs_by_labels(scores, dealt), labels, clusters, seed, draws)


def matched_auroc(
    scores: np.ndarray,
    labels: np.ndarray,
    strata: np.ndarray,
    clusters: np.ndarray,
    seed: int = 0,
    resamples: int = 200,
) -> tuple[float, float, float, int]:
    """(AUROC, low, high, pairs) over pairs of a harmful and a benign query of one stratum, such as one prompt length.

    What a probe still knows when the stratum cannot help it. The interval is a percentile bootstrap over clusters; NaN
    throughout when no stratum has both classes.

    Args:
        scores: [row]. labels: bool [row]. strata, clusters: [row].
    """
    names, member = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    counts = np.concatenate([np.ones((1, len(labels))), draws[:, member]])
    won, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for stratum in np.unique(strata):
        one, other = (np.flatnonzero((strata == stratum) & side) for side in (labels, ~labels))
        wins = (np.sign(scores[one][:, None] - scores[other][None]) + 1) / 2
        won += np.einsum("rh,hb,rb->r", counts[:, one], wins, counts[:, other], optimize=True)
        pairs += counts[:, one].sum(axis=1) * counts[:, other].sum(axis=1)
    if pairs[0] == 0:
        return float("nan"), float("nan"), float("nan"), 0
    rates = won[1:][pairs[1:] > 0] / pairs[1:][pairs[1:] > 0]
    low, high = np.quantile(rates, (0.025, 0.975))
    return float(won[0] / pairs[0]), float(low), float(high), int(pairs[0])


@dataclass(frozen=True)
class Selectivity:
    """A probe's AUROC beside what it should be compared with.

    auroc, low, high: the probe on unseen clusters, with its interval. permuted: mean on permuted labels;
    selectivity: the difference. p_value: of the permutation test. length: AUROC of the
    prompt's number of tokens alone, with its interval. matched: the probe's AUROC among prompts of equal length, with
    its interval, over so many pairs. n: queries.
    """

    auroc: float
    low: float
    high: float
    permuted: float
    selectivity: float
    p_value: float
    length: float
    length_low: float
    length_high: float
    matched: float
    matched_low: float
    matched_high: float
    pairs: int
    n: int


def selectivity(
    scores: np.ndarray,
    permuted: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    clusters: np.ndarray,
    seed: int = 0,
) -> Selectivity:
    """Held-out `scores` [row] against permuted labels (`permuted_aurocs`, [repeat]) and prompt lengths [row]."""
    groups = list(clusters)
    value, low, high = auroc_interval(list(scores), list(labels), groups, seed, resamples=200)
    by_length = auroc_interval(list(lengths.astype(float)), list(labels), groups, seed, resamples=200)
    chance = float(permuted.mean())
    p_value = (1 + int((permuted >= value).sum())) / (1 + len(permuted))
    matched, matched_low, matched_high, pairs = matched_auroc(scores, labels, lengths, clusters, seed)
    return Selectivity(
        auroc=value, low=low, high=high, permuted=chance, selectivity=value - chance, p_value=p_value,
        length=by_length[0], length_low=by_length[1], length_high=by_length[2],
        matched=matched, matched_low=matched_low, matched_high=matched_high, pairs=pairs, n=len(labels),
    )  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Platt's map from a probe's score to a probability: `sigmoid(slope * score + offset)`."""

    slope: float
    offset: float

    @classmethod
    def fit(cls, scores: np.ndarray, labels: np.ndarray) -> Calibration:
        """From held-out scores [row] and labels bool [row], without a penalty."""
        found = LogisticRegression(C=np.inf).fit(scores[:, None], labels)
        return cls(float(found.coef_[0, 0]), float(found.intercept_[0]))

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities [...] that queries with these scores are harmful."""
        return np.asarray(1 / (1 + np.exp(-np.clip(self.slope * scores + self.offset, -500, 500))))


def calibrated(scores: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Probabilities [row] of held-out `scores` [row], each by a calibration fitted on the other folds."""
    found = np.empty(len(scores))
    for number in np.unique(fold):
        inside = fold == number
        found[inside] = Calibration.fit(scores[~inside], labels[~inside])(scores[inside])
    return found


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> tuple[float, float]:
    """(Expected calibration error over equal-count bins, Brier score) of `probabilities` [row]."""
    order = np.argsort(probabilities)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [abs(probabilities[part].mean() - labels[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(labels)), float(brier_score_loss(labels, probabilities))


def bootstrap_weights(clusters: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each row is drawn, int [resample, row], when clusters are drawn with replacement: for `fit_batch`."""
    names, member = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, member]


@dataclass(frozen=True)
class _Problems:
    """The columns of one solve: for each penalty the outer folds and all rows, then for each penalty the inner folds.

    weights: bool [problem, row]. grid: the penalties. splits: the folds.
    """

    weights: np.ndarray
    grid: Sequence[float]
    splits: Folds

    @classmethod
    def of(cls, splits: Folds, grid: Sequence[float]) -> _Problems:
        training = splits.training()
        outer = np.concatenate([training, np.ones((1, training.shape[1]), dtype=bool)])
        inner = np.concatenate(
            [rows[None] & ~held for rows, held in zip(training, splits.inner, strict=True)]
            if len(grid) > 1
            else [outer[:0]]
        )
        return cls(np.concatenate([np.tile(outer, (len(grid), 1)), np.tile(inner, (len(grid), 1))]), grid, splits)

    def penalty(self, like: torch.Tensor) -> torch.Tensor:
        """[problem]."""
        outer = self.splits.number + 1
        inner = len(self.weights) // len(self.grid) - outer
        return torch.tensor(np.concatenate([np.repeat(self.grid, outer), np.repeat(self.grid, inner)])).to(like)

    def choose(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Index in the grid of the best penalty, [site, fold + 1]; the last (all rows) is the folds' median."""
        folds, sizes = self.splits.number, len(self.grid)
        chosen = np.zeros((len(scores), folds + 1), dtype=int)
        if sizes == 1:
            return chosen
        inner = scores[:, sizes * (folds + 1) :].reshape(len(scores), sizes, folds, -1, scores.shape[-1])
        for fold, masks in enumerate(self.splits.inner):
            quality = np.zeros((len(scores), sizes))
            for place, held in enumerate(masks):
                if labels[held].any() and not labels[held].all():
                    quality += auroc_of(inner[:, :, fold, place][..., held], labels[held])
            # The strongest of the best: ties are common where all are perfect.
            chosen[:, fold] = sizes - 1 - np.argmax(quality[:, ::-1], axis=1)
        chosen[:, folds] = np.round(np.median(chosen[:, :folds], axis=1))
        return chosen

    def pick(self, scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """The scores [site, fold + 1, row] of the models with the chosen penalties."""
        outer = self.splits.number + 1
        return np.take_along_axis(scores, (chosen * outer + np.arange(outer))[..., None], axis=1)

    def spread(self, scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Standard deviation of each chosen model's scores over its training rows, [site, fold + 1, 1]."""
        rows = self.weights[: self.splits.number + 1]
        picked = np.where(rows, self.pick(scores, chosen), np.nan)
        spread = np.nanstd(picked, axis=2, keepdims=True)
        return np.where(spread > 0, spread, 1)


def _held_out(scores: np.ndarray, place: np.ndarray) -> np.ndarray:
    """For each row the score of the model that did not see its cluster: [site, row] of [site, fold + 1, row]."""
    return np.ascontiguousarray(scores[:, place, np.arange(scores.shape[2])])


def _deal(labels: np.ndarray, clusters: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """A fold for each row, int [row]: clusters whole, both classes spread evenly.

    Clusters in random order, the large first, each to the fold that has the fewest rows of its class: what
    `sklearn.model_selection.StratifiedGroupKFold` does, which takes longer here than all the fits.
    """
    names, member = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(member)
    mostly = np.bincount(member, weights=labels) > sizes / 2
    filled = np.zeros((2, folds))
    place = np.empty(len(names), dtype=int)
    order = rng.permutation(len(names))
    for cluster in order[np.argsort(-sizes[order], kind="stable")]:
        kind = int(mostly[cluster])
        place[cluster] = np.lexsort((filled.sum(axis=0), filled[kind]))[0]
        filled[kind, place[cluster]] += sizes[cluster]
    return place[member]
