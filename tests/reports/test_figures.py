"""The words of a figure: a title above the panels; below them a legend that names each label once, and the caption."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from helpers.figures import unlike
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from casa_mech.figures import bar_lengths, style, titled

CAPTION = "What stands behind the claim, in whole sentences. " * 6


def _figure(panels: int = 2, caption: str = CAPTION, title: str = "A claim in one line") -> Figure:
    with style():
        figure, axes = plt.subplots(1, panels, figsize=(4 * panels, 3), squeeze=False)
        for number, axis in enumerate(axes[0]):
            axis.plot([0, 1], [0, 1], label="both panels have it")
            axis.plot([0, 1], [1, 0], label=f"panel {number} has it")
            axis.set_xlabel("a label below the panel")
        return titled(figure, title, caption, legend_of=axes[0])


def test_nothing_overlaps_and_the_caption_is_at_the_foot() -> None:
    figure = _figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (caption,) = [text for text in figure.texts if text.get_gid() == "caption"]
    (legend,) = figure.legends
    panels = [axis.get_tightbbox(renderer) for axis in figure.axes]
    foot, box = caption.get_window_extent(renderer), legend.get_window_extent(renderer)
    assert foot.y1 < box.y0 and box.y1 <= min(panel.y0 for panel in panels) + 1
    assert foot.x1 - foot.x0 <= 1.02 * figure.get_tightbbox().width * figure.dpi
    head = figure._suptitle.get_window_extent(renderer)
    assert head.y0 >= max(panel.y1 for panel in panels) and head.height < 1.5 * foot.height
    assert caption.get_text().replace("\n", " ") == CAPTION.strip()


def test_a_label_stands_in_the_legend_once() -> None:
    names = [text.get_text() for text in _figure().legends[0].get_texts()]
    assert names == ["both panels have it", "panel 0 has it", "panel 1 has it"]


def test_a_title_is_wrapped_only_where_the_figure_is_too_narrow() -> None:
    title = "a claim of about a hundred letters, which has room above two panels but never above a single one of them"
    assert "\n" not in _figure(panels=3, title=title).get_suptitle()
    assert _figure(panels=1, title=title).get_suptitle().replace("\n", " ") == title
    assert not [text for text in _figure(caption="").texts if text.get_gid() == "caption"]


def test_bars_reach_no_further_than_their_interval() -> None:
    rows = pd.DataFrame({"value": [0.5, 1.0, 0.2], "low": [0.4, 1.1, float("nan")], "high": [0.7, 1.2, float("nan")]})
    assert bar_lengths(rows).round(6).tolist() == [[0.1, 0.0, 0.0], [0.2, 0.2, 0.0]]


def test_a_table_with_a_wrong_sign_or_in_another_order_is_unlike() -> None:
    """Forty small effects beside one of the gate's own size: turned round they are within a tenth of the range."""
    effects = [0.1 + 0.01 * number for number in range(40)]
    kept = pd.DataFrame({"component": [f"c{n}" for n in range(41)], "mean": [*effects, 12.0], "held": [True] * 41})
    assert unlike(kept, kept.assign(mean=kept["mean"] + 0.01)) == []
    assert unlike(kept, kept.assign(mean=-kept["mean"])) == ["mean"]
    assert unlike(kept, kept.assign(component=kept["component"][::-1].to_numpy())) == ["component"]
    assert unlike(kept, kept.assign(held=[False] * 5 + [True] * 36)) == ["held"]
    assert unlike(kept, kept.assign(mean=float("nan"))) == ["mean"] and unlike(kept, kept[1:]) == ["columns and rows"]
    assert unlike(kept, kept.assign(mean=-kept["mean"]), frozenset({"mean"})) == []
