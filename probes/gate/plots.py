"""Figures of where safety attention looks."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from casa_mech.figures import LABEL_COLOURS, SERIES, style, titled
from probes.gate.safety_attention import AttentionMap, MediumMap, word_shares


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
        for (words, medium), attention in zip(axes, maps, strict=True):
            _draw_words(words, attention)
            _draw_medium(medium, attention)
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


def _draw_medium(axis: Axes, attention: AttentionMap) -> None:
    """The first picture, tinted where the weights over it lie, or the first clip with their course, each scaled to its
    highest; the share of all attention that the medium gets is written below."""
    axis.grid(False)
    total = max(attention.weights.sum(), 1e-12)
    media = sorted(attention.media, key=lambda medium: medium.kind != "image")
    if not media:
        axis.axis("off")
    elif media[0].kind == "image":
        _draw_picture(axis, media[0], total)
    else:
        _draw_clip(axis, media[0], total)


def _draw_picture(axis: Axes, medium: MediumMap, total: float) -> None:
    height, width = medium.content.shape[:2]
    axis.imshow(medium.content, extent=(0, width, height, 0), cmap="gray")
    tint = np.zeros((*medium.weights.shape, 4))
    tint[..., :3] = to_rgb(SERIES[1])
    tint[..., 3] = 0.8 * medium.weights / max(medium.weights.max(), 1e-12)
    axis.imshow(tint, extent=(0, width, height, 0))
    axis.set(yticks=[], xlabel=f"pixels; {medium.weights.sum() / total:.0%} of the attention, where tinted")


def _draw_clip(axis: Axes, medium: MediumMap, total: float) -> None:
    bands, frames = medium.content.shape
    seconds = frames / 100
    extent = (0, seconds, 0, bands)
    axis.imshow(medium.content, origin="lower", aspect="auto", extent=extent, cmap="gray")
    course = np.repeat(medium.weights / max(medium.weights.max(), 1e-12), 2)
    edges = np.repeat(np.linspace(0, seconds, len(medium.weights) + 1), 2)[1:-1]
    axis.plot(edges, course * 0.95 * bands, color=SERIES[1], linewidth=1.5)
    axis.set(ylabel="mel band", ylim=(0, bands))
    axis.set_xlabel(f"seconds; {medium.weights.sum() / total:.0%} of the attention, as the line goes")
