"""Judging probes: nested cross-validation by topic, and controls (labels dealt anew, prompt length).

Folds keep queries about one topic together (`Activations.topics`, the rule of `casa_mech.judging.stats.cluster_of`), so
a probe is always judged on topics that it has not seen. Penalties are chosen on the training folds only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import RESAMPLES, cluster_counts, exact_reach, members
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import PERMUTATIONS, label_permutation_test, permuted_labels
from casa_mech.judging.stats import auroc_interval, aurocs_by_labels
from probes.linear.estimators import PENALISED, ProbeKind, fit_batch

PENALTIES = (3.0, 30.0, 300.0)
"""Penalties (`1 / C`) that are tried."""
_SOLVED = 2**25
"""Numbers of a solve's largest array."""
_DEALT_TOLERANCE = 1e-2
"""Of the solver on dealt labels: it moves an AUROC by less than 0.001 and takes a third of the time."""
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
    if not inner:
        return Folds(outer, (np.zeros((0, len(labels)), dtype=bool),) * folds)
    nested = []
    for number in range(folds):
        train = np.flatnonzero(outer != number)
        within = _assign_folds(labels[train], clusters[train], inner, rng)
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
    inner: np.ndarray
    """[site, fold]: AUROC on inner folds of each fold's training rows, at the penalty chosen there, so that a site can
    be chosen without the rows held out; NaN where there was nothing to choose."""


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
    compare_sites: bool = False,
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
        compare_sites: fill `CrossValidated.inner` for kinds without a penalty, too.

    Returns:
        One for the states themselves, then one for each of `others`.

    Raises:
        InputError: states that are not finite, one class, or fewer clusters of a class than folds.
    """
    splits = make_folds(labels, clusters, folds, seed)
    grid = list(penalties) if kind in PENALISED else [1.0]
    tensor = torch.as_tensor(states, dtype=torch.float32, device=device)
    problems = _Problems.of(splits, grid, compare_sites or len(grid) > 1)
    weights, truth = (torch.tensor(array, device=tensor.device) for array in (problems.weights, labels))
    models = fit_batch(kind, tensor, truth, weights, problems.penalty(tensor))
    scores = models.scores(tensor).cpu().numpy()
    best, inner = problems.best_penalties(scores, labels)
    scale = problems.spread(scores, best)
    penalty, final = np.asarray(grid)[best[:, :folds]], np.asarray(grid)[best[:, folds]]
    results = [CrossValidated(_held_out(problems.pick(scores, best) / scale, splits.fold), penalty, final, inner)]
    fold_of = dict(zip(clusters, splits.fold, strict=True))
    for other_states, other_clusters in others:
        tensor = torch.as_tensor(other_states, dtype=torch.float32, device=device)
        scores = models.scores(tensor).cpu().numpy()
        fold = np.array([fold_of.get(cluster, folds) for cluster in other_clusters])
        results.append(CrossValidated(_held_out(problems.pick(scores, best) / scale, fold), penalty, final, inner))
    return results


@dataclass(frozen=True)
class Chance:
    """What probes reach on labels dealt anew."""

    aurocs: np.ndarray
    """[site, deal]: held-out AUROC of probes fitted and judged on the dealt labels."""
    own: np.ndarray
    """[site]: of the same probe, with the same penalty, on the labels as they are."""

    @property
    def p_value(self) -> np.ndarray:
        """[site]: one-sided p of an AUROC as high; exact, since every deal is fitted and judged as the labels are."""
        # 1e-12: the same sum in another order is not a smaller one.
        above = (self.aurocs >= self.own[:, None] - 1e-12).sum(axis=1)
        share: np.ndarray = (1 + above) / (1 + self.aurocs.shape[1])
        return share

    @property
    def band(self) -> np.ndarray:
        """[2, site]: the middle 95 % of the deals."""
        bounds: np.ndarray = np.quantile(self.aurocs, (0.025, 0.975), axis=1)
        return bounds


@dataclass(frozen=True)
class Rows:
    """Hidden states with what a probe is fitted to and judged by."""

    states: np.ndarray
    """[site, row, d_model]."""
    labels: np.ndarray
    """bool [row]."""
    clusters: np.ndarray
    """str [row]."""
    units: np.ndarray
    """str [row]: rows of one name, such as a query as text and as picture, keep one label."""


def chance_of(
    fitted: Rows,
    others: Sequence[Rows] = (),
    deals: int = PERMUTATIONS,
    penalty: float = PENALTIES[1],
    kind: ProbeKind = "logistic",
    folds: int = 5,
    seed: int = 0,
) -> list[Chance]:
    """Chance for a probe and for what it is carried to: labels dealt anew (`permuted_labels`), fitted and judged again.

    Dealing labels to scores that a cross-validated probe gave is not enough: they depend on each other through the
    labels that it was fitted to, and such a test can find noise twice as often as it says.

    Args:
        fitted: what the probe is fitted to and judged on, in folds.
        others: more to judge, such as the same queries as pictures; a cluster that `fitted` has is judged by the fold
            that held it out, a new one by the probe of all rows.
        deals: how many. penalty: for kinds that take one. kind, folds, seed: as in `cross_validate`.

    Returns:
        One for `fitted`, then one for each of `others`.

    Raises:
        InputError: as `cross_validate`.
    """
    sides = [fitted, *others]
    dealt = _deal(sides, deals, np.random.default_rng(seed))
    tensors = [torch.as_tensor(side.states, dtype=torch.float32) for side in sides]
    whole, member = np.ones((1, len(fitted.labels)), dtype=bool), members(list(fitted.clusters), len(fitted.labels))
    # For each row whether `fitted` has its cluster, and a row of it there.
    row_of = {cluster: row for row, cluster in enumerate(fitted.clusters)}
    places = [
        (np.isin(side.clusters, fitted.clusters), np.array([row_of.get(cluster, 0) for cluster in side.clusters]))
        for side in sides
    ]
    models_each = folds + any(not known.all() for known, _ in places)
    # As many deals in one solve as a few hundred megabytes hold.
    size = max(1, _SOLVED // (len(fitted.states) * models_each * max(fitted.states.shape[1:])))
    aurocs: list[list[np.ndarray]] = [[] for _ in sides]
    for start in range(0, 1 + deals, size):
        block = [labels[start : start + size] for labels in dealt]
        splits = [
            make_folds(labels, member, folds, seed + start + number, inner=0) for number, labels in enumerate(block[0])
        ]
        weights = np.concatenate([np.concatenate([split.training(), whole])[:models_each] for split in splits])
        truth = torch.from_numpy(np.repeat(block[0], models_each, axis=0))
        models = fit_batch(kind, tensors[0], truth, torch.from_numpy(weights), penalty, tolerance=_DEALT_TOLERANCE)
        for tensor, (known, place), labels, values in zip(tensors, places, block, aurocs, strict=True):
            scores = models.scores(tensor).numpy().reshape(len(tensor), len(labels), models_each, -1)
            for number, split in enumerate(splits):
                fold = np.where(known, split.fold[place], folds)
                values.append(auroc_of(scores[:, number, fold, np.arange(len(fold))], labels[number]))
    stacked = [np.stack(values, axis=1) for values in aurocs]
    return [Chance(values[:, 1:], values[:, 0]) for values in stacked]


def _deal(sides: Sequence[Rows], deals: int, rng: np.random.Generator) -> list[np.ndarray]:
    """For each side bool [1 + deal, row]: its labels, then those dealt anew, a unit's the same on every side.

    Clusters that the first side lacks change labels among themselves, so that it keeps as many of either class.
    """
    units = np.concatenate([side.units for side in sides])
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    labels, clusters = (
        np.concatenate([getattr(side, name) for side in sides])[first] for name in ("labels", "clusters")
    )
    dealt = np.tile(labels, (1 + deals, 1))
    fitted = np.isin(clusters, sides[0].clusters)
    for group in (fitted, ~fitted):
        if group.any():
            dealt[1:, group] = permuted_labels(labels[group], clusters[group], deals, rng)
    ends = np.cumsum([len(side.units) for side in sides])[:-1]
    return [dealt[:, rows] for rows in np.split(unit.ravel(), ends)]


def auroc_of(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC [...] of scores [..., row] for labels bool [row]; ties count half."""
    n_pos = int(labels.sum())
    ranks = rankdata(scores, axis=-1)[..., labels].sum(axis=-1)
    return (ranks - n_pos * (n_pos + 1) / 2) / (n_pos * (len(labels) - n_pos))


def chance_p(
    scores: np.ndarray, labels: np.ndarray, clusters: np.ndarray, seed: int = 0, draws: int = PERMUTATIONS
) -> float:
    """One-sided p of the AUROC of `scores` [row], by dealing the labels anew (`permuted_labels`).

    For scores that were made without these labels; those of a cross-validated probe need `chance_of`.
    """
    return label_permutation_test(lambda dealt: aurocs_by_labels(scores, dealt), labels, clusters, seed, draws)


def matched_auroc(
    scores: np.ndarray,
    labels: np.ndarray,
    strata: np.ndarray,
    clusters: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float, int]:
    """(AUROC, low, high, pairs) over pairs of a harmful and a benign query of one stratum, such as one prompt length.

    It is above 1/2 only for what a probe knows beside the stratum. The interval is a percentile bootstrap over
    clusters, and at 0 or 1 the exact bound for as many draws as the classes have clusters among the pairs; NaN
    throughout when no stratum has both classes.

    Args:
        scores: [row].
        labels: bool [row].
        strata: [row]; a row whose stratum is not known (NaN) is in no pair.
        clusters: [row].
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    member = members(list(clusters), len(labels))
    drawn = cluster_counts(int(member.max()) + 1, resamples, np.random.default_rng(seed))
    counts = np.concatenate([np.ones_like(drawn[:1]), drawn])
    won, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    paired = np.zeros(len(labels), dtype=bool)
    for stratum in np.unique(strata[~np.isnan(strata)]):
        harmful, benign = (np.flatnonzero((strata == stratum) & side) for side in (labels, ~labels))
        if not len(harmful) or not len(benign):
            continue
        paired[harmful], paired[benign] = True, True
        wins = (np.sign(scores[harmful][:, None] - scores[benign][None]) + 1) / 2
        of_harmful, of_benign = counts[:, member[harmful]], counts[:, member[benign]]
        won += ((of_harmful @ wins) * of_benign).sum(axis=1)
        pairs += of_harmful.sum(axis=1) * of_benign.sum(axis=1)
    if pairs[0] == 0:
        return float("nan"), float("nan"), float("nan"), 0
    value = float(won[0] / pairs[0])
    rates = won[1:][pairs[1:] > 0] / pairs[1:][pairs[1:] > 0]
    low, high = (float(bound) for bound in np.quantile(rates, (0.025, 0.975)))
    if value in (0.0, 1.0):
        draws = min(len(np.unique(member[paired & side])) for side in (labels, ~labels))
        low, high = max(0.0, value - exact_reach(draws)), min(1.0, value + exact_reach(draws))
    return value, min(low, value), max(high, value), int(pairs[0])


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
    """AUROC of the prompt's number of tokens alone, with its interval, over queries whose length is known; NaN where
    that leaves a class empty: the control is then missing, not passed."""
    length_low: float
    length_high: float
    matched: float
    """AUROC of the probe among prompts of equal, known length, with its interval, over `pairs` pairs."""
    matched_low: float
    matched_high: float
    pairs: int
    n: int
    """Queries."""
    lengths_missing: int
    """Queries whose length is not known."""


def probe_controls(
    scores: np.ndarray,
    permuted: np.ndarray,
    p_value: float,
    labels: np.ndarray,
    lengths: np.ndarray,
    clusters: np.ndarray,
    seed: int = 0,
) -> ProbeControls:
    """Comparison of held-out `scores` [row] with permuted labels and lengths.

    Args:
        scores: [row]. permuted, p_value: of `chance_of`, [deal] and the test's p. labels: bool [row].
        lengths: [row], the prompts' numbers of tokens, NaN where not known. clusters: [row]. seed: of the intervals.
    """
    groups = list(clusters)
    value, low, high = auroc_interval(list(scores), list(labels), groups, seed)
    lengths = np.asarray(lengths, dtype=np.float64)
    known = ~np.isnan(lengths)
    by_length = Estimate(math.nan, math.nan, math.nan)
    if labels[known].any() and not labels[known].all():
        by_length = auroc_interval(list(lengths[known]), list(labels[known]), list(clusters[known]), seed)
    chance = float(permuted.mean())
    matched, matched_low, matched_high, pairs = matched_auroc(scores, labels, lengths, clusters, seed)
    return ProbeControls(
        auroc=value, low=low, high=high, permuted=chance, above_permuted=value - chance, p_value=p_value,
        length=by_length[0], length_low=by_length[1], length_high=by_length[2],
        matched=matched, matched_low=matched_low, matched_high=matched_high, pairs=pairs, n=len(labels),
        lengths_missing=int((~known).sum()),
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
    def of(cls, splits: Folds, grid: Sequence[float], inner_folds: bool) -> _Problems:
        training = splits.training()
        outer = np.concatenate([training, np.ones((1, training.shape[1]), dtype=bool)])
        inner = np.concatenate(
            [rows[None] & ~held for rows, held in zip(training, splits.inner, strict=True)]
            if inner_folds
            else [outer[:0]]
        )
        return cls(np.concatenate([np.tile(outer, (len(grid), 1)), np.tile(inner, (len(grid), 1))]), grid, splits)

    def penalty(self, like: torch.Tensor) -> torch.Tensor:
        """Each problem's penalty [problem]."""
        outer = self.splits.number + 1
        inner = len(self.weights) // len(self.grid) - outer
        return torch.tensor(np.concatenate([np.repeat(self.grid, outer), np.repeat(self.grid, inner)])).to(like)

    def best_penalties(self, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index in the grid of the best penalty, [site, fold + 1], and its AUROC on the inner folds, [site, fold].

        The last index (all rows) is the folds' median.
        """
        folds, sizes = self.splits.number, len(self.grid)
        best, aurocs = np.zeros((len(scores), folds + 1), dtype=int), np.full((len(scores), folds), np.nan)
        if len(self.weights) == sizes * (folds + 1):
            return best, aurocs
        inner = scores[:, sizes * (folds + 1) :].reshape(len(scores), sizes, folds, -1, scores.shape[-1])
        for fold, masks in enumerate(self.splits.inner):
            quality, judged = np.zeros((len(scores), sizes)), 0
            for place, held in enumerate(masks):
                if labels[held].any() and not labels[held].all():
                    quality += auroc_of(inner[:, :, fold, place][..., held], labels[held])
                    judged += 1
            # The strongest of the best: ties are common where all are perfect.
            best[:, fold] = sizes - 1 - np.argmax(quality[:, ::-1], axis=1)
            aurocs[:, fold] = quality[np.arange(len(quality)), best[:, fold]] / max(1, judged)
        best[:, folds] = np.round(np.median(best[:, :folds], axis=1))
        return best, aurocs

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
