"""Notebook 07: the tables behind its figures, their titles, and its claims with what they stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.judging.stats import rate_interval
from casa_mech.reports.claim import Claim, name_of
from casa_mech.reports.safety_attention.tables import RUNS
from casa_mech.study import Study
from casa_mech.study.settings import slug
from probes.gate.attribution import GATE
from probes.gate.calibration import Reliability, reliability, spiegelhalter
from probes.gate.patching import INSERT
from probes.gate.safety_attention import AttentionMap, attention_shares

WHOLE = "whole prompt"
NOTHING, REFUSAL, OWN, RANDOM = RUNS


def examples(maps: Mapping[str, Sequence[AttentionMap]]) -> list[AttentionMap]:
    """One harmful and one benign request of each surface to draw: those with the median v_s of their class."""
    chosen = []
    for found in maps.values():
        for label in ("harmful", "benign"):
            ranked = sorted((entry for entry in found if entry.label == label), key=lambda entry: entry.v_s)
            chosen.append(ranked[len(ranked) // 2])
    return chosen


def share_data(maps: Mapping[str, Sequence[AttentionMap]], seed: int) -> pd.DataFrame:
    """What `plots.plot_shares` draws. A span that a request lacks has no share there and counts as none."""
    rows = []
    for surface, found in maps.items():
        shares = attention_shares(found)
        for (label, span), group in shares.groupby(["label", "span"], sort=False):
            mean, low, high = mean_interval(group["share"].to_numpy(), group["topic"].tolist(), seed)
            where = {"surface": surface, "span": span, "label": label, "n": len(group)}
            rows.append({**where, "mean": mean, "low": low, "high": high, "even": group["even"].mean()})
    return pd.DataFrame(rows)


def example_data(chosen: Sequence[AttentionMap]) -> pd.DataFrame:
    """The numbers of the drawn examples: `query_id, label, topic, v_s, position, token, role, weight`."""
    tables = [
        pd.DataFrame(
            {
                "query_id": found.query_id,
                "label": found.label,
                "topic": found.topic,
                "v_s": found.v_s,
                "position": np.arange(len(found.tokens)),
                "token": found.tokens,
                "role": found.roles,
                "weight": found.weights,
            }
        )
        for found in chosen
    ]
    return pd.concat(tables, ignore_index=True)


def residual(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of a patching summary that exchange the residual stream."""
    sites = summary["site"].str.fullmatch(r"embeddings|\d+")
    return summary[sites & (summary["span"] != WHOLE)].reset_index(drop=True)


def heads(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows that put one head of the harmful run into the benign one."""
    return summary[(summary["head"] >= 0) & (summary["direction"] == INSERT)].reset_index(drop=True)


def ablation_data(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What `plots.plot_ablation` draws: the share given the unsafe token, by surface, label and run."""
    rows = []
    for (surface, label, run), group in table.groupby(["surface", "label", "run"], sort=False):
        share = rate_interval(group["unsafe"].to_numpy(), group["topic"].tolist(), seed)
        where = {"surface": surface, "label": label, "run": run, "n": group["query_id"].nunique()}
        rows.append({**where, **share._asdict()})
    return pd.DataFrame(rows)


def curve_data(found: Mapping[str, Reliability]) -> pd.DataFrame:
    """The reliability curves as one table, with each attack's scores."""
    tables = []
    for attack, entry in found.items():
        scores = {name: getattr(entry, name)[0] for name in ("brier", "ece", "bias")}
        tables.append(entry.curve.assign(attack=attack, **scores))
    return pd.concat(tables, ignore_index=True)


def by_attack_title(model: str, readings: pd.DataFrame) -> str:
    """Medians of v_s by attack."""
    medians = readings.groupby(["attack", "label"], sort=False)["v_s"].median().unstack()
    listed = ", ".join(f"{attack} {row['harmful']:.2f}/{row['benign']:.2f}" for attack, row in medians.iterrows())
    return f"{slug(model)}: median v_s of harmful/benign requests, trained on plain text alone: {listed}"


def maps_title(model: str) -> str:
    """Which examples are drawn."""
    return f"{slug(model)}: safety attention over the requests whose v_s is the median of their surface and class"


def shares_title(model: str, data: pd.DataFrame) -> str:
    """Where most of the attention goes."""
    parts = []
    for surface, part in data[data["label"] == "harmful"].groupby("surface", sort=False):
        top = part.loc[part["mean"].idxmax()]
        parts.append(f"{surface}: {top['span']} {top['mean']:.2f} (even: {top['even']:.2f})")
    return f"{slug(model)}: where safety attention goes most in harmful requests. {', '.join(parts)}"


def heads_title(model: str, data: pd.DataFrame) -> str:
    """The head that carries most, surface by surface."""
    parts = []
    for surface, part in data.groupby("surface", sort=False):
        top = part.loc[part["delta_v_s_mean"].abs().idxmax()]
        place = f"{str(top['site']).removeprefix('z.')}.{int(top['head'])}"
        moved = Estimate(*(top[f"delta_v_s_{name}"] for name in ("mean", "low", "high")))
        parts.append(f"{surface} head {place}: {moved.value:+.2f} {moved.bounds()} of {top['gap_v_s']:.2f}")
    return f"{slug(model)}: the single head whose harmful output moves a benign request's v_s most. {'; '.join(parts)}"


def attribution_title(model: str, table: pd.DataFrame) -> str:
    """How much of the classes' difference is the gate's."""
    means = table.pivot(index="component", columns="label", values="mean")
    gap = means["harmful"] - means["benign"]
    own = gap.drop(GATE)
    top = str(own.abs().idxmax())
    return (
        f"{slug(model)}, plain text: harmful and benign differ by {gap.sum():.1f} in the tokens' logit difference; "
        f"safety attention adds {gap[GATE]:.1f}, the model's own most telling part ({top}) {own[top]:.1f}"
    )


def removal_title(model: str, table: pd.DataFrame, seed: int) -> str:
    """How few positions the decision rests on."""
    parts = []
    for surface, part in table.groupby("surface", sort=False):
        flipped = rate_interval(part["flipped"].to_numpy(), part["topic"].tolist(), seed)
        parts.append(f"{surface} {part['size'].median():.0f} ({flipped.text('.0%')} flipped)")
    return (
        f"{slug(model)}: positions that have to be hidden before a flagged harmful request is let through, median: "
        + ", ".join(parts)
    )


def patching_claim(study: Study, effects: pd.DataFrame) -> Claim:
    """Through which span harm reaches v_s after the last block, on text; the test is against the next best span."""
    seed, last = study.settings.seed, str(study.omni().n_layers - 1)
    table = effects[(effects["direction"] == INSERT) & (effects["site"] == last) & (effects["head"] < 0)]
    table = table.assign(delta=table["v_s_patched"] - table["v_s"], gap=table["v_s_donor"] - table["v_s"])
    table = table[table["span"] != WHOLE]
    parts = []
    for surface, part in table.groupby("surface", sort=False):
        best = str(part.groupby("span")["delta"].mean().idxmax())
        rows = part[part["span"] == best]
        delta = mean_interval(rows["delta"].to_numpy(), rows["topic"].tolist(), seed)
        parts.append(f"{surface}: {best} {delta.text()} of {rows['gap'].mean():.2f} (n = {len(rows)})")
    text = table[table["surface"] == "text"].pivot(index=["pair", "topic"], columns="span", values="delta").dropna()
    order = text.mean().sort_values(ascending=False).index
    topics = list(text.index.get_level_values("topic"))
    first, second = text[order[0]].to_numpy(), text[order[1]].to_numpy()
    change, p = paired_difference(first, second, topics, seed)
    statement = (
        f"{name_of(study)}: after the last block, exchanging one span's states for a harmful twin's raises "
        f"v_s most at the\n{'; '.join(parts)}"
    )
    return Claim(
        statement, "gate_patching", len(text), *change,
        f"permutation over topics: {order[0]} against {order[1]}, text", p,
        f"on fresh pairs the difference between {order[0]} and {order[1]} has an interval that holds 0",
    )  # fmt: skip


def ablation_claim(study: Study, table: pd.DataFrame) -> Claim:
    """What taking the refusal direction out does to harmful text's decisions, against random directions."""
    seed = study.settings.seed
    harmful = table[table["label"] == "harmful"]
    share = harmful.groupby(["surface", "query_id", "topic", "run"], sort=False)["unsafe"].mean().unstack()
    parts = [
        f"{surface} {part[NOTHING].mean():.0%} → {part[REFUSAL].mean():.0%} (gated model's own: "
        f"{part[OWN].mean():.0%}, random: {part[RANDOM].mean():.0%})"
        for surface, part in share.groupby("surface", sort=False)
    ]
    text = share.loc["text"].astype(float)
    topics = list(text.index.get_level_values("topic"))
    without, random = text[REFUSAL].to_numpy(), text[RANDOM].to_numpy()
    change, p = paired_difference(without, random, topics, seed)
    statement = (
        f"{name_of(study)}: harmful requests given the unsafe token before → after the refusal direction is "
        f"ablated:\n{', '.join(parts)}"
    )
    return Claim(
        statement, "gate_ablation", len(text), *change,
        "permutation over topics: refusal against random directions, text", p,
        "on fresh requests the difference between refusal and random directions has an interval that holds 0",
    )  # fmt: skip


def calibration_claim(study: Study, readings: pd.DataFrame, found: Mapping[str, Reliability]) -> Claim:
    """Whether v_s is a probability off the surface that it was trained on."""
    part = readings[readings["attack"] != "plain"]
    harmful, topics = (part["label"] == "harmful").to_numpy(), part["topic"].tolist()
    scores = part["v_s"].to_numpy()
    pooled, p = reliability(scores, harmful, topics, seed=study.settings.seed), spiegelhalter(scores, harmful)
    listed = ", ".join(f"{attack} {entry.ece[0]:.2f}" for attack, entry in found.items())
    verdict = "is not a calibrated probability" if p < 0.05 else "is not shown to be miscalibrated"
    lean = "low" if pooled.bias[0] < 0 else "high"
    statement = (
        f"{name_of(study)}: off plain text v_s {verdict}; it is {lean} by {abs(pooled.bias[0]):.2f} on "
        f"average.\nExpected calibration error: {listed}"
    )
    return Claim(
        statement, "gate_calibration", pooled.n, *pooled.ece,
        "Spiegelhalter's Z on all attacks but plain", p,
        "on fresh requests under these attacks the calibration error is no larger than on plain text",
    )  # fmt: skip
