"""Notebook 08: one set of tables for each system, kept in the run folder, and what is drawn of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from casa_mech.defenses import load_defense
from casa_mech.defenses.ssft import SsftSettings
from casa_mech.defenses.training import WORK, train_defense
from casa_mech.draws import Draw
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.identity import digest_of, file_sha256, key_digest
from casa_mech.judging.crossed import crossed_mean
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import mean_difference
from casa_mech.judging.stats import rate_interval
from casa_mech.plan import StudyData
from casa_mech.reports.safety_attention.patch_tables import matched_pairs
from casa_mech.reports.safety_attention.tables import refusals
from casa_mech.study.settings import slug
from casa_mech.study.study import LABELS, Study
from casa_mech.trace.sites import Site
from probes.gate.pairs import MatchedPair
from probes.linear.refusal_direction import opening_ids
from probes.prefill.depth import depth_changes, depth_effects
from probes.prefill.divergence import forced_divergence
from probes.prefill.edges import CUT, edge_effects, state_effects
from probes.prefill.replies import judge_replies, replies_by_length, trajectories
from probes.prefill.sweep import AttackedModel, position_axes, prefill_sweep

SUCCESS = "attack success"
"""Of a benign counterpart: it is answered."""
OPENING = "probability of a refusal's opening"
KL = "KL from the unattacked model, nats"
FLAGGED = "given the unsafe token"
BEFORE, AFTER = "decision before the prefill", "decision after the prefill"
LOG_ODDS = "log-odds of a refusal's opening"
BASE_KL = "KL from the pretrained model, nats"
SSFT = "SSFT"
SYSTEMS = (PRETRAINED, SSFT, CASA)
DIFFERENCE = "harmful - benign"
THESE, RANDOM = "these edges", "random edges"
LENGTHS = (0, 1, 2, 4, 6, 9, 12, 16)
TOKENS = 8
"""Tokens of a reply that are followed."""
DEPTH_LENGTH = 4
"""Tokens of the openings whose states are exchanged."""
EDGE_LENGTHS = (2, 12)
"""Tokens of the prefills whose attention is cut."""
STATE_LENGTH = 12
"""Tokens of the prefill between whose run and the clean one states are exchanged."""


@dataclass(frozen=True)
class PrefillTables:
    """What was measured under prefills, of harmful requests and of their benign counterparts.

    Each table has the columns `label`, `pair` (the harmful request's id) and `phrasing` (of `PHRASINGS`).
    """

    lengths: pd.DataFrame
    """A row a system, query and length (`PrefillSweep.table`)."""
    replies: pd.DataFrame
    """Verdicts, a row a system, query and length (`judge_replies`)."""
    tokens: pd.DataFrame
    """A row a reply and token (`trajectories`), without a prefill, with a middling and with the longest one."""
    depth: pd.DataFrame
    """What exchanged states do (`depth_effects`)."""
    divergence: pd.DataFrame
    """KL of the trained systems from the pretrained one along the complying answers (`forced_divergence`)."""
    edges: pd.DataFrame
    """What cut attention does, under CASA (`edge_effects`)."""
    states: pd.DataFrame
    """What exchanged states at the safety token do, under CASA (`state_effects`)."""


def prefill_tables(study: Study, n: int, lengths: Sequence[int] = LENGTHS) -> PrefillTables:
    """All tables of all systems, over `n` harmful requests at most and as many benign counterparts."""
    by_system = [_tables(study, name, n, lengths) for name in SYSTEMS]

    def joined(field: str) -> pd.DataFrame:
        tables = [getattr(tables, field) for tables in by_system]
        return pd.concat([table for table in tables if len(table)], ignore_index=True)

    return PrefillTables(**{field.name: joined(field.name) for field in fields(PrefillTables)})


def prefill_pairs(study: Study, n: int, draw: Draw = Draw.PREFILL_MEASUREMENT) -> list[MatchedPair]:
    """Up to `n` harmful requests and their benign counterparts, complying answers in all wordings in turn."""
    return phrased(study.data, matched_pairs(study, "plain", n, draw=draw))


def phrased(data: StudyData, pairs: Sequence[MatchedPair]) -> list[MatchedPair]:
    """`pairs` with their answers in each of the plan's wordings in turn, the same for both members of a pair."""
    count = len(data.phrasings)
    return [
        MatchedPair(*(data.in_phrasing(query, number % count) for query in (pair.harmful, pair.benign)))
        for number, pair in enumerate(pairs)
    ]


def _tables(study: Study, name: str, n: int, lengths: Sequence[int]) -> PrefillTables:
    key: dict[str, Any] = {"gate": study.gate_digest(), "n": n, "lengths": list(lengths)}
    key["tokens"] = [study.sizes.max_new_tokens, TOKENS, DEPTH_LENGTH, *EDGE_LENGTHS, STATE_LENGTH]
    key["draws"] = [Draw.PREFILL_MEASUREMENT, Draw.PREFILL_AXES]
    key["phrasings"] = digest_of(study.data.phrasings)
    if name == SSFT:
        key["ssft"] = file_sha256(ssft_folder(study) / "done.json")

    def build(folder: Path) -> None:
        with attacked_model(study, name) as attacked:
            tables = _measured(study, attacked, n, lengths)
        for field in fields(PrefillTables):
            getattr(tables, field.name).to_parquet(folder / f"{field.name}.parquet")

    folder = study.folder.artifact("analysis", f"prefill-{name.lower()}", key, build)
    return PrefillTables(
        **{field.name: pd.read_parquet(folder / f"{field.name}.parquet") for field in fields(PrefillTables)}
    )


def _measured(study: Study, system: AttackedModel, n: int, lengths: Sequence[int]) -> PrefillTables:
    """One system's tables; those that are not of this system are empty."""
    pairs, others = prefill_pairs(study, n), prefill_pairs(study, study.sizes.n_probe, Draw.PREFILL_AXES)
    harmful, benign = [pair.harmful for pair in pairs], [pair.benign for pair in pairs]
    queries = [*harmful, *benign]
    openings = opening_ids(system.omni, refusals(study))
    sites: list[Site] = [system.omni.n_layers // 2, "norm"]
    positions = max(lengths) + TOKENS
    axes = position_axes(system, [p.harmful for p in others], [p.benign for p in others], sites, positions)
    replies = replies_by_length(system, queries, lengths, study.sizes.max_new_tokens)
    followed = [reply for reply in replies if reply.length in (lengths[0], lengths[len(lengths) // 2], lengths[-1])]
    nothing = pd.DataFrame({"query_id": pd.Series(dtype=str)})
    gated, trained = system.casa is not None, system.name != PRETRAINED
    tables = PrefillTables(
        lengths=prefill_sweep(system, queries, lengths, openings.tolist(), sites).table(axes),
        replies=judge_replies(system, replies, study.judge()),
        tokens=trajectories(system, followed, TOKENS, openings.tolist(), axes),
        depth=depth_effects(system, queries, DEPTH_LENGTH, refusals(study)[0]),
        divergence=forced_divergence(system, study.casa().disabled, queries, max(lengths)) if trained else nothing,
        edges=pd.concat(
            [edge_effects(system, queries, length, openings, seed=study.settings.seed) for length in EDGE_LENGTHS],
            ignore_index=True,
        )
        if gated
        else nothing,
        states=state_effects(system, queries, [*benign, *harmful], STATE_LENGTH, openings) if gated else nothing,
    )
    design = pd.DataFrame(
        [
            {"query_id": query.id, "pair": pair.harmful.id, "phrasing": query.meta["phrasing"]}
            for pair in pairs
            for query in (pair.harmful, pair.benign)
        ]
    )
    return PrefillTables(
        **{field.name: getattr(tables, field.name).merge(design, on="query_id") for field in fields(PrefillTables)}
    )


@contextmanager
def attacked_model(study: Study, name: str) -> Iterator[AttackedModel]:
    """One of `SYSTEMS`, for the length of a block."""
    if name == CASA:
        yield AttackedModel(CASA, study.omni(), casa=study.casa())
    elif name == PRETRAINED:
        with study.casa().disabled() as omni:
            yield AttackedModel(PRETRAINED, omni)
    else:
        with load_defense("ssft", study.new_omni(), path=ssft_folder(study)) as defense:
            yield AttackedModel(SSFT, defense.omni, adapter=getattr(defense, "adapter", None))


def ssft_folder(study: Study) -> Path:
    """Supervised fine-tuning on the gate's own examples, steps and seed; trained on the first call, continued if it was
    stopped."""
    training = study.train_settings.model_dump(mode="json")
    key = {
        **study.model_key(),
        "examples": study.sizes.train_examples,
        "train": training,
        "ssft": SsftSettings().model_dump(mode="json"),
    }
    name = f"{slug(study.settings.model)}-ssft"

    def build(folder: Path) -> None:
        work = study.folder.path("defenses", f"training-{name}-{key_digest(key)}")
        if work.exists() and not (work / WORK).is_dir():
            shutil.rmtree(work)  # killed between its end and the copy
        options = {field: value for field, value in study.train_settings.model_dump().items() if field != "seed"}
        seed, examples = study.settings.seed, study.training_examples()
        train_defense("ssft", study.new_omni(), examples, work, seed=seed, progress=study.progress, **options).close()
        shutil.copytree(work, folder, dirs_exist_ok=True)
        shutil.rmtree(work)

    return study.folder.artifact("defenses", name, key, build)


def length_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Every measure by length: `measure, system, label, length, value, low, high, n`.

    Measures: `SUCCESS`, `OPENING`, `KL`, the projections, and `FLAGGED`, whose systems are the gate's two orders.
    Labels: harmful, benign, and `DIFFERENCE`, over pairs.
    """
    return _summary(_by_length(tables), ["measure", "system", "length"], seed)


def token_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Every measure by generated token: `measure, system, label, length, token, value, low, high, n`.

    A token that fewer than five replies reach is left out.
    """
    columns = {OPENING: "opening", KL: "kl", **_projections(tables.tokens)}
    rows = _melted(tables.tokens, columns, ["length", "token"]).dropna(subset="value")
    return _summary(rows, ["measure", "system", "length", "token"], seed, least=5)


def depth_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Changes by exchanged states, by depth (see `depth_changes`)."""
    return depth_changes(tables.depth, seed)


def divergence_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """KL of the trained systems from the pretrained one: `measure, system, label, position, value, low, high, n`."""
    rows = _melted(tables.divergence, {BASE_KL: "kl"}, ["position"])
    return _summary(rows, ["measure", "system", "position"], seed)


def edge_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Changes by cut attention: `measure, length, edges, cut, label, value, low, high, n` and `count`, the mean number
    of edges. `cut`: `THESE`, or `RANDOM`, the mean over draws of as many for each reader."""
    rows = tables.edges.assign(cut=np.where(tables.edges["draw"] == CUT, THESE, RANDOM))
    rows[LOG_ODDS] = rows["after"] - rows["before"]
    rows[OPENING] = expit(rows["after"]) - expit(rows["before"])
    names = ["system", "query_id", "label", "topic", "pair", "phrasing", "length", "edges", "cut"]
    means = rows.groupby(names, sort=False)[[LOG_ODDS, OPENING, "count"]].mean().reset_index()
    counts = means.groupby(["length", "edges"], sort=False)["count"].mean().reset_index()
    columns = {name: name for name in (LOG_ODDS, OPENING)}
    data = _summary(_melted(means, columns, ["length", "edges", "cut"]), ["measure", "length", "edges", "cut"], seed)
    return data.merge(counts, on=["length", "edges"])


def state_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Changes of the log-odds of a refusal by exchanged states: `exchange, site, label, value, low, high, n` and `gap`,
    the mean difference between the donor's run and the one that is patched."""
    rows = tables.states.assign(change=tables.states["patched"] - tables.states["before"])
    rows["gap"] = rows["donor"] - rows["before"]
    gaps = rows.groupby(["exchange", "label"], sort=False)["gap"].mean().reset_index()
    data = _summary(_melted(rows, {LOG_ODDS: "change"}, ["exchange", "site"]), ["exchange", "site"], seed)
    return data[data["label"] != DIFFERENCE].merge(gaps, on=["exchange", "label"])


def pair_differences(rows: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Harmful minus benign `value` of each pair, with the harmful request's topic: `*by, pair, phrasing, topic, value`.

    There is no column `label`. A pair that lacks one of the two is left out. Pairs are clustered by the harmful topic,
    which the design draws; the counterpart's follows from it.
    """
    keys = [*by, "pair", "phrasing"]
    harmful, benign = (rows[rows["label"] == label][[*keys, "topic", "value"]] for label in LABELS)
    both = harmful.merge(benign[[*keys, "value"]], on=keys, suffixes=("", "_benign"), validate="1:1")
    return both.assign(value=both["value"] - both["value_benign"]).drop(columns="value_benign")


def estimate(rows: pd.DataFrame, seed: int, outcomes: bool = False) -> Estimate:
    """Mean of `value` with an interval over topics and wordings.

    `outcomes`: the values are 0 or 1, or differences of such; where they are all alike, there is no spread to draw from
    and the interval is as wide as so many topics leave it.
    """
    values, topics = rows["value"].to_numpy(dtype=float), rows["topic"].tolist()
    if outcomes and (values == values[0]).all():
        if "label" in rows:
            return rate_interval(values.astype(bool), topics, seed)
        return mean_difference(values, np.zeros_like(values), topics, seed, outcomes=True)
    return crossed_mean(values, topics, rows["phrasing"].tolist(), seed)


def _by_length(tables: PrefillTables) -> pd.DataFrame:
    """All that is drawn by length, a row a measure, system, query and length."""
    complied = tables.replies.assign(complied=(tables.replies["outcome"] == "complied").astype(float))
    columns = {OPENING: "opening", KL: "kl", **_projections(tables.lengths)}
    rows = [_melted(complied, {SUCCESS: "complied"}, ["length"]), _melted(tables.lengths, columns, ["length"])]
    gated = tables.lengths[tables.lengths["system"] == CASA]
    for order, column in ((BEFORE, "unsafe_a"), (AFTER, "unsafe_b")):
        decisions = gated.assign(system=order, decided=gated[column].astype(float))
        rows.append(_melted(decisions, {FLAGGED: "decided"}, ["length"]))
    return pd.concat(rows, ignore_index=True)


def _melted(table: pd.DataFrame, columns: dict[str, str], by: Sequence[str]) -> pd.DataFrame:
    """`measure, value` of each measure's column, with the design's columns and `by`."""
    kept = ["system", "query_id", "label", "topic", "pair", "phrasing", *by]
    parts = [table[kept].assign(measure=measure, value=table[name]) for measure, name in columns.items()]
    return pd.concat(parts, ignore_index=True)


def _summary(rows: pd.DataFrame, by: list[str], seed: int, least: int = 1) -> pd.DataFrame:
    """`estimate` of `value` for each label and for the difference within pairs, in groups of at least `least`."""
    summaries = []
    for where, group in rows.groupby(by, sort=False):
        sets = {label: group[group["label"] == label] for label in LABELS} | {DIFFERENCE: pair_differences(group)}
        for label, members in sets.items():
            if len(members) < max(least, 1):
                continue
            value = estimate(members, seed, outcomes=bool(group["value"].isin([0.0, 1.0]).all()))
            keys = dict(zip(by, where, strict=True))
            summaries.append({**keys, "label": label, "n": len(members), **value.widened()._asdict()})
    return pd.DataFrame(summaries)


def _projections(table: pd.DataFrame) -> dict[str, str]:
    """The measures that are projections, and their columns."""
    names = [str(name) for name in table if str(name).startswith("projection")]
    sites = {name: name.removeprefix("projection ") for name in names}
    return {
        f"position's own axis, {'final norm' if site == 'norm' else f'block {site}'} (SD)": name
        for name, site in sites.items()
    }
