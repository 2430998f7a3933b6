"""Figures of notebook 07: v_s, what safety attention reads, and what the decision rests on."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import LABEL_COLOURS, MARKERS, SERIES, bar_lengths, style, titled
from probes.gate.calibration import Reliability
from probes.gate.plots import plot_attention_maps as plot_attention_maps
from probes.gate.removal import PERMUTED, SCORES

LABELS = ("harmful", "benign")


def plot_learning(log: pd.DataFrame, readings: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Left: mean v_s of both classes over training. Right: v_s by attack; middle half, middle 90 % and median.

    Args:
        log: columns `step, v_harmful, v_benign`, a row a training step.
        readings: columns `attack, label, v_s`, a row a query.
        title: the claim.
        caption: what stands behind it.
    """
    attacks = list(dict.fromkeys(readings["attack"]))
    with style():
        ratios = {"width_ratios": [1, 1.6]}
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, gridspec_kw=ratios)
        for number, label in enumerate(LABELS):
            left.plot(log["step"], log[f"v_{label}"], color=LABEL_COLOURS[label], linestyle=("-", "--")[number])
            groups = [readings[(readings["attack"] == a) & (readings["label"] == label)]["v_s"] for a in attacks]
            place = np.arange(len(attacks)) + (number - 0.5) * 0.36
            quantiles = np.array([np.quantile(group, (0.05, 0.25, 0.5, 0.75, 0.95)) for group in groups])
            name = f"{label} (n = {min(len(group) for group in groups)} each)"
            right.vlines(place, quantiles[:, 0], quantiles[:, 4], color=LABEL_COLOURS[label], linewidth=1)
            right.vlines(place, quantiles[:, 1], quantiles[:, 3], color=LABEL_COLOURS[label], linewidth=6, label=name)
            right.plot(place, quantiles[:, 2], "o", color="white", markeredgecolor=LABEL_COLOURS[label], markersize=5)
        left.set(xlabel="training step", ylabel="v_s (1: unsafe)", title="batch means in training", ylim=(-0.03, 1.03))
        right.set_xticks(np.arange(len(attacks)), attacks)
        right.set(xlabel="attack", title="after training, new requests")
        how = "Right: thick bars are the middle half of the requests, lines the middle 90 %, dots the medians."
        return titled(figure, title, f"{caption} {how}", legend_of=right)


def plot_shares(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Share of safety attention by span and surface, harmful beside benign, with intervals; the tick is what an even
    spread would give.

    Args:
        data: columns `surface, span, label, mean, low, high, even, n`.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    with style():
        figure, axes = plt.subplots(1, len(surfaces), figsize=(3.1 * len(surfaces), 3.2), sharey=True, squeeze=False)
        for axis, surface in zip(axes[0], surfaces, strict=True):
            panel = data[data["surface"] == surface]
            spans = list(dict.fromkeys(panel["span"]))
            for number, label in enumerate(LABELS):
                rows = panel[panel["label"] == label].set_index("span").reindex(spans)
                x = np.arange(len(spans)) + (number - 0.5) * 0.3
                error = bar_lengths(rows, "mean")
                axis.errorbar(
                    x, rows["mean"], yerr=error, fmt=MARKERS[number], color=LABEL_COLOURS[label], capsize=2, label=label
                )
                axis.scatter(x, rows["even"], marker="_", s=120, color="grey", label="even spread" if number else None)
            axis.set_xticks(np.arange(len(spans)), spans, rotation=25, ha="right")
            axis.set(title=f"{surface} (n = {int(panel['n'].min())} each)", ylim=(-0.03, 1.03))
        axes[0][0].set_ylabel("share of safety attention")
        return titled(figure, title, f"{caption} Bars: 95 % intervals.", legend_of=axes[0][0])


def plot_attribution(data: pd.DataFrame, title: str, caption: str = "", shown: int = 14) -> Figure:
    """The components of the token difference that differ most between the classes, with intervals.

    Args:
        data: `Attribution.table`: `component, label, mean, low, high, n`.
        title: the claim.
        caption: what stands behind it.
        shown: how many components.
    """
    means = data.pivot(index="component", columns="label", values="mean")
    order = (means["harmful"] - means["benign"]).abs().sort_values(ascending=False).index[:shown]
    with style():
        figure, axis = plt.subplots(figsize=(7.5, 0.28 * len(order) + 1.6))
        for number, label in enumerate(LABELS):
            rows = data[data["label"] == label].set_index("component").reindex(order)
            y = np.arange(len(order)) + (number - 0.5) * 0.3
            error = bar_lengths(rows, "mean")
            name = f"{label} (n = {int(rows['n'].min())})"
            axis.errorbar(
                rows["mean"], y, xerr=error, fmt=MARKERS[number], color=LABEL_COLOURS[label], capsize=2, label=name
            )
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(np.arange(len(order)), order)
        axis.invert_yaxis()
        axis.set_xlabel("contribution to the logit difference, unsafe minus safe")
        how = f"The {len(order)} components that differ most between the classes, with 95 % intervals."
        return titled(figure, title, f"{caption} {how}", legend_of=axis)


def plot_removals(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Share of searches whose decision flips when at most so many positions are hidden, by surface.

    Solid: greedy; dashed: the same search on permuted scores.

    Args:
        data: `removal.sets_table` with `surface`.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    with style():
        size = (3.3 * len(surfaces), 3.2)
        figure, axes = plt.subplots(1, len(surfaces), figsize=size, sharex=True, sharey=True, squeeze=False)
        sizes = np.arange(int(data["size"].max()) + 1)
        for number, (axis, surface) in enumerate(zip(axes[0], surfaces, strict=True)):
            panel = data[data["surface"] == surface]
            for search, line in ((SCORES, "-"), (PERMUTED, "--")):
                rows = panel[panel["search"] == search]
                share = [(rows["flipped"] & (rows["size"] <= size)).mean() for size in sizes]
                axis.step(sizes, share, line, where="post", color=SERIES[number])
                axis.plot(sizes, share, MARKERS[number], color=SERIES[number], markersize=4)
            axis.set(xlabel="positions removed", title=f"{surface} (n = {panel['query_id'].nunique()})")
        axes[0][0].set(ylabel="share of decisions flipped", ylim=(-0.03, 1.03))
        how = "Solid: greedily; dashed: the same search on scores that are dealt to other positions at every step."
        return titled(figure, title, f"{caption} {how}")


def plot_ablation(data: pd.DataFrame, cosines: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Left: share given the unsafe token, by what is ablated. Right: cosines of the gate's directions with others.

    Args:
        data: columns `surface, label, run, value, low, high, least, most, n`.
        cosines: of `probes.gate.safety_attention.cosine_table`.
        title: the claim.
        caption: what stands behind it.
    """
    runs = list(dict.fromkeys(data["run"]))
    groups = list(dict.fromkeys(zip(data["surface"], data["label"], strict=True)))
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), gridspec_kw={"width_ratios": [1.3, 1]})
        for number, run in enumerate(runs):
            rows = data[data["run"] == run].set_index(["surface", "label"]).reindex(groups)
            x = np.arange(len(groups)) + 0.16 * (number - (len(runs) - 1) / 2)
            error = bar_lengths(rows)
            left.vlines(x, rows["least"], rows["most"], color=SERIES[number], linewidth=5, alpha=0.2)
            left.errorbar(x, rows["value"], yerr=error, fmt=MARKERS[number], color=SERIES[number], capsize=2, label=run)
        left.set_xticks(np.arange(len(groups)), [f"{surface}\n{label}" for surface, label in groups], fontsize=8)
        left.set(ylabel="share given the unsafe token", ylim=(-0.03, 1.03), title=f"ablated (n ≥ {data['n'].min()})")
        names = [f"{row.gate_direction} · {row.direction}" for row in cosines.itertuples()]
        y = np.arange(len(names))
        error = bar_lengths(cosines, "cosine")
        chance = float(cosines["chance"].max())
        right.axvspan(-chance, chance, color="grey", alpha=0.25)
        right.errorbar(cosines["cosine"], y, xerr=error, fmt="o", color=SERIES[5], capsize=2)
        right.set_yticks(y, names, fontsize=8)
        right.invert_yaxis()
        right.set(xlim=(-1.03, 1.03), xlabel="cosine")
        how = (
            "Left: bars are 95 % intervals over topics, pale ones the range of a control's directions. Right: cosines "
            "of the gate's directions with others; grey: where 95 % of random directions lie."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=left)


def plot_reliability(data: Mapping[str, Reliability], title: str, caption: str = "") -> Figure:
    """Reliability curves: share of harmful requests by v_s, a panel an attack, with Wilson intervals."""
    with style():
        columns = min(3, len(data))
        rows = -(-len(data) // columns)
        size = (3.2 * columns, 3.0 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axis, (name, calibration) in zip(axes.flat, data.items(), strict=False):
            curve = calibration.curve
            axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
            error = bar_lengths(curve, "share")
            axis.errorbar(curve["mean_score"], curve["share"], yerr=error, fmt="o", color=SERIES[0], capsize=2)
            axis.set_title(
                f"{name} (n = {calibration.n})\nBrier {calibration.brier.text()}\nECE {calibration.ece.text()}",
                fontsize=8,
            )
        for axis in axes.flat[len(data) :]:
            axis.axis("off")
        figure.supxlabel("v_s", fontsize=9)
        figure.supylabel("share of harmful requests", fontsize=9)
        how = "Bars: 95 % intervals (Wilson); ECE: expected calibration error."
        return titled(figure, title, f"{caption} {how}")
