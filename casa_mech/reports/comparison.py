"""The figures of a grid that `casa-mech compare` filled: those of notebooks 05 and 06, beside its tables."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from casa_mech.compare.ablations import BASE, NO_ATTENTION, PROMPT_AXIS
from casa_mech.compare.comparison import Comparison
from casa_mech.compare.systems import REFERENCE
from casa_mech.errors import InputError
from casa_mech.figures import save_figure
from casa_mech.reports.ablations.claims import MEDIA, attention_claim, variant_claim
from casa_mech.reports.ablations.plots import plot_ablations, plot_by_attack
from casa_mech.reports.ablations.tables import ablation_data, prompt_data
from casa_mech.reports.claim import Heading
from casa_mech.reports.defences.claims import alpha_heading, rival_claim, success_claim
from casa_mech.reports.defences.plots import plot_alpha, plot_grid, plot_tradeoff
from casa_mech.reports.defences.tables import grid_data, tradeoff_data
from casa_mech.reports.topics import JUDGING
from casa_mech.study.folder import RunFolder
from casa_mech.study.settings import slug


def draw(comparison: Comparison, folder: RunFolder, name: str) -> list[Path]:
    """Draw a grid into `figures` of `folder`, each figure as PNG, SVG and the plotted numbers; returns the PNGs' paths.

    What its rows do not allow is left out. A title is the claim where there are the rows and the held-out topics to
    make it, else it says what is shown.
    """
    figures = _ablations(comparison) if comparison.ablated else _defences(comparison)
    return [
        save_figure(figure, data, folder.path("figures", f"{name}-{suffix}"))
        for suffix, (figure, data) in figures.items()
    ]


def _defences(comparison: Comparison) -> dict[str, tuple[Figure, pd.DataFrame]]:
    defenses, metrics = set(comparison.replies["defense"]), set(comparison.summary["metric"])
    attacks = comparison.replies["attack"].nunique()
    neutral = Heading(f"{slug(comparison.model)}: {len(defenses)} defences, {attacks} attacks", "")
    cells = grid_data(comparison.summary)
    if cells.empty:
        return {}
    claimed = {REFERENCE, "none"} <= defenses and "attack_success" in metrics
    heading = success_claim(comparison).heading if claimed else neutral
    figures = {"grid": (plot_grid(cells, *heading), cells)}
    if {"attack_success", "benign_answered"} <= metrics:
        rivals = any(not str(other).startswith(REFERENCE) for other in defenses)
        claimed = REFERENCE in defenses and rivals and _has_held_out(comparison)
        heading = neutral
        if claimed:
            with suppress(InputError):  # too few held-out topics for an interval: nothing is claimed
                heading = rival_claim(comparison).heading
        points = tradeoff_data(comparison.summary)
        figures["tradeoff"] = (plot_tradeoff(points, *heading), points)
    if len(comparison.curves):
        figures["alpha"] = (plot_alpha(comparison.curves, *alpha_heading(comparison)), comparison.curves)
    return figures


def _ablations(comparison: Comparison) -> dict[str, tuple[Figure, pd.DataFrame]]:
    figures: dict[str, tuple[Figure, pd.DataFrame]] = {}
    defenses, model = set(comparison.replies["defense"]), slug(comparison.model)
    if comparison.summary["axis"].eq(PROMPT_AXIS).any():
        claimed = {BASE, NO_ATTENTION} <= defenses and bool(set(MEDIA) & set(comparison.replies["attack"]))
        neutral = Heading(f"{model}: attention × safety prompt", "")
        heading = attention_claim(comparison).heading if claimed else neutral
        levels = prompt_data(comparison)
        figures["prompt"] = (plot_by_attack(levels, *heading), levels)
    if comparison.summary["axis"].ne(PROMPT_AXIS).any():
        claimed = BASE in defenses and _has_held_out(comparison)
        heading = variant_claim(comparison).heading if claimed else Heading(f"{model}: one setting changed", "")
        levels = ablation_data(comparison)
        figures["axes"] = (plot_ablations(levels, *heading), levels)
    return figures


def _has_held_out(comparison: Comparison) -> bool:
    splits = comparison.replies["split"]
    judged = splits.isin(JUDGING)
    return bool(judged.any() and not judged.all())
