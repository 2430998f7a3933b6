"""`casa-mech evaluate`: a researcher's own files through the model and its gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa_mech.errors import InputError, RunError
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.queries import Query
from casa_mech.queries.files import QuerySource, read_source
from casa_mech.study.evaluate import check_media, evaluate, save_evaluation
from casa_mech.study.threads import settle_threads

if TYPE_CHECKING:
    from casa_mech.casa import Casa

NONE = "-"
_RESULTS = {"replies.parquet", "replies.csv", "results.parquet", "results.csv"}


@dataclass(frozen=True)
class SystemUnderTest:
    """The system under test. model, device, dtype: as for `load_omni`. gate: folder of a trained gate, or None."""

    model: str = "organism"
    gate: Path | None = None
    device: str = "auto"
    dtype: str = "auto"


def query_sources(
    paths: Sequence[Path],
    labels: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    text: str | None = None,
    limit: int | None = None,
) -> list[QuerySource]:
    """The sources that the command line's repeated options describe.

    Each option is given once for all, or once each in the order of the paths; `-` stands for none. Column options may
    leave out the paths that are no tables.

    Raises:
        InputError: another number of values, or a label that is neither harmful nor benign.
    """
    tables = [path for path in paths if QuerySource(path=path).is_table]
    fields: list[dict[str, Any]] = [{"path": path, "text": text, "limit": limit} for path in paths]
    for name, values in {"label": labels, **columns}.items():
        within = tables if name != "label" and len(values) not in (1, len(paths)) else list(paths)
        for path, value in _spread(name, values, within).items():
            fields[paths.index(path)][name] = None if value == NONE else value
    for entry in fields:
        if entry.get("label") not in (None, "harmful", "benign"):
            raise InputError(f"--label {entry['label']}: use harmful, benign or {NONE}")
        if entry["path"] not in tables:
            entry |= dict.fromkeys(columns)
    return [QuerySource(**entry) for entry in fields]


def evaluate_files(
    sources: Sequence[QuerySource],
    system: SystemUnderTest,
    *,
    settings: GenerationSettings,
    attack: str = "none",
    out: Path | None = None,
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Read, answer, judge and write; every row gets a reply, and with a gate a safety token and a v_s.

    Args:
        sources: what to read; all are checked before the model is loaded.
        system: the model and its gate.
        settings: how replies are generated.
        attack: its name in the tables.
        out: folder for the tables; None: nothing is written.
        note: told the warnings, one line each.

    Returns:
        What was evaluated, the share of unknown words, the rates, and where the tables are.

    Raises:
        InputError: a source or a row that cannot be used. RunError: `out` cannot be written or holds other files.
    """
    readings = [read_source(source) for source in sources]
    for reading in readings:
        if reading.dropped:
            note(f"{reading.name}: left out {len(reading.dropped)} rows that mention minors in a harmful setting")
    queries = [_named(query, attack) for reading in readings for query in reading.queries]
    if out is not None:
        check_target(out)
    check_media(queries)
    omni = settle_threads(load_omni(system.model, device=system.device, dtype=system.dtype))
    unknown = omni.unknown_share([query.text for query in queries if query.text])
    if unknown > 0:
        note(
            f"warning: {unknown:.0%} of the words are unknown to {system.model}, which speaks a micro-world's English "
            "only: replies, v_s and rates say nothing about these files beyond that they can be run"
        )
    found = evaluate(omni, _load_gate(system.gate, omni), queries, settings=settings, seed=settings.seed, progress=True)
    if out is not None:
        save_evaluation(found, out)
    table = found.replies
    by_source = table.groupby(["source", "label", "surface"], sort=False).agg(
        n=("reply", "size"), flagged=("safety_token", lambda tokens: float((tokens == "unsafe").mean())),
        mean_v_s=("v_s", "mean"), refused=("outcome", lambda outcome: float((outcome == "refused").mean())),
    )  # fmt: skip
    shown = ("label", "surface", "metric", "n", "value", "low", "high")
    rates = [{name: row[name] for name in shown} for row in found.rows]
    return {
        "model": system.model,
        "gate": str(system.gate) if system.gate else None,
        "queries": len(table),
        "dropped_minors": sum(len(reading.dropped) for reading in readings),
        "unknown_words": round(unknown, 4),
        "judge": str(table["judge"].iloc[0]),
        "out": str(out) if out else None,
        "sources": by_source.reset_index().to_dict("records"),
        "results": rates,
    }


def check_target(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier evaluation.

    Raises:
        RunError: the folder holds other files, or is a file.
    """
    if out.exists() and (not out.is_dir() or {entry.name for entry in out.iterdir()} - _RESULTS):
        raise RunError(f"{out} holds other files than an evaluation's: choose a new or empty folder with --out")


def _named(query: Query, attack: str) -> Query:
    return query.model_copy(update={"meta": {**query.meta, "attack": attack}})


def _load_gate(gate: Path | None, omni: Omni) -> Casa | None:
    if gate is None:
        return None
    from casa_mech.casa import Casa

    return Casa.from_pretrained(gate, omni)


def _spread(name: str, values: Sequence[str], paths: Sequence[Path]) -> dict[Path, str]:
    if len(values) == 1:
        return dict.fromkeys(paths, values[0])
    if values and len(values) != len(paths):
        option = "--" + name.replace("_", "-")
        raise InputError(
            f"{option} is given {len(values)} times for {len(paths)} files: give it once, or once for each --queries "
            f"in their order ({NONE} for none)"
        )
    return dict(zip(paths, values, strict=False))
