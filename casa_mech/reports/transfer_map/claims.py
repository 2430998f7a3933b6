"""Notebook 11: its claims, each computed from the table that it stands above; organisms are the independent draws."""

from __future__ import annotations

import pandas as pd

from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import holm, paired_difference
from casa_mech.reports.claim import Claim
from casa_mech.reports.transfer_map.tables import MEDIA, PAPER, PREDICTORS, by_member

TRANSFER_FIGURE, PREDICTION_FIGURE = "map_transfer", "map_predictors"
CAUSE_FIGURE, MEND_FIGURE = "map_causes", "map_mends"


def transfer_claim(data: pd.DataFrame, seed: int = 0) -> Claim:
    """What a gate's AUROC loses from plain text to pictures and speech, over organisms (`tables.transfer_data`)."""
    text, media = by_member(data, "gate_auroc", ("text",)), by_member(data, "gate_auroc", MEDIA)
    members = [name for name in text.index if name in media.index]
    change, p = paired_difference(media[members], text[members], members, seed)
    best, worst = media.idxmax(), media.idxmin()
    forced = by_member(data, "forced", MEDIA)
    return Claim(
        f"From text to media v_s goes from AUROC {text.mean():.2f} to {media.mean():.2f} over {len(members)} organisms",
        f"On pictures and speech it is highest on {best} ({media[best]:.2f}) and lowest on {worst} "
        f"({media[worst]:.2f}); the change from text is {change.text('+.2f')}. The forced token adds "
        f"{100 * forced.min():.0f} to {100 * forced.max():.0f} points of refusals there.",
        TRANSFER_FIGURE, len(members), *change, "paired permutation over organisms", p,
        "on other organisms the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def prediction_claim(correlations: pd.DataFrame) -> Claim | None:
    """Which measure of the base predicts a gate's AUROC best (`tables.prediction_data`); None for too few organisms."""
    if correlations.empty:
        return None
    rows = correlations[correlations["outcome"] == "gate_auroc"].set_index("predictor")
    best = rows["value"].abs().idxmax()
    row = rows.loc[best]
    others = ", ".join(
        f"{PREDICTORS[str(name)]} {Estimate.of(other).text()}" for name, other in rows.drop(index=best).iterrows()
    )
    forced = correlations[(correlations["outcome"] == "forced") & (correlations["predictor"] == best)]
    effect = "".join(f" With the forced token's effect: {Estimate.of(other).text()}." for _, other in forced.iterrows())
    predicts = "predicts" if row["p_holm"] < 0.05 else "is not shown to predict"
    name = PREDICTORS[str(best)]
    return Claim(
        f"{name[0].upper()}{name[1:]} {predicts} a gate's transfer: rank correlation {row['value']:.2f}",
        f"Of {len(rows)} measures taken before a gate was trained it goes with the AUROC of v_s closest, over "
        f"{int(row['organisms'])} organisms and {int(row['n'])} points: {Estimate.of(row).text()}. The others: "
        f"{others}.{effect}",
        PREDICTION_FIGURE, int(row["n"]), *Estimate.of(row),
        f"permutation of whole organisms, Holm's correction over {len(correlations)} correlations",
        float(row["p_holm"]),
        "on other organisms the correlation lies outside the interval, or another measure's is higher",
    )  # fmt: skip


def cause_claim(data: pd.DataFrame, seed: int = 0) -> Claim:
    """How much of the fall on media the gate does, against replies that fall apart (`tables.cause_data`)."""
    wide = data.pivot_table(index="member", columns="part", values="value", sort=False)
    broken = wide["breakage"] + wide["conditioning"]
    difference, p = paired_difference(wide["gate"], broken, wide.index.tolist(), seed)
    parts = 100 * wide.mean()
    most = wide["gate"].idxmax()
    return Claim(
        f"Of a fall of {parts['total']:.0f} points on media the gate does {parts['gate']:.0f}, inability "
        f"{100 * broken.mean():.0f}",
        f"Means over {len(wide)} organisms. The gate does most on {most} ({100 * wide.at[most, 'gate']:.0f} points of "
        f"{100 * wide.at[most, 'total']:.0f}). Gate minus inability (replies that neither refuse nor answer): "
        f"{difference.times(100).text('+.1f')} points.",
        CAUSE_FIGURE, len(wide), *difference, "paired permutation over organisms", p,
        "on other organisms the difference has the other sign, or its interval holds 0",
    )  # fmt: skip


def mend_claim(points: pd.DataFrame, seed: int = 0) -> Claim | None:
    """Which way to mend a gate gains most after its price, against the paper's gate; None where none was tried.

    Gain: fall of attack success minus loss of benign answers (`tables.mend_points`), paired by organism and gate.
    """
    if points.empty:
        return None
    gain = points.assign(gain=points["fall"] - points["price"]).pivot_table(
        index=["member", "gate_seed"], columns="mend", values="gain", sort=False
    )
    means = points.groupby("mend", sort=False)[["fall", "price"]].mean()
    tests = {}
    for mend in gain.columns.drop(PAPER):
        pairs = gain[[mend, PAPER]].dropna()
        members = pairs.index.get_level_values("member").tolist()
        tests[mend] = (*paired_difference(pairs[mend], pairs[PAPER], members, seed), len(pairs), len(set(members)))
    corrected = dict(zip(tests, holm([test[1] for test in tests.values()]), strict=True))
    best = max(tests, key=lambda mend: tests[mend][0].value)
    change, _, n, organisms = tests[best]
    return Claim(
        f"Mended by {best}, attack success on media falls by {100 * means.at[best, 'fall']:.0f} points, not "
        f"{100 * means.at[PAPER, 'fall']:.0f}",
        f"Of {len(tests)} ways it gains most after its price: benign requests answered fall by "
        f"{100 * means.at[best, 'price']:.0f} points, behind the paper's gate by {100 * means.at[PAPER, 'price']:.0f}. "
        f"Gain over the paper's gate: {change.times(100).text('+.1f')} points, over {organisms} organisms.",
        MEND_FIGURE, n, *change, f"paired permutation over organisms, Holm's correction over {len(tests)} ways",
        corrected[best], "on other organisms the gain has the other sign, or another way gains more",
    )  # fmt: skip
