"""Judging probes: nested cross-validation by topic, and controls (permuted labels, prompt length).

Folds keep queries about one topic together (`Activations.topics`, the rule of `casa_mech.judging.stats.cluster_of`), so
a probe is always judged on topics that it has not seen. Penalties are chosen on the training folds only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from casa_mech.errors import InputError
from casa_mech.judging.hypothesis import label_permutation_test, permuted_labels
from casa_mech.judging.stats import auroc_interval, aurocs_by_labels
from probes.linear.estimators import PENALISED, ProbeKind, fit_batch

PENALTIES = (3.0, 30.0, 300.0)
"""Penalties (`1 / C`) that are tried."""
INNER = 3
"""Folds within the training folds, on which the penalty is chosen."""


@dataclass(frozen=True)
class Folds:
    """A split of rows into outer folds, and of each fold's training rows into inner ones."""

    fold: np.ndarray
    """int [row]: the fold in which a row is held out."""
    inner: tuple[np.ndarray, ...]
    """For each fold bool [inner, row]: the rows held out within its training rows."""

    @property
    def number(self) -> int:
        """Number of outer folds."""
        return len(self.inner)

    def training(self) -> np.ndarray:
        """bool [fold, row]: the rows that each fold trains on."""
        return self.fold[None] != np.arange(self.number)[:, None]


def make_folds(labels: np.ndarray, clusters: np.ndarray, folds: int = 5, seed: int = 0, inner: int = INNER) -> Folds:
    """Stratified folds that keep clusters together.

    Args:
        labels: bool [row].
        clusters: [row]; rows of one cluster stay together.
        folds: number of outer folds.
        seed: of the split.
        inner: number of inner folds.

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
    outer = _assign_folds(labels, clusters, folds, rng)
    nested = []
    for number in range(folds):
        train = np.flatnonzero(outer != number)
        within = _assign_folds(labels[train], clusters[train], max(inner, 1), rng)
        masks = np.zeros((inner, len(labels)), dtype=bool)
        for place in range(inner):
            masks[place, train[within == place]] = True
        nested.append(masks)
    return Folds(outer, tuple(nested))


@dataclass(frozen=True)
class CrossValidated:
    """Held-out scores of nested cross-validation, and the penalties that it chose."""

    scores: np.ndarray
    """[site, row], each from a probe that saw no query of the row's cluster, in units of that probe's spread over its
    training rows."""
    penalty: np.ndarray
    """[site, fold]: chosen on each fold's training rows."""
    final_penalty: np.ndarray
    """[site]: the folds' median, for a probe fitted on everything."""


def cross_validate(
    states: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    kind: ProbeKind = "logistic",
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
    others: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    device: str = "cpu",
) -> list[CrossValidated]:
    """Held-out scores of a probe at every site, by nested cross-validation in one solve.

    Args:
        states: [site, row, d_model], real numbers.
        labels: bool [row].
        clusters: str [row].
        kind: which probe.
        penalties: the grid to choose from, for kinds that take one.
        folds: outer folds.
        seed: of the splits.
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
    scores = models.scores(tensor).cpu().numpy()
    best = problems.best_penalties(scores, labels)
    scale = problems.spread(scores, best)
    penalty, final = np.asarray(grid)[best[:, :folds]], np.asarray(grid)[best[:, folds]]
    results = [CrossValidated(_held_out(problems.pick(scores, best) / scale, splits.fold), penalty, final)]
    fold_of = dict(zip(clusters, splits.fold, strict=True))
    for other_states, other_clusters in others:
        tensor = torch.as_tensor(other_states, dtype=torch.float32, device=device)
        scores = models.scores(tensor).cpu().numpy()
        fold = np.array([fold_of.get(cluster, folds) for cluster in other_clusters])
        results.append(CrossValidated(_held_out(problems.pick(scores, best) / scale, fold), penalty, final))
    return results


def permuted_aurocs(
    states: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    penalty: float = PENALTIES[1],
    repeats: int = 20,
    kind: ProbeKind = "logistic",
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

    It is above 1/2 only for what a probe knows beside the stratum. The interval is a percentile bootstrap over
    clusters; NaN throughout when no stratum has both classes.

    Args:
        scores: [row].
        labels: bool [row].
        strata: [row].
        clusters: [row].
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    names, member = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    counts = np.concatenate([np.ones((1, len(labels))), draws[:, member]])
    won, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for stratum in np.unique(strata):
        harmful, benign = (np.flatnonzero((strata == stratum) & side) for side in (labels, ~labels))
        wins = (np.sign(scores[harmful][:, None] - scores[benign][None]) + 1) / 2
        won += np.einsum("rh,hb,rb->r", counts[:, harmful], wins, counts[:, benign], optimize=True)
        pairs += counts[:, harmful].sum(axis=1) * counts[:, benign].sum(axis=1)
    if pairs[0] == 0:
        return float("nan"), float("nan"), float("nan"), 0
    rates = won[1:][pairs[1:] > 0] / pairs[1:][pairs[1:] > 0]
    low, high = np.quantile(rates, (0.025, 0.975))
    return float(won[0] / pairs[0]), float(low), float(high), int(pairs[0])


@dataclass(frozen=True)
class ProbeControls:
    """A probe's AUROC beside what it should be compared with."""

    auroc: float
    """Of the probe on unseen clusters; `low` and `high` are its interval."""
    low: float
    high: float
    permuted: float
    """Mean AUROC on permuted labels."""
    above_permuted: float
    """`auroc` minus `permuted`."""
    p_value: float
    """Of the permutation test, one-sided."""
    length: float
    """AUROC of the prompt's number of tokens alone, with its interval."""
    length_low: float
    length_high: float
    matched: float
    """AUROC of the probe among prompts of equal length, with its interval, over `pairs` pairs."""
    matched_low: float
    matched_high: float
    pairs: int
    n: int
    """Queries."""


def probe_controls(
    scores: np.ndarray,
    permuted: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    clusters: np.ndarray,
    seed: int = 0,
) -> ProbeControls:
    """Comparison of held-out `scores` [row] with permuted labels (`permuted_aurocs`, [repeat]) and lengths [row]."""
    groups = list(clusters)
    value, low, high = auroc_interval(list(scores), list(labels), groups, seed, resamples=200)
    by_length = auroc_interval(list(lengths.astype(float)), list(labels), groups, seed, resamples=200)
    chance = float(permuted.mean())
    p_value = (1 + int((permuted >= value).sum())) / (1 + len(permuted))
    matched, matched_low, matched_high, pairs = matched_auroc(scores, labels, lengths, clusters, seed)
    return ProbeControls(
        auroc=value, low=low, high=high, permuted=chance, above_permuted=value - chance, p_value=p_value,
        length=by_length[0], length_low=by_length[1], length_high=by_length[2],
        matched=matched, matched_low=matched_low, matched_high=matched_high, pairs=pairs, n=len(labels),
    )  # fmt: skip


@dataclass(frozen=True)
class _Problems:
    """The problems of one solve: for each penalty the outer folds and all rows, then for each the inner folds."""

    weights: np.ndarray
    """bool [problem, row]."""
    grid: Sequence[float]
    """The penalties."""
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
        """Each problem's penalty [problem]."""
        outer = self.splits.number + 1
        inner = len(self.weights) // len(self.grid) - outer
        return torch.tensor(np.concatenate([np.repeat(self.grid, outer), np.repeat(self.grid, inner)])).to(like)

    def best_penalties(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Index in the grid of the best penalty, [site, fold + 1]; the last (all rows) is the folds' median."""
        folds, sizes = self.splits.number, len(self.grid)
        best = np.zeros((len(scores), folds + 1), dtype=int)
        if sizes == 1:
            return best
        inner = scores[:, sizes * (folds + 1) :].reshape(len(scores), sizes, folds, -1, scores.shape[-1])
        for fold, masks in enumerate(self.splits.inner):
            quality = np.zeros((len(scores), sizes))
            for place, held in enumerate(masks):
                if labels[held].any() and not labels[held].all():
                    quality += auroc_of(inner[:, :, fold, place][..., held], labels[held])
            # The strongest of the best: ties are common where all are perfect.
            best[:, fold] = sizes - 1 - np.argmax(quality[:, ::-1], axis=1)
        best[:, folds] = np.round(np.median(best[:, :folds], axis=1))
        return best

    def pick(self, scores: np.ndarray, best: np.ndarray) -> np.ndarray:
        """The scores [site, fold + 1, row] of the models with the penalties `best` (`best_penalties`)."""
        outer = self.splits.number + 1
        return np.take_along_axis(scores, (best * outer + np.arange(outer))[..., None], axis=1)

    def spread(self, scores: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Standard deviation of those models' scores over their training rows, [site, fold + 1, 1]."""
        rows = self.weights[: self.splits.number + 1]
        picked = np.where(rows, self.pick(scores, best), np.nan)
        spread = np.nanstd(picked, axis=2, keepdims=True)
        return np.where(spread > 0, spread, 1)


def _held_out(scores: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Each row's score by the model that did not see its cluster: [site, row] of `scores` [site, fold + 1, row]."""
    return np.ascontiguousarray(scores[:, fold, np.arange(scores.shape[2])])


def _assign_folds(labels: np.ndarray, clusters: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """A fold for each row, int [row]: clusters whole, both classes spread evenly.

    Clusters in random order, the large first, each to the fold that has the fewest rows of its class: what
    `sklearn.model_selection.StratifiedGroupKFold` does, which takes longer here than all the fits.
    """
    names, member = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(member)
    mostly = np.bincount(member, weights=labels) > sizes / 2
    filled = np.zeros((2, folds))
    fold = np.empty(len(names), dtype=int)
    order = rng.permutation(len(names))
    for cluster in order[np.argsort(-sizes[order], kind="stable")]:
        label = int(mostly[cluster])
        fold[cluster] = np.lexsort((filled.sum(axis=0), filled[label]))[0]
        filled[label, fold[cluster]] += sizes[cluster]
    return fold[member]
