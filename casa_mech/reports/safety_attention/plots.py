"""Figures of notebook 07: v_s, what safety attention reads, and what the decision rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from casa_mech.figures import LABEL_COLOURS, MARKERS, SERIES, bar_lengths, style, titled
from casa_mech.reports.safety_attention.tables import word_shares
from probes.gate.calibration import Reliability
from probes.gate.safety_attention import AttentionMap

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


def plot_attention_maps(maps: Sequence[AttentionMap], title: str, caption: str = "") -> Figure:
    """Safety attention over each prompt: a row a request, its words with their weights, and its medium if it has one.

    Args:
        maps: the requests.
        title: what is drawn.
        caption: which requests.
    """
    with style():
        figure, axes = plt.subplots(
            len(maps), 2, figsize=(11, 1.75 * len(maps)), squeeze=False, gridspec_kw={"width_ratios": [2.2, 1]}
        )
        for (words, media), attention in zip(axes, maps, strict=True):
            _draw_words(words, attention)
            _draw_media(media, attention)
        axes[-1][0].set_xlabel("position of the prompt (media in one bar)")
        how = (
            "Left: share of safety attention on each token that it may read. Right: where in the picture, or when in "
            "the clip, the medium's share lies, scaled to its highest."
        )
        return titled(figure, title, f"{caption} {how}")


def _draw_words(axis: Axes, attention: AttentionMap) -> None:
    """A bar for each token that may be read; the positions of a medium are one bar together."""
    names, shares = word_shares(attention)
    axis.bar(np.arange(len(names)), shares, color=LABEL_COLOURS.get(attention.label, SERIES[5]))
    axis.set_xticks(np.arange(len(names)), names, rotation=40, ha="right", fontsize=7)
    axis.set(ylim=(0, 1), ylabel="share")
    axis.set_title(
        f"{attention.label or 'unlabelled'} ({attention.topic}): v_s = {attention.v_s:.2f}", fontsize=8, loc="left"
    )


def _draw_media(axis: Axes, attention: AttentionMap) -> None:
    """The first picture, tinted where the weights over it lie, or the first clip with their course, each scaled to its
    highest; the share of all attention that the medium gets is written below."""
    axis.grid(False)
    total = max(attention.weights.sum(), 1e-12)
    if attention.picture is not None and attention.grid is not None:
        height, width = attention.picture.shape[:2]
        axis.imshow(attention.picture, extent=(0, width, height, 0), cmap="gray")
        tint = np.zeros((*attention.grid.shape, 4))
        tint[..., :3] = to_rgb(SERIES[1])
        tint[..., 3] = 0.8 * attention.grid / max(attention.grid.max(), 1e-12)
        axis.imshow(tint, extent=(0, width, height, 0))
        axis.set(yticks=[], xlabel=f"pixels; {attention.grid.sum() / total:.0%} of the attention, where tinted")
    elif attention.spectrogram is not None and attention.sound is not None:
        bands, frames = attention.spectrogram.shape
        seconds = frames / 100
        extent = (0, seconds, 0, bands)
        axis.imshow(attention.spectrogram, origin="lower", aspect="auto", extent=extent, cmap="gray")
        course = np.repeat(attention.sound / max(attention.sound.max(), 1e-12), 2)
        edges = np.repeat(np.linspace(0, seconds, len(attention.sound) + 1), 2)[1:-1]
        axis.plot(edges, course * 0.95 * bands, color=SERIES[1], linewidth=1.5)
        axis.set(ylabel="mel band", ylim=(0, bands))
        axis.set_xlabel(f"seconds; {attention.sound.sum() / total:.0%} of the attention, as the line goes")
    else:
        axis.axis("off")


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


def plot_patching(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Effect of exchanged states on v_s and on the model's own token difference, by depth and span; a column a surface.

    Solid: harm put into benign runs; dashed: taken out of harmful ones.

    Args:
        data: `PatchEffects.summary` with `surface`, of the residual stream by span.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces, sites = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["site"]))
    spans = list(dict.fromkeys(data["span"]))
    names = {"v_s": "change of v_s", "logit": "change of the token\nlogit difference"}
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
                if measure == "v_s":
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
    """Effect of one head's exchanged output on v_s: a panel a surface, blocks down, heads across.

    Args:
        data: `PatchEffects.summary` with `surface`, of single heads in one direction.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    reach = max(float(data["delta_v_s_mean"].abs().max()), 1e-6)
    with style():
        figure, axes = plt.subplots(1, len(surfaces), figsize=(3.6 * len(surfaces), 2.9), squeeze=False)
        for axis, surface in zip(axes[0], surfaces, strict=True):
            panel = data[data["surface"] == surface]
            grid = panel.assign(layer=panel["site"].str.removeprefix("z.").astype(int))
            values = grid.pivot(index="layer", columns="head", values="delta_v_s_mean")
            image = axis.imshow(values, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
            low, high = (
                grid.pivot(index="layer", columns="head", values=f"delta_v_s_{end}") for end in ("low", "high")
            )
            for row, column in zip(*np.nonzero((low.to_numpy() > 0) | (high.to_numpy() < 0)), strict=True):
                axis.text(column, row, f"{values.iloc[row, column]:.2f}", ha="center", va="center", fontsize=7)
            axis.grid(False)
            axis.set_xticks(np.arange(values.shape[1]), values.columns)
            axis.set_yticks(np.arange(values.shape[0]), values.index)
            axis.set(xlabel="head", ylabel="block", title=f"{surface} (n = {int(panel['n'].max())} pairs)")
            figure.colorbar(image, ax=axis, label="change of v_s")
        return titled(figure, title, f"{caption} Numbers stand where the 95 % interval leaves 0 out.")


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
    """Share of requests whose decision flips when at most so many positions are hidden, by surface.

    Args:
        data: columns `surface, flipped, size, chance`, a row a request.
        title: the claim.
        caption: what stands behind it.
    """
    with style():
        figure, axis = plt.subplots(figsize=(7.4, 3.4))
        largest = int(data["size"].max())
        for number, (surface, panel) in enumerate(data.groupby("surface", sort=False)):
            sizes = np.arange(largest + 1)
            share = [(panel["flipped"] & (panel["size"] <= size)).mean() for size in sizes]
            name = f"{surface} (n = {len(panel)}; random: {panel['chance'].mean():.0%})"
            axis.step(sizes, share, where="post", color=SERIES[number], label=name)
            axis.plot(sizes, share, MARKERS[number], color=SERIES[number], markersize=4)
        axis.set(xlabel="positions removed, greedily", ylabel="share of decisions flipped", ylim=(-0.03, 1.03))
        how = "In the legend: how often as many positions, taken at random, flip the decision."
        return titled(figure, title, f"{caption} {how}", legend_of=axis)


def plot_ablation(data: pd.DataFrame, cosines: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Left: share given the unsafe token, by what is ablated. Right: cosines of the gate's directions with others.

    Args:
        data: columns `surface, label, run, value, low, high, n`.
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
            x = np.arange(len(groups)) + 0.19 * (number - (len(runs) - 1) / 2)
            error = bar_lengths(rows)
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
            "Left: bars are 95 % intervals over topics. Right: cosines of the gate's directions with others; grey: "
            "where 95 % of random directions lie."
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
