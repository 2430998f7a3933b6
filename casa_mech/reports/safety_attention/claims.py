"""Notebook 07: the headings of its figures and its claims, each computed from the table that it stands above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.judging.stats import rate_interval
from casa_mech.reports.claim import Claim, Heading, span
from casa_mech.reports.safety_attention.tables import RUNS, WHOLE, word_shares
from casa_mech.study import Study
from probes.gate.attribution import GATE
from probes.gate.calibration import Reliability, reliability, spiegelhalter
from probes.gate.patching import INSERT
from probes.gate.safety_attention import AttentionMap

NOTHING, REFUSAL, OWN, RANDOM = RUNS


def attack_heading(study: Study, readings: pd.DataFrame) -> Heading:
    """Medians of v_s by attack."""
    medians = readings.groupby(["attack", "label"], sort=False)["v_s"].median().unstack()
    by_attack = ", ".join(f"{attack} {row['harmful']:.2f} / {row['benign']:.2f}" for attack, row in medians.iterrows())
    return Heading(
        f"{study.name}: trained on plain text alone, median v_s of harmful requests is {span(medians['harmful'])} by "
        "attack",
        f"Median v_s of harmful / benign requests: {by_attack}.",
    )


def map_heading(study: Study, maps: Sequence[AttentionMap]) -> Heading:
    """How many of the examples are read at one place."""
    at_one = sum(bool(word_shares(attention)[1].max() > 0.5) for attention in maps)
    return Heading(
        f"{study.name}: in {at_one} of {len(maps)} typical requests one token or medium gets most safety attention",
        "The requests whose v_s is the median of their surface and class.",
    )


def share_heading(study: Study, shares: pd.DataFrame) -> Heading:
    """Where most of the attention goes in harmful requests."""
    most = {
        str(surface): rows.loc[rows["mean"].idxmax()]
        for surface, rows in shares[shares["label"] == "harmful"].groupby("surface", sort=False)
    }
    above = sum(bool(row["low"] > row["even"]) for row in most.values())
    by_surface = ", ".join(
        f"{surface}: {row['span']} {row['mean']:.2f} (even spread: {row['even']:.2f})" for surface, row in most.items()
    )
    return Heading(
        f"{study.name}: on {above} of {len(most)} surfaces one span gets more safety attention than an even spread "
        "gives",
        f"Where most of it goes in harmful requests. {by_surface}.",
    )


def head_heading(study: Study, heads: pd.DataFrame) -> Heading:
    """The head that carries most, surface by surface."""
    most = {
        str(surface): rows.loc[rows["delta_v_s_mean"].abs().idxmax()]
        for surface, rows in heads.groupby("surface", sort=False)
    }
    surface, top = max(most.items(), key=lambda item: abs(item[1]["delta_v_s_mean"]))
    return Heading(
        f"{study.name}: one head's harmful output moves a benign request's v_s by at most "
        f"{top['delta_v_s_mean']:+.2f} ({surface}, head {_head(top)})",
        "The head that moves v_s most, of the gap between the two runs: "
        + "; ".join(
            f"{surface} head {_head(row)} {_moved(row).value:+.2f} {_moved(row).bounds()} of {row['gap_v_s']:.2f}"
            for surface, row in most.items()
        )
        + ".",
    )


def attribution_heading(study: Study, components: pd.DataFrame) -> Heading:
    """How much of the classes' difference is the gate's."""
    means = components.pivot(index="component", columns="label", values="mean")
    gap = means["harmful"] - means["benign"]
    own = gap.drop(GATE)
    top = str(own.abs().idxmax())
    return Heading(
        f"{study.name}: safety attention adds {gap[GATE]:.1f} of the {gap.sum():.1f} by which the classes' token "
        "logits differ",
        f"On plain text; of the model's own parts the most telling is {top} with {own[top]:.1f}. Logits: the unsafe "
        "token's minus the safe one's.",
    )


def removal_heading(study: Study, sets: pd.DataFrame) -> Heading:
    """How few positions the decision rests on."""
    medians, by_surface = [], []
    for surface, rows in sets.groupby("surface", sort=False):
        flipped = rate_interval(rows["flipped"].to_numpy(), rows["topic"].tolist(), study.settings.seed)
        medians.append(rows["size"].median())
        by_surface.append(f"{surface} {rows['size'].median():.0f} ({flipped.text('.0%')} flipped)")
    return Heading(
        f"{study.name}: hiding {span(medians, '.0f')} positions (median) lets a flagged harmful request through",
        f"Median by surface: {', '.join(by_surface)}.",
    )


def patching_claim(study: Study, effects: pd.DataFrame) -> Claim:
    """Through which span harm reaches v_s after the last block, on text; the test is against the next best span.

    Spans are chosen on the pairs of one half of the topics and measured on the other half's: the best of several is
    better than the next by chance alone where both are chosen and compared on the same pairs.
    """
    seed, last = study.settings.seed, str(study.omni().n_layers - 1)
    rows = effects[(effects["direction"] == INSERT) & (effects["site"] == last) & (effects["head"] < 0)]
    rows = rows.assign(delta=rows["v_s_patched"] - rows["v_s"], gap=rows["v_s_donor"] - rows["v_s"])
    rows = rows[rows["span"] != WHOLE]
    by_surface = []
    for surface, of_surface in rows.groupby("surface", sort=False):
        choosing, tested = _halves(of_surface, seed)
        best = _by_delta(choosing)[0]
        pairs = tested[tested["span"] == best]
        delta = mean_interval(pairs["delta"].to_numpy(), pairs["topic"].tolist(), seed)
        by_surface.append(f"{surface}: {best} {delta.text()} of {pairs['gap'].mean():.2f} (n = {len(pairs)})")
    choosing, tested = _halves(rows[rows["surface"] == "text"], seed)
    first, second = _by_delta(choosing)[:2]
    text = tested.pivot(index=["pair", "topic"], columns="span", values="delta")[[first, second]]
    text = text.dropna()
    topics = list(text.index.get_level_values("topic"))
    difference, p = paired_difference(text[first].to_numpy(), text[second].to_numpy(), topics, seed)
    return Claim(
        f"{study.name}: after the last block, harmful states at the {first} move a benign text's v_s by "
        f"{text[first].mean():+.2f}",
        "One span's states are exchanged for those of a harmful request that differs in the key word alone. The span "
        "that raises v_s most is chosen on half of the topics; on the other half, of the whole gap: "
        f"{'; '.join(by_surface)}.",
        "gate_patching", len(text), *difference,
        f"permutation over topics that did not choose the spans: {first} against {second}, text", p,
        f"on fresh pairs the difference between {first} and {second} has an interval that holds 0",
    )  # fmt: skip


def _halves(rows: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of every second topic in a random order, and those of the others.

    Raises:
        InputError: all rows are of one topic.
    """
    topics = np.random.default_rng(seed).permutation(sorted(set(rows["topic"])))
    if len(topics) < 2:
        raise InputError("spans are chosen on one topic's pairs and measured on another's: ask for more pairs")
    choosing = rows["topic"].isin(topics[::2])
    return rows[choosing], rows[~choosing]


def _by_delta(rows: pd.DataFrame) -> list[str]:
    """The spans, the one that moves v_s up most first."""
    return [str(span) for span in rows.groupby("span")["delta"].mean().sort_values(ascending=False).index]


def ablation_claim(study: Study, ablated: pd.DataFrame) -> Claim:
    """What taking the refusal direction out does to harmful text's decisions, against random directions."""
    harmful = ablated[ablated["label"] == "harmful"]
    shares = harmful.groupby(["surface", "query_id", "topic", "run"], sort=False)["unsafe"].mean().unstack()
    by_surface = ", ".join(
        f"{surface} {rows[NOTHING].mean():.0%} → {rows[REFUSAL].mean():.0%} ({OWN}: {rows[OWN].mean():.0%}, random: "
        f"{rows[RANDOM].mean():.0%})"
        for surface, rows in shares.groupby("surface", sort=False)
    )
    text = shares.loc["text"].astype(float)
    topics = list(text.index.get_level_values("topic"))
    difference, p = paired_difference(text[REFUSAL].to_numpy(), text[RANDOM].to_numpy(), topics, study.settings.seed)
    return Claim(
        f"{study.name}: without the refusal direction {text[REFUSAL].mean():.0%} of harmful texts get the unsafe "
        f"token, with it {text[NOTHING].mean():.0%}",
        f"Harmful requests given the unsafe token, before → after the refusal direction is ablated: {by_surface}.",
        "gate_ablation", len(text), *difference,
        "permutation over topics: refusal against random directions, text", p,
        "on fresh requests the difference between refusal and random directions has an interval that holds 0",
    )  # fmt: skip


def calibration_claim(study: Study, readings: pd.DataFrame, calibrations: Mapping[str, Reliability]) -> Claim:
    """Whether v_s is a probability off the surface that it was trained on."""
    rows = readings[readings["attack"] != "plain"]
    harmful, topics = (rows["label"] == "harmful").to_numpy(), rows["topic"].tolist()
    scores = rows["v_s"].to_numpy()
    pooled, p = reliability(scores, harmful, topics, seed=study.settings.seed), spiegelhalter(scores, harmful, topics)
    errors = ", ".join(f"{attack} {entry.ece.value:.2f}" for attack, entry in calibrations.items())
    verdict = "is not a calibrated probability" if p < 0.05 else "is not shown to be miscalibrated"
    lean = "low" if pooled.bias.value < 0 else "high"
    return Claim(
        f"{study.name}: off plain text v_s {verdict}; on average it is {abs(pooled.bias.value):.2f} too {lean}",
        f"Expected calibration error: {errors}; over all attacks but plain {pooled.ece.text()}.",
        "gate_calibration", pooled.n, *pooled.ece, "Spiegelhalter's Z over topics, all attacks but plain", p,
        "on fresh requests under these attacks the calibration error is no larger than on plain text",
    )  # fmt: skip


def _head(row: pd.Series) -> str:
    """`block.head`."""
    return f"{str(row['site']).removeprefix('z.')}.{int(row['head'])}"


def _moved(row: pd.Series) -> Estimate:
    return Estimate(*(float(row[f"delta_v_s_{name}"]) for name in ("mean", "low", "high")))
