"""Figures that are readable alone: a claim as title, units, n and intervals drawn, colours for colour-blind eyes too.

Every figure is saved as PNG and SVG together with the plotted numbers as CSV.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.files import writing

# Okabe and Ito's palette: distinct under every common colour blindness and, in this order, in grey print.
HARMFUL, BENIGN = "#D55E00", "#0072B2"
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "casa-mech",  # the same numbers give the same bytes
    "svg.fonttype": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """The project's matplotlib style, for the time of a block."""
    with plt.rc_context(_STYLE):
        yield


def save_figure(figure: Figure, data: pd.DataFrame, path: Path | str) -> Path:
    """Write `path` with the suffixes .png, .svg and .csv (the plotted numbers), each whole or not at all.

    Returns:
        The PNG's path.

    Raises:
        RunError: the place cannot be written to.
    """
    path = Path(path)
    with style():
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            with writing(path.with_suffix(suffix)) as temporary:
                figure.savefig(temporary, bbox_inches="tight", metadata=metadata)
    with writing(path.with_suffix(".csv")) as temporary:
        data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return path.with_suffix(".png")


POSITIONS = {"last": "last prompt position", "mean": "mean over the prompt"}


def plot_planes(data: pd.DataFrame, title: str) -> Figure:
    """Harmful and benign queries in the PCA plane: a column a surface, a row (and a plane) a choice of positions.

    Args:
        data: columns `positions, surface, label, x, y, explained_x, explained_y, silhouette`, one row a query.
        title: the claim.
    """
    surfaces, rows = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["positions"]))
    with style():
        size = (3.4 * len(surfaces), 3.1 * len(rows))
        figure, axes = plt.subplots(len(rows), len(surfaces), figsize=size, sharex="row", sharey="row", squeeze=False)
        for line, positions in zip(axes, rows, strict=True):
            here = data[data["positions"] == positions]
            for axis, surface in zip(line, surfaces, strict=True):
                part = here[here["surface"] == surface]
                for label, colour, marker in (("harmful", HARMFUL, "^"), ("benign", BENIGN, "o")):
                    chosen = part[part["label"] == label]
                    name = f"{label} (n = {len(chosen)} a panel)"
                    axis.scatter(
                        chosen["x"], chosen["y"], s=14, c=colour, marker=marker, alpha=0.6, linewidths=0, label=name
                    )
                axis.set_title(f"{surface}: silhouette {part['silhouette'].iloc[0]:.2f}")
                axis.set_xlabel(f"PC 1 ({here['explained_x'].iloc[0]:.0%} of variance)")
            share = f"PC 2 ({here['explained_y'].iloc[0]:.0%} of variance)"
            line[0].set_ylabel(f"{POSITIONS.get(positions, positions)}\n{share}")
        return titled(figure, title, axes[0][0])


def plot_probes(data: pd.DataFrame, title: str) -> Figure:
    """Probe AUROC by layer with 95 % intervals and chance: fitted on each surface, and fitted on text alone.

    Args:
        data: columns `positions, site, surface, measure, auroc, low, high, n`; a row of panels for each `positions`.
        title: the claim.
    """
    surfaces, rows = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["positions"]))
    panels = {"probe": "fitted on the same surface", "transfer": "fitted on text, judged on another surface"}
    with style():
        figure, axes = plt.subplots(len(rows), 2, figsize=(9, 3.1 * len(rows)), sharey=True, squeeze=False)
        for line, positions in zip(axes, rows, strict=True):
            here = data[data["positions"] == positions]
            for axis, (measure, name) in zip(line, panels.items(), strict=True):
                _layers(axis, here, measure, surfaces)
                axis.set_title(f"probe {name}")
            line[0].set_ylabel(f"{POSITIONS.get(positions, positions)}\nAUROC, unseen topics")
        return titled(figure, title, axes[0][0])


def plot_training(data: pd.DataFrame, title: str) -> Figure:
    """Loss and mean v_s of both classes over training.

    Args:
        data: columns `step, loss, v_s_harmful, v_s_benign`.
        title: the claim.
    """
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        left.plot(data["step"], data["loss"], color=SERIES[5], linewidth=1)
        left.set(xlabel="step", ylabel="training loss (nats a token)", title="loss")
        left.set_yscale("log")
        for column, colour, dash in (("v_s_harmful", HARMFUL, "-"), ("v_s_benign", BENIGN, "--")):
            right.plot(data["step"], data[column], color=colour, linestyle=dash, label=column.removeprefix("v_s_"))
        right.set(xlabel="step", ylabel="mean v_s of the batch", title="safety attention", ylim=(-0.03, 1.03))
        return titled(figure, title, right)


def plot_gate(data: pd.DataFrame, title: str) -> Figure:
    """Distribution of v_s by surface, harmful beside benign: median, middle half, and the middle 90 %.

    Args:
        data: columns `surface, label, v_s`, one row a query, and optionally `moment` (before or after training).
        title: the claim.
    """
    moments = list(dict.fromkeys(data["moment"])) if "moment" in data else [None]
    surfaces = list(dict.fromkeys(data["surface"]))
    with style():
        figure, axes = plt.subplots(1, len(moments), figsize=(4.6 * len(moments), 3.6), sharey=True, squeeze=False)
        for axis, moment in zip(axes[0], moments, strict=True):
            part = data if moment is None else data[data["moment"] == moment]
            for shift, (label, colour) in zip((-0.18, 0.18), (("harmful", HARMFUL), ("benign", BENIGN)), strict=True):
                groups = [part[(part["surface"] == s) & (part["label"] == label)]["v_s"].to_numpy() for s in surfaces]
                _boxes(axis, groups, np.arange(len(surfaces)) + shift, colour, f"{label} (n = {len(groups[0])} each)")
            axis.set_xticks(np.arange(len(surfaces)), surfaces)
            axis.set(xlabel="surface of the request", ylim=(-0.03, 1.03), title=moment or "")
        axes[0][0].set_ylabel("v_s (1: unsafe)")
        return titled(figure, title, axes[0][0])


def plot_rates(data: pd.DataFrame, title: str, panels: Sequence[tuple[str, str]]) -> Figure:
    """Rates with Wilson intervals: a row of panels a model, a column a metric, an attack a line, defences side by side.

    Args:
        data: the result schema (`model, defense, attack, metric, n, value, low, high`).
        title: the claim.
        panels: (metric, axis label), drawn in this order for each model.
    """
    models, defenses = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["defense"]))
    cells = [(model, metric, name) for model in models for metric, name in panels]
    attacks = {metric: list(dict.fromkeys(data[data["metric"] == metric]["attack"])) for metric, _ in panels}
    height = 1.2 + 0.36 * max(len(names) for names in attacks.values())
    with style():
        size = (3.1 * len(panels), 0.7 + height * len(models))
        figure, axes = plt.subplots(len(models), len(panels), figsize=size, sharex=True, squeeze=False)
        for axis, (model, metric, name) in zip(axes.flat, cells, strict=True):
            part = data[(data["model"] == model) & (data["metric"] == metric)]
            for number, defense in enumerate(defenses):
                rows = part[part["defense"] == defense].set_index("attack").reindex(attacks[metric])
                y = np.arange(len(rows)) + 0.16 * (2 * number - len(defenses) + 1)
                error = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None) * 100
                axis.errorbar(
                    100 * rows["value"], y, xerr=error, fmt=MARKERS[number], color=SERIES[number], capsize=2,
                    markersize=4.5, label=defense,
                )  # fmt: skip
            smallest = int(part["n"].min()) if len(part) else 0
            short = model.rstrip("/").split("/")[-1]
            axis.set(xlim=(-3, 103), xlabel=f"{name}, %", title=f"{short} (n ≥ {smallest} a cell)")
            axis.tick_params(labelbottom=True)
            axis.set_yticks(np.arange(len(attacks[metric])), attacks[metric])
            axis.invert_yaxis()
        return titled(figure, title, axes[0][0])


def plot_separation(data: pd.DataFrame, title: str, scores: Mapping[str, str]) -> Figure:
    """AUROC of several scores with their intervals: a panel a model, an attack a line, the scores side by side.

    Args:
        data: the result schema (`model, attack, metric, n, value, low, high`).
        title: the claim.
        scores: what to call each metric.
    """
    models, attacks = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["attack"]))
    with style():
        size = (4.2 * len(models), 1.6 + 0.36 * len(attacks))
        figure, axes = plt.subplots(1, len(models), figsize=size, sharex=True, sharey=True, squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            part = data[data["model"] == model]
            for number, (metric, name) in enumerate(scores.items()):
                rows = part[part["metric"] == metric].set_index("attack").reindex(attacks)
                y = np.arange(len(rows)) + 0.16 * (2 * number - len(scores) + 1)
                error = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
                axis.errorbar(
                    rows["value"], y, xerr=error, fmt=MARKERS[number], color=SERIES[number], capsize=2, markersize=4.5,
                    label=name,
                )  # fmt: skip
            axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set(xlabel="AUROC", title=f"{model.rstrip('/').split('/')[-1]} (n ≥ {int(part['n'].min())} an attack)")
            axis.set_yticks(np.arange(len(attacks)), attacks)
        axes[0][0].invert_yaxis()
        return titled(figure, title, axes[0][0])


def plot_published(data: pd.DataFrame, title: str) -> Figure:
    """The paper's own numbers, one panel a model: a row a benchmark, a marker a defence. No intervals were published.

    Args:
        data: columns `model, defense, attack, value` (a fraction).
        title: what the panel shows.
    """
    models = list(dict.fromkeys(data["model"]))
    attacks, defenses = list(dict.fromkeys(data["attack"])), list(dict.fromkeys(data["defense"]))
    with style():
        figure, axes = plt.subplots(1, len(models), figsize=(4.4 * len(models), 3.2), sharey=True, squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            part = data[data["model"] == model]
            for number, defense in enumerate(defenses):
                rows = part[part["defense"] == defense].set_index("attack").reindex(attacks)
                y = np.arange(len(rows)) + 0.12 * (number - (len(defenses) - 1) / 2)
                axis.plot(100 * rows["value"], y, MARKERS[number % 6], color=SERIES[number % 6], label=defense)
            axis.set(xlim=(-3, 103), xlabel="attack success as published, %", title=model)
            axis.set_yticks(np.arange(len(attacks)), attacks)
        axes[0][0].invert_yaxis()
        return titled(figure, title, axes[0][0])


def _layers(axis: Axes, data: pd.DataFrame, measure: str, surfaces: list[str]) -> None:
    sites = list(dict.fromkeys(data["site"]))
    x = np.arange(len(sites))
    part = data[data["measure"] == measure]
    for surface in dict.fromkeys(part["surface"]):
        number = surfaces.index(surface)
        rows = part[part["surface"] == surface].set_index("site").reindex(sites)
        name = f"{surface} (n = {int(rows['n'].iloc[0])})"
        axis.plot(x, rows["auroc"], marker=MARKERS[number], color=SERIES[number], label=name, markersize=4)
        axis.fill_between(x, rows["low"], rows["high"], color=SERIES[number], alpha=0.15, linewidth=0)
    chance = data[data["measure"] == "permuted"].set_index("site").reindex(sites)
    axis.fill_between(x, chance["low"], chance["high"], color="grey", alpha=0.3, label="text, labels permuted")
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set_xlabel("layer (norm: after the final norm)")
    axis.set_xticks(x, sites)
    axis.set_ylim(top=1.02)


def _boxes(axis: Axes, groups: list[np.ndarray], places: np.ndarray, colour: str, label: str) -> None:
    for place, values in zip(places, groups, strict=True):
        low, first, middle, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        axis.plot([place, place], [low, high], color=colour, linewidth=1)
        axis.plot([place, place], [first, third], color=colour, linewidth=6, solid_capstyle="butt", label=label)
        axis.plot(place, middle, marker="o", color="white", markeredgecolor=colour, markersize=5)
        label = ""


def titled(figure: Figure, title: str, named: Axes | None = None) -> Figure:
    """Title, and the legend of `named` below the panels, where it covers no data."""
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.tight_layout()
    if named is not None:
        handles, names = named.get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(names))
    plt.close(figure)  # shown by the notebook that displays it, once
    return figure
