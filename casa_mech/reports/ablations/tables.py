"""The grid of notebook 06, in a study's run folder at the size of its profile."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pandas as pd

from casa_mech.compare.ablations import ABLATION_SEEDS, FEW, PROMPT_AXIS, systems_of, variants
from casa_mech.compare.comparison import Comparison
from casa_mech.compare.tables import ALL
from casa_mech.compare.weights import TrainingPlan
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.merit import OUTCOME_METRICS
from casa_mech.reports.defences.tables import (
    SIX_ATTACKS,
    GridSizes,
    committed_grid,
    drawn_examples,
    filled_grid,
    grid_data,
    sizes_for,
)
from casa_mech.study import Study
from casa_mech.study.settings import ProfileName

ABLATION_SIZES: Mapping[ProfileName, GridSizes] = MappingProxyType(
    {
        "smoke": GridSizes(10, ("plain", "image"), steps=4, axes=("prompt", "form"), only=("form=mean",)),
        "default": GridSizes(60, ("plain", "image", "audio", "prefill-12"), only=FEW),
        "full": GridSizes(200, SIX_ATTACKS, seeds=len(ABLATION_SEEDS)),
    }
)
"""Of notebook 06; those of the default profile where there are no committed tables of the model."""
_SHORT = TrainingPlan(n_examples=600, settings={"max_steps": 60, "batch_size": 32, "micro_batch_size": 32})
"""Training of the variants where there are no committed tables: shorter than that of the comparison's rows."""


def ablation_grid(study: Study, n: int = 0, tables: str = "") -> Comparison:
    """The ablations of notebook 06: the committed ones of the model (`committed_grid`), else some of them, all trained
    alike and, but for the full profile, shorter than the comparison's rows.

    `n` takes the place of the profile's number of requests in each cell.
    """
    committed = committed_grid(study, "ablations", tables, n)
    if committed is not None:
        return committed
    sizes = sizes_for(study, ABLATION_SIZES[study.settings.profile])
    plan = TrainingPlan() if study.settings.profile == "full" else _SHORT
    if sizes.steps is not None:
        plan = TrainingPlan(64, {**plan.settings, "max_steps": sizes.steps})
    if not study.data.micro_world:
        own = study.sizes
        settings = {"max_steps": max(1, own.train_steps // 2), "batch_size": own.train_batch}
        settings["micro_batch_size"] = min(32, own.train_batch)
        plan = TrainingPlan(own.train_examples, settings, drawn=drawn_examples(study))
    ablated = variants(study.omni().n_layers, plan.n_examples, sizes.axes, sizes.only)
    return filled_grid(study, systems_of(ablated), sizes, plan, n, ablated)


def prompt_data(comparison: Comparison) -> pd.DataFrame:
    """Attack success and benign counterparts answered: attention × safety prompt, by attack."""
    return grid_data(comparison.summary[comparison.summary["axis"] == PROMPT_AXIS])


def ablation_data(comparison: Comparison) -> pd.DataFrame:
    """Attack success and benign counterparts answered: one setting at a time, over all attacks."""
    rows = grid_data(comparison.summary[comparison.summary["axis"] != PROMPT_AXIS])
    return rows[rows["scope"] == ALL].reset_index(drop=True)


def variant_table(comparison: Comparison) -> pd.DataFrame:
    """The variants to read: axis and level down, `value [low, high]` in percent across."""
    summary = comparison.summary
    rows = summary[(summary["scope"] == ALL) & summary["metric"].isin(OUTCOME_METRICS)]
    cells = [Estimate(row.value, row.low, row.high).percent(n=row.n) for row in rows.itertuples()]
    return rows.assign(cell=cells).pivot_table(
        index=["axis", "level"], columns="metric", values="cell", aggfunc="first", sort=False
    )
