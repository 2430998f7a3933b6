"""`casa-mech evaluate`: a researcher's own files and public sets through the model and its gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from casa_mech.defenses import load_defense
from casa_mech.evaluation.evaluate import (
    CASA,
    PARTS,
    PRETRAINED,
    VERDICTS,
    Evaluation,
    evaluate,
    save_evaluation,
)
from casa_mech.evaluation.sources import NO_ATTACK, both_labels, under_attack
from casa_mech.files import check_folder
from casa_mech.identity import file_sha256
from casa_mech.judging import MicroWorldJudge
from casa_mech.judging.http_api import requests_of
from casa_mech.omni import GenerationSettings, load_omni
from casa_mech.queries import LoadedQueries, Query
from casa_mech.queries.media import check_media

if TYPE_CHECKING:
    from casa_mech.judging import Judge

_TABLES = {f"{name}.{suffix}" for name in ("replies", "verdicts", "results") for suffix in ("parquet", "csv")}
_STUDY_NAMES = {"none": PRETRAINED, "casa": CASA}
"""Names in the tables where no defence was asked for by name: those of the study's."""
_RESULTS = {*_TABLES, PARTS, VERDICTS}


@dataclass(frozen=True)
class SystemUnderTest:
    """A model with its defence, as the command line names them."""

    model: str = "organism"
    """As for `load_omni`, like `device` and `dtype`."""
    gate: Path | None = None
    """Folder of a trained gate or other defence, or None."""
    device: str = "auto"
    dtype: str = "auto"
    defense: str | None = None
    """The defence's name; None: what the folder holds, or none."""
    safety_prompt: bool = False
    """As for `load_defense`, like `options`."""
    options: Mapping[str, Any] = field(default_factory=dict)


def evaluate_files(
    loaded: Sequence[LoadedQueries],
    system: SystemUnderTest,
    *,
    settings: GenerationSettings,
    attack: str = NO_ATTACK,
    out: Path | None = None,
    judge: Judge | None = None,
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Answer, judge and write; every row gets a reply, and with a gate a safety token and a v_s.

    Args:
        loaded: the queries of each source (`load_sources`); their media are checked before the model is loaded.
        system: the model and its gate.
        settings: how replies are generated.
        attack: its name in the tables.
        out: folder for the tables; replies and verdicts are kept there while the run is on, and the same call after a
            stop goes on from them. None: nothing is written.
        judge: default `judge_for` the queries.
        note: gets the warnings, one line each.

    Returns:
        What was evaluated, the share of unknown words, the rates, and where the tables are.

    Raises:
        InputError: media, a defence or an option that cannot be used. RunError: `out` cannot be written or holds other
            files, or the judge is down; what was finished is kept in `out`.
    """
    tested = _defense_name(system)
    queries = _checked(loaded, attack, out, judge, note)
    omni = load_omni(system.model, device=system.device, dtype=system.dtype)
    unknown = omni.unknown_share([query.text for query in queries if query.text])
    if unknown > 0 and omni.speaks_micro_world:
        note(
            f"warning: {unknown:.0%} of the words are unknown to {system.model}, which speaks a micro-world's English "
            "only: replies, v_s and rates say nothing about these files beyond that they can be run"
        )
    chosen = {"safety_prompt": system.safety_prompt, "path": system.gate, **system.options}
    with load_defense(tested, omni, **chosen) as defense:
        name = None if system.defense or system.safety_prompt else _STUDY_NAMES.get(tested)
        evaluation = evaluate(
            omni, defense, queries, judge, defense=name, settings=settings, seed=settings.seed, progress=True,
            store=out, identity=_identity(tested, system),
        )  # fmt: skip
    if out is not None:
        save_evaluation(evaluation, out)
    return {
        "model": system.model,
        "gate": str(system.gate) if system.gate else None,
        "queries": len(queries),
        "dropped_minors": sum(len(source.dropped) for source in loaded),
        "unknown_words": round(unknown, 4),
        "out": str(out) if out else None,
        **_summary(evaluation),
        **(requests_of(judge) if judge else {}),
    }


def _checked(
    loaded: Sequence[LoadedQueries], attack: str, out: Path | None, judge: Judge | None, note: Callable[[str], None]
) -> list[Query]:
    """All queries, under the attack's name; whatever can be found wrong before the model is loaded is."""
    for source in loaded:
        if source.dropped:
            note(f"{source.name}: left out {len(source.dropped)} rows that mention minors in a harmful setting")
    queries = [under_attack(query, attack) for source in loaded for query in source.queries]
    if pairs := both_labels(queries):
        first, second = pairs[0]
        note(
            f"warning: {len(pairs)} prompts are there as harmful and as benign, first {first} and {second}: check the "
            "labels"
        )
    if out is not None:
        check_folder(out, _RESULTS)
    check_media(queries)
    if isinstance(judge, MicroWorldJudge):
        for query in queries:
            judge.judge(query, "")  # one that it cannot read is said now, not after hours of generation
    return queries


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    """Defence, judge, and the rates by source and in all."""
    replies = evaluation.replies
    by_source = replies.groupby(["source", "label", "surface"], sort=False).agg(
        n=("reply", "size"), flagged=("safety_token", _unsafe_share), mean_v_s=("v_s", "mean"),
        refused=("outcome", lambda outcomes: float((outcomes == "refused").mean())),
        undecided=("outcome", lambda outcomes: int((outcomes == "undecided").sum())),
    )  # fmt: skip
    shown = ("label", "surface", "metric", "n", "value", "low", "high")
    rates = [{name: row[name] for name in shown} for row in evaluation.rows]
    named = {name: str(replies[name].iloc[0]) for name in ("defense", "judge")}
    return {**named, "sources": by_source.reset_index().to_dict("records"), "results": rates}


def _unsafe_share(tokens: pd.Series) -> float:
    """The share of unsafe tokens; NaN where a system gives none."""
    return float((tokens == "unsafe").mean()) if tokens.notna().any() else float("nan")


def _defense_name(system: SystemUnderTest) -> str:
    """The defence to test, checked as far as that goes without the model."""
    from casa_mech.defenses.registry import check_defense
    from casa_mech.defenses.trained import saved_as

    name = system.defense or (saved_as(system.gate) if system.gate else "none")
    check_defense(name, system.gate, system.options)
    return name


def _identity(tested: str, system: SystemUnderTest) -> dict[str, Any]:
    """The options and files that the defence's replies depend on, for the replies that are kept."""
    files = sorted(path for path in system.gate.rglob("*") if path.is_file()) if system.gate else []
    return {
        "defense": tested,
        "safety_prompt": system.safety_prompt,
        "options": json.loads(json.dumps(dict(system.options), default=str, sort_keys=True)),
        "files": [[path.name, file_sha256(path)] for path in files],
    }
