"""Notebooks 05 and 06: which grid they read, what is seen beside held out, what a defence changes at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from casa_mech.compare.comparison import Comparison, write_comparison
from casa_mech.reports.defences import tables
from casa_mech.reports.topics import topic_table
from casa_mech.study import Study
from casa_mech.study.settings import settings_of


def comparison(fingerprint: str, seeds: int = 1, ablated: bool = False) -> Comparison:
    """Four replies of two systems under each seed; `safecode` changes one of the harmful ones."""
    rows = [
        {"model": "organism", "defense": defense, "attack": "plain", "surface": "text", "label": label,
         "split": "seen" if i else "held_out", "seed": seed, "gate_seed": 0, "query_id": f"{label}{i}",
         "cluster": f"t{i}", "outcome": "refused" if (defense, label, i) == ("safecode", "harmful", 1) else "complied"}
        for seed in range(seeds) for defense in ("none", "safecode") for label in ("harmful", "benign")
        for i in range(2)
    ]  # fmt: skip
    summary = pd.DataFrame([{"metric": "trained_parameters", "defense": "none", "value": 0.0}])
    if ablated:
        summary = summary.assign(axis="form", level="mean", base=True)
    empty = pd.DataFrame(columns=["p"])
    return Comparison("organism", fingerprint, pd.DataFrame(rows), result_rows(), summary, empty, empty)


def result_rows() -> pd.DataFrame:
    row = {"model": "organism", "defense": "none", "attack": "plain", "surface": "text", "label": "harmful",
           "metric": "attack_success", "seed": 0, "n": 2, "value": 1.0, "low": 0.5, "high": 1.0}  # fmt: skip
    return pd.DataFrame([row])


def test_the_default_profile_reads_the_grid_of_these_weights(tmp_path: Path) -> None:
    study = Study.open(tmp_path / "run", **settings_of(profile="default").identity)
    write_comparison(comparison(study.omni().fingerprint(), seeds=5), tmp_path / "own", "compare-organism")
    write_comparison(comparison("of another build"), tmp_path / "stale", "compare-organism")
    grid = tables.committed_grid(study, "compare", str(tmp_path / "own"))
    assert grid is not None and grid.replies["seed"].nunique() == 5
    assert tables.grid_note(grid) == "organism: 2 requests a cell, trainings and draws of 5 seeds."
    assert tables.committed_grid(study, "compare", str(tmp_path / "stale")) is None
    assert tables.committed_grid(study, "ablations", str(tmp_path / "own")) is None
    assert tables.committed_grid(study, "compare", str(tmp_path / "own"), n=20) is None
    smoke = Study.open(tmp_path / "smoke", **settings_of(profile="smoke").identity)
    assert tables.committed_grid(smoke, "compare", str(tmp_path / "own")) is None


def test_a_grid_of_one_seed_says_so() -> None:
    note = tables.grid_note(comparison("x"))
    assert "draws of 1 seed. Too few" in note and "casa-mech compare makes" in note
    assert "casa-mech compare --ablations makes" in tables.grid_note(comparison("x", ablated=True))


def test_what_a_defence_changes_is_counted_against_the_model_itself() -> None:
    found = tables.changed_outcomes(comparison("x", seeds=3), ["safecode", "safecode-code"])
    assert found.to_dict("records") == [
        {"defense": "safecode", "label": "harmful", "changed": 3, "n": 6},
        {"defense": "safecode", "label": "benign", "changed": 0, "n": 6},
    ]


def test_the_studys_gate_stands_for_casa_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of CASA with a training of its own is trained, not taken from the study."""
    study = Study.open(tmp_path / "run", **settings_of(profile="default").identity)
    monkeypatch.setattr(Study, "casa", lambda self: None)
    paths: dict[str, Any] = {}

    def noted(study: Study, systems: Any, *_: Any) -> None:
        paths.update({system.label: system.path for system in systems})

    monkeypatch.setattr(tables, "filled_grid", noted)
    tables.defense_grid(study, n=20)
    assert paths["casa"] and paths["casa + safety prompt"] == paths["casa"]
    assert {paths[name] for name in ("casa-scale", "casa-scale-replace", "coca", "ssft")} == {None}


def test_seen_topics_stand_beside_held_out_ones() -> None:
    def row(attack: str, metric: str, value: float, defense: str = "CASA") -> dict[str, Any]:
        return {"model": "m", "defense": defense, "attack": attack, "metric": metric, "n": 50, "value": value,
                "low": value - 0.01, "high": value + 0.01}  # fmt: skip

    results = pd.DataFrame(
        [
            row("plain", "attack_success", 0.5), row("plain", "attack_success:held_out", 0.12),
            row("plain", "attack_success:seen", 0.02), row("image", "attack_success:seen", 0.3),
            row("plain", "over_refusal:seen", 0.9), row("plain", "attack_success:seen", 0.8, "pretrained"),
        ]
    )  # fmt: skip
    table = topic_table(results, "attack", ("model", "defense"))
    assert list(table.index) == ["plain", "image"]
    assert list(table.columns) == [
        ("m", "CASA", "seen topics"), ("m", "CASA", "held-out topics"), ("m", "pretrained", "seen topics"),
    ]  # fmt: skip
    assert table.loc["plain"].tolist() == [
        "2.0 [1.0, 3.0] n=50", "12.0 [11.0, 13.0] n=50", "80.0 [79.0, 81.0] n=50",
    ]  # fmt: skip
    assert table.loc["image"].tolist()[1:] == ["–", "–"]
    assert topic_table(results[results["defense"] == "CASA"], "defense", "attack").shape == (1, 3)
