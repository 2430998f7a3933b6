"""Notebook 01: the headings of its figures and its claims, each computed from the table that it stands above."""

from __future__ import annotations

import pandas as pd

from casa_mech.judging.estimate import Estimate
from casa_mech.reports.claim import Claim, Heading, span
from casa_mech.study import Study
from probes.linear.gate_transfer import transfer_prediction

SITE, POSITIONS = "norm", "last"
"""Where the claims look: behind the final norm, at the last position of the prompt."""


def plane_heading(study: Study, points: pd.DataFrame) -> Heading:
    """How well the classes part in the plane, surface by surface."""
    silhouettes = points.groupby(["surface", "positions"], sort=False)["silhouette"].first().unstack()
    best = silhouettes.max(axis=1)
    by_surface = ", ".join(f"{surface} {value:.2f}" for surface, value in best.items())
    return Heading(
        f"{study.name} before CASA: harmful and benign part in two dimensions with silhouettes of {span(best)}",
        f"States behind the final norm, in their first two principal components. Best silhouette: {by_surface}.",
    )


def probe_heading(study: Study, table: pd.DataFrame) -> Heading:
    """What probes reach on the surface that they were fitted on, and from text on others."""
    aurocs = _there(table).set_index(["measure", "surface"])["auroc"]
    own, carried = (
        ", ".join(f"{surface} {value:.2f}" for surface, value in aurocs[measure].items())
        for measure in ("probe", "transfer")
    )
    return Heading(
        f"{study.name}: probes tell harm in unseen topics with AUROC {span(aurocs['probe'])}, "
        f"from text alone {span(aurocs['transfer'])}",
        f"Behind the final norm at the last position, probes reach {own} on the surface that they were fitted on; "
        f"fitted on text alone, {carried}.",
    )


def matrix_heading(study: Study, matrix: pd.DataFrame) -> Heading:
    """What is lost on the way from one surface to another."""
    rows = _there(matrix)
    own, away = rows[rows["fit"] == rows["surface"]]["auroc"], rows[rows["fit"] != rows["surface"]]
    worst = away.loc[away["auroc"].idxmin()]
    return Heading(
        f"{study.name}: probes reach AUROC {span(own)} on their own surface, {span(away['auroc'])} on another",
        "Rows: where a probe was fitted; columns: where it is judged. Behind the final norm at the last position least "
        f"is carried from {worst['fit']} to {worst['surface']}.",
    )


def probe_claim(study: Study, matrix: pd.DataFrame, controls: pd.DataFrame) -> Claim:
    """That probes find harm on every surface; the number is of the surface where they are weakest."""
    own = _own(matrix)
    weakest = own["auroc"].idxmin()
    by_surface = _there(controls).set_index("surface")
    matched = Estimate(*by_surface.loc[weakest, ["matched", "matched_low", "matched_high"]])
    finds = "finds" if (own["low"] > 0.5).all() else "is not shown to find"
    lengths = ", ".join(
        f"{row.Index} {row.auroc:.2f} / {row.matched:.2f} / {row.length:.2f}" for row in by_surface.itertuples()
    )
    return Claim(
        f"{study.name} before CASA: a linear probe {finds} harm in unseen topics on every surface",
        f"Behind the final norm at the last position the weakest surface is {weakest}: AUROC "
        f"{_auroc(own.loc[weakest]).text()}, among prompts of equal length {matched.text()}. AUROC of the probe / "
        f"among equal lengths / of length alone: {lengths}.",
        "probe_controls", int(own.at[weakest, "n"]), *_auroc(own.loc[weakest]),
        "labels permuted over topics, 999 draws", float(own.at[weakest, "p"]),
        "on fresh requests the interval of a surface holds 0.5, or holds it among prompts of equal length",
    )  # fmt: skip


def transfer_claim(study: Study, matrix: pd.DataFrame) -> Claim:
    """What a probe fitted on text alone keeps on the surface where it keeps least."""
    rows = _there(matrix)
    away = rows[(rows["fit"] == "text") & (rows["surface"] != "text")].set_index("surface")
    least = away["auroc"].idxmin()
    return Claim(
        f"{study.name} before CASA: a probe fitted on text carries over least to {least}, AUROC "
        f"{_auroc(away.loc[least]).text()}",
        f"Behind the final norm at the last position; a probe fitted on {least} itself reaches "
        f"{_auroc(_own(matrix).loc[least]).text()}.",
        "transfer_matrix", int(away.at[least, "n"]), *_auroc(away.loc[least]),
        "labels permuted over topics, 999 draws", float(away.at[least, "p"]),
        "on fresh requests its interval lies elsewhere; if it reaches the own probe's, nothing is lost on the way",
    )  # fmt: skip


def prediction_claim(study: Study, points: pd.DataFrame) -> Claim:
    """Whether a probe's transfer predicts a gate's."""
    prediction = transfer_prediction(points, seed=study.settings.seed)
    overall = Estimate(prediction.spearman, prediction.low, prediction.high)
    within = Estimate(prediction.within, prediction.within_low, prediction.within_high)
    holds = prediction.within_p < 0.05 and prediction.within > 0
    predicts = "predicts" if prediction.p_value < 0.05 and prediction.low > 0 and holds else "is not shown to predict"
    by_model = ", ".join(
        f"{model} {value:.2f} (p = {p:.2g}, {gates} gates)" for model, (value, p, gates) in prediction.by_model.items()
    )
    return Claim(
        f"A text probe's transfer {predicts} CASA's transfer: rank correlation {overall.text()}",
        f"Over models, layers and training steps, {prediction.clusters} gates; by model {by_model}. The check within a "
        f"model and surface {'holds' if holds else 'fails'}: rank correlation {within.text()}, "
        f"p = {prediction.within_p:.2g}.",
        "transfer_prediction", prediction.n, *overall,
        f"permutation of whole gates within a model, 2000 draws; interval by bootstrap over {prediction.clusters}",
        prediction.p_value, "gates on further models whose correlation lies outside the interval",
    )  # fmt: skip


def _there(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table at the site and positions that the claims look at."""
    return table[(table["site"] == SITE) & (table["positions"] == POSITIONS)]


def _own(matrix: pd.DataFrame) -> pd.DataFrame:
    """The probes that are judged on the surface they were fitted on, by surface."""
    rows = _there(matrix)
    return rows[rows["fit"] == rows["surface"]].set_index("surface")


def _auroc(row: pd.Series) -> Estimate:
    return Estimate(*(float(row[name]) for name in ("auroc", "low", "high")))
