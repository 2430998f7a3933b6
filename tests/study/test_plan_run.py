"""The whole suite on a plan of one's own and a text-only model: notebooks fill, or say in a line what they lack."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from helpers.families import save_family
from helpers.plans import write_plan

from casa_mech.plan.records import PREFILLS, REFUSALS
from casa_mech.study.manifest import Manifest
from casa_mech.study.runner import run_study
from casa_mech.study.settings import settings_of

TEXT_FIGURES = {
    "ablations", "attack_benchmarks", "attack_success", "attention_shares", "benign_sets", "casa_training",
    "defence_grid", "gate_before_after", "gate_patching", "harm_and_refusal", "lens_depth", "prefill_by_length",
    "probe_auroc_by_layer", "probe_kinds", "token_audit", "white_box_steps",
}  # fmt: skip
"""Some of each notebook's figures."""
MEDIA_FIGURES = {"transfer_matrix", "probe_thresholds", "gate_moved_states", "white_box_budget", "coca_alpha"}
"""Figures of other surfaces than text, and of rows that need more than the plan gives."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    plan = write_plan(folder)
    tables = [pd.read_csv(path)["prompt"].tolist() for path in folder.glob("*.csv")]
    texts = [*PREFILLS, *REFUSALS, *(text for table in tables for text in table * 5)]
    (folder / "model").mkdir()
    save_family("llama", folder / "model", texts)
    settings = settings_of(model=str(folder / "model"), plan=str(plan), profile="smoke")
    return run_study(settings, folder / "run", jobs=2)


def test_every_notebook_runs_on_text_alone(run: Path) -> None:
    figures = {path.stem for path in (run / "figures").glob("*.png")}
    assert figures >= TEXT_FIGURES and not figures & MEDIA_FIGURES
    left_out = {path.stem: path.read_text() for path in (run / "left-out").iterdir()}
    assert left_out == {"other-surfaces": "plan small shows model text alone\n"}
    manifest = Manifest.read(run / "manifest.json")
    assert manifest.settings["plan"].endswith("plan.yaml") and manifest.settings["sizes"]["n_eval"] == 6


def test_what_is_left_out_stands_in_the_notebook(run: Path) -> None:
    content = nbformat.read(run / "notebooks" / "01_separability.ipynb", as_version=4)
    shown = [str(output) for cell in content.cells for output in cell.get("outputs", ())]
    assert sum("plan small shows model text alone" in text for text in shown) == 4


def test_claims_name_the_plan_and_tables_its_columns(run: Path) -> None:
    content = nbformat.read(run / "notebooks" / "03_attack_success.ipynb", as_version=4)
    assert "model on plan small: CASA" in str(content.cells[-1].outputs)
    table = pd.read_parquet(run / "tables" / "attack_success.parquet")
    assert set(table["attack"]) == {"Own", "Own, prefill-4"}
    sets = pd.read_csv(run / "figures" / "benign_sets.csv")
    assert set(sets["benign_set"]) == {"Requests", "Questions"} and set(sets["n"]) == {24}
    assert sets["value"].between(0, 1).all() and (sets["low"] <= sets["high"]).all()
