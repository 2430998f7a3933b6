"""The figure of the gate on real English."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import BENIGN, HARMFUL, MARKERS, SERIES, error_bars, named_rows, style, titled

_SCORES = {
    "gate_auroc": (SERIES[5], MARKERS[0], "AUROC of v_s"),
    "token_auroc": (SERIES[2], MARKERS[1], "AUROC of the safety token's log-odds"),
    "words_auroc": (SERIES[1], MARKERS[3], "AUROC of words alone (logistic regression)"),
}


def plot_english(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """A gate on real prompts: AUROC of v_s and of the token, and how many prompts it flags, with 95 % intervals.

    Args:
        data: the result schema, with the metrics `gate_auroc`, `token_auroc`, `flagged` and `words_auroc` (of words
            alone).
        title: the claim.
        caption: what stands behind it.
    """
    data = data.assign(panel=data["attack"] + ", " + data["surface"])
    panels = list(dict.fromkeys(data["panel"]))
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 1.4 + 0.4 * len(panels)), sharey=True)
        rows = data[data["metric"] == "gate_auroc"].set_index("panel").reindex(panels)
        for shift, (metric, (colour, marker, name)) in zip((-0.2, 0.0, 0.2), _SCORES.items(), strict=True):
            panel = data[data["metric"] == metric].set_index("panel").reindex(panels)
            error_bars(left, panel, np.arange(len(panel)) + shift, colour, marker, name, scale=1)
        left.axvline(0.5, color="grey", linewidth=0.8)
        left.set(xlabel="AUROC", title=f"n = {rows['n'].min():.0f}–{rows['n'].max():.0f} a row", xlim=(-0.02, 1.02))
        for shift, label, colour, marker in ((-0.12, "harmful", HARMFUL, "^"), (0.12, "benign", BENIGN, "o")):
            panel = data[(data["metric"] == "flagged") & (data["label"] == label)].set_index("panel").reindex(panels)
            error_bars(right, panel, np.arange(len(panel)) + shift, colour, marker, label)
        right.set(xlabel="given the unsafe token, %", xlim=(-3, 103))
        named_rows(left, panels)
        how = "Bars: 95 % intervals, over clusters of prompts for AUROCs, Wilson's for rates; dotted: chance."
        return titled(figure, title, f"{caption} {how}", legend_of=(left, right))
