"""Agreement of a judge with people, and of people with each other: Cohen's kappa, Krippendorff's alpha, confusion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import RESAMPLES, Statistic, bootstrap_interval, exact_reach, mean_interval, members
from casa_mech.judging.verdict import UNDECIDED

if TYPE_CHECKING:
    import pandas as pd

Level = Literal["nominal", "ordinal", "interval"]
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")
MAJORITY = "majority"


@dataclass(frozen=True)
class Agreement:
    """Measures of agreement with their intervals, and the table of labels behind them."""

    measures: pd.DataFrame
    """`measure, raters, n, value, low, high`: a row for each pair of raters (`observed`, `cohen_kappa`) and for each
    group (`krippendorff_alpha`); value is NaN where it is not defined."""
    confusion: pd.DataFrame
    """`human, judge, n, share, low, high`: a row for each pair of labels; share of that human label,
    Wilson's interval where every reply is its own cluster."""
    undecided: int
    """Replies without a verdict of the judge: they are in the confusion table and in no measure."""


def agreement(
    labels: pd.DataFrame,
    judge: str,
    humans: Sequence[str],
    *,
    positive: Sequence[str] = (),
    level: Level = "nominal",
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Agreement:
    """Agreement of a judge's column with one or more human columns.

    Args:
        labels: a row for each reply; an empty cell is a missing label.
        judge: the judge's column. Its `undecided` is no label.
        humans: the people's columns. With three or more, their majority is a rater too (ties have none).
        positive: labels to set against all others, so that `complied` against the rest is what is compared.
        level: of Krippendorff's alpha; ordinal and interval need labels that are numbers.
        clusters: which replies are one draw; None: each its own.
        seed, resamples: of the bootstrap.

    Raises:
        InputError: a missing column, no human label, `positive` labels that nobody gave, or labels that are no numbers.
    """
    import pandas as pd

    if level not in LEVELS:
        raise InputError(f"unknown level {level!r}; levels: {', '.join(LEVELS)}")
    table = _labels(labels, [judge, *humans], positive, level)
    undecided = int((table[judge] == UNDECIDED).sum())
    decided = table.mask(table == UNDECIDED)
    if len(humans) > 2:
        decided[MAJORITY] = [_majority([row[name] for name in humans]) for row in decided.to_dict("records")]
    raters = [name for name in decided.columns if name != judge]
    settings: dict[str, Any] = {"clusters": clusters, "seed": seed, "resamples": resamples}
    rows = []
    pairs = [(human, judge) for human in raters] + list(combinations(humans, 2))
    for pair in pairs:
        rows += _pair_rows(decided, pair, settings)
    groups = [[*humans, judge]] + ([list(humans)] if len(humans) > 1 else [])
    rows += [_alpha_row(decided, group, level, settings) for group in groups]
    human = MAJORITY if MAJORITY in decided else humans[0]
    return Agreement(pd.DataFrame(rows), _confusion(decided[human], table[judge], settings), undecided)


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa of two raters' labels [n]; NaN where both give one and the same label throughout."""
    from sklearn.metrics import cohen_kappa_score

    codes = _codes(first, second)
    return float(cohen_kappa_score(*codes)) if len(set(np.concatenate(codes))) > 1 else float("nan")


def krippendorff_alpha(counts: np.ndarray, values: Sequence[Any], level: Level = "nominal") -> float:
    """Krippendorff's alpha from how many raters gave each unit each value, int [unit, value]; NaN if undefined."""
    import krippendorff

    useful = counts[counts.sum(axis=1) > 1]
    if (useful.sum(axis=0) > 0).sum() < 2:
        return float("nan")
    domain = list(range(len(values))) if level == "nominal" else [float(value) for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(krippendorff.alpha(value_counts=useful, value_domain=domain, level_of_measurement=level))


def _labels(frame: pd.DataFrame, names: Sequence[str], positive: Sequence[str], level: str) -> pd.DataFrame:
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise InputError(f"no column {missing[0]!r} of labels; the columns are {', '.join(map(str, frame.columns))}")
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError("agreement needs the judge's column and at least one other of people's labels")
    text = frame[list(names)].map(_label).reset_index(drop=True)
    if text[list(names[1:])].isna().all(axis=None):
        raise InputError(f"the columns {', '.join(names[1:])} hold no label")
    if level != "nominal":
        return text.map(lambda label: _number(label) if _is_label(label) else label)
    positives = {str(name).strip().lower() for name in positive}
    labels = _labels_in(text)
    if positives - labels:
        unknown = sorted(positives - labels)[0]
        raise InputError(f"nobody gave the label {unknown!r}; labels: {', '.join(sorted(labels))}")
    if not positives:
        return text
    name = "+".join(sorted(positives))
    return text.map(lambda label: (name if label in positives else f"not {name}") if _is_label(label) else label)


def _is_label(cell: Any) -> bool:
    """True for text that is not the judge's `undecided`."""
    return isinstance(cell, str) and cell != UNDECIDED


def _labels_in(table: pd.DataFrame) -> set[str]:
    return {cell for cell in table.to_numpy(dtype=object).ravel() if _is_label(cell)}


def _label(value: Any) -> str | None:
    """A cell as a label: lower case; a number alike however it is typed; None for an empty cell."""
    if value is None or value != value:
        return None
    text = str(value).strip().lower()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text or None


def _number(label: str) -> str:
    try:
        return str(float(label))
    except ValueError:
        raise InputError(f"the label {label!r} is no number, which this level of measurement needs") from None


def _majority(labels: Sequence[str | None]) -> str | None:
    counts: dict[str, int] = {}
    for label in labels:
        if isinstance(label, str):
            counts[label] = counts.get(label, 0) + 1
    best = [label for label, count in counts.items() if count == max(counts.values())]
    return best[0] if len(best) == 1 else None


def _pair_rows(decided: pd.DataFrame, pair: tuple[str, str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    both = decided[list(pair)].notna().all(axis=1).to_numpy()
    first, second = (decided.loc[both, name].tolist() for name in pair)
    raters, n = f"{pair[0]} ~ {pair[1]}", int(both.sum())
    if not n:
        return [_row("cohen_kappa", raters, 0, float("nan"))]
    codes = _codes(first, second)
    same = (codes[0] == codes[1]).astype(float)
    rows = []
    ones = np.ones((1, n))
    observed = mean_interval(same, _rated(both, settings), settings["seed"], resamples=settings["resamples"],
                             limits=(0.0, 1.0))  # fmt: skip
    rows.append(_row("observed", raters, n, observed.value, (observed.low, observed.high)))
    value, chance = cohen_kappa(first, second), _expected_agreement(*codes, ones)[0]
    interval = _interval(lambda weights: _weighted_kappa(*codes, weights), value, 1 - chance, both, settings)
    return [*rows, _row("cohen_kappa", raters, n, value, interval)]


def _alpha_row(decided: pd.DataFrame, raters: list[str], level: Level, settings: dict[str, Any]) -> dict[str, Any]:
    labels = decided[raters]
    values = sorted(_labels_in(labels), key=float if level != "nominal" else str)
    counts = np.stack([(labels == value).sum(axis=1).to_numpy() for value in values], axis=1)
    pairable = counts.sum(axis=1) > 1
    value = krippendorff_alpha(counts, values, level)

    kinds = np.arange(len(values), dtype=float) if level == "nominal" else np.array([float(each) for each in values])
    shares = counts[pairable].sum(axis=0) / max(1, counts[pairable].sum())
    interval = _interval(
        lambda weights: _weighted_alpha(counts[pairable], kinds, level, weights), value, 1 - float(shares @ shares),
        pairable, settings,
    )  # fmt: skip
    return _row("krippendorff_alpha", ", ".join(raters), int(pairable.sum()), value, interval)


def _interval(
    statistic: Statistic, value: float, disagreement: float, rated: np.ndarray, settings: dict[str, Any]
) -> tuple[float, float] | None:
    """The bootstrap's bounds, None for a value that is not defined.

    Raters who never differ leave nothing to draw from: the interval then reaches down to what the largest share of
    differing draws that so many clusters cannot exclude would give, `disagreement` being the share by chance.
    """
    if math.isnan(value):
        return None
    clusters = _rated(rated, settings)
    low, high = bootstrap_interval(
        statistic, clusters, int(rated.sum()), settings["seed"], resamples=settings["resamples"]
    )
    if value == 1:
        low = 1 - exact_reach(int(members(clusters, int(rated.sum())).max()) + 1) / disagreement
    return low, high


def _rated(rated: np.ndarray, settings: dict[str, Any]) -> list[Hashable] | None:
    """The clusters of the rows that were rated."""
    clusters = settings["clusters"]
    return None if clusters is None else [name for name, keep in zip(clusters, rated, strict=True) if keep]


def _row(
    measure: str, raters: str, n: int, value: float, interval: tuple[float, float] | None = None
) -> dict[str, Any]:
    low, high = interval or (float("nan"), float("nan"))
    return {"measure": measure, "raters": raters, "n": n, "value": value, "low": low, "high": high}


def _codes(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    index = {label: place for place, label in enumerate(dict.fromkeys([*first, *second]))}
    return np.array([index[label] for label in first]), np.array([index[label] for label in second])


def _weighted_kappa(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cohen's kappa [resample] under each row of `weights` [resample, n], as scikit-learn's with sample weights."""
    observed, expected = weights @ (first == second) / weights.sum(axis=1), _expected_agreement(first, second, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


def _expected_agreement(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often two raters with these shares of labels agree by chance, [resample]."""
    size, total = int(max(first.max(), second.max())) + 1, weights.sum(axis=1)[:, None]
    shares: np.ndarray = ((weights @ np.eye(size)[first] / total) * (weights @ np.eye(size)[second] / total)).sum(
        axis=1
    )
    return shares


def _weighted_alpha(counts: np.ndarray, values: np.ndarray, level: Level, weights: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha [resample] of `counts` [unit, value] under each row of `weights` [resample, unit].

    The matrix of coincidences is a sum over units, so that all resamples are one product (Krippendorff 2011).
    """
    units = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    units = units / (counts.sum(axis=1) - 1)[:, None, None]
    coincidences = np.tensordot(weights.astype(float), units, axes=1)
    totals = coincidences.sum(axis=2)
    if level == "ordinal":
        # Half of what lies at either end, all that lies between.
        middle = np.cumsum(totals, axis=1) - totals / 2
        distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    else:
        apart = values[:, None] - values[None]
        distance = (apart**2 if level == "interval" else (apart != 0).astype(float))[None]
    expected = (totals[:, :, None] * totals[:, None, :] * distance).sum(axis=(1, 2)) / (totals.sum(axis=1) - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 1e-12, 1 - (coincidences * distance).sum(axis=(1, 2)) / expected, np.nan)


def _confusion(human: pd.Series, judge: pd.Series, settings: dict[str, Any]) -> pd.DataFrame:
    import pandas as pd

    from casa_mech.judging.stats import rate_interval

    both = human.notna().to_numpy() & judge.notna().to_numpy()
    table = pd.crosstab(human[both], judge[both])
    rows = []
    for truth in table.index:
        here = both & (human == truth).to_numpy()
        for verdict in table.columns:
            hits = (judge[here] == verdict).to_numpy()
            share, low, high = rate_interval(hits, _rated(here, settings), settings["seed"])
            rows.append(
                {"human": truth, "judge": verdict, "n": int(hits.sum()), "share": share, "low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=["human", "judge", "n", "share", "low", "high"])
