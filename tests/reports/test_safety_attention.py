"""What notebook 07 works with, on a random organism of tiny sizes: it runs, resumes, and says what it did."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from helpers.figures import assert_one_line

from casa_mech.judging.results import RESULT_COLUMNS
from casa_mech.reports.claim import claim_rows
from casa_mech.reports.safety_attention import claims as gate_claims
from casa_mech.reports.safety_attention import plots as gate_plots
from casa_mech.reports.safety_attention import tables as gate_analysis
from casa_mech.study import Study
from probes.gate.positions import position_roles

SIZES = {"n_probe": 6, "train_examples": 16, "train_steps": 2, "train_batch": 8, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def study(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    out = tmp_path_factory.mktemp("runs") / "study"
    return Study.open(out, model=str(random_organism), profile="smoke", device="cpu", progress=False, sizes=SIZES)


@pytest.mark.parametrize("attack", ["plain", "image", "audio"])
def test_matched_pairs_differ_in_the_key_word_alone(study: Study, attack: str) -> None:
    pairs = gate_analysis.matched_pairs(study, attack, 3)
    assert 1 <= len(pairs) <= 3
    omni = study.omni()
    for pair in pairs:
        assert (pair.harmful.label, pair.benign.label) == ("harmful", "benign")
        assert pair.benign.meta["compliance"].count(pair.benign.meta["topic"]) == 2
        assert pair.harmful.meta["topic"] not in pair.benign.meta["compliance"].split()
        one, other = (omni.encode([query]) for query in (pair.harmful, pair.benign))
        assert (position_roles(one) == position_roles(other)).all()
        differing = int((one.inputs["input_ids"] != other.inputs["input_ids"]).sum())
        assert differing == (1 if attack == "plain" else 0)


def test_gate_tables_are_made_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = gate_analysis.v_s_by_attack(study)
    assert len(readings) == 6 * 2 * 6 and readings["v_s"].between(0, 1).all()
    monkeypatch.setattr(gate_analysis, "_readings", None)
    pd.testing.assert_frame_equal(gate_analysis.v_s_by_attack(study), readings)


def test_directions_are_found_or_said_to_be_second_best(study: Study) -> None:
    direction = gate_analysis.refusal_direction(study)
    assert direction.difference.shape == (64,) and not direction.rules_met
    table = gate_analysis.cosines(study)
    assert table["cosine"].abs().max() <= 1 and len(table) == 9
    ablated = gate_analysis.ablation(study, 2)
    assert set(ablated["run"]) == set(gate_analysis.RUNS)
    assert (ablated.groupby(["surface", "run"])["query_id"].count() == [4, 4, 20, 4] * 3).all()


def test_claims_of_the_gate_hold_their_numbers(study: Study) -> None:
    readings = gate_analysis.v_s_by_attack(study)
    effects = gate_analysis.patching(study, 2)
    calibration = gate_analysis.calibration(study, readings)
    claims = [
        gate_claims.patching_claim(study, effects),
        gate_claims.ablation_claim(study, gate_analysis.ablation(study, 2)),
        gate_claims.calibration_claim(study, readings, calibration),
    ]
    for claim in claims:
        assert 0 <= claim.p <= 1 and claim.n > 0 and claim.low <= claim.high and claim.refuted_if
        assert_one_line(claim.title)
    rows = claim_rows(study, claims)
    assert all(tuple(row) == RESULT_COLUMNS or set(row) == set(RESULT_COLUMNS) for row in rows)
    study.save_table("gate", rows)
    summary = gate_analysis.patch_summary(study, effects)
    residual, heads = gate_analysis.residual_rows(summary), gate_analysis.head_rows(summary)
    assert len(heads) == 3 * 4 and set(residual["site"]) == {"embeddings", "0", "1"}
    assert len(gate_plots.plot_patching(residual, *claims[0].heading).axes) == 6
    assert gate_plots.plot_heads(heads, *gate_claims.head_heading(study, heads)).axes
    assert gate_plots.plot_reliability(calibration, *claims[2].heading).axes
    parts = gate_analysis.attribution(study, 2).table()
    assert gate_plots.plot_attribution(parts, *gate_claims.attribution_heading(study, parts)).axes
