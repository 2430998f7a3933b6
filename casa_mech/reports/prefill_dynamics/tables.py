"""What the notebook on prefills works with: one set of tables for each system, kept in the run folder."""

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
from casa_mech.queries import Query
from casa_mech.reports.safety_attention.tables import refusals
from casa_mech.study import Study
from casa_mech.study.manifest import data_hashes
from casa_mech.study.settings import slug
from casa_mech.trace.sites import Site
from probes.linear.refusal_direction import opening_ids
from probes.prefill.depth import depth_effects
from probes.prefill.replies import judge_replies, replies_by_length, trajectories
from probes.prefill.sweep import AttackedModel, prefill_sweep, refusal_axes

SSFT = "SSFT"
SYSTEMS = (PRETRAINED, SSFT, CASA)
LENGTHS = (0, 1, 2, 3, 4, 6, 9, 12, 16)
TOKENS = 10
"""Tokens of a reply that are followed."""
DEPTH_LENGTH = 4
"""Tokens of the openings whose states are exchanged."""


@dataclass(frozen=True)
class PrefillTables:
    """lengths: a row a system, query and length (`PrefillSweep.table`). replies: verdicts (`judge_replies`). tokens: a
    row a reply and token (`trajectories`). depth: exchanged states (`depth_effects`)."""

    lengths: pd.DataFrame
    replies: pd.DataFrame
    tokens: pd.DataFrame
    depth: pd.DataFrame


def prefill_tables(study: Study, n: int, lengths: Sequence[int] = LENGTHS) -> PrefillTables:
    """All tables of all systems, over `n` harmful requests."""
    parts = [_tables(study, name, n, lengths) for name in SYSTEMS]
    return PrefillTables(
        **{
            field.name: pd.concat([getattr(part, field.name) for part in parts], ignore_index=True)
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
        with system(study, name) as chosen:
            tables = _measured(study, chosen, n, lengths)
        for field in fields(PrefillTables):
            getattr(tables, field.name).to_parquet(folder / f"{field.name}.parquet")

    folder = study.folder.artifact("analysis", f"prefill-{name.lower()}", key, build)
    return PrefillTables(
        **{field.name: pd.read_parquet(folder / f"{field.name}.parquet") for field in fields(PrefillTables)}
    )


def _measured(study: Study, chosen: AttackedModel, n: int, lengths: Sequence[int]) -> PrefillTables:
    """One system's tables."""
    queries = study.queries("plain", "harmful", n, Draw.PREFILL_MEASUREMENT)
    openings = opening_ids(chosen.omni, refusals(study)).tolist()
    sites: list[Site] = [chosen.omni.n_layers // 2, "norm"]
    fit: list[list[Query]] = [
        study.queries("plain", "harmful", study.sizes.n_probe, Draw.PREFILL_AXES),
        study.queries("plain", "benign", study.sizes.n_probe, Draw.PREFILL_AXES),
    ]
    axes = refusal_axes(chosen, fit[0], fit[1], sites)
    sweep = prefill_sweep(chosen, queries, lengths, openings, sites)
    attacked = replies_by_length(chosen, queries, lengths, study.sizes.max_new_tokens)
    return PrefillTables(
        lengths=sweep.table(axes),
        replies=judge_replies(chosen, attacked, study.judge()),
        tokens=trajectories(chosen, attacked, TOKENS, openings, axes),
        depth=depth_effects(chosen, queries, DEPTH_LENGTH, refusals(study)[0]),
    )


@contextmanager
def system(study: Study, name: str) -> Iterator[AttackedModel]:
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
