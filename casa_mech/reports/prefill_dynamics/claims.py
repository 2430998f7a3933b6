"""Notebook 08: the headings of its figures and its claims, each computed from the table that it stands above."""

from __future__ import annotations

import pandas as pd

from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import holm, paired_difference, permutation_test
from casa_mech.judging.stats import rate_interval
from casa_mech.reports.claim import Claim, Heading
from casa_mech.reports.prefill_dynamics.tables import DEPTH_LENGTH, KL, SSFT, SYSTEMS, PrefillTables
from casa_mech.study import Study
from probes.prefill.depth import EARLIER, LAST, depth_shares


def length_heading(success: Claim, order: Claim) -> Heading:
    """Of the figure by length, which shows what two claims are about."""
    return Heading(success.title, f"{success.statement} {order.statement}")


def token_heading(study: Study, tokens: pd.DataFrame) -> Heading:
    """How long the longest prefill is felt under CASA."""
    rows = tokens[(tokens["system"] == CASA) & (tokens["measure"] == KL)]
    longest = rows[rows["length"] == rows["length"].max()].sort_values("token")
    first, last = longest["value"].iloc[0], longest["value"].iloc[-1]
    return Heading(
        f"{study.name}: {int(longest['length'].max())} prefilled tokens leave CASA {first:.1f} nats from itself at "
        f"first, {last:.1f} at token {int(longest['token'].max())}",
        "KL of CASA's next word from what it is without an attack, token by token of the reply.",
    )


def success_claim(study: Study, tables: PrefillTables) -> Claim:
    """Attack success under the longest prefill, system by system; the test is CASA against SSFT."""
    seed, longest = study.settings.seed, int(tables.replies["length"].max())
    replies = tables.replies[tables.replies["length"] == longest]
    complied = replies.assign(complied=replies["outcome"] == "complied").pivot(
        index=["query_id", "topic"], columns="system", values="complied"
    )
    topics = list(complied.index.get_level_values("topic"))
    rates = {name: rate_interval(complied[name].astype(bool).to_numpy(), topics, seed) for name in SYSTEMS}
    casa, ssft, base = (complied[name].to_numpy(dtype=float) for name in (CASA, SSFT, PRETRAINED))
    difference, p = paired_difference(casa, ssft, topics, seed)
    p_values = holm([p, permutation_test(casa, base, topics, seed)])
    return Claim(
        f"{study.name}: {longest} prefilled tokens succeed against "
        + ", ".join(f"{name} in {rate.value:.0%}" for name, rate in rates.items()),
        f"Attack success under {longest} prefilled tokens: "
        + ", ".join(f"{name} {rate.text('.0%')}" for name, rate in rates.items()) + ".",
        "prefill_by_length", len(complied), *difference,
        f"permutation over topics, CASA against SSFT, Holm (against pretrained: p = {p_values[1]:.2g})", p_values[0],
        "on fresh requests the difference of CASA and SSFT has an interval that holds 0, or another sign",
    )  # fmt: skip


def order_claim(study: Study, tables: PrefillTables) -> Claim:
    """What a prefill does to the gate when it comes first."""
    rows = tables.lengths[tables.lengths["system"] == CASA]
    longest = int(rows["length"].max())
    at_longest = rows[rows["length"] == longest]
    before, after = (at_longest[name].to_numpy(dtype=float) for name in ("unsafe_a", "unsafe_b"))
    change, p = paired_difference(after, before, at_longest["topic"].tolist(), study.settings.seed)
    spread = float(rows.groupby("query_id")["v_s"].agg(lambda values: values.max() - values.min()).max())
    logits = rows.groupby("length")["logit"].mean()
    return Claim(
        f"{study.name}: {before.mean():.0%} of harmful requests get the unsafe token before a prefill, "
        f"{after.mean():.0%} after {longest} tokens of one",
        f"{before.mean():.0%} of harmful requests get the unsafe token before a prefill, {after.mean():.0%} when "
        f"{longest} tokens of it come first: the token difference goes from {logits.iloc[0]:.1f} to "
        f"{logits.iloc[-1]:.1f} while v_s, which reads the prompt alone, moves by at most {spread:.2g}.",
        "prefill_by_length", len(at_longest), *change, "permutation over topics: decision after against before", p,
        "on fresh requests the change of the share given the unsafe token lies outside this interval",
    )  # fmt: skip


def depth_claim(study: Study, tables: PrefillTables, system: str = CASA) -> Claim:
    """Where the opening's earlier tokens hand over to its last one."""
    rows = tables.depth[tables.depth["system"] == system]
    shares = depth_shares(rows, study.settings.seed)
    earlier = shares[shares["span"] == EARLIER].set_index("site")["share"]
    handed_over = [site for site in earlier.index if earlier[site] < 0.5]
    site = str(handed_over[0]) if handed_over else str(earlier.index[-1])
    moved = (
        rows[rows["site"] == site]
        .assign(moved=rows["attacked"] - rows["patched"])
        .pivot(index=["query_id", "topic"], columns="span", values="moved")
    )
    topics = list(moved.index.get_level_values("topic"))
    of_last = shares[(shares["site"] == site) & (shares["span"] == LAST)].iloc[0]
    share = Estimate(*(float(of_last[name]) for name in ("share", "low", "high")))
    where = "at the input" if site == "embeddings" else f"after block {site}"
    return Claim(
        f"{study.name}, {system}: {where} a prefill's last token carries {share.value:.0%} of what the earlier ones do",
        f"Of what the earlier of {DEPTH_LENGTH} prefilled tokens do to the next word ({of_last['gap']:.1f} nats), the "
        f"last token's state carries {share.text('.0%')} {where}, and nothing at the input.",
        "prefill_depth", len(moved), *share, "permutation over topics: last token against earlier ones",
        permutation_test(moved[LAST].to_numpy(), moved[EARLIER].to_numpy(), topics, study.settings.seed),
        f"on fresh requests the earlier tokens still carry more than the last one {where}",
    )  # fmt: skip
