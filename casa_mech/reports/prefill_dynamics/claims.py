"""Notebook 08: the tables behind its figures, and its claims with what they stand on."""

from __future__ import annotations

from typing import Any

import pandas as pd

from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import holm, paired_difference, permutation_test
from casa_mech.judging.stats import rate_interval
from casa_mech.reports.claim import Claim, name_of
from casa_mech.reports.prefill_dynamics.tables import DEPTH_LENGTH, SSFT, SYSTEMS, PrefillTables
from casa_mech.study import Study
from probes.prefill.depth import EARLIER, LAST, depth_shares

SUCCESS = "attack success"
OPENING = "probability of a refusal's opening"
KL = "KL from the unattacked model, nats"
FLAGGED = "given the unsafe token"
BEFORE, AFTER = "decision before the prefill", "decision after the prefill"


def length_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Every measure by length: `measure, system, length, value, low, high, n`.

    Measures: `SUCCESS`, `OPENING`, `KL`, the projections, and `FLAGGED`, whose systems are the gate's two orders.
    """
    rows = []
    for (system, length), group in tables.replies.groupby(["system", "length"], sort=False):
        hits, topics = (group["outcome"] == "complied").to_numpy(), group["topic"].tolist()
        rows.append(_row(SUCCESS, system, length, rate_interval(hits, topics, seed), len(group)))
    projections = [name for name in tables.lengths if str(name).startswith("projection")]
    for (system, length), group in tables.lengths.groupby(["system", "length"], sort=False):
        topics = group["topic"].tolist()
        for measure, column in ((OPENING, "opening"), (KL, "kl"), *((_axis(name), name) for name in projections)):
            found = mean_interval(group[column].to_numpy(), topics, seed)
            rows.append(_row(measure, system, length, found, len(group)))
        if system == CASA:
            for order, column in ((BEFORE, "unsafe_a"), (AFTER, "unsafe_b")):
                found = rate_interval(group[column].astype(bool).to_numpy(), topics, seed)
                rows.append(_row(FLAGGED, order, length, found, len(group)))
    return pd.DataFrame(rows)


def token_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Every measure by generated token, without a prefill, with a short and with the longest one: `measure, system,
    length, token, value, low, high, n`. A token that fewer than five replies reach is left out."""
    lengths = sorted(tables.tokens["length"].unique())
    shown = dict.fromkeys([lengths[0], lengths[len(lengths) // 2], lengths[-1]])
    projections = [name for name in tables.tokens if str(name).startswith("projection")]
    columns = {OPENING: "opening", KL: "kl", **{_axis(name): name for name in projections}}
    rows = []
    chosen = tables.tokens[tables.tokens["length"].isin(shown)]
    for (system, length, token), group in chosen.groupby(["system", "length", "token"], sort=False):
        for measure, column in columns.items():
            part = group[group[column].notna()]
            if len(part) >= 5:
                found = mean_interval(part[column].to_numpy(), part["topic"].tolist(), seed)
                rows.append({**_row(measure, system, length, found, len(part)), "token": token})
    return pd.DataFrame(rows)


def depth_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """What `plots.plot_depth` draws (see `depth_shares`)."""
    return depth_shares(tables.depth, seed)


def success_claim(study: Study, tables: PrefillTables) -> Claim:
    """Attack success under the longest prefill, system by system; the test is CASA against SSFT."""
    seed = study.settings.seed
    longest = int(tables.replies["length"].max())
    part = tables.replies[tables.replies["length"] == longest]
    hits = part.assign(hit=part["outcome"] == "complied").pivot(
        index=["query_id", "topic"], columns="system", values="hit"
    )
    topics = list(hits.index.get_level_values("topic"))
    listed = []
    for name in SYSTEMS:
        listed.append(f"{name} {rate_interval(hits[name].astype(bool).to_numpy(), topics, seed).text('.0%')}")
    casa, ssft, base = (hits[name].to_numpy(dtype=float) for name in (CASA, SSFT, PRETRAINED))
    change, p = paired_difference(casa, ssft, topics, seed)
    p_values = holm([p, permutation_test(casa, base, topics, seed)])
    statement = f"{name_of(study)}: attack success under {longest} prefilled tokens: {', '.join(listed)}"
    return Claim(
        statement, "prefill_by_length", len(hits), *change,
        f"permutation over topics, CASA against SSFT, Holm (against pretrained: p = {p_values[1]:.2g})", p_values[0],
        "on fresh requests the difference of CASA and SSFT has an interval that holds 0, or another sign",
    )  # fmt: skip


def order_claim(study: Study, tables: PrefillTables) -> Claim:
    """What a prefill does to the gate when it comes first."""
    seed = study.settings.seed
    table = tables.lengths[tables.lengths["system"] == CASA]
    longest = int(table["length"].max())
    part = table[table["length"] == longest]
    before, after = (part[name].to_numpy(dtype=float) for name in ("unsafe_a", "unsafe_b"))
    topics = part["topic"].tolist()
    change, p = paired_difference(after, before, topics, seed)
    spread = float(table.groupby("query_id")["v_s"].agg(lambda values: values.max() - values.min()).max())
    own = table.groupby("length")["logit"].mean()
    statement = (
        f"{name_of(study)}: {before.mean():.0%} of harmful requests get the unsafe token before a prefill, "
        f"{after.mean():.0%} when {longest} tokens of it come first;\n"
        f"the token difference goes from {own.iloc[0]:.1f} to {own.iloc[-1]:.1f} while v_s, which reads the prompt "
        f"alone, moves by at most {spread:.2g}"
    )
    return Claim(
        statement, "prefill_by_length", len(part), *change,
        "permutation over topics: decision after against before", p,
        "on fresh requests the change of the share given the unsafe token lies outside this interval",
    )  # fmt: skip


def depth_claim(study: Study, tables: PrefillTables, system: str = CASA) -> Claim:
    """Where the opening's earlier tokens hand over to its last one."""
    seed = study.settings.seed
    shares = depth_shares(tables.depth[tables.depth["system"] == system], seed)
    earlier = shares[shares["span"] == EARLIER].set_index("site")["share"]
    handed = [site for site in earlier.index if earlier[site] < 0.5]
    site = str(handed[0]) if handed else str(earlier.index[-1])
    part = tables.depth[(tables.depth["system"] == system) & (tables.depth["site"] == site)]
    moved = part.assign(moved=part["attacked"] - part["patched"]).pivot(
        index=["query_id", "topic"], columns="span", values="moved"
    )
    topics = list(moved.index.get_level_values("topic"))
    found = shares[(shares["site"] == site) & (shares["span"] == LAST)].iloc[0]
    share = Estimate(*(float(found[name]) for name in ("share", "low", "high")))
    late, early = moved[LAST].to_numpy(), moved[EARLIER].to_numpy()
    where = "at the input" if site == "embeddings" else f"after block {site}"
    statement = (
        f"{name_of(study)}, {system}: of what the earlier of {DEPTH_LENGTH} prefilled tokens do to the next "
        f"word ({found['gap']:.1f} nats),\nthe last token's state carries {share.text('.0%')} {where}, and nothing "
        "at the input"
    )
    return Claim(
        statement, "prefill_depth", len(moved), *share,
        "permutation over topics: last token against earlier ones", permutation_test(late, early, topics, seed),
        f"on fresh requests the earlier tokens still carry more than the last one {where}",
    )  # fmt: skip


def depth_title(study: Study) -> str:
    """What is exchanged."""
    return f"{name_of(study)}: through which of {DEPTH_LENGTH} prefilled tokens the opening acts, by depth"


def token_title(study: Study, data: pd.DataFrame) -> str:
    """How long the prefill is felt, under CASA."""
    part = data[(data["system"] == CASA) & (data["measure"] == KL) & (data["length"] == data["length"].max())]
    ends = part.sort_values("token")["value"]
    return (
        f"{name_of(study)}: token by token under a prefill; with the longest, CASA's KL from its unattacked self is "
        f"{ends.iloc[0]:.1f} nats at the first token and {ends.iloc[-1]:.1f} at token {int(part['token'].max())}"
    )


def _row(measure: str, system: Any, length: Any, estimate: Estimate, n: int) -> dict[str, Any]:
    named = {"measure": measure, "system": str(system), "length": int(length), "n": n}
    return {**named, **estimate.widened()._asdict()}


def _axis(column: str) -> str:
    site = column.removeprefix("projection ")
    return f"projection on refusal, {'final norm' if site == 'norm' else f'block {site}'}"
