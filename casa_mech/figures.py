"""Figures that are readable alone: a claim as title, units, n and intervals drawn, colours for colour-blind eyes too.

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


def titled(figure: Figure, title: str, legend_of: Axes | None = None) -> Figure:
    """`figure` with its title, wrapped to its width, and the legend of `legend_of` below the panels, off the data.

    The figure is closed: the notebook that displays it shows it once.
    """
    width = int(13.5 * figure.get_size_inches()[0])
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, width)]
    figure.tight_layout()
    figure.suptitle("\n".join(lines), fontsize=10, y=1.0, va="bottom")
    if legend_of is not None:
        handles, names = legend_of.get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(4, len(names)))
    plt.close(figure)
    return figure


def error_bars(
    axis: Axes, rows: pd.DataFrame, y: np.ndarray, colour: str, marker: str, label: str, scale: float = 100
) -> None:
    """Draw `rows` (`value, low, high`) at the heights `y` as points with horizontal intervals, in percent."""
    error = scale * np.nan_to_num(np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None))
    axis.errorbar(
        scale * rows["value"], y, xerr=error, fmt=marker, color=colour, capsize=2, markersize=4.5, label=label
    )


def named_rows(axis: Axes, names: Sequence[str]) -> None:
    """`names` down the vertical axis, the first on top."""
    axis.set_yticks(np.arange(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
