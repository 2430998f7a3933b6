"""Notebook 02: the training's course, and v_s before and after it."""

from __future__ import annotations

import pandas as pd

from casa_mech.evaluation.evaluate import CASA
from casa_mech.judging.results import value_row
from casa_mech.judging.stats import auroc_interval
from casa_mech.study import Study


def training_data(log: pd.DataFrame) -> pd.DataFrame:
    """Columns `step, loss, v_s_harmful, v_s_benign` of `Study.training_log`."""
    return log[["step", "loss", "v_harmful", "v_benign"]].rename(
        columns={"v_harmful": "v_s_harmful", "v_benign": "v_s_benign"}
    )


def gate_rows(study: Study, readings: pd.DataFrame) -> list[dict[str, object]]:
    """AUROC of v_s, before and after training, by surface and by the topics' split, in the result schema."""
    rows: list[dict[str, object]] = []
    for (moment, surface), of_surface in readings.groupby(["moment", "surface"], sort=False):
        for split in ("", "seen", "held_out"):
            requests = of_surface[of_surface["split"] == split] if split else of_surface
            if requests["label"].nunique() < 2 or requests["topic"].nunique() < 6:
                continue
            harmful, topics = (requests["label"] == "harmful").tolist(), requests["topic"].tolist()
            auroc = auroc_interval(requests["v_s"].tolist(), harmful, topics, study.settings.seed)
            rows.append(
                value_row(
                    model=study.settings.model, defense=f"{CASA} {moment} training", attack="none",
                    surface=str(surface), label="both", metric=f"gate_auroc:{split}" if split else "gate_auroc",
                    seed=study.settings.seed, n=len(requests), **auroc._asdict(),
                )
            )  # fmt: skip
    return rows
