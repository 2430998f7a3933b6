"""The figure of probes by layer (needs matplotlib, extra `study`)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, style, titled
from probes.linear.separability import separability_table

POSITIONS = {"last": "last prompt position", "last:user": "user's last token", "mean": "mean over the prompt"}


def plot_probes(
    data: pd.DataFrame, title: str = "Probes of harmful against benign prompts", caption: str = ""
) -> Figure:
    """Probe AUROC by layer with 95 % intervals and chance: fitted on each surface, and fitted on one surface alone.

    Args:
        data: columns `positions, site, surface, measure, auroc, low, high, n` (`separability_table`; a row of panels
            for each `positions`), or what `transfer_matrix` gives.
        title: the claim.
        caption: what stands behind it.
    """
    if "measure" not in data:
        data = separability_table(data, fit_surface=str(data["fit"].iloc[0]))
    surfaces, rows = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["positions"]))
    panels = {"probe": "fitted on the same surface", "transfer": "fitted on text, judged on another surface"}
    panels = {measure: name for measure, name in panels.items() if measure in set(data["measure"])}
    with style():
        size = (4.5 * len(panels), 3.1 * len(rows))
        figure, axes = plt.subplots(len(rows), len(panels), figsize=size, sharey=True, squeeze=False)
        for line, positions in zip(axes, rows, strict=True):
            here = data[data["positions"] == positions]
            for axis, (measure, name) in zip(line, panels.items(), strict=True):
                _layers(axis, here, measure, surfaces)
                axis.set_title(f"probe {name}" if len(panels) > 1 else "")
            line[0].set_ylabel(f"{POSITIONS.get(positions, positions)}\nAUROC, unseen topics".strip())
        return titled(figure, title, f"{caption} Bands: 95 % intervals.".strip(), legend_of=axes[0])


def _layers(axis: Axes, data: pd.DataFrame, measure: str, surfaces: list[str]) -> None:
    sites = list(dict.fromkeys(data["site"]))
    x = np.arange(len(sites))
    panel = data[data["measure"] == measure]
    for surface in dict.fromkeys(panel["surface"]):
        number = surfaces.index(surface)
        rows = panel[panel["surface"] == surface].set_index("site").reindex(sites)
        name = f"{surface} (n = {int(rows['n'].iloc[0])})".strip()
        axis.plot(x, rows["auroc"], marker=MARKERS[number], color=SERIES[number], label=name, markersize=4)
        axis.fill_between(x, rows["low"], rows["high"], color=SERIES[number], alpha=0.15, linewidth=0)
    chance = data[data["measure"] == "permuted"]
    if chance["low"].notna().any():
        band, name = chance.set_index("site").reindex(sites), chance["surface"].iloc[0]
        axis.fill_between(
            x, band["low"], band["high"], color="grey", alpha=0.3, label=f"{name}, labels permuted".strip(", ")
        )
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set_xlabel("layer (norm: after the final norm)")
    axis.set_xticks(x, sites)
    axis.set_ylim(top=1.02)
