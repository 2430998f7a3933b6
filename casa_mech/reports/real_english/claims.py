"""The heading of the figure on real English."""

from __future__ import annotations

import pandas as pd

from casa_mech.evaluation.evaluate import CASA
from casa_mech.reports.claim import Heading, span
from casa_mech.study.settings import slug


def english_heading(rows: pd.DataFrame) -> Heading:
    """AUROC of v_s on every pair of sets and surface."""
    aurocs = rows[(rows["metric"] == "gate_auroc") & (rows["defense"] == CASA)]
    by_panel = "; ".join(
        f"{name}: " + ", ".join(f"{row.surface} {row.value:.2f}" for row in panel.itertuples())
        for name, panel in aurocs.groupby("attack", sort=False)
    )
    return Heading(
        f"{slug(str(rows['model'].iloc[0]))}: on public English prompts v_s tells harm with AUROC "
        f"{span(aurocs['value'])}",
        f"Trained on other prompts, as plain text. AUROC of v_s by pair of sets and surface: {by_panel}.",
    )
