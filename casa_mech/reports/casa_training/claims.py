"""Titles and tables of notebook 02."""

from __future__ import annotations

import pandas as pd

from casa_mech.evaluation.evaluate import CASA
from casa_mech.study import Study
from casa_mech.study.settings import slug


def training_data(log: pd.DataFrame) -> pd.DataFrame:
    """What `plots.plot_training` draws."""
    return log[["step", "loss", "v_harmful", "v_benign"]].rename(
        columns={"v_harmful": "v_s_harmful", "v_benign": "v_s_benign"}
    )


def training_claim(model: str, data: pd.DataFrame) -> str:
    """The title of the training figure: means over the last tenth of the steps."""
    last = data.tail(max(1, len(data) // 10))
    return (
        f"{slug(model)}: after {len(data)} steps on text alone, v_s is {last['v_s_harmful'].mean():.2f} on harmful "
        f"and {last['v_s_benign'].mean():.2f} on benign training requests"
    )


def gate_claim(model: str, readings: pd.DataFrame) -> str:
    """The title of the before/after figure: medians after training, held-out phrasings."""
    after = readings[readings["moment"] == "after"].groupby(["surface", "label"], sort=False)["v_s"].median().unstack()
    listed = ", ".join(f"{surface} {row['harmful']:.2f}/{row['benign']:.2f}" for surface, row in after.iterrows())
    return f"{slug(model)}: trained on text alone, median v_s of harmful/benign requests is {listed}"


def gate_rows(study: Study, readings: pd.DataFrame) -> list[dict[str, object]]:
    """AUROC of v_s, before and after training, by surface and by the topics' split, in the result schema."""
    from casa_mech.judging.results import value_row
    from casa_mech.judging.stats import auroc_interval

    rows: list[dict[str, object]] = []
    for (moment, surface), part in readings.groupby(["moment", "surface"], sort=False):
        for split in ("", "seen", "held_out"):
            chosen = part[part["split"] == split] if split else part
            if chosen["label"].nunique() < 2 or chosen["topic"].nunique() < 6:
                continue
            harmful = (chosen["label"] == "harmful").tolist()
            auroc = auroc_interval(
                chosen["v_s"].tolist(), harmful, chosen["topic"].tolist(), study.settings.seed, resamples=200
            )
            metric = f"gate_auroc:{split}" if split else "gate_auroc"
            rows.append(
                value_row(
                    model=study.settings.model,
                    defense=f"{CASA} {moment} training",
                    attack="none",
                    surface=str(surface),
                    label="both",
                    metric=metric,
                    seed=study.settings.seed,
                    n=len(chosen),
                    **auroc._asdict(),
                )
            )
    return rows
