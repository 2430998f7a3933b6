"""Figures of notebook 07 on patching: spans, heads and their paths, attribution, states moved between surfaces."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, bar_lengths, style, titled
from casa_mech.reports.safety_attention.patch_tables import BENIGN_TEXT, HARMFUL_TEXT, PATHS, TOTAL

MEASURE_NAMES = {"log_odds": "log-odds of v_s", "logit": "token logit difference"}


def plot_patching(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Effect of exchanged states on v_s's log-odds and on the model's own token difference, by depth and span.

    A column a surface. Solid: harm put into benign runs; dashed: taken out of harmful ones.

    Args:
        data: `PatchEffects.summary` with `surface`, of the residual stream by span.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces, sites = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["site"]))
    spans = list(dict.fromkeys(data["span"]))
    names = {"log_odds": "change of the\nlog-odds of v_s", "logit": "change of the token\nlogit difference"}
    with style():
        size = (3.3 * len(surfaces), 5.4)
        figure, axes = plt.subplots(2, len(surfaces), figsize=size, sharex=True, sharey="row", squeeze=False)
        for line, (measure, label) in zip(axes, names.items(), strict=True):
            for axis, surface in zip(line, surfaces, strict=True):
                for (span, direction), rows in data[data["surface"] == surface].groupby(["span", "direction"]):
                    number = spans.index(str(span))
                    rows = rows.set_index("site").reindex(sites)
                    inserted = direction == "insert harm"
                    mean, low, high = (rows[f"delta_{measure}_{end}"] for end in ("mean", "low", "high"))
                    axis.plot(
                        np.arange(len(sites)), mean, "-" if inserted else "--", color=SERIES[number % 6],
                        marker=MARKERS[number % 6], markersize=4, label=span if inserted else None,
                    )  # fmt: skip
                    axis.fill_between(
                        np.arange(len(sites)), low, high, color=SERIES[number % 6], alpha=0.15, linewidth=0
                    )
                axis.axhline(0, color="grey", linewidth=0.8)
                if measure == "log_odds":
                    axis.set_title(f"{surface} (n = {int(data[data['surface'] == surface]['n'].max())} pairs)")
                else:
                    axis.set_xlabel("residual stream after block")
                    axis.set_xticks(
                        np.arange(len(sites)), ["input" if site == "embeddings" else site for site in sites]
                    )
            line[0].set_ylabel(label)
        how = "Solid: harm put into benign runs; dashed: taken out of harmful ones. Bands: 95 % intervals over pairs."
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0])


def plot_heads(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Effect of one head's exchanged output on the log-odds of v_s: a panel a surface, blocks down, heads across.

    Args:
        data: `PatchEffects.summary` with `surface`, of single heads in one direction.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    reach = max(float(data["delta_log_odds_mean"].abs().max()), 1e-6)
    with style():
        figure, axes = plt.subplots(1, len(surfaces), figsize=(3.6 * len(surfaces), 2.9), squeeze=False)
        for axis, surface in zip(axes[0], surfaces, strict=True):
            panel = data[data["surface"] == surface]
            grid = panel.assign(layer=panel["site"].str.removeprefix("z.").astype(int))
            values = grid.pivot(index="layer", columns="head", values="delta_log_odds_mean")
            image = axis.imshow(values, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
            low, high = (
                grid.pivot(index="layer", columns="head", values=f"delta_log_odds_{end}") for end in ("low", "high")
            )
            for row, column in zip(*np.nonzero((low.to_numpy() > 0) | (high.to_numpy() < 0)), strict=True):
                axis.text(column, row, f"{values.iloc[row, column]:.2f}", ha="center", va="center", fontsize=7)
            axis.grid(False)
            axis.set_xticks(np.arange(values.shape[1]), values.columns)
            axis.set_yticks(np.arange(values.shape[0]), values.index)
            axis.set(xlabel="head", ylabel="block", title=f"{surface} (n = {int(panel['n'].max())} pairs)")
            figure.colorbar(image, ax=axis, label="change of the log-odds")
        return titled(figure, title, f"{caption} Numbers stand where the 95 % interval leaves 0 out.")


def plot_spans(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """The share of v_s's log-odds that each span carries after the last block: a panel a surface, with intervals.

    Args:
        data: `patch_tables.span_data`.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    with style():
        figure, axes = plt.subplots(1, len(surfaces), figsize=(3.1 * len(surfaces), 2.6), sharex=True, squeeze=False)
        for number, (axis, surface) in enumerate(zip(axes[0], surfaces, strict=True)):
            rows = data[data["surface"] == surface]
            y = np.arange(len(rows))
            axis.errorbar(
                100 * rows["value"], y, xerr=100 * bar_lengths(rows), fmt=MARKERS[number], color=SERIES[number],
                capsize=2,
            )  # fmt: skip
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set_yticks(y, rows["span"])
            axis.invert_yaxis()
            axis.set(title=f"{surface} (n = {int(rows['n'].max())} pairs)", xlabel="share of the gap, %")
        how = (
            "Harmful states after the last block at one span alone, in the benign run: change of the log-odds of v_s "
            "over the whole gap. Bars: 95 % intervals over topics."
        )
        return titled(figure, title, f"{caption} {how}")


def plot_paths(data: pd.DataFrame, title: str, caption: str = "", shown: int = 8) -> Figure:
    """Total, direct and indirect effect of the heads that move most: a column a surface, a line a measure.

    Args:
        data: `patch_tables.path_data`.
        title: the claim.
        caption: what stands behind it.
        shown: heads in a panel.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    with style():
        size = (3.3 * len(surfaces), 1.2 + 0.56 * shown)
        figure, axes = plt.subplots(len(MEASURE_NAMES), len(surfaces), figsize=size, squeeze=False)
        for line, (measure, name) in zip(axes, MEASURE_NAMES.items(), strict=True):
            for axis, surface in zip(line, surfaces, strict=True):
                panel = data[data["surface"] == surface].set_index(["site", "head"])
                total = panel[panel["path"] == TOTAL][f"delta_{measure}_mean"]
                order = total.abs().sort_values(ascending=False).index[:shown]
                for number, path in enumerate(PATHS):
                    rows = panel[panel["path"] == path].reindex(order)
                    ends = rows[[f"delta_{measure}_{end}" for end in ("mean", "low", "high")]]
                    ends.columns = ["value", "low", "high"]
                    y = np.arange(len(order)) + 0.22 * (number - 1)
                    axis.errorbar(
                        ends["value"], y, xerr=bar_lengths(ends), fmt=MARKERS[number], color=SERIES[number],
                        capsize=1.5, markersize=4, label=path,
                    )  # fmt: skip
                axis.axvline(0, color="grey", linewidth=0.8)
                axis.set_yticks(np.arange(len(order)), [f"{site.removeprefix('z.')}.{head}" for site, head in order])
                axis.invert_yaxis()
                gap = float(panel[f"gap_{measure}"].iloc[0])
                axis.set(xlabel=f"change of the {name}\n(whole gap: {gap:.1f})")
                if measure == "log_odds":
                    axis.set_title(f"{surface} (n = {int(panel['n'].max())} pairs)")
            line[0].set_ylabel("block.head")
        how = (
            "One head's harmful output in the benign run. Direct: to what safety attention and the head read at the "
            f"end, and no block between; indirect: through later blocks alone. The {shown} heads with the largest "
            "total; bars: 95 % intervals over topics."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def plot_agreement(points: pd.DataFrame, agreement: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Attribution patching against true patching: a dot a target (mean over pairs), a column a surface.

    Args:
        points: `patch_tables.estimates`.
        agreement: `patch_tables.agreement` of them.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(points["surface"]))
    kinds = {"stream": r"input|stream.*", "heads": "heads.*", "attention and MLP": "attention.*|MLP.*"}
    totals = agreement[agreement["part"] == "all"].set_index(["surface", "measure"])
    with style():
        size = (3.3 * len(surfaces), 6.2)
        figure, axes = plt.subplots(len(MEASURE_NAMES), len(surfaces), figsize=size, squeeze=False)
        for line, (measure, name) in zip(axes, MEASURE_NAMES.items(), strict=True):
            for axis, surface in zip(line, surfaces, strict=True):
                panel = points[(points["surface"] == surface) & (points["measure"] == measure)]
                means = panel.groupby(["part", "target"])[["estimated", "patched"]].mean()
                for number, (kind, pattern) in enumerate(kinds.items()):
                    rows = means[means.index.get_level_values("part").str.fullmatch(pattern)]
                    axis.plot(
                        rows["estimated"], rows["patched"], MARKERS[number], color=SERIES[number], markersize=4,
                        alpha=0.8, label=kind,
                    )  # fmt: skip
                ends = np.array([means.min().min(), means.max().max()])
                axis.plot(ends, ends, color="grey", linewidth=0.8)
                where = (surface, measure)
                row = totals.loc[where] if where in totals.index else None
                r = "" if row is None else f"r = {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                axis.set_title(f"{surface}, {r}\nn = {len(panel)} ({len(means)} targets)", fontsize=8)
                axis.set_xlabel("estimated by the slope")
            line[0].set_ylabel(f"patched: change of\nthe {name}")
        how = (
            "Dots: targets (site, head and span), means over pairs; line: equal. r: Pearson's over all pairs and "
            "targets, with its 95 % interval over topics."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def plot_moved(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Change by a text's states in a picture's or clip's run, by depth: a column a surface and span.

    Args:
        data: `patch_tables.moved_data`.
        title: the claim.
        caption: what stands behind it.
    """
    columns = list(dict.fromkeys(zip(data["surface"], data["span"], strict=True)))
    sites = list(dict.fromkeys(data["site"]))
    with style():
        size = (3.0 * len(columns), 5.2)
        figure, axes = plt.subplots(
            len(MEASURE_NAMES), len(columns), figsize=size, sharex=True, sharey="row", squeeze=False
        )
        for line, (measure, name) in zip(axes, MEASURE_NAMES.items(), strict=True):
            for axis, (surface, span) in zip(line, columns, strict=True):
                panel = data[(data["surface"] == surface) & (data["span"] == span)]
                for number, donor in enumerate((HARMFUL_TEXT, BENIGN_TEXT)):
                    rows = panel[panel["donor"] == donor].set_index("site").reindex(sites)
                    ends = rows[[f"delta_{measure}_{end}" for end in ("mean", "low", "high")]]
                    ends.columns = ["value", "low", "high"]
                    axis.errorbar(
                        np.arange(len(sites)) + 0.1 * (2 * number - 1), ends["value"], yerr=bar_lengths(ends),
                        capsize=2, fmt=MARKERS[number] + "-", color=SERIES[number], markersize=4,
                        label=f"states of the {donor}",
                    )  # fmt: skip
                gap = float(panel[panel["donor"] == HARMFUL_TEXT][f"gap_{measure}"].mean())
                axis.axhline(gap, color="grey", linestyle=":", linewidth=1)
                axis.axhline(0, color="grey", linewidth=0.8)
                if measure == "log_odds":
                    axis.set_title(f"{surface} (n = {int(panel['n'].max())})\n{span}", fontsize=8)
                else:
                    names = ["input" if site == "embeddings" else site for site in sites]
                    axis.set_xticks(np.arange(len(sites)), names)
                    axis.set_xlabel("states after block")
            line[0].set_ylabel(f"change of the\n{name}")
        how = (
            "The run of a harmful request as a picture or clip gets a text run's states. Dotted: as far as the harmful "
            "text's own run is away. Bars: 95 % intervals over topics."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])
