"""Notebook 01: the headings of its figures and its claims, each computed from the table that it stands above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.reports.claim import Claim, Heading, span
from casa_mech.reports.separability.tables import TOPICS
from casa_mech.study import Study
from probes.linear.gate_transfer import transfer_prediction
from probes.linear.harm_and_refusal import Dissociation
from probes.linear.kinds import ALL
from probes.linear.thresholds import AS_IT_IS, BENIGN_FLAGGED, HARMFUL_FLAGGED, MOVED, RANKING

SITE, POSITIONS = "norm", "last"
"""Where the claims look: behind the final norm, at the last position of the prompt."""


def plane_heading(study: Study, points: pd.DataFrame) -> Heading:
    """How well the classes part in the plane, surface by surface."""
    silhouettes = points.groupby(["surface", "positions"], sort=False)["silhouette"].first().unstack()
    best = silhouettes.max(axis=1)
    by_surface = ", ".join(f"{surface} {value:.2f}" for surface, value in best.items())
    return Heading(
        f"{study.title} before CASA: harmful and benign part in two dimensions with silhouettes of {span(best)}",
        f"States behind the final norm, in their first two principal components. Best silhouette: {by_surface}.",
    )


def probe_heading(study: Study, table: pd.DataFrame) -> Heading:
    """What probes reach on the surface that they were fitted on, and from text on others."""
    aurocs = _there(table).set_index(["measure", "surface"])["auroc"]
    own, carried = (
        ", ".join(f"{surface} {value:.2f}" for surface, value in aurocs.get(measure, pd.Series(dtype=float)).items())
        for measure in ("probe", "transfer")
    )
    if not carried:
        return Heading(
            f"{study.title}: probes tell harm in unseen prompts with AUROC {span(aurocs['probe'])}",
            f"Behind the final norm at the last position, probes reach {own}.",
        )
    return Heading(
        f"{study.title}: probes tell harm in unseen topics with AUROC {span(aurocs['probe'])}, "
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
        f"{study.title}: probes reach AUROC {span(own)} on their own surface, {span(away['auroc'])} on another",
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
        f"{row.Index} {row.auroc:.2f} / {row.matched:.2f} / {row.length:.2f} / {row.untrained:.2f}"
        for row in by_surface.itertuples()
    )
    tasks = ", ".join(f"{row.Index} {row.task:.2f} / {row.control_task:.2f}" for row in by_surface.itertuples())
    tasks = f" Where topics are met in training, of harm / of random labels of topics (a control task): {tasks}."
    tasks *= bool(by_surface["task"].notna().all())
    return Claim(
        f"{study.title} before CASA: a linear probe {finds} harm in unseen topics on every surface",
        f"Behind the final norm at the last position the weakest surface is {weakest}: AUROC "
        f"{_auroc(own.loc[weakest]).text()}, among prompts of equal length {matched.text()}. AUROC of the probe / "
        f"among equal lengths / of length alone / with random weights: {lengths}.{tasks}",
        "probe_controls", int(own.at[weakest, "n"]), *_auroc(own.loc[weakest]),
        "labels permuted over topics, 999 draws", float(own.at[weakest, "p"]),
        "on fresh requests the interval of a surface holds 0.5, or holds it among prompts of equal length, or random "
        "weights do as well",
    )  # fmt: skip


def transfer_claim(study: Study, matrix: pd.DataFrame) -> Claim:
    """What a probe fitted on text alone keeps on the surface where it keeps least."""
    rows = _there(matrix)
    away = rows[(rows["fit"] == "text") & (rows["surface"] != "text")].set_index("surface")
    least = away["auroc"].idxmin()
    return Claim(
        f"{study.title} before CASA: a probe fitted on text carries over least to {least}, AUROC "
        f"{_auroc(away.loc[least]).text()}",
        f"Behind the final norm at the last position; a probe fitted on {least} itself reaches "
        f"{_auroc(_own(matrix).loc[least]).text()}.",
        "transfer_matrix", int(away.at[least, "n"]), *_auroc(away.loc[least]),
        "labels permuted over topics, 999 draws", float(away.at[least, "p"]),
        "on fresh requests its interval lies elsewhere; if it reaches the own probe's, nothing is lost on the way",
    )  # fmt: skip


def threshold_claim(study: Study, scores: pd.DataFrame, thresholds: pd.DataFrame) -> Claim:
    """What a text probe still flags at its own threshold on the surface where it flags least."""
    here = thresholds[thresholds["positions"] == POSITIONS].set_index(["model", "surface", "states", "measure"])[
        "value"
    ]
    cells = here[study.name]
    surfaces = [surface for surface in dict.fromkeys(thresholds["surface"]) if surface != "text"]
    least = min(surfaces, key=lambda surface: cells[surface, AS_IT_IS, HARMFUL_FLAGGED])
    own = scores[(scores["model"] == study.name) & (scores["positions"] == POSITIONS)]
    harmful = own[own["label"] == "harmful"]
    rows = harmful[harmful["states"] == AS_IT_IS].set_index(["surface", "query_id"])
    text, there = ((rows.loc[surface, "score"] > 0).astype(float) for surface in ("text", least))
    topics = rows.loc["text", "topic"].tolist()
    lost, p = paired_difference(text, there.loc[text.index], topics, study.settings.seed, outcomes=True)
    numbers = ". ".join(
        f"{model}: text {_flagged(here[model], 'text', AS_IT_IS)}"
        + "".join(
            f", {surface} {_flagged(here[model], surface, AS_IT_IS)} "
            f"(AUROC {here[model, surface, AS_IT_IS, RANKING]:.2f}), moved {_flagged(here[model], surface, MOVED)}"
            for surface in surfaces
        )
        for model in dict.fromkeys(thresholds["model"])
    )
    return Claim(
        f"{study.title}: at its own threshold a text probe flags {there.mean():.0%} of harmful {least} requests, "
        f"{text.mean():.0%} of texts",
        f"{lost.times(100).value:.0f} points {lost.times(100).bounds('.0f')} fewer. Harmful / benign flagged, as it "
        f"is and with its mean moved onto text's: {numbers}. The mean is moved without labels, on as many harmful as "
        "benign requests.",
        "probe_thresholds", len(text), *lost, "paired permutation over topics", p,
        "on fresh requests as many are flagged there as on text: the difference's interval holds 0",
    )  # fmt: skip


def kinds_claim(study: Study, kinds: pd.DataFrame) -> Claim:
    """Whether a text probe finds kinds of harm that it was not fitted on, on text and elsewhere."""
    rows = kinds[(kinds["positions"] == POSITIONS) & (kinds["surface"] == "text")].set_index("kind")
    overall, topics = _auroc(rows.loc[ALL]), _auroc(rows.loc[TOPICS])
    single = rows.drop(index=[ALL, TOPICS])
    hardest = single["auroc"].idxmin()
    elsewhere = kinds[(kinds["positions"] == POSITIONS) & (kinds["kind"] == ALL) & (kinds["surface"] != "text")]
    carried = ", ".join(f"{row.surface} {row.auroc:.2f}" for row in elsewhere.itertuples())
    p_value = float(rows.at[ALL, "p"])
    finds = "finds" if p_value < 0.05 else "is not shown to find"
    return Claim(
        f"{study.title}: on kinds of harm it has not met a text probe has AUROC {overall.value:.2f}, on new topics "
        f"alone {topics.value:.2f}",
        f"It {finds} harm of a new kind: AUROC {overall.text()} over kinds; with topics alone left out "
        f"{topics.text()}. Hardest kind: {hardest}, {_auroc(single.loc[hardest]).text()}. Elsewhere: {carried}.",
        "probe_kinds", int(rows.at[ALL, "n"]), *overall, "labels permuted over kinds, 999 draws", p_value,
        "further kinds of harm are ranked no better than with labels permuted over kinds",
    )  # fmt: skip


def differences_heading(study: Study, differences: pd.DataFrame) -> Heading:
    """How long the difference of class means is behind the final norm, and whether it points text's way."""
    rows = differences[(differences["site"] == SITE) & (differences["positions"] == POSITIONS)]
    cells = rows.set_index(["model", "surface", "measure"])
    others = rows[rows["surface"] != "text"][["model", "surface"]].drop_duplicates().itertuples(index=False, name=None)
    numbers = "; ".join(
        f"{model}, {surface} {Estimate.of(cells.loc[(model, surface, 'shrinkage')]).text()}, "
        f"{Estimate.of(cells.loc[(model, surface, 'cosine')]).text()}"
        for model, surface in others
    )
    own = rows[rows["model"] == study.name]
    span_of = {name: span(own[own["measure"] == name]["value"]) for name in ("shrinkage", "cosine")}
    return Heading(
        f"{study.title}: off text the difference of class means has {span_of['shrinkage']} of text's length, "
        f"cosine {span_of['cosine']}",
        f"Behind the final norm at the last position. Length as a share of text's, cosine with text's: {numbers}. "
        "Sampling noise of the topics is taken off; every feature is in units of its spread on text.",
    )


def dissociation_claim(study: Study, by_surface: Mapping[str, Dissociation | None], site: str) -> Claim:
    """Whether harm at the user's last token and refusal after the header are two directions, on text."""
    text = by_surface["text"]
    where = f"after block {site}"
    shared: dict[str, Any] = {
        "figure": "harm_and_refusal",
        "test": "ranks of the two directions exchanged by topic, 999 draws; the larger p of the two contrasts",
        "refuted_if": "on fresh requests either direction reads the other's contrast as well as the other does",
    }
    if text is None:
        return Claim(
            f"{study.title}: too few requests of a kind to part harm from refusal",
            f"{where.capitalize()}: a direction needs harmful requests of two topics or more that are refused, as many "
            "that are answered, and benign ones that are answered.",
            n=0, value=float("nan"), low=float("nan"), high=float("nan"), p=1.0, **shared,
        )  # fmt: skip
    parted = "are two directions" if text.p_value < 0.05 else "are not shown to be two directions"
    numbers = "; ".join(
        f"{surface} {each.harm.text()} / {each.refusal.text()}, p {each.p_value:.3f}" if each else f"{surface} too few"
        for surface, each in by_surface.items()
    )
    return Claim(
        f"{study.title}: harm at the user's last token and refusal after the header {parted}",
        f"{where.capitalize()}, on text. By how much AUROC each reads its own contrast better than the other does "
        f"(harm, answered requests alone / refusal, harmful requests alone): {numbers}. The number is the smaller of "
        "text's two.",
        n=text.n, value=text.weaker.value, low=text.weaker.low, high=text.weaker.high, p=text.p_value, **shared,
    )  # fmt: skip


def prediction_claim(study: Study, points: pd.DataFrame) -> Claim:
    """Whether a probe's transfer predicts a gate's."""
    prediction = transfer_prediction(points, seed=study.settings.seed)
    overall = Estimate(prediction.spearman, prediction.low, prediction.high)
    within = Estimate(prediction.within, prediction.within_low, prediction.within_high)
    alone = [value > 0 and p < 0.05 for value, p, _ in prediction.by_model.values()]
    holds = prediction.within_p < 0.05 and prediction.within > 0
    sure = prediction.p_value < 0.05 and prediction.low > 0 and holds and all(alone)
    predicts = "predicts" if sure else "is not shown to predict"
    by_model = ", ".join(
        f"{model} {value:.2f} (p = {p:.2g}, {gates} gates)" for model, (value, p, gates) in prediction.by_model.items()
    )
    return Claim(
        f"A text probe's transfer {predicts} CASA's transfer: rank correlation {overall.text()}",
        f"Over models, layers and training steps, {prediction.clusters} gates. The check within models and "
        f"surfaces {'holds' if holds else 'fails'}: {within.text()}, p = {prediction.within_p:.2g}; the check in each "
        f"model alone {'holds' if all(alone) else 'fails'}: {by_model}.",
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


def _flagged(cells: pd.Series, surface: str, states: str) -> str:
    return " / ".join(f"{cells[surface, states, measure]:.0%}" for measure in (HARMFUL_FLAGGED, BENIGN_FLAGGED))


def _auroc(row: pd.Series) -> Estimate:
    return Estimate(*(float(row[name]) for name in ("auroc", "low", "high")))
