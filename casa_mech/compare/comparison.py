"""`Comparison`: a filled grid with the tables made from it, and how it is kept for others to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from casa_mech.compare.ablations import Variant, ablation_frame
from casa_mech.compare.grid import GridResult
from casa_mech.compare.paired import paired_tests
from casa_mech.compare.tables import grid_rows, summarise
from casa_mech.errors import RunError
from casa_mech.files import write_text, writing
from casa_mech.judging.results import read_table, write_table

_SCHEMA = 1
_REPLY = ["model", "attack", "surface", "label", "split", "seed", "query_id", "cluster"]
"""What tells one query of a grid from another."""


@dataclass(frozen=True)
class Comparison:
    """A filled grid with its tables."""

    model: str
    """The model's name."""
    fingerprint: str
    """Digest of its weights (`Omni.fingerprint`)."""
    replies: pd.DataFrame
    """Every reply (`GridResult.replies`); of a comparison that was read its outcome alone, with `_REPLY`, `defense` and
    `gate_seed`."""
    rows: pd.DataFrame
    """Every rate in the result schema (`tables.grid_rows`)."""
    summary: pd.DataFrame
    """The grid over seeds (`tables.summarise`); of the second grid with axis and level (`ablations.ablation_frame`)."""
    tests: pd.DataFrame
    """Every row against CASA (`paired.paired_tests`)."""
    curves: pd.DataFrame
    """What CoCA's alpha was chosen on (`tuning.CURVE_COLUMNS`)."""

    @classmethod
    def of(cls, model: str, fingerprint: str, result: GridResult, variants: Sequence[Variant] = ()) -> Comparison:
        """The tables of a filled grid; `variants` are those of the second grid."""
        summary = summarise(result)
        if variants:
            summary = ablation_frame(summary, variants)
        tests = paired_tests(result.replies)
        return cls(model, fingerprint, result.replies, grid_rows(result), summary, tests, result.curves)

    @property
    def ablated(self) -> bool:
        """True for the second grid."""
        return "axis" in self.summary


def write_comparison(comparison: Comparison, folder: Path, name: str) -> None:
    """Write the tables into `folder` under a name: `NAME-summary.csv` and so on, and the outcome of every reply, a
    column a defence, in `NAME-outcomes.parquet`.

    Raises:
        RunError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("summary", "tests", "curves"):
        with writing(folder / f"{name}-{kind}.csv") as temporary:
            getattr(comparison, kind).to_csv(temporary, index=False)
    write_table(comparison.rows, folder / f"{name}-results.parquet")
    outcomes = comparison.replies.pivot(index=_REPLY, columns="defense", values="outcome")
    outcomes = outcomes[list(dict.fromkeys(comparison.replies["defense"]))].astype("category").reset_index()
    with writing(folder / f"{name}-outcomes.parquet") as temporary:
        outcomes.to_parquet(temporary, compression="zstd", index=False)
    head = {"schema_version": _SCHEMA, "model": comparison.model, "fingerprint": comparison.fingerprint}
    write_text(folder / f"{name}.json", json.dumps(head, indent=2) + "\n")


def read_comparison(folder: Path, name: str, fingerprint: str) -> Comparison | None:
    """The comparison that `write_comparison` wrote, of the model with this fingerprint; None where there is none, or
    one of other weights.

    Raises:
        RunError: some of its files are missing or cannot be read.
    """
    head = folder / f"{name}.json"
    if not head.is_file():
        return None
    try:
        facts = json.loads(head.read_text(encoding="utf-8"))
        if facts["schema_version"] != _SCHEMA or facts["fingerprint"] != fingerprint:
            return None
        summary, tests, curves = (pd.read_csv(folder / f"{name}-{kind}.csv") for kind in ("summary", "tests", "curves"))
        rows = read_table(folder / f"{name}-results.parquet")
        outcomes = pd.read_parquet(folder / f"{name}-outcomes.parquet")
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{head} has no complete tables beside it ({error}): copy them all, or delete it") from None
    outcomes = outcomes.rename_axis(columns=None)
    replies = outcomes.melt(id_vars=_REPLY, var_name="defense", value_name="outcome").dropna(subset=["outcome"])
    size = summary[summary["metric"] == "trained_parameters"].drop_duplicates("defense").set_index("defense")["value"]
    trained = replies["defense"].map(size).fillna(0) > 0
    replies = replies.assign(outcome=replies["outcome"].astype(str), gate_seed=replies["seed"].where(trained, 0))
    return Comparison(facts["model"], fingerprint, replies.reset_index(drop=True), rows, summary, tests, curves)
