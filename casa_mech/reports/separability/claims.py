"""Titles and claims of notebook 01."""

from __future__ import annotations

import pandas as pd

from casa_mech.judging.estimate import Estimate
from casa_mech.reports.claim import Claim
from casa_mech.study.settings import slug
from probes.linear.gate_transfer import TransferPrediction, transfer_prediction


def plane_claim(model: str, data: pd.DataFrame) -> str:
    """The title of the PCA figure."""
    values = data.groupby(["surface", "positions"], sort=False)["silhouette"].first().unstack()
    listed = ", ".join(f"{surface} {row.max():.2f}" for surface, row in values.iterrows())
    return f"{slug(model)} before CASA, final layer in two dimensions: best silhouette of harmful and benign {listed}"


def probe_claim(model: str, table: pd.DataFrame, site: str = "norm") -> str:
    """The title of the probe figure."""
    chosen = table[(table["site"] == site) & (table["positions"] == "last")]
    rows = chosen.set_index(["measure", "surface"])["auroc"]
    own = ", ".join(f"{surface} {value:.2f}" for surface, value in rows["probe"].items())
    carried = ", ".join(f"{surface} {value:.2f}" for surface, value in rows["transfer"].items())
    where = f"{slug(model)}, final layer, last position: a probe finds harm in unseen topics"
    return f"{where} with AUROC {own};\nfitted on text alone it carries over with {carried}"


def matrix_claim(model: str, matrix: pd.DataFrame, site: str = "norm") -> str:
    """The title of the transfer figure: what is lost on the way, at the final layer."""
    part = matrix[(matrix["site"] == site) & (matrix["positions"] == "last")]
    own = part[part["fit"] == part["surface"]].set_index("surface")["auroc"]
    away = part[part["fit"] != part["surface"]]
    worst = away.loc[away["auroc"].idxmin()]
    return (
        f"{slug(model)}, final layer, last position: probes reach {own.min():.2f} to {own.max():.2f} on their own "
        f"surface,\n{away['auroc'].min():.2f} to {away['auroc'].max():.2f} on another (least from {worst['fit']} to "
        f"{worst['surface']})"
    )


def controls_claim(model: str, against: pd.DataFrame, site: str = "norm") -> str:
    """The title of the controls figure."""
    part = against[(against["site"] == site) & (against["positions"] == "last")]
    lines = [f"{row.surface} {row.auroc:.2f} / {row.matched:.2f} / {row.length:.2f}" for row in part.itertuples()]
    return f"{slug(model)}, final layer: AUROC of the probe / among equal lengths / of length alone: " + ", ".join(
        lines
    )


def prediction_claim(points: pd.DataFrame, seed: int) -> str:
    """The title of the prediction figure."""
    found = transfer_prediction(points, seed=seed)
    return (
        f"Transfer from text of a linear probe and of CASA, {found.clusters} gates: rank correlation "
        f"{Estimate(found.spearman, found.low, found.high).text()};\n"
        f"within a model and surface {Estimate(found.within, found.within_low, found.within_high).text()}"
    )


def closing_claims(
    model: str, matrix: pd.DataFrame, against: pd.DataFrame, points: pd.DataFrame, seed: int
) -> list[Claim]:
    """The notebook's claims, at the final layer and last position, each on the surface where it is weakest."""
    here = matrix[(matrix["site"] == "norm") & (matrix["positions"] == "last")]
    own = here[here["fit"] == here["surface"]].set_index("surface")
    weakest = own["auroc"].idxmin()
    lengths = against[(against["site"] == "norm") & (against["positions"] == "last")].set_index("surface")
    away = here[(here["fit"] == "text") & (here["surface"] != "text")].set_index("surface")
    least = away["auroc"].idxmin()
    found = transfer_prediction(points, seed=seed)
    matched = Estimate(*lengths.loc[weakest, ["matched", "matched_low", "matched_high"]])
    finds = "finds" if (own["low"] > 0.5).all() else "is not shown to find"
    return [
        _claim(
            f"{slug(model)}: before CASA a linear probe {finds} harm in unseen topics on every surface; the weakest is "
            f"{weakest}, where among prompts of equal length it has {matched.text()}",
            "probe_controls", own.loc[weakest], "labels dealt anew among topics, 999 draws",
            "on fresh requests the interval of a surface holds 0.5, or holds it among prompts of equal length",
        ),
        _claim(
            f"{slug(model)}: fitted on text alone, the probe carries over least to {least} (there: own probe "
            f"{Estimate(*own.loc[least, ['auroc', 'low', 'high']]).text()})",
            "transfer_matrix", away.loc[least], "labels dealt anew among topics, 999 draws",
            "on fresh requests its interval lies elsewhere; if it reaches the own probe's, nothing is lost on the way",
        ),
        _prediction(found),
    ]  # fmt: skip


def _claim(statement: str, figure: str, row: pd.Series, test: str, refuted: str) -> Claim:
    numbers = (int(row["n"]), float(row["auroc"]), float(row["low"]), float(row["high"]))
    return Claim(statement, figure, *numbers, test, float(row["p"]), refuted)


def _prediction(found: TransferPrediction) -> Claim:
    holds = "predicts" if found.low > 0 else "is not shown to predict"
    within = Estimate(found.within, found.within_low, found.within_high).text()
    return Claim(
        f"over models, layers and training steps the transfer of a text probe {holds} CASA's transfer (rank "
        f"correlation; within a model and surface {within})",
        "transfer_prediction", found.n, found.spearman, found.low, found.high,
        f"permutation of points, 2000 draws; interval by bootstrap over {found.clusters} gates", found.p_value,
        "gates on further models whose correlation lies outside the interval",
    )  # fmt: skip
