"""Notebook 08: the headings of its figures and its claims, each computed from the table that it stands above.

One gate is trained here, and one model by SSFT: what is claimed of CASA is claimed of this gate.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.crossed import crossed_ratio, crossed_test
from casa_mech.judging.hypothesis import holm
from casa_mech.reports.claim import Claim, Heading
from casa_mech.reports.prefill_dynamics.tables import (
    DEPTH_LENGTH,
    EDGE_LENGTHS,
    KL,
    SSFT,
    STATE_LENGTH,
    SYSTEMS,
    PrefillTables,
    estimate,
    pair_differences,
)
from casa_mech.study import Study
from probes.prefill.depth import EARLIER, LAST
from probes.prefill.edges import CUT, EDGES, RESTORED, TOKEN

FACTORS = ("topic", "phrasing")
"""What intervals and tests draw anew."""
TEST = "crossed bootstrap of topics and wordings"
FIRST_TOKENS = 3
"""Tokens of a continuation on which a shallow alignment has most of its divergence."""


def length_heading(success: Claim, order: Claim) -> Heading:
    """Of the figure by length, which shows what two claims are about."""
    return Heading(success.title, f"{success.statement} {order.statement}")


def token_heading(study: Study, tokens: pd.DataFrame) -> Heading:
    """How long the longest prefill is felt under CASA, along one continuation."""
    rows = tokens[(tokens["system"] == CASA) & (tokens["measure"] == KL) & (tokens["label"] == "harmful")]
    longest = rows[rows["length"] == rows["length"].max()].sort_values("token")
    first, last = longest["value"].iloc[0], longest["value"].iloc[-1]
    return Heading(
        f"{study.title}: {int(longest['length'].max())} prefilled tokens leave this gate {first:.1f} nats from itself "
        f"at first, {last:.1f} at token {int(longest['token'].max())}",
        "KL of CASA's next word from what it is without an attack, token by token of its unattacked reply.",
    )


def state_heading(study: Study, states: pd.DataFrame) -> Heading:
    """From which depth the state at the token's place makes the prefilled run refuse as the clean one does."""
    rows = states[(states["exchange"] == RESTORED) & (states["label"] == "harmful")]
    half = rows[rows["value"] >= rows["gap"] / 2]
    where = "at no depth" if not len(half) else _where(str(half["site"].iloc[0]))
    gap = float(rows["gap"].iloc[0])
    return Heading(
        f"{study.title}: the clean state in place of the prefill's end brings half of the refusal back {where}",
        f"Under {STATE_LENGTH} prefilled tokens the log-odds of a refusal are {-gap:+.1f} from the clean run's. The "
        "state of the token's own position is the same in both runs and cannot carry the attack; its counterpart's "
        "says what it still does.",
    )


def success_claim(study: Study, tables: PrefillTables) -> Claim:
    """Attack success under the longest prefill, system by system; the test is CASA against SSFT."""
    seed, longest = study.settings.seed, int(tables.replies["length"].max())
    replies = tables.replies[tables.replies["length"] == longest]
    replies = replies.assign(value=(replies["outcome"] == "complied").astype(float))
    harmful = replies[replies["label"] == "harmful"]
    rates = {name: estimate(harmful[harmful["system"] == name], seed, outcomes=True) for name in SYSTEMS}
    answered = replies[replies["label"] == "benign"].groupby("system")["value"].mean()
    complied = harmful.pivot(index=["query_id", *FACTORS], columns="system", values="value")
    factors = _factors(complied.reset_index())
    casa, ssft, base = (complied[name].to_numpy() for name in (CASA, SSFT, PRETRAINED))
    difference = estimate(complied.reset_index().assign(value=casa - ssft), seed, outcomes=True)
    p_values = holm([crossed_test(casa, other, *factors, seed) for other in (ssft, base)])
    return Claim(
        f"{study.title}, this gate: {longest} prefilled tokens succeed against "
        + ", ".join(f"{name} in {rate.value:.0%}" for name, rate in rates.items()),
        f"Attack success under {longest} prefilled tokens in {len(study.data.phrasings)} wordings (benign "
        "counterparts answered): "
        + ", ".join(f"{name} {rate.text('.0%')} ({answered[name]:.0%})" for name, rate in rates.items()) + ".",
        "prefill_by_length", len(complied), *difference,
        f"{TEST}: CASA against SSFT, Holm (against pretrained: p = {p_values[1]:.2g})", p_values[0],
        "on fresh requests and wordings the difference of CASA and SSFT has an interval that holds 0, or another sign",
    )  # fmt: skip


def order_claim(study: Study, tables: PrefillTables) -> Claim:
    """What a prefill does to the gate when it comes first."""
    rows = tables.lengths[(tables.lengths["system"] == CASA) & (tables.lengths["label"] == "harmful")]
    longest = int(rows["length"].max())
    at_longest = rows[rows["length"] == longest]
    before, after = (at_longest[name].to_numpy(dtype=float) for name in ("unsafe_a", "unsafe_b"))
    changes = at_longest.drop(columns="label").assign(value=after - before)
    change = estimate(changes, study.settings.seed, outcomes=True)
    p = crossed_test(after, before, *_factors(at_longest), study.settings.seed)
    spread = float(rows.groupby("query_id")["v_s"].agg(lambda values: values.max() - values.min()).max())
    logits = rows.groupby("length")["logit"].mean()
    return Claim(
        f"{study.title}, this gate: {before.mean():.0%} of harmful requests are flagged before a prefill, "
        f"{after.mean():.0%} after {longest} tokens of one",
        f"{before.mean():.0%} of harmful requests get the unsafe token before a prefill, {after.mean():.0%} when "
        f"{longest} tokens of it come first: the token difference goes from {logits.iloc[0]:.1f} to "
        f"{logits.iloc[-1]:.1f} while v_s, which reads the prompt alone, moves by at most {spread:.2g}.",
        "prefill_by_length", len(at_longest), *change, f"{TEST}: decision after against before", p,
        "on fresh requests the change of the share given the unsafe token lies outside this interval",
    )  # fmt: skip


def axis_claim(study: Study, tables: PrefillTables, system: str = CASA) -> Claim:
    """Whether harmful and benign requests still lie apart after the longest prefill, on that position's own axis."""
    seed = study.settings.seed
    rows = tables.lengths[tables.lengths["system"] == system].assign(value=lambda table: table["projection norm"])
    differences = pair_differences(rows, ["length"])
    lengths = sorted(differences["length"].unique())
    at = {int(length): differences[differences["length"] == length] for length in (lengths[0], lengths[-1])}
    (first, at_first), (last, at_last) = at.items()
    before, after = estimate(at_first, seed), estimate(at_last, seed)
    values, factors = at_last["value"].to_numpy(), _factors(at_last)
    return Claim(
        f"{study.title}, this gate: harmful and benign states lie {before.value:.1f} SD apart after {first} prefilled "
        f"tokens, {after.value:.1f} after {last}",
        f"{system}: after the final norm, on the axis of each position, a harmful request lies {before.text('.1f')} "
        f"standard deviations from its benign counterpart after {first} prefilled tokens and {after.text('.1f')} after "
        f"{last}. The axes are fitted on other requests.",
        "prefill_difference", len(at_last), *after, f"{TEST}: labels of a pair, {last} tokens",
        crossed_test(values, np.zeros_like(values), *factors, seed),
        f"on fresh pairs the difference after {last} tokens has an interval that holds 0",
    )  # fmt: skip


def shallow_claim(study: Study, tables: PrefillTables, system: str = CASA) -> Claim:
    """How much of the KL from the pretrained model, along complying answers, is on the first tokens."""
    seed = study.settings.seed
    of_system = tables.divergence[tables.divergence["system"] == system]
    tokens = int(of_system["position"].max()) + 1
    shares, kinds = {}, {}
    for label, rows in of_system.groupby("label"):
        kl = rows.pivot(index=["query_id", *FACTORS], columns="position", values="kl")
        factors = _factors(kl.reset_index())
        first, whole = kl.iloc[:, :FIRST_TOKENS].to_numpy().sum(axis=1), kl.to_numpy().sum(axis=1)
        shares[label], kinds[label] = crossed_ratio(first, whole, *factors, seed), (kl, factors)
    kl, factors = kinds["harmful"]
    first, later = kl.iloc[:, :FIRST_TOKENS].mean(axis=1), kl.iloc[:, FIRST_TOKENS:].mean(axis=1)
    even, share = FIRST_TOKENS / tokens, shares["harmful"]
    return Claim(
        f"{study.title}, this gate: {share.value:.0%} of its KL from the pretrained model is on the first "
        f"{FIRST_TOKENS} of {tokens} tokens",
        f"{system}, along complying answers to harmful requests: {share.text('.0%')} of the KL from the pretrained "
        f"model is on the first {FIRST_TOKENS} tokens (evenly spread {even:.0%}; benign counterparts "
        f"{shares['benign'].text('.0%')}): {first.mean():.2f} nats a token there, {later.mean():.2f} later.",
        "prefill_divergence", len(kl), *share,
        f"{TEST}: KL a token on the first {FIRST_TOKENS} against the later ones",
        crossed_test(first.to_numpy(), later.to_numpy(), *factors, seed),
        f"on fresh requests and wordings the share's interval holds {even:.0%}",
    )  # fmt: skip


def depth_claim(study: Study, tables: PrefillTables, system: str = CASA) -> Claim:
    """Where the opening's earlier tokens hand over to its last one, on harmful requests: found on one half of them,
    measured and tested on the other."""
    seed = study.settings.seed
    rows = tables.depth[(tables.depth["system"] == system) & (tables.depth["label"] == "harmful")]
    number = {pair: place for place, pair in enumerate(sorted(rows["pair"].unique()))}
    place = rows["pair"].map(number)
    # The shift lets both halves have every wording, of which each pair has the next.
    first = (place + place // len(study.data.phrasings)) % 2 == 0
    # Towards where the whole exchange takes the first half.
    towards = 1.0 if (rows["attacked"] - rows["other"])[first].mean() >= 0 else -1.0
    rows = rows.assign(moved=towards * (rows["attacked"] - rows["patched"]), first=first)
    means = rows[rows["first"]].groupby(["site", "span"], sort=False)["moved"].mean().unstack()
    handed_over = [site for site in means.index if means.loc[site, LAST] > means.loc[site, EARLIER]]
    site = str(handed_over[0]) if handed_over else str(means.index[-1])
    other = rows[~rows["first"] & (rows["site"] == site)]
    moved = other.pivot(index=["query_id", *FACTORS], columns="span", values="moved").reset_index()
    last, earlier = (estimate(moved.assign(value=moved[span]), seed) for span in (LAST, EARLIER))
    difference = estimate(moved.assign(value=moved[LAST] - moved[EARLIER]), seed)
    where = _where(site)
    return Claim(
        f"{study.title}, this gate: {where} a prefill's last token moves the next word {last.value:.1f} nats, earlier "
        f"ones {earlier.value:.1f}",
        f"{system}, {DEPTH_LENGTH} prefilled tokens: {where}, found on one half of the harmful requests, the exchanged "
        f"state of the last token moves the next word of the other half by {last.text()} nats, in the direction of the "
        f"whole opening, those of the earlier tokens by {earlier.text()}. At the input the last token does nothing.",
        "prefill_depth", len(moved), *difference, f"{TEST}: last token against earlier ones",
        crossed_test(moved[LAST], moved[EARLIER], *_factors(moved), seed),
        f"on fresh requests the earlier tokens still move the next word more than the last one {where}",
    )  # fmt: skip


def edge_claim(study: Study, tables: PrefillTables) -> Claim:
    """What cutting the prefill's reading of the safety token does to refusals, against random edges."""
    seed, length = study.settings.seed, max(EDGE_LENGTHS)
    rows = tables.edges[(tables.edges["length"] == length) & (tables.edges["label"] == "harmful")]
    rows = rows.assign(value=rows["after"] - rows["before"])
    names = ["query_id", *FACTORS, "edges"]
    these = rows[rows["draw"] == CUT].set_index(names)["value"]
    random = rows[rows["draw"] != CUT].groupby(names)["value"].mean()
    both = pd.DataFrame({"cut": these, "random": random}).reset_index()
    changes, p_values = {}, []
    for name in EDGES:
        of_set = both[both["edges"] == name]
        excess = estimate(of_set.assign(value=of_set["cut"] - of_set["random"]), seed)
        changes[name] = (estimate(of_set.assign(value=of_set["cut"]), seed), excess)
        p_values.append(crossed_test(of_set["cut"], of_set["random"], *_factors(of_set), seed))
    by_set = "; ".join(
        f"{name}: {change.text('+.2f')}, beyond random edges {excess.text('+.2f')}"
        for name, (change, excess) in changes.items()
    )
    change, excess = changes[TOKEN]
    return Claim(
        f"{study.title}, this gate: hidden from {length} prefilled tokens, the token moves refusal's log-odds "
        f"{change.value:+.1f}",
        f"Harmful requests under {length} prefilled tokens, change of the log-odds of a refusal when edges of "
        f"attention are cut. {by_set}.",
        "prefill_edges", len(both[both["edges"] == TOKEN]), *excess,
        f"{TEST}: cut edges against as many random ones, Holm over three sets ("
        + ", ".join(f"{name}: p = {p:.2g}" for name, p in zip(EDGES[1:], holm(p_values)[1:], strict=True)) + ")",
        holm(p_values)[0],
        "on fresh requests the token's edges change refusals no more than random ones: the interval holds 0",
    )  # fmt: skip


def _factors(rows: pd.DataFrame) -> tuple[list[str], list[str]]:
    return rows["topic"].tolist(), rows["phrasing"].tolist()


def _where(site: str) -> str:
    return "at the input" if site == "embeddings" else f"after block {site}"
