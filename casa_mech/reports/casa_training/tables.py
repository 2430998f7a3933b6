"""Notebook 02: the training's course, and v_s before and after it, of every gate."""

from __future__ import annotations

import pandas as pd

from casa_mech.evaluation.evaluate import CASA
from casa_mech.judging.gate_aurocs import mean_auroc
from casa_mech.judging.results import value_row
from casa_mech.study import Study


def training_logs(study: Study) -> pd.DataFrame:
    """`Study.training_log` of every gate, with its `gate_seed`."""
    return study.over_gates(lambda gate: study.training_log(gate=gate))


def gate_readings(study: Study) -> pd.DataFrame:
    """`Study.readings` of every gate, with its `gate_seed`."""
    return study.over_gates(lambda gate: study.readings(gate=gate))


def training_data(logs: pd.DataFrame) -> pd.DataFrame:
    """Columns `gate_seed, step, loss, v_s_harmful, v_s_benign` of `training_logs`."""
    return logs[["gate_seed", "step", "loss", "v_harmful", "v_benign"]].rename(
        columns={"v_harmful": "v_s_harmful", "v_benign": "v_s_benign"}
    )


def gate_rows(study: Study, readings: pd.DataFrame) -> list[dict[str, object]]:
    """AUROC of v_s, before and after training, by surface and topics' split, averaged over gates: result rows."""
    rows: list[dict[str, object]] = []
    for (moment, surface), of_surface in readings.groupby(["moment", "surface"], sort=False):
        for split in ("", "seen", "held_out"):
            requests = of_surface[of_surface["split"] == split] if split else of_surface
            if requests["label"].nunique() < 2 or requests["topic"].nunique() < 6:
                continue
            auroc, _ = mean_auroc(requests, study.settings.seed)
            rows.append(
                value_row(
                    model=study.settings.model, defense=f"{CASA} {moment} training", attack="none",
                    surface=str(surface), label="both", metric=f"gate_auroc:{split}" if split else "gate_auroc",
                    seed=study.settings.seed, n=len(requests), **auroc._asdict(),
                )
            )  # fmt: skip
    return rows
