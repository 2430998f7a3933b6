"""Notebook 07: the headings of its figures and its claims, each computed from the table that it stands above."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.judging.stats import rate_interval
from casa_mech.reports.claim import Claim, Heading, listed, span
from casa_mech.reports.safety_attention.patch_tables import (
    BENIGN_TEXT,
    HARMFUL_TEXT,
    PATHS,
    TOTAL,
    WHOLE,
    agreement_p,
)
from casa_mech.reports.safety_attention.tables import RUNS
from casa_mech.study import Study
from probes.gate.attribution import GATE
from probes.gate.calibration import Reliability, reliability, spiegelhalter
from probes.gate.patching import INSERT
from probes.gate.paths import DIRECT, INDIRECT
from probes.gate.removal import PERMUTED, SCORES
from probes.gate.safety_attention import AttentionMap, word_shares
from probes.gate.surfaces import HEADER

NOTHING, REFUSAL, OWN, RANDOM, PERMUTED_LABELS = RUNS


def attack_heading(study: Study, readings: pd.DataFrame) -> Heading:
    """Medians of v_s by attack."""
    medians = readings.groupby(["attack", "label"], sort=False)["v_s"].median().unstack()
    by_attack = ", ".join(f"{attack} {row['harmful']:.2f} / {row['benign']:.2f}" for attack, row in medians.iterrows())
    return Heading(
        f"{study.title}: trained on plain text alone, median v_s of harmful requests is {span(medians['harmful'])} by "
        "attack",
        f"Median v_s of harmful / benign requests: {by_attack}.",
    )


def map_heading(study: Study, maps: Sequence[AttentionMap]) -> Heading:
    """How many of the examples are read at one place."""
    at_one = sum(bool(word_shares(attention)[1].max() > 0.5) for attention in maps)
    return Heading(
        f"{study.title}: in {at_one} of {len(maps)} typical requests one token or medium gets most safety attention",
        "The requests whose v_s is the median of their surface and class.",
    )


def share_heading(study: Study, shares: pd.DataFrame) -> Heading:
    """Where most of the attention goes in harmful requests, surface by surface."""
    most = {
        str(surface): rows.loc[rows["mean"].idxmax()]
        for surface, rows in shares[shares["label"] == "harmful"].groupby("surface", sort=False)
    }
    header = shares[(shares["label"] == "harmful") & (shares["span"] == "header")].set_index("surface")
    above = [surface for surface, row in header.iterrows() if row["low"] > row["even"]]
    by_surface = ", ".join(
        f"{surface} {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}] ({row['even']:.2f})"
        for surface, row in header.iterrows()
    )
    return Heading(
        f"{study.title}: safety attention lies most on {_by_surface(most)}",
        "Of harmful requests. The header's share (that of an even spread): "
        f"{by_surface}. It gets more than an even spread gives on {listed(above) if above else 'no surface'}.",
    )


def span_heading(study: Study, spans: pd.DataFrame) -> Heading:
    """Through which span harm reaches v_s after the last block, surface by surface."""
    most = {str(surface): rows.loc[rows["value"].idxmax()] for surface, rows in spans.groupby("surface", sort=False)}
    header = spans[spans["span"] == "header"]
    by_surface = ", ".join(
        f"{row['surface']} {Estimate.of(row).text('.0%')} of a gap of {row['gap']:.1f}" for _, row in header.iterrows()
    )
    return Heading(
        f"{study.title}: v_s takes harm from {_by_surface(most)}",
        "Where one span's harmful states after the last block move the log-odds of v_s most. The header's share of the "
        f"gap: {by_surface}.",
    )


def head_heading(study: Study, heads: pd.DataFrame) -> Heading:
    """The head that carries most, surface by surface."""
    most = _telling_heads(heads, "log_odds")
    surface, top = max(most.items(), key=lambda item: abs(item[1]["delta_log_odds_mean"]))
    return Heading(
        f"{study.title}: one head's harmful output moves a benign request's log-odds of v_s by at most "
        f"{top['delta_log_odds_mean']:+.1f} ({surface}, {_head(top)})",
        "The head that moves them most, of the gap between the two runs: "
        + "; ".join(
            f"{surface} head {_head(row)} {_moved(row, 'log_odds').text('+.1f')} of {row['gap_log_odds']:.1f}"
            for surface, row in most.items()
        )
        + ".",
    )


def path_heading(study: Study, paths: pd.DataFrame) -> Heading:
    """Which way the most telling head's effect goes, on the token's logits and on v_s."""
    sentences, indirect = [], 0
    by_path = paths.set_index(["surface", "site", "head", "path"])
    for measure, name in (("log_odds", "log-odds of v_s"), ("logit", "token logit difference")):
        parts = []
        for surface, top in _telling_heads(paths[paths["path"] == TOTAL], measure).items():
            moved = {path: _moved(by_path.loc[(surface, top["site"], top["head"], path)], measure) for path in PATHS}
            indirect += abs(moved[INDIRECT].value) > abs(moved[DIRECT].value)
            values = ", ".join(f"{path} {estimate.text('+.2f')}" for path, estimate in moved.items())
            parts.append(f"{surface} {_head(top)}: {values}, gap {top[f'gap_{measure}']:.1f}")
        sentences.append(f"{name[0].upper()}{name[1:]}: {'; '.join(parts)}.")
    n = 2 * paths["surface"].nunique()
    return Heading(
        f"{study.title}: the most telling head works more through later blocks than directly in {indirect} of {n} "
        "cases",
        "The head with the largest total, for each surface. " + " ".join(sentences),
    )


def attribution_heading(study: Study, components: pd.DataFrame) -> Heading:
    """How much of the classes' difference is the gate's."""
    means = components.pivot(index="component", columns="label", values="mean")
    gap = means["harmful"] - means["benign"]
    own = gap.drop(GATE)
    top = str(own.abs().idxmax())
    return Heading(
        f"{study.title}: safety attention adds {gap[GATE]:.1f} of the {gap.sum():.1f} by which the classes' token "
        "logits differ",
        f"On plain text; of the model's own parts the most telling is {top} with {own[top]:.1f}. Logits: the unsafe "
        "token's minus the safe one's.",
    )


def removal_heading(study: Study, sets: pd.DataFrame) -> Heading:
    """How few positions the decision rests on, against the same search on permuted scores."""
    seed = study.settings.seed
    greedy = sets[sets["search"] == SCORES]
    permuted = sets[sets["search"] == PERMUTED].merge(
        greedy[["surface", "query_id", "size"]], on=["surface", "query_id"], suffixes=("", "_greedy")
    )
    as_few = permuted["flipped"] & (permuted["size"] <= permuted["size_greedy"])
    medians, by_surface = [], []
    for surface, rows in greedy.groupby("surface", sort=False):
        flipped = rate_interval(rows["flipped"].to_numpy(), rows["topic"].tolist(), seed)
        here = permuted["surface"] == surface
        control = rate_interval(as_few[here].to_numpy(), permuted[here]["topic"].tolist(), seed)
        medians.append(rows["size"].median())
        by_surface.append(
            f"{surface} {rows['size'].median():.0f} ({flipped.text('.0%')} flipped; on permuted scores "
            f"{control.text('.0%')} with no more)"
        )
    return Heading(
        f"{study.title}: hiding {span(medians, '.0f')} positions (median) lets a flagged request through, on permuted "
        f"scores {as_few.mean():.0%}",
        f"Median by surface: {', '.join(by_surface)}.",
    )


def patching_claim(study: Study, effects: pd.DataFrame) -> Claim:
    """Through which span harm reaches v_s after the last block, on text; the test is against the next best span.

    Spans are chosen on the pairs of one half of the topics and measured on the other half's: the best of several is
    better than the next by chance alone where both are chosen and compared on the same pairs.
    """
    seed, last = study.settings.seed, str(study.omni().n_layers - 1)
    rows = effects[(effects["direction"] == INSERT) & (effects["site"] == last) & (effects["head"] < 0)]
    rows = rows.assign(delta=rows["log_odds_patched"] - rows["log_odds"], gap=rows["log_odds_donor"] - rows["log_odds"])
    rows = rows[rows["span"] != WHOLE]
    by_surface = []
    for surface, of_surface in rows.groupby("surface", sort=False):
        choosing, tested = _halves(of_surface, seed)
        best = _by_delta(choosing)[0]
        pairs = tested[tested["span"] == best]
        delta = mean_interval(pairs["delta"].to_numpy(), pairs["topic"].tolist(), seed)
        by_surface.append(f"{surface}: {best} {delta.text('.1f')} of {pairs['gap'].mean():.1f} (n = {len(pairs)})")
    choosing, tested = _halves(rows[rows["surface"] == "text"], seed)
    first, second = _by_delta(choosing)[:2]
    text = tested.pivot(index=["pair", "topic"], columns="span", values="delta")[[first, second]]
    text = text.dropna()
    topics = list(text.index.get_level_values("topic"))
    difference, p = paired_difference(text[first].to_numpy(), text[second].to_numpy(), topics, seed)
    return Claim(
        f"{study.title}: after the last block, harmful {first} states move a benign text's log-odds of v_s by "
        f"{text[first].mean():+.1f}",
        "One span's states are exchanged for those of a harmful request that differs in the key word alone. The span "
        "that raises the log-odds most is chosen on half of the topics; on the other half, of the whole gap: "
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
    """The spans, the one that moves the log-odds of v_s up most first."""
    return [str(span) for span in rows.groupby("span")["delta"].mean().sort_values(ascending=False).index]


def ablation_claim(study: Study, ablated: pd.DataFrame) -> Claim:
    """What taking the refusal direction out does to harmful text's decisions, against directions of equal variance."""
    seed = study.settings.seed
    harmful = ablated[ablated["label"] == "harmful"]
    shares = harmful.groupby(["surface", "query_id", "topic", "run"], sort=False)["unsafe"].mean().unstack()
    by_surface = ", ".join(
        f"{surface} {rows[NOTHING].mean():.0%} → {rows[REFUSAL].mean():.0%} ({RANDOM}: {rows[RANDOM].mean():.0%})"
        for surface, rows in shares.groupby("surface", sort=False)
    )
    text = shares.loc["text"].astype(float)
    topics = list(text.index.get_level_values("topic"))
    difference, p = paired_difference(text[REFUSAL].to_numpy(), text[RANDOM].to_numpy(), topics, seed)
    own, own_p = paired_difference(text[OWN].to_numpy(), text[PERMUTED_LABELS].to_numpy(), topics, seed)
    each = harmful[(harmful["surface"] == "text") & (harmful["run"] == RANDOM)].groupby("ablated")["unsafe"].mean()
    as_low = int((each <= text[REFUSAL].mean()).sum())
    return Claim(
        f"{study.title}: {text[REFUSAL].mean():.0%} of harmful texts are flagged without the refusal direction, "
        f"{text[RANDOM].mean():.0%} without a random one",
        "Harmful requests given the unsafe token, before → after the refusal direction is ablated, beside directions "
        f"along which states vary as much: {by_surface}. Of {len(each)} such directions {as_low} leave as few texts "
        f"flagged. Without the {OWN} {text[OWN].mean():.0%} of the texts are flagged, without those {PERMUTED_LABELS} "
        f"{text[PERMUTED_LABELS].mean():.0%}: a difference of {own.text('+.2f')}, p = {own_p:.2g}.",
        "gate_ablation", len(text), *difference,
        "permutation over topics: refusal against random directions of equal variance, text", p,
        "on fresh requests the difference between refusal and random directions has an interval that holds 0",
    )  # fmt: skip


def agreement_claim(study: Study, points: pd.DataFrame, agreement: pd.DataFrame) -> Claim:
    """How far attribution patching can be trusted: its correlation with true patching, and the parts where it fails."""
    rows = agreement[agreement["measure"] == "log_odds"]
    total, parts = rows[rows["part"] == "all"].set_index("surface"), rows[rows["part"] != "all"]
    failing = parts[parts["value"] < math.sqrt(0.5)].sort_values("value")
    names = "; ".join(
        f"{surface}: " + ", ".join(f"{part} {r:.2f}" for part, r in zip(group["part"], group["value"], strict=True))
        for surface, group in failing.groupby("surface", sort=False)
    )
    by_surface = "; ".join(
        f"{surface} {Estimate.of(row).text()}, {row['same_sign']:.0%} of one sign, patched changes "
        f"{row['slope']:.1f} times as large"
        for surface, row in total.iterrows()
    )
    own = total.loc["text"]
    return Claim(
        f"{study.title}: on text attribution patching and patching correlate at r = {own['value']:.2f}; it fails at "
        f"{len(failing)} of {len(parts)} parts",
        f"Pearson's r of estimated and patched change of v_s's log-odds: {by_surface}. It explains less than half of "
        f"the variance at {len(failing)} of {len(parts)} parts of the model and surface{': ' if names else ''}{names}.",
        "gate_attribution_patching", int(own["n"]), *Estimate.of(own), "targets of the estimates permuted, text",
        agreement_p(points, study.settings.seed),
        "on fresh pairs the correlation on text has an interval that holds 0",
    )  # fmt: skip


def moved_claim(study: Study, moved: pd.DataFrame) -> Claim:
    """Whether a harmful text's header moves a spoken request's v_s more than a benign text's header does."""
    seed, middle = study.settings.seed, str(study.omni().n_layers // 2)
    rows = moved[(moved["site"] == middle) & (moved["span"] == HEADER)]
    sentences, tests = [], {}
    for surface, of_surface in rows.groupby("surface", sort=False):
        parts = []
        for measure, name in (("log_odds", "log-odds of v_s"), ("logit", "token logits")):
            change = of_surface.assign(delta=of_surface[f"{measure}_patched"] - of_surface[measure]).pivot(
                index=["query_id", "topic"], columns="donor", values="delta"
            )
            topics = list(change.index.get_level_values("topic"))
            harmful, benign = change[HARMFUL_TEXT].to_numpy(), change[BENIGN_TEXT].to_numpy()
            difference, p = paired_difference(harmful, benign, topics, seed)
            tests[surface, measure] = (change, difference, p)
            parts.append(
                f"{name} {change[HARMFUL_TEXT].mean():+.1f} against {change[BENIGN_TEXT].mean():+.1f} (a difference of "
                f"{difference.text('+.1f')}, p = {p:.2g})"
            )
        gap = (of_surface["log_odds_donor"] - of_surface["log_odds"])[of_surface["donor"] == HARMFUL_TEXT].mean()
        sentences.append(f"{surface}: {', '.join(parts)}; its own text's log-odds of v_s are {gap:+.1f} away")
    change, difference, p = tests["audio", "log_odds"]
    return Claim(
        f"{study.title}: a harmful text's header moves speech's log-odds of v_s by "
        f"{change[HARMFUL_TEXT].mean():+.1f}, a benign text's by {change[BENIGN_TEXT].mean():+.1f}",
        f"Header states after block {middle}, of the request's own text against those of its benign counterpart. "
        f"{'; '.join(sentences)}.",
        "gate_moved_states", len(change), *difference,
        "permutation over topics: harmful against benign text, speech", p,
        "on fresh requests the difference between the two texts' states has an interval that holds 0",
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
        f"{study.title}: off plain text v_s {verdict}; on average it is {abs(pooled.bias.value):.2f} too {lean}",
        f"Expected calibration error: {errors}; over all attacks but plain {pooled.ece.text()}.",
        "gate_calibration", pooled.n, *pooled.ece, "Spiegelhalter's Z over topics, all attacks but plain", p,
        "on fresh requests under these attacks the calibration error is no larger than on plain text",
    )  # fmt: skip


def _by_surface(most: Mapping[str, pd.Series]) -> str:
    """The `span` of each surface's row, in words: `header (text, image) and audio (audio)`."""
    spans: dict[str, list[str]] = {}
    for surface, row in most.items():
        spans.setdefault(str(row["span"]), []).append(surface)
    return listed([f"{name} ({', '.join(surfaces)})" for name, surfaces in spans.items()])


def _telling_heads(heads: pd.DataFrame, measure: str) -> dict[str, pd.Series]:
    """For each surface the head that moves a measure most."""
    return {
        str(surface): rows.loc[rows[f"delta_{measure}_mean"].abs().idxmax()]
        for surface, rows in heads.groupby("surface", sort=False)
    }


def _head(row: pd.Series) -> str:
    """`block.head`."""
    return f"{str(row['site']).removeprefix('z.')}.{int(row['head'])}"


def _moved(row: pd.Series, measure: str) -> Estimate:
    return Estimate(*(float(row[f"delta_{measure}_{name}"]) for name in ("mean", "low", "high")))
