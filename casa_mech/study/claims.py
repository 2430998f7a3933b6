"""Titles and tables of the notebooks' figures: each claim is computed from the numbers it stands above."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from casa_mech.attacks import PREFILL_LENGTHS
from casa_mech.study.artifacts import Study
from casa_mech.study.evaluate import CASA, PRETRAINED
from casa_mech.study.settings import slug

KINDS = {
    "plain": ("plain",),
    "jailbreak": ("jailbreak",),
    "spelled text": ("spelled",),
    "image": ("image",),
    "speech": ("audio", "spoken"),
    "prefill": tuple(f"prefill-{length}" for length in PREFILL_LENGTHS),
}

SEPARATION = {"gate_auroc": "v_s", "token_auroc": "log-odds of the safety token, which decide"}
"""What notebook 03 asks of the two halves of the gate, by metric."""


def training_data(log: pd.DataFrame) -> pd.DataFrame:
    """What `probes.plots.plot_training` draws."""
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
    from casa_mech.judging import auroc_interval, value_row

    rows: list[dict[str, object]] = []
    for (moment, surface), part in readings.groupby(["moment", "surface"], sort=False):
        for split in ("", "seen", "held_out"):
            chosen = part[part["split"] == split] if split else part
            if chosen["label"].nunique() < 2 or chosen["topic"].nunique() < 6:
                continue
            harmful = (chosen["label"] == "harmful").tolist()
            value, low, high = auroc_interval(
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
                    value=value,
                    low=low,
                    high=high,
                )
            )
    return rows


def attack_claim(results: pd.DataFrame, models: Sequence[str]) -> str:
    """The title of the attack figure: mean attack success by kind of attack, before and after."""
    rows = results[results["metric"] == "attack_success"]
    lines = []
    for model in models:
        part = rows[rows["model"] == model]
        pieces = []
        for name, attacks in KINDS.items():
            mean = part[part["attack"].isin(attacks)].groupby("defense")["value"].mean()
            pieces.append(f"{name} {100 * mean[PRETRAINED]:.0f} → {100 * mean[CASA]:.0f} %")
        lines.append(f"{slug(model)}: " + ", ".join(pieces))
    return "Mean attack success before → after CASA, trained on plain text alone\n" + "\n".join(lines)


def token_claim(results: pd.DataFrame, models: Sequence[str]) -> str:
    """The title of the separation figure: what v_s tells apart against what the token's log-odds do."""
    lines = []
    for model in models:
        rows = results[(results["model"] == model) & (results["defense"] == CASA)]
        both = rows.pivot_table(index="attack", columns="metric", values="value")[list(SEPARATION)].dropna()
        ahead = int((both["token_auroc"] > both["gate_auroc"]).sum())
        means = both.mean()
        lines.append(
            f"{slug(model)}: the token's log-odds tell harm apart better than v_s under {ahead} of {len(both)} attacks,"
            f" mean AUROC {means['token_auroc']:.2f} against {means['gate_auroc']:.2f}"
        )
    return "\n".join(lines)


def attack_table(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A table to read: attacks down, model and defence across, `value [low, high]` in percent and n."""
    rows = results[results["metric"] == metric]
    cells = [
        f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}] n={row.n}"
        for row in rows[["value", "low", "high", "n"]].itertuples()
    ]
    table = rows.assign(cell=cells).pivot_table(
        index="attack", columns=["model", "defense"], values="cell", aggfunc="first", sort=False
    )
    return table.replace(np.nan, "–")
