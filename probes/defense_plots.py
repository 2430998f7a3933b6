"""Figures of the comparison: defence × attack, safety against utility against cost, ablations, published rates."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.plots import BENIGN, HARMFUL, MARKERS, SERIES, style

PANELS = {"attack_success": "attack success (%)", "benign_answered": "benign twins answered (%)"}
_WIDE = 8
_TEXT = {"attack_success": (HARMFUL, "^"), "benign_answered": (BENIGN, "o")}


def plot_grid(data: pd.DataFrame, title: str) -> Figure:
    """A heat-map for each of `PANELS` in `data`: a row a defence, a column an attack, in each cell rate and interval.

    Args:
        data: columns `defense, metric, scope, n, value, low, high`; fractions.
        title: the claim.
    """
    rows, columns = list(dict.fromkeys(data["defense"])), list(dict.fromkeys(data["scope"]))
    panels = {metric: name for metric, name in PANELS.items() if metric in set(data["metric"])}
    with style():
        # Many attacks: one panel below the other, or the page is too wide to read.
        down, across = (len(panels), 1) if len(columns) > _WIDE else (1, len(panels))
        size = (1.5 + across * max(3.2, 0.95 * len(columns)), 1.6 + down * 0.46 * len(rows))
        figure, axes = plt.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axis, (metric, name) in zip(axes.flat, panels.items(), strict=True):
            part = data[data["metric"] == metric].set_index(["defense", "scope"])
            values = np.array([[part["value"].get((row, column), np.nan) for column in columns] for row in rows])
            axis.imshow(100 * values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
            for y, row in enumerate(rows):
                for x, column in enumerate(columns):
                    if (row, column) in part.index:
                        _cell(axis, x, y, part.loc[(row, column)])
            axis.set_xticks(np.arange(len(columns)), columns, rotation=35, ha="right")
            axis.set_yticks(np.arange(len(rows)), rows)
            axis.grid(visible=False)
            each = part.drop(index="all", level="scope")["n"]
            axis.set_title(f"{name}, n = {int(each.min())} a cell{_seeds(data)}")
        return _finished(figure, title)


def plot_tradeoff(data: pd.DataFrame, title: str) -> Figure:
    """Attack success against benign twins answered, a point a defence, its area the seconds a query takes.

    Args:
        data: columns `defense, n, attack_success, benign_answered` (each with `_low` and `_high`), `relative_seconds`
            (NaN for the model itself, which is 1), `trained` (how many numbers its training sets).
        title: the claim.
    """
    with style():
        figure, axis = plt.subplots(figsize=(8.2, 4.8))
        for number, row in enumerate(data.to_dict("records")):
            x, y = 100 * row["attack_success"], 100 * row["benign_answered"]
            error = {
                "xerr": [[x - 100 * row["attack_success_low"]], [100 * row["attack_success_high"] - x]],
                "yerr": [[y - 100 * row["benign_answered_low"]], [100 * row["benign_answered_high"] - y]],
            }
            times = 1.0 if np.isnan(row["relative_seconds"]) else row["relative_seconds"]
            colour, marker = SERIES[number % len(SERIES)], MARKERS[(number // len(SERIES) + number) % len(MARKERS)]
            axis.errorbar(x, y, **error, color=colour, alpha=0.5, linewidth=0.9, capsize=2)
            trained = f", {row['trained'] / 1e3:.0f}k trained" if row["trained"] else ""
            axis.scatter(
                x, y, s=45 * times, color=colour, marker=marker, alpha=0.85, edgecolors="black", linewidths=0.5,
                label=f"{row['defense']}: {times:.2f}× time{trained}",
            )  # fmt: skip
        axis.set(xlabel="attack success, mean over attacks (%)", ylabel="benign twins answered, mean over attacks (%)")
        axis.set_title(f"n = {int(data['n'].min())} replies a rate{_seeds(data)}; area: seconds a query")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, markerscale=0.8)
        return _finished(figure, title)


def plot_ablations(data: pd.DataFrame, title: str) -> Figure:
    """A panel an axis: attack success and benign twins answered of each of its levels; the base's name is in capitals.

    Args:
        data: columns `axis, level, base, metric, n, value, low, high`, over all attacks; fractions.
        title: the claim.
    """
    axes_names = list(dict.fromkeys(data["axis"]))
    across = min(3, len(axes_names))
    down = -(-len(axes_names) // across)
    with style():
        figure, axes = plt.subplots(down, across, figsize=(4.1 * across, 2.3 * down), sharex=True, squeeze=False)
        for axis, name in zip(axes.flat, axes_names, strict=False):
            part = data[data["axis"] == name]
            levels = part.drop_duplicates("level")[["level", "base"]].to_records(index=False)
            _levels(axis, part, [str(level) for level, _ in levels])
            shown = [str(level).upper() if base else str(level) for level, base in levels]
            axis.set_yticks(np.arange(len(levels)), shown)
            axis.set_ylim(len(levels) - 0.5, -0.5)
            axis.set_title(f"{name} (n = {int(part['n'].min())})")
        for axis in axes.flat[len(axes_names) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("percent of requests")
        figure = _finished(figure, title)
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
        return figure


def plot_by_attack(data: pd.DataFrame, title: str) -> Figure:
    """Attack success and benign twins answered by attack, a marker a level, with intervals.

    Args:
        data: columns `level, metric, scope, n, value, low, high`; fractions.
        title: the claim.
    """
    levels, scopes = list(dict.fromkeys(data["level"])), list(dict.fromkeys(data["scope"]))
    with style():
        size = (9, 1.4 + 0.45 * len(scopes))
        figure, axes = plt.subplots(1, len(PANELS), figsize=size, sharey=True, sharex=True)
        for axis, (metric, name) in zip(axes, PANELS.items(), strict=True):
            part = data[data["metric"] == metric]
            for number, level in enumerate(levels):
                rows = part[part["level"] == level].set_index("scope").reindex(scopes)
                y = np.arange(len(scopes)) + 0.17 * (number - (len(levels) - 1) / 2)
                _bars(axis, rows, y, SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)], str(level))
            axis.set(xlim=(-3, 103), xlabel=name)
            axis.set_title(f"n = {int(part[part['scope'] != 'all']['n'].min())} a cell")
            axis.set_yticks(np.arange(len(scopes)), scopes)
        axes[0].invert_yaxis()
        figure = _finished(figure, title)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(names))
        return figure


def plot_published_rates(data: pd.DataFrame, title: str) -> Figure:
    """The paper's rates, a panel a model and table; intervals where a test-set size fits all rates of a benchmark.

    Args:
        data: columns `table, model, defense, attack, value, low, high`; fractions.
        title: says that nothing here was measured.
    """
    panels = list(dict.fromkeys(zip(data["table"], data["model"], strict=True)))
    attacks = list(dict.fromkeys(data["attack"]))
    with style():
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), sharey=True, squeeze=False)
        for axis, (table, model) in zip(axes[0], panels, strict=True):
            part = data[(data["table"] == table) & (data["model"] == model)]
            defenses = list(dict.fromkeys(part["defense"]))
            for number, defense in enumerate(defenses):
                rows = part[part["defense"] == defense].set_index("attack").reindex(attacks)
                y = np.arange(len(attacks)) + 0.14 * (number - (len(defenses) - 1) / 2)
                _bars(axis, rows, y, SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)], defense)
            axis.set(xlim=(-3, 103), xlabel="attack success as published (%)", title=f"{model}, {table} table")
            axis.set_yticks(np.arange(len(attacks)), attacks)
            axis.legend(loc="upper right", fontsize=8)  # the rates there are low
        axes[0][0].invert_yaxis()
        return _finished(figure, title)


def _levels(axis: Axes, part: pd.DataFrame, levels: list[str]) -> None:
    for shift, (metric, name) in zip((-0.13, 0.13), PANELS.items(), strict=True):
        rows = part[part["metric"] == metric].set_index("level").reindex(levels)
        colour, marker = _TEXT[metric]
        _bars(axis, rows, np.arange(len(levels)) + shift, colour, marker, name.removesuffix(" (%)"))
    axis.set_xlim(-3, 103)


def _bars(axis: Axes, rows: pd.DataFrame, y: np.ndarray, colour: str, marker: str, label: str) -> None:
    error = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
    axis.errorbar(
        100 * rows["value"], y, xerr=100 * np.nan_to_num(error), fmt=marker, color=colour, capsize=2, markersize=4.5,
        label=label,
    )  # fmt: skip


def _cell(axis: Axes, x: int, y: int, row: pd.Series) -> None:
    value = 100 * row["value"]
    axis.text(
        x, y, f"{value:.0f}\n[{100 * row['low']:.0f}, {100 * row['high']:.0f}]", ha="center", va="center", fontsize=7,
        color="white" if value < 55 else "black",
    )  # fmt: skip


def _seeds(data: pd.DataFrame) -> str:
    return f", {seeds} seeds" if (seeds := int(data["seeds"].max()) if "seeds" in data else 1) > 1 else ""


def _finished(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    plt.close(figure)  # shown by the notebook that displays it, once
    return figure
