"""Notebook 02: the headings of its figures and its claim, each computed from the table that it stands above."""

from __future__ import annotations

import numpy as np
import pandas as pd

from casa_mech.judging.hypothesis import PERMUTATIONS, label_permutation_test
from casa_mech.judging.stats import auroc_interval, aurocs_by_labels
from casa_mech.reports.claim import Claim, Heading, span
from casa_mech.study import Study


def training_heading(study: Study, steps: pd.DataFrame) -> Heading:
    """Where v_s ends on training requests: means over the last tenth of the steps."""
    last = steps.tail(max(1, len(steps) // 10))
    harmful, benign = (last[f"v_s_{label}"].mean() for label in ("harmful", "benign"))
    return Heading(
        f"{study.name}: {len(steps)} steps on text alone take v_s to {harmful:.2f} on harmful and {benign:.2f} on "
        "benign requests",
        f"Means over the batches of the last {len(last)} steps; loss of reply and safety token.",
    )


def gate_heading(study: Study, readings: pd.DataFrame) -> Heading:
    """Medians of v_s after training, on requests in held-out phrasings."""
    after = readings[readings["moment"] == "after"].groupby(["surface", "label"], sort=False)["v_s"].median().unstack()
    medians = ", ".join(f"{surface} {row['harmful']:.2f} / {row['benign']:.2f}" for surface, row in after.iterrows())
    return Heading(
        f"{study.name}: trained on text alone, median v_s is {span(after['harmful'])} on harmful, "
        f"{span(after['benign'])} on benign requests",
        f"Median v_s of harmful / benign requests after training: {medians}. All in held-out phrasings.",
    )


def gate_claim(study: Study, readings: pd.DataFrame) -> Claim:
    """How well v_s tells harm off the surface that it was trained on, where it does so least."""
    after = readings[(readings["moment"] == "after") & (readings["surface"] != "text")]
    aurocs = {
        str(surface): auroc_interval(
            rows["v_s"].tolist(), (rows["label"] == "harmful").tolist(), rows["topic"].tolist(), study.settings.seed
        )
        for surface, rows in after.groupby("surface", sort=False)
    }
    least = min(aurocs, key=lambda surface: aurocs[surface].value)
    rows = after[after["surface"] == least]
    scores, harmful = rows["v_s"].to_numpy(), (rows["label"] == "harmful").to_numpy()
    p = label_permutation_test(
        lambda labels: np.abs(aurocs_by_labels(scores, labels) - 0.5), harmful, rows["topic"], study.settings.seed
    )
    by_surface = ", ".join(f"{surface} {auroc.text()}" for surface, auroc in aurocs.items())
    return Claim(
        f"{study.name}: trained on text alone, v_s tells harm least on {least}, with AUROC {aurocs[least].text()}",
        f"AUROC of v_s after training, on requests in held-out phrasings: {by_surface}.",
        "gate_before_after", len(rows), *aurocs[least], f"labels permuted over topics, {PERMUTATIONS} draws", p,
        "on fresh requests the interval of this surface holds 0.5, or lies elsewhere",
    )  # fmt: skip
