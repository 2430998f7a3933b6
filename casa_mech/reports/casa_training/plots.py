"""Figures of notebook 02: the training run, and v_s before and after it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.figures import BENIGN, HARMFUL, SERIES, style, titled


def plot_training(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Loss and mean v_s of both classes over training, a line a gate.

    Args:
        data: columns `gate_seed, step, loss, v_s_harmful, v_s_benign`.
        title: the claim.
        caption: what stands behind it.
    """
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        for _, gate in data.groupby("gate_seed"):
            left.plot(gate["step"], gate["loss"], color=SERIES[5], linewidth=1, alpha=0.6)
        left.set(xlabel="step", ylabel="training loss (nats a token)", title="loss")
        left.set_yscale("log")
        for column, colour, dash in (("v_s_harmful", HARMFUL, "-"), ("v_s_benign", BENIGN, "--")):
            for _, gate in data.groupby("gate_seed"):
                name = column.removeprefix("v_s_")
                right.plot(gate["step"], gate[column], color=colour, linestyle=dash, linewidth=1, label=name)
        right.set(xlabel="step", ylabel="mean v_s of the batch", title="safety attention", ylim=(-0.03, 1.03))
        return titled(figure, title, caption, legend_of=right)


def plot_gate(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Distribution of v_s by surface, harmful beside benign: median, middle half, and the middle 90 %.

    Args:
        data: columns `surface, label, v_s`, one row a query and gate, and optionally `moment` (before or after
            training) and `gate_seed`.
        title: the claim.
        caption: what stands behind it.
    """
    moments = list(dict.fromkeys(data["moment"])) if "moment" in data else [None]
    surfaces = list(dict.fromkeys(data["surface"]))
    gates = data["gate_seed"].nunique() if "gate_seed" in data else 1
    with style():
        figure, axes = plt.subplots(1, len(moments), figsize=(4.6 * len(moments), 3.6), sharey=True, squeeze=False)
        for axis, moment in zip(axes[0], moments, strict=True):
            panel = data if moment is None else data[data["moment"] == moment]
            for shift, (label, colour) in zip((-0.18, 0.18), (("harmful", HARMFUL), ("benign", BENIGN)), strict=True):
                groups = [
                    panel[(panel["surface"] == s) & (panel["label"] == label)]["v_s"].to_numpy() for s in surfaces
                ]
                n = f"n = {len(groups[0]) // gates} each" + (f", {gates} gates" if gates > 1 else "")
                _boxes(axis, groups, np.arange(len(surfaces)) + shift, colour, f"{label} ({n})")
            axis.set_xticks(np.arange(len(surfaces)), surfaces)
            axis.set(xlabel="surface of the request", ylim=(-0.03, 1.03), title=moment or "")
        axes[0][0].set_ylabel("v_s (1: unsafe)")
        how = "Thick bars: the middle half of the requests; lines: the middle 90 %; dots: medians."
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def _boxes(axis: Axes, groups: list[np.ndarray], places: np.ndarray, colour: str, label: str) -> None:
    for place, values in zip(places, groups, strict=True):
        low, first, middle, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        axis.plot([place, place], [low, high], color=colour, linewidth=1)
        axis.plot([place, place], [first, third], color=colour, linewidth=6, solid_capstyle="butt", label=label)
        axis.plot(place, middle, marker="o", color="white", markeredgecolor=colour, markersize=5)
        label = ""
