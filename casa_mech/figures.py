"""Figures that are readable alone: a claim as title, a caption, units, n and intervals; safe for colour-blind eyes.

Every figure is saved as PNG and SVG together with the plotted numbers as CSV.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
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
LABEL_COLOURS = {"harmful": HARMFUL, "benign": BENIGN}
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
TITLE_SIZE, CAPTION_SIZE = 11, 8.5
_LETTERS_AN_INCH = {TITLE_SIZE: 12.5, CAPTION_SIZE: 17.0}
"""How many letters of DejaVu Sans fit on an inch at the sizes that titles and captions have."""
_GAP = 0.08
"""Inches between panels, legend and caption."""
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


def titled(figure: Figure, title: str, caption: str = "", legend_of: Axes | Sequence[Axes] = ()) -> Figure:
    """`figure` with its title above the panels, and below them, off the data, a legend and the caption.

    The figure is closed: the notebook that displays it shows it once.

    Args:
        figure: with its panels drawn.
        title: the claim, one line; wrapped where the figure is too narrow for it.
        caption: what stands behind the claim and how the panels are read; small, wrapped to the figure's width.
        legend_of: the panel, or panels, whose labels the legend explains; each label once.
    """
    panels = [legend_of] if isinstance(legend_of, Axes) else list(legend_of)
    figure.tight_layout()
    drawn, width = figure.get_tightbbox(), figure.get_size_inches()[0]  # in inches; a legend may stand beside a panel
    figure.suptitle(
        _wrapped(title, drawn.width, TITLE_SIZE), fontsize=TITLE_SIZE, x=(drawn.x0 + drawn.x1) / 2 / width, y=1.0,
        va="bottom",
    ).set_gid("title")  # fmt: skip
    labelled = [pair for panel in panels for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in reversed(labelled)}
    if handles:
        names = list(dict.fromkeys(label for _, label in labelled))
        columns = _columns(names, width)
        figure.legend(
            [handles[name] for name in names], names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns
        )
    if caption:
        drawn = figure.get_tightbbox()
        left, bottom = (figure.dpi_scale_trans + figure.transFigure.inverted()).transform((drawn.x0, drawn.y0 - _GAP))
        figure.text(
            left, bottom, _wrapped(caption, drawn.width, CAPTION_SIZE), fontsize=CAPTION_SIZE, va="top", ha="left"
        ).set_gid("caption")
    plt.close(figure)
    return figure


def _wrapped(text: str, inches: float, size: float) -> str:
    return textwrap.fill(" ".join(text.split()), int(_LETTERS_AN_INCH[size] * inches))


def _columns(names: Sequence[str], inches: float) -> int:
    """Columns of a legend that is no wider than its figure."""
    longest = max(len(name) for name in names) / 14 + 0.5
    return max(1, min(len(names), 5, int(inches / longest)))


def error_bars(
    axis: Axes,
    rows: pd.DataFrame,
    y: np.ndarray,
    colour: str,
    marker: str,
    label: str,
    scale: float = 100,
    hollow: bool = False,
) -> None:
    """Draw `rows` (`value, low, high`) at the heights `y` as points with horizontal intervals, in percent."""
    error = scale * bar_lengths(rows)
    axis.errorbar(
        scale * rows["value"], y, xerr=error, fmt=marker, color=colour, capsize=2, markersize=4.5, label=label,
        markerfacecolor="white" if hollow else colour,
    )  # fmt: skip


def not_refused_bars(axis: Axes, rows: pd.DataFrame, y: np.ndarray, colour: str, marker: str) -> None:
    """Draw the columns `not_refused` of rates of attack success as hollow points; nothing where `rows` lacks them."""
    if "not_refused" in rows:
        beside = rows.filter(like="not_refused").set_axis(["value", "low", "high"], axis=1)
        error_bars(axis, beside, y, colour, marker, "", hollow=True)


def bar_lengths(rows: pd.DataFrame, value: str = "value") -> np.ndarray:
    """How far intervals (`low, high`) reach below and above the column `value`, [2, row]; 0 where that is unknown."""
    return np.nan_to_num(np.clip([rows[value] - rows["low"], rows["high"] - rows[value]], 0, None))


def named_rows(axis: Axes, names: Sequence[str]) -> None:
    """`names` down the vertical axis, the first on top."""
    axis.set_yticks(np.arange(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
