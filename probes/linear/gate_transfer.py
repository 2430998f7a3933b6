"""Correlation of a probe's transfer to other surfaces with that of a gate (CASA).

If a linear probe fitted on text already finds harm in pictures and speech, a gate trained on text alone should find it
there too. A point is one gate: its model, how long it was trained, the layer it reads and the surface it is judged on;
its two numbers are the probe's AUROC on that surface (base model, that layer, fitted on text) and the gate's (v_s).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, rankdata

from casa_mech.errors import InputError

POINT_COLUMNS = (
    "model", "steps", "site", "surface", "probe", "probe_low", "probe_high", "casa", "casa_low", "casa_high", "n",
)  # fmt: skip
_GATE = ["model", "steps", "site"]


@dataclass(frozen=True)
class TransferPrediction:
    """Correlations of probe transfer with CASA's transfer, over gates and surfaces."""

    spearman: float
    """Rank correlation over all points; `low` and `high` are its interval."""
    low: float
    high: float
    pearson: float
    """Correlation of the numbers themselves."""
    within: float
    """Rank correlation after each model's and surface's mean is taken out, so that differences between models and
    surfaces do not count; with its interval."""
    within_low: float
    within_high: float
    p_value: float
    """Of `spearman`, two-sided: whole gates change places within their model, with all their surfaces."""
    within_p: float
    """Of `within`, likewise; the check that `spearman` has to pass: it also grows when one surface is easier for both
    probes and gates."""
    by_model: dict[str, tuple[float, float, int]]
    """For each model the rank correlation of its own points, its p, and its gates; NaN where one side is the same."""
    n: int
    """Points."""
    clusters: int
    """Gates that the points come from, which the intervals draw."""


def join_points(probes: pd.DataFrame, gates: pd.DataFrame, fit_surface: str = "text") -> pd.DataFrame:
    """One row a gate and surface (`POINT_COLUMNS`) from the two sides' tables.

    Args:
        probes: `model, site, fit, surface, auroc, low, high` (`transfer_matrix` with the model's name).
        gates: `model, steps, site, surface, auroc, low, high, n` (AUROC of v_s on the same requests).
        fit_surface: the surface that both were trained on; it is left out, since nothing is transferred to it.

    Raises:
        InputError: no gate has a probe at its layer and surface.
    """
    transfers = probes[(probes["fit"] == fit_surface) & (probes["surface"] != fit_surface)]
    renamed = transfers.rename(columns={"auroc": "probe", "low": "probe_low", "high": "probe_high"})
    gate = gates.rename(columns={"auroc": "casa", "low": "casa_low", "high": "casa_high"})
    keys = ["model", "site", "surface"]
    points = gate.assign(site=gate["site"].astype(str)).merge(
        renamed[[*keys, "probe", "probe_low", "probe_high"]], on=keys
    )
    if not len(points):
        raise InputError("no gate reads a layer at which there is a probe: collect the gates' layers")
    return points[list(POINT_COLUMNS)]


def transfer_prediction(points: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> TransferPrediction:
    """Correlation of `probe` and `casa` over `points` (`POINT_COLUMNS`).

    Intervals are percentile bootstraps over gates (model, steps, layer): the surfaces of one gate are not independent.
    They hold the spread between gates, not the sampling of requests, nor that there are few models. For the p values a
    gate's points move together, too, within its model: what one model's gates have in common is no evidence.

    Raises:
        InputError: fewer than four points, or a side that is the same everywhere.
    """
    if len(points) < 4:
        raise InputError(
            f"a correlation of {len(points)} points says nothing: give at least four (layers, models, steps)"
        )
    x, y = points["probe"].to_numpy(float), points["casa"].to_numpy(float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise InputError("one side is the same at every point: there is nothing to predict")
    points = points.sort_values(["model", "steps", "site", "surface"], kind="stable").reset_index(drop=True)
    rng = np.random.default_rng(seed)
    x, y, centred, moved = _sides(points, resamples, rng)
    gate = points.groupby(_GATE, sort=False).ngroup().to_numpy()
    count = int(gate.max()) + 1
    members = [np.flatnonzero(gate == index) for index in range(count)]
    draws = [np.concatenate([members[index] for index in rng.integers(count, size=count)]) for _ in range(resamples)]
    low, high = interval(_rank_correlations(x, y, draws))
    within_low, within_high = interval(_rank_correlations(*centred, draws))
    by_model = {}
    for model, own in points.groupby("model", sort=False):
        own_x, own_y, _, own_moved = _sides(own, resamples, rng)
        gates = own.groupby(_GATE, sort=False).ngroups
        by_model[str(model)] = (rank_correlation(own_x, own_y), _permutation_p(own_x, own_y, own_moved), gates)
    return TransferPrediction(
        spearman=rank_correlation(x, y), low=low, high=high,
        pearson=float(pearsonr(x, y).statistic),
        within=rank_correlation(*centred), within_low=within_low, within_high=within_high,
        p_value=_permutation_p(x, y, moved),
        within_p=_permutation_p(*centred, moved),
        by_model=by_model, n=len(points), clusters=count,
    )  # fmt: skip


def _sides(
    points: pd.DataFrame, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """(probe [point], gate [point], both less their model's and surface's mean, rows after permuting [draw, point])."""
    x, y = points["probe"].to_numpy(float), points["casa"].to_numpy(float)
    groups = points.groupby(["model", "surface"], sort=False)
    centred_x, centred_y = ((points[side] - groups[side].transform("mean")).to_numpy() for side in ("probe", "casa"))
    return x, y, (centred_x, centred_y), _gates_permuted(points, draws, rng)


def _gates_permuted(points: pd.DataFrame, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The row [draw, point] whose gate's number each point is given: gates of one model with the same surfaces swap."""
    places: dict[Hashable, list[np.ndarray]] = {}
    for (model, *_), rows in points.reset_index(drop=True).groupby(_GATE, sort=False):
        rows = rows.sort_values("surface", kind="stable")
        places.setdefault((model, *rows["surface"]), []).append(rows.index.to_numpy())
    moved = np.tile(np.arange(len(points)), (draws, 1))
    for alike in places.values():
        block = np.stack(alike)
        orders = rng.permuted(np.tile(np.arange(len(block)), (draws, 1)), axis=1)
        moved[:, block.ravel()] = block[orders].reshape(draws, -1)
    return moved


def _permutation_p(x: np.ndarray, y: np.ndarray, moved: np.ndarray) -> float:
    """Two-sided p of the rank correlation of `x` and `y` [point]; `moved` [draw, point] are other orders of y."""
    x_ranks, y_ranks = rankdata(x) - (len(x) + 1) / 2, rankdata(y) - (len(y) + 1) / 2
    if not x_ranks.any() or not y_ranks.any():
        return float("nan")
    # 1e-9: the same sum in another order is not a smaller one.
    extreme = int((np.abs(y_ranks[moved] @ x_ranks) >= abs(y_ranks @ x_ranks) - 1e-9).sum())
    return (1 + extreme) / (1 + len(moved))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation of `x` [n] and `y` [n]; NaN where one of them is the same everywhere."""
    x_ranks, y_ranks = rankdata(x) - (len(x) + 1) / 2, rankdata(y) - (len(y) + 1) / 2
    size = float(np.sqrt((x_ranks @ x_ranks) * (y_ranks @ y_ranks)))
    return float(x_ranks @ y_ranks) / size if size > 0 else float("nan")


def _rank_correlations(x: np.ndarray, y: np.ndarray, draws: list[np.ndarray]) -> list[float]:
    """`rank_correlation` of each of `draws`, rows of x and y; those of one length at once."""
    values: list[float] = []
    for length in {len(rows) for rows in draws}:
        places = np.stack([rows for rows in draws if len(rows) == length])
        x_ranks, y_ranks = (rankdata(side[places], axis=1) - (length + 1) / 2 for side in (x, y))
        size = np.sqrt((x_ranks**2).sum(axis=1) * (y_ranks**2).sum(axis=1))
        with np.errstate(invalid="ignore"):
            values += (np.where(size > 0, (x_ranks * y_ranks).sum(axis=1), np.nan) / size).tolist()
    return values


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 95 % of the finite `values`; NaN where there are none."""
    finite = np.array(values)[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)
