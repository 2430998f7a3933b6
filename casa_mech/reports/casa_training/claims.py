"""Notebook 02: the headings of its figures and its claims, each computed from the table that it stands above."""

from __future__ import annotations

import pandas as pd

from casa_mech.judging.gate_aurocs import auroc_change, mean_auroc
from casa_mech.judging.hypothesis import PERMUTATIONS
from casa_mech.reports.claim import Claim, Heading, span
from casa_mech.study import Study

FIGURE = "gate_before_after"
_CHANCE = f"labels permuted over topics, {PERMUTATIONS} draws, and a bootstrap over topics and gates: the larger p"


def gates_of(table: pd.DataFrame) -> str:
    """How many gates a table's numbers are over, in words."""
    n = table["gate_seed"].nunique()
    return f"{n} gates" if n > 1 else "one gate"


def training_heading(study: Study, steps: pd.DataFrame) -> Heading:
    """Where v_s ends on training requests: means over the last tenth of the steps, and over gates."""
    count = int(steps["step"].max())
    last = steps[steps["step"] > count - max(1, count // 10)]
    by_gate = last.groupby("gate_seed")[["v_s_harmful", "v_s_benign"]].mean()
    harmful, benign = by_gate.mean()
    return Heading(
        f"{study.title}: {count} steps on text alone take v_s to {harmful:.2f} on harmful and {benign:.2f} on "
        "benign requests",
        f"Means of {gates_of(steps)}, over the batches of the last {last['step'].nunique()} steps; gate by gate "
        f"{span(by_gate['v_s_harmful'])} and {span(by_gate['v_s_benign'])}. Loss of reply and safety token.",
    )


def gate_heading(study: Study, readings: pd.DataFrame) -> Heading:
    """Medians of v_s after training, on prompts that it did not see."""
    after = readings[readings["moment"] == "after"].groupby(["surface", "label"], sort=False)["v_s"].median().unstack()
    medians = ", ".join(f"{surface} {row['harmful']:.2f} / {row['benign']:.2f}" for surface, row in after.iterrows())
    return Heading(
        f"{study.title}: trained on text alone, median v_s is {span(after['harmful'])} on harmful, "
        f"{span(after['benign'])} on benign requests",
        f"Median v_s of harmful / benign requests after training, {gates_of(readings)} together: {medians}. No "
        "prompt of training is among them.",
    )


def training_claims(study: Study, readings: pd.DataFrame) -> list[Claim]:
    """The claims of the notebook: the weakest surface, what training adds, and topics that it did not see."""
    carried = carried_readings(readings)
    after, before = (carried[carried["moment"] == moment] for moment in ("after", "before"))
    claims = [gate_claim(study, after), change_claim(study, before, after)]
    held_out = after[after["split"] == "held_out"]
    return claims + ([held_out_claim(study, held_out)] if held_out["label"].nunique() == 2 else [])


def carried_readings(readings: pd.DataFrame) -> pd.DataFrame:
    """Those off text, which the gate was not trained on; of a plan that has text alone, all."""
    off_text = readings[readings["surface"] != "text"]
    return off_text if len(off_text) else readings


def gate_claim(study: Study, after: pd.DataFrame) -> Claim:
    """How well v_s tells harm off the surface that it was trained on, where it does so least."""
    tested = {
        str(surface): mean_auroc(rows, study.settings.seed) for surface, rows in after.groupby("surface", sort=False)
    }
    least = min(tested, key=lambda surface: tested[surface][0].value)
    auroc, p = tested[least]
    rows = after[after["surface"] == least]
    by_surface = ", ".join(f"{surface} {each.text()}" for surface, (each, _) in tested.items())
    return Claim(
        f"{study.title}: trained on text alone, v_s tells harm least on {least}, with AUROC {auroc.text()}",
        f"AUROC of v_s after training, on prompts that training did not see: {by_surface}. {_by_gate(rows)}",
        FIGURE, len(rows), *auroc, _CHANCE, p,
        "on fresh requests and gates the interval of this surface holds 0.5, or lies elsewhere",
    )  # fmt: skip


def change_claim(study: Study, before: pd.DataFrame, after: pd.DataFrame) -> Claim:
    """What training on text adds off text, over the same safety attention before it was trained."""
    change, p = auroc_change(before, after, study.settings.seed)
    start, end = (mean_auroc(rows, study.settings.seed)[0] for rows in (before, after))
    return Claim(
        f"{study.title}: training on text takes v_s's AUROC {_where(after)} from {start.value:.2f} to {end.value:.2f}",
        f"A change of {change.value:+.2f} {change.bounds('+.2f')}, mean of {span_of(after)}: from {start.text()} to "
        f"{end.text()}.",
        FIGURE, len(after), *change, "bootstrap over topics and gates", p,
        "on fresh requests and gates the change has the other sign, or its interval holds 0",
    )  # fmt: skip


def held_out_claim(study: Study, held_out: pd.DataFrame) -> Claim:
    """How well v_s tells harm off text on topics that training did not see."""
    auroc, p = mean_auroc(held_out, study.settings.seed)
    return Claim(
        f"{study.title}: on topics that training did not see, v_s's AUROC {_where(held_out)} is {auroc.text()}",
        f"Mean of {span_of(held_out)}, {held_out['topic'].nunique()} topics. {_by_gate(held_out)}",
        FIGURE, len(held_out), *auroc, _CHANCE, p,
        "on fresh topics and gates the interval holds 0.5, or lies elsewhere",
    )  # fmt: skip


def span_of(readings: pd.DataFrame) -> str:
    """The surfaces and gates of a mean, in words."""
    return f"{', '.join(dict.fromkeys(readings['surface']))} and {gates_of(readings)}"


def _where(readings: pd.DataFrame) -> str:
    return "on unseen text" if set(readings["surface"]) == {"text"} else "off text"


def _by_gate(readings: pd.DataFrame) -> str:
    if readings["gate_seed"].nunique() < 2:
        return "Of one gate; another training may differ."
    values = [mean_auroc(rows)[0].value for _, rows in readings.groupby("gate_seed")]
    return f"Gate by gate {span(values)}."
