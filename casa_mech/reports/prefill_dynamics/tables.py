"""Notebook 08: one set of tables for each system, kept in the run folder, and what is drawn of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.defenses import load_defense
from casa_mech.defenses.ssft import SsftSettings
from casa_mech.defenses.training import WORK, train_defense
from casa_mech.draws import Draw
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.identity import file_sha256, key_digest
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import rate_interval
from casa_mech.reports.safety_attention.tables import refusals
from casa_mech.study.manifest import data_hashes
from casa_mech.study.settings import slug
from casa_mech.study.study import LABELS, Study
from casa_mech.trace.sites import Site
from probes.linear.refusal_direction import opening_ids
from probes.prefill.depth import depth_effects, depth_shares
from probes.prefill.replies import judge_replies, replies_by_length, trajectories
from probes.prefill.sweep import AttackedModel, prefill_sweep, refusal_axes

SUCCESS = "attack success"
OPENING = "probability of a refusal's opening"
KL = "KL from the unattacked model, nats"
FLAGGED = "given the unsafe token"
BEFORE, AFTER = "decision before the prefill", "decision after the prefill"
SSFT = "SSFT"
SYSTEMS = (PRETRAINED, SSFT, CASA)
LENGTHS = (0, 1, 2, 3, 4, 6, 9, 12, 16)
TOKENS = 10
"""Tokens of a reply that are followed."""
DEPTH_LENGTH = 4
"""Tokens of the openings whose states are exchanged."""


@dataclass(frozen=True)
class PrefillTables:
    """What was measured under prefills."""

    lengths: pd.DataFrame
    """A row a system, query and length (`PrefillSweep.table`)."""
    replies: pd.DataFrame
    """Verdicts, a row a system, query and length (`judge_replies`)."""
    tokens: pd.DataFrame
    """A row a reply and token (`trajectories`)."""
    depth: pd.DataFrame
    """What exchanged states do (`depth_effects`)."""


def prefill_tables(study: Study, n: int, lengths: Sequence[int] = LENGTHS) -> PrefillTables:
    """All tables of all systems, over `n` harmful requests."""
    by_system = [_tables(study, name, n, lengths) for name in SYSTEMS]
    return PrefillTables(
        **{
            field.name: pd.concat([getattr(tables, field.name) for tables in by_system], ignore_index=True)
            for field in fields(PrefillTables)
        }
    )


def _tables(study: Study, name: str, n: int, lengths: Sequence[int]) -> PrefillTables:
    key: dict[str, Any] = {"gate": study.gate_digest(), "n": n, "lengths": list(lengths)}
    key["tokens"] = study.sizes.max_new_tokens
    key["draws"] = [Draw.PREFILL_MEASUREMENT, Draw.PREFILL_AXES]
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
    """One system's tables."""
    queries = study.queries("plain", "harmful", n, Draw.PREFILL_MEASUREMENT)
    openings = opening_ids(system.omni, refusals(study)).tolist()
    sites: list[Site] = [system.omni.n_layers // 2, "norm"]
    harmful, benign = (study.queries("plain", label, study.sizes.n_probe, Draw.PREFILL_AXES) for label in LABELS)
    axes = refusal_axes(system, harmful, benign, sites)
    sweep = prefill_sweep(system, queries, lengths, openings, sites)
    replies = replies_by_length(system, queries, lengths, study.sizes.max_new_tokens)
    return PrefillTables(
        lengths=sweep.table(axes),
        replies=judge_replies(system, replies, study.judge()),
        tokens=trajectories(system, replies, TOKENS, openings, axes),
        depth=depth_effects(system, queries, DEPTH_LENGTH, refusals(study)[0]),
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
        "model": study.omni().fingerprint(),
        "data": key_digest(data_hashes()),
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
    """Every measure by length: `measure, system, length, value, low, high, n`.

    Measures: `SUCCESS`, `OPENING`, `KL`, the projections, and `FLAGGED`, whose systems are the gate's two orders.
    """
    rows = []
    for (system, length), group in tables.replies.groupby(["system", "length"], sort=False):
        complied, topics = (group["outcome"] == "complied").to_numpy(), group["topic"].tolist()
        rows.append(_row(SUCCESS, system, length, rate_interval(complied, topics, seed), len(group)))
    projections = [name for name in tables.lengths if str(name).startswith("projection")]
    for (system, length), group in tables.lengths.groupby(["system", "length"], sort=False):
        topics = group["topic"].tolist()
        for measure, column in ((OPENING, "opening"), (KL, "kl"), *((_axis(name), name) for name in projections)):
            mean = mean_interval(group[column].to_numpy(), topics, seed)
            rows.append(_row(measure, system, length, mean, len(group)))
        if system == CASA:
            for order, column in ((BEFORE, "unsafe_a"), (AFTER, "unsafe_b")):
                share = rate_interval(group[column].astype(bool).to_numpy(), topics, seed)
                rows.append(_row(FLAGGED, order, length, share, len(group)))
    return pd.DataFrame(rows)


def token_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Every measure by generated token: `measure, system, length, token, value, low, high, n`.

    Without a prefill, with a short and with the longest one. A token that fewer than five replies reach is left out.
    """
    lengths = sorted(tables.tokens["length"].unique())
    shown = dict.fromkeys([lengths[0], lengths[len(lengths) // 2], lengths[-1]])
    projections = [name for name in tables.tokens if str(name).startswith("projection")]
    columns = {OPENING: "opening", KL: "kl", **{_axis(name): name for name in projections}}
    rows = []
    drawn = tables.tokens[tables.tokens["length"].isin(shown)]
    for (system, length, token), group in drawn.groupby(["system", "length", "token"], sort=False):
        for measure, column in columns.items():
            reached = group[group[column].notna()]
            if len(reached) >= 5:
                mean = mean_interval(reached[column].to_numpy(), reached["topic"].tolist(), seed)
                rows.append({**_row(measure, system, length, mean, len(reached)), "token": token})
    return pd.DataFrame(rows)


def depth_data(tables: PrefillTables, seed: int) -> pd.DataFrame:
    """Shares of the openings' difference by depth (see `depth_shares`)."""
    return depth_shares(tables.depth, seed)


def _row(measure: str, system: Any, length: Any, estimate: Estimate, n: int) -> dict[str, Any]:
    named = {"measure": measure, "system": str(system), "length": int(length), "n": n}
    return {**named, **estimate.widened()._asdict()}


def _axis(column: str) -> str:
    site = column.removeprefix("projection ")
    return f"projection on refusal, {'final norm' if site == 'norm' else f'block {site}'}"
