"""The figures of a grid that `casa-mech compare` filled: those of notebooks 05 and 06, beside its tables."""

from __future__ import annotations

from pathlib import Path

from casa_mech.compare.ablations import BASE, NO_ATTENTION, PROMPT_AXIS
from casa_mech.compare.comparison import Comparison
from casa_mech.compare.systems import REFERENCE
from casa_mech.compare.tables import HELD_OUT
from casa_mech.figures import save_figure
from casa_mech.reports.ablations import claims as ablation_claims
from casa_mech.reports.ablations.plots import plot_ablations, plot_by_attack
from casa_mech.reports.defences import claims
from casa_mech.reports.defences.plots import plot_grid, plot_tradeoff
from casa_mech.study.folder import RunFolder
from casa_mech.study.settings import slug


def draw(found: Comparison, folder: RunFolder, name: str) -> list[Path]:
    """Draw `found` into `figures` of `folder`, each as PNG, SVG and the plotted numbers; returns the PNGs' paths.

    What its rows do not allow is left out. A title is the claim where there are the rows and the held-out topics to
    make it, else it says what is shown.
    """
    return _ablations(found, folder, name) if found.variants else _grid(found, folder, name)


def _grid(found: Comparison, folder: RunFolder, name: str) -> list[Path]:
    present, metrics = set(found.replies["defense"]), set(found.summary["metric"])
    plain = f"{slug(found.model)}: {len(present)} defences, {found.replies['attack'].nunique()} attacks"
    cells = claims.grid_data(found.summary)
    if cells.empty:
        return []
    told = {REFERENCE, "none"} <= present and "attack_success" in metrics
    title = claims.success_claim(found).statement if told else plain
    drawn = [save_figure(plot_grid(cells, title), cells, folder.path("figures", f"{name}-grid"))]
    if {"attack_success", "benign_answered"} <= metrics:
        rivals = any(not str(other).startswith(REFERENCE) for other in present)
        told = REFERENCE in present and rivals and _has_held_out(found)
        points = claims.tradeoff_data(found.summary)
        title = claims.rival_claim(found).statement if told else plain
        drawn.append(save_figure(plot_tradeoff(points, title), points, folder.path("figures", f"{name}-tradeoff")))
    return drawn


def _ablations(found: Comparison, folder: RunFolder, name: str) -> list[Path]:
    drawn = []
    present = set(found.replies["defense"])
    if found.summary["axis"].eq(PROMPT_AXIS).any():
        levels = ablation_claims.prompt_data(found)
        told = {BASE, NO_ATTENTION} <= present and bool(set(ablation_claims.MEDIA) & set(found.replies["attack"]))
        title = (
            ablation_claims.attention_claim(found).statement
            if told
            else f"{slug(found.model)}: attention × safety prompt"
        )
        drawn.append(save_figure(plot_by_attack(levels, title), levels, folder.path("figures", f"{name}-prompt")))
    if found.summary["axis"].ne(PROMPT_AXIS).any():
        changed = ablation_claims.ablation_data(found)
        told = BASE in present and _has_held_out(found)
        title = ablation_claims.variant_claim(found).statement if told else f"{slug(found.model)}: one setting changed"
        drawn.append(save_figure(plot_ablations(changed, title), changed, folder.path("figures", f"{name}-axes")))
    return drawn


def _has_held_out(found: Comparison) -> bool:
    return bool(found.replies["split"].eq(HELD_OUT).any() and found.replies["split"].ne(HELD_OUT).any())
