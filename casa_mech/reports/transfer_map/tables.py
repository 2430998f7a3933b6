"""Notebook 11: the committed tables of `casa-mech family`, and what its figures draw from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from casa_mech.errors import RunError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.hypothesis import holm
from casa_mech.reports.transfer_map.correlation import organism_correlation
from casa_mech.study.settings import CLONE

FOLDER = CLONE / "figures" / "map"
NOTE = (
    "The tables of the map are not here: make them with `casa-mech family --out runs/family` (about three hours on two "
    "cores), copy its .csv files and plan.json to figures/map, or give their folder as map_tables."
)
AWAY = ("spelled", "image", "audio")
"""Surfaces that a gate trained on plain text has not seen; a jailbreak is plain text, too."""
MEDIA = ("image", "audio")
OUTCOMES = {"gate_auroc": "AUROC of v_s", "forced": "refused by the forced token"}
"""How far a gate carries over: whether it tells harm apart, and whether its token makes the reply refuse."""
SHOWN = {"gate_auroc": "AUROC of v_s", "token_auroc": "AUROC of the token", "forced": "effect of the forced token"}
PREDICTORS = {
    "probe_from_text": "probe fitted on text (AUROC)",
    "probe": "probe fitted there (AUROC)",
    "shrinkage": "length of the mean difference",
    "cosine": "cosine of the mean difference",
    "tolerance": "tolerance of a random word",
}
"""Measured before any gate is trained."""
CAUSES = ("gate", "adapter", "conditioning", "breakage", "other", "gained")
PAPER = "as in the paper"


@dataclass(frozen=True)
class TransferMap:
    """The tables of one map (see `casa_mech.family`)."""

    organisms: pd.DataFrame
    """Knobs and card rows with their thresholds."""
    predictors: pd.DataFrame
    """What was known before the gates."""
    transfer: pd.DataFrame
    """A row for each member, gate seed and surface."""
    split: pd.DataFrame
    """The causes of the fall of attack success."""
    mends: pd.DataFrame
    """What mended gates do; empty where none was tried."""


def read_map(folder: str | Path = "") -> TransferMap | None:
    """The tables in `folder` (empty: the committed ones); None where there are none.

    Raises:
        RunError: some of the tables are there and others are not, or one cannot be read.
    """
    place = Path(folder or FOLDER)
    needed = ("organisms", "predictors", "transfer", "split")
    there = [name for name in needed if (place / f"{name}.csv").is_file()]
    if not there:
        return None
    absent = [name for name in needed if name not in there]
    if absent:
        raise RunError(f"{place} lacks {absent[0]}.csv: copy all tables of one casa-mech family --out")
    mends = place / "mends.csv"
    try:
        read = {name: pd.read_csv(place / f"{name}.csv") for name in needed}
        return TransferMap(**read, mends=pd.read_csv(mends) if mends.is_file() else pd.DataFrame())
    except (OSError, ValueError) as error:
        raise RunError(f"{place}: a table cannot be read ({type(error).__name__}): copy them again") from None


def threshold_data(tables: TransferMap) -> pd.DataFrame:
    """For each member its knobs, how many of the card's thresholds it meets, and where it misses one."""
    bounded = tables.organisms[tables.organisms["met"].notna()]
    place = bounded["measure"] + " " + bounded["surface"] + " " + bounded["split"].str.replace("_", " ")
    met = bounded["met"].astype(str).eq("True")
    rows = bounded.assign(met=met, missed=place.where(~met, ""))
    counts = rows.groupby("member", sort=False).agg(
        thresholds=("met", "size"), met=("met", "sum"), missed=("missed", lambda names: ", ".join(filter(None, names)))
    )
    knobs = list(tables.organisms.columns)
    knobs = knobs[knobs.index("seed") : knobs.index("parameters")]
    return tables.organisms.groupby("member", sort=False)[knobs].first().join(counts)


def transfer_data(tables: TransferMap) -> pd.DataFrame:
    """Mean over a member's gates, with the least and the largest of them: `member, surface, measure, gates, value, low,
    high`."""
    rows = []
    for (member, surface), gates in tables.transfer.groupby(["member", "surface"], sort=False):
        for measure in SHOWN:
            values = gates[measure]
            rows.append(
                {
                    "member": member, "surface": surface, "measure": measure, "gates": len(gates),
                    "value": values.mean(), "low": values.min(), "high": values.max(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def prediction_points(tables: TransferMap) -> pd.DataFrame:
    """A row for each member and surface of `AWAY`: `member, surface`, the `PREDICTORS`, and the gates' mean `OUTCOMES`.

    What a card has for seen and for held-out topics apart is averaged.
    """
    known = tables.predictors[tables.predictors["measure"].isin(list(PREDICTORS))]
    wide = known.pivot_table(index=["member", "surface"], columns="measure", values="value", sort=False)
    gates = tables.transfer.groupby(["member", "surface"], sort=False)[list(OUTCOMES)].mean()
    points = gates.join(wide).reindex(columns=[*PREDICTORS, *OUTCOMES]).reset_index()
    return points[points["surface"].isin(AWAY)].reset_index(drop=True)


def prediction_data(points: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of each predictor with each outcome (see `organism_correlation`), p also after Holm.

    Columns `predictor, outcome, n, organisms, value, low, high, p, p_holm`; Holm's correction is over all rows.
    """
    rows = []
    for outcome in OUTCOMES:
        for predictor in PREDICTORS:
            correlation = organism_correlation(points, predictor, outcome, seed)
            if correlation is not None:
                rows.append({"predictor": predictor, "outcome": outcome, **correlation})
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].tolist())) if len(table) else table


def cause_data(tables: TransferMap) -> pd.DataFrame:
    """Where the fall of attack success on pictures and speech comes from, mean over a member's gates and `MEDIA`.

    Columns `member, part, value, low, high` (least and largest gate); parts `CAUSES` and "total".
    """
    rows = tables.split[(tables.split["label"] == "harmful") & tables.split["surface"].isin(MEDIA)]
    rows = rows[rows["part"].isin([*CAUSES, "total"])]
    gates = rows.groupby(["member", "gate_seed", "part"], sort=False)["value"].mean()
    summary = gates.groupby(["member", "part"], sort=False).agg(["mean", "min", "max"]).reset_index()
    return summary.rename(columns={"mean": "value", "min": "low", "max": "high"})


def mend_points(tables: TransferMap) -> pd.DataFrame:
    """What each way to mend a gate gains and costs on `MEDIA`: `member, gate_seed, mend, fall, price`.

    `fall`: attack success of the base minus that behind the gate; `price`: the same of benign requests answered. The
    gate of the paper is the mend `PAPER`, on the members on which others were tried.
    """
    if tables.mends.empty:
        return pd.DataFrame(columns=["member", "gate_seed", "mend", "fall", "price"])
    keys = ["member", "gate_seed", "surface"]
    paper = tables.transfer[tables.transfer["member"].isin(tables.mends["member"])]
    after = paper.rename(columns={"success_after": "success", "benign_after": "benign"}).assign(mend=PAPER)
    columns = [*keys, "mend", "success", "benign"]
    tried = pd.concat([after[columns], tables.mends[columns]], ignore_index=True)
    joined = tried.merge(paper[[*keys, "success_before", "benign_before"]], on=keys)
    joined = joined[joined["surface"].isin(MEDIA)].assign(
        fall=lambda rows: rows["success_before"] - rows["success"],
        price=lambda rows: rows["benign_before"] - rows["benign"],
    )
    return joined.groupby(["member", "gate_seed", "mend"], sort=False)[["fall", "price"]].mean().reset_index()


def mend_data(points: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Mean of `fall` and `price` of each mend with intervals by bootstrap over organisms.

    Columns `mend, organisms, gates, fall, fall_low, fall_high, price, price_low, price_high`.
    """
    rows = []
    for mend, group in points.groupby("mend", sort=False):
        row: dict[str, object] = {"mend": mend, "organisms": group["member"].nunique(), "gates": len(group)}
        for side in ("fall", "price"):
            estimate = mean_interval(group[side].to_numpy(), group["member"].tolist(), seed).widened()
            row |= {side: estimate.value, f"{side}_low": estimate.low, f"{side}_high": estimate.high}
        rows.append(row)
    return pd.DataFrame(rows)


def by_member(table: pd.DataFrame, measure: str, surfaces: tuple[str, ...]) -> pd.Series:
    """Mean of a measure of `transfer_data` over surfaces, by member."""
    rows = table[(table["measure"] == measure) & table["surface"].isin(surfaces)]
    means = rows.groupby("member", sort=False)["value"].mean()
    return means[np.isfinite(means)]
