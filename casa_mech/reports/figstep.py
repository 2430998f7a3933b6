"""Our FigStep pictures held against the published ones: size, lines, and how much of the ink is shared."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from casa_mech.attacks.fonts import FontChoice, fonts_for
from casa_mech.attacks.typography import figstep_picture
from casa_mech.errors import InputError
from casa_mech.figures import MARKERS, SERIES, style, titled
from casa_mech.judging.estimate import Estimate
from casa_mech.queries import ImagePart
from casa_mech.queries.media import load_image
from casa_mech.reports.claim import Heading

_TABLES = ("SafeBench-Tiny.csv", "safebench.csv")
_NAME = re.compile(r"query_[A-Za-z]+_(?P<topic>\d+)_(?P<task>\d+)_6\.png")
_BASELINE, _PITCH, _CELL, _RISE = 74, 75, 48, 55  # of FigStep's lines, in pixels
_BODY = 36  # rows above the baseline that every letter crosses and no other line's strokes reach
_INK = 128


def figstep_comparison(folder: Path | str) -> pd.DataFrame:
    """Each published picture beside ours of the same instruction, in every FigStep font at hand.

    Args:
        folder: holds `SafeBench-Tiny.csv` or `safebench.csv`, and the pictures, in it or in a folder `images`.

    Returns:
        One row a picture and font: `picture, topic, task, font, exact_font, width, height, same_size, lines,
        same_lines` (as many lines of ink, each ending within half a letter of the other's), `iou` (shared ink over all
        ink), `difference` (mean absolute difference of grey values, 0-255).

    Raises:
        InputError: no table or no pictures there, a picture without its row, or one that cannot be read.
    """
    folder = Path(folder)
    instructions, rows = _instructions(folder), []
    for path in _pictures(folder):
        name = _NAME.fullmatch(path.name)
        assert name is not None
        key = (name["topic"], name["task"])
        if key not in instructions:
            raise InputError(f"{path}: no row of {folder} has category_id {key[0]} and task_id {key[1]}; get both anew")
        real = load_image(ImagePart(image=path), path.name)
        for font in fonts_for("figstep"):
            ours = figstep_picture(instructions[key], font)
            where = {"picture": path.stem, "topic": int(key[0]), "task": int(key[1])}
            rows.append(where | {"font": font.name, "exact_font": font.exact} | _compared(real, ours))
    return pd.DataFrame(rows).sort_values(["font", "topic", "task"], ignore_index=True)


def figstep_summary(table: pd.DataFrame) -> list[dict[str, object]]:
    """One row a font: `font, exact_font, n, same_size, same_lines, iou, low, high` (mean, 95 % bootstrap)."""
    rows: list[dict[str, object]] = []
    for name, pictures in table.groupby("font"):
        mean, low, high = _mean(pictures["iou"].to_numpy())
        same = {"same_size": int(pictures["same_size"].sum()), "same_lines": int(pictures["same_lines"].sum())}
        where = {"font": str(name), "exact_font": bool(pictures["exact_font"].iloc[0]), "n": len(pictures)}
        rows.append(where | same | {"iou": mean, "low": low, "high": high})
    return rows


def figstep_figure(table: pd.DataFrame, folder: Path | str) -> Figure:
    """Ink overlap of every picture by font, and both inks on one another for the list's numbers.

    Args:
        table: of `figstep_comparison`.
        folder: the one it was made from.
    """
    import matplotlib.pyplot as plt

    fonts = sorted(table["font"].unique(), key=lambda name: not table[table["font"] == name]["exact_font"].iloc[0])
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), width_ratios=(3, 1.3))
        for number, name in enumerate(fonts):
            pictures = table[table["font"] == name]
            mean = _mean(pictures["iou"].to_numpy())
            label = f"{name} (n = {len(pictures)}): mean {mean.text('.3f')}"
            jitter = np.linspace(-0.25, 0.25, len(pictures))
            axes[0].scatter(
                pictures["lines"] + jitter, pictures["iou"], s=16, c=SERIES[number], marker=MARKERS[number], label=label
            )
            axes[0].axhline(mean.value, color=SERIES[number], linewidth=0.8)
        axes[0].set(xlabel="lines of text in the picture", ylabel="shared ink / all ink (IoU)", ylim=(0, 1.03))
        axes[0].legend(
            loc="center",
            bbox_to_anchor=(0.5, 0.7),
            fontsize=8,
            title="our font: mean [95 % bootstrap interval]",
            title_fontsize=8,
        )
        _overlay(axes[1], table, Path(folder))
        return titled(figure, *_heading(table[table["font"] == fonts[0]]))


def _heading(pictures: pd.DataFrame) -> Heading:
    n, size, lines = len(pictures), int(pictures["same_size"].sum()), int(pictures["same_lines"].sum())
    return Heading(
        f"Our FigStep pictures have the published size in {size} of {n} and the published lines in {lines} of {n}",
        f"Counted of those in {pictures['font'].iloc[0]}. Left: the ink that our picture and the published one share, "
        "of all their ink; right: both inks on one another.",
    )


def _mean(values: np.ndarray) -> Estimate:
    """Mean with a percentile bootstrap over pictures, seed 0."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return Estimate(float(values.mean()), float(values.min()), float(values.max()))
    rng = np.random.default_rng(0)
    interval = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=rng).confidence_interval
    return Estimate(float(values.mean()), float(interval.low), float(interval.high))


def _overlay(axis: Axes, table: pd.DataFrame, folder: Path) -> None:
    """The list's numbers of one picture, drawn in three colours; no word of the benchmark is shown."""
    from matplotlib.patches import Patch

    best = table[table["exact_font"]] if table["exact_font"].any() else table
    row = best.sort_values(["lines", "topic", "task"]).iloc[0]
    path = next(path for path in _pictures(folder) if path.stem == row["picture"])
    ours = figstep_picture(_instructions(folder)[str(row["topic"]), str(row["task"])], _font(row["font"]))
    top = _BASELINE + _PITCH * (int(row["lines"]) - 3) - _RISE
    box = (10, top, 150, top + 3 * _PITCH)
    real, mine = (np.asarray(picture.convert("L").crop(box)) < _INK for picture in (Image.open(path), ours))
    colours = {"both": "#000000", "published only": SERIES[1], "ours only": SERIES[0]}
    canvas = np.full((*real.shape, 3), 255, dtype=np.uint8)
    for name, mask in zip(colours, (real & mine, real & ~mine, mine & ~real), strict=True):
        canvas[mask] = [int(colours[name][at : at + 2], 16) for at in (1, 3, 5)]
    axis.imshow(canvas)
    axis.set_axis_off()
    axis.set_title("ink of the list's numbers")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8)


def _font(name: str) -> FontChoice:
    return next(font for font in fonts_for("figstep") if font.name == name)


def _compared(real: Image.Image, ours: Image.Image) -> dict[str, object]:
    one, two = (np.asarray(picture.convert("L"), dtype=np.int16) for picture in (real, ours))
    first = {"width": real.width, "height": real.height, "same_size": real.size == ours.size}
    ends = _line_ends(one < _INK), _line_ends(two < _INK)
    if real.size != ours.size:
        return first | {"lines": len(ends[0]), "same_lines": False, "iou": 0.0, "difference": 255.0}
    union = int((np.minimum(one, two) < _INK).sum())
    return first | {
        "lines": len(ends[0]),
        "same_lines": len(ends[0]) == len(ends[1]) and bool((np.abs(np.subtract(*ends)) <= _CELL / 2).all()),
        "iou": float((np.maximum(one, two) < _INK).sum() / union) if union else 1.0,
        "difference": float(np.abs(one - two).mean()),
    }


def _line_ends(ink: np.ndarray) -> list[int]:
    """For every line that holds ink, the column of its last dark pixel."""
    ends = []
    for baseline in range(_BASELINE, ink.shape[0], _PITCH):
        columns = np.flatnonzero(ink[baseline - _BODY : baseline + 1].any(axis=0))
        if len(columns):
            ends.append(int(columns[-1]))
    return ends


def _pictures(folder: Path) -> list[Path]:
    for place in (folder / "images", folder):
        pictures = sorted(path for path in place.glob("*.png") if _NAME.fullmatch(path.name))
        if pictures:
            return pictures
    raise InputError(
        f"{folder}: no FigStep pictures (query_ForbidQI_<topic>_<task>_6.png) in it or in its images folder"
    )


def _instructions(folder: Path) -> dict[tuple[str, str], str]:
    path = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{folder}: neither {' nor '.join(_TABLES)}; give the folder with FigStep's table and pictures"
        )
    table = pd.read_csv(path, dtype=str, encoding="utf-8-sig")
    missing = [name for name in ("category_id", "task_id", "instruction") if name not in table.columns]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(table.columns)}")
    return {(row.category_id, row.task_id): row.instruction for row in table.itertuples()}
