"""What notebooks 07 and 08 work with, on a random organism of tiny sizes: it runs, resumes, and says what it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.figures import assert_one_line
from scipy import stats

from casa_mech.judging.results import RESULT_COLUMNS
from casa_mech.reports.claim import claim_rows
from casa_mech.reports.prefill_dynamics import claims as prefill_claims
from casa_mech.reports.prefill_dynamics import plots as prefill_plots
from casa_mech.reports.prefill_dynamics import tables as prefill_analysis
from casa_mech.reports.safety_attention import claims as gate_claims
from casa_mech.reports.safety_attention import plots as gate_plots
from casa_mech.reports.safety_attention import tables as gate_analysis
from casa_mech.study import Study
from probes.gate.patching import INSERT
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
    assert len(table) == 9
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
        assert claim.refuted_if
        assert_one_line(claim.title)
    rows = claim_rows(study, claims)
    assert [(row["metric"], row["n"], row["value"]) for row in rows] == [
        (claim.figure, claim.n, claim.value) for claim in claims
    ]
    assert {frozenset(row) for row in rows} == {frozenset(RESULT_COLUMNS)}
    study.save_table("gate", rows)
    summary = gate_analysis.patch_summary(study, effects)
    residual, heads = gate_analysis.residual_rows(summary), gate_analysis.head_rows(summary)
    assert len(heads) == 3 * 4 and set(residual["site"]) == {"embeddings", "0", "1"}
    assert len(gate_plots.plot_patching(residual, *claims[0].heading).axes) == 6
    assert gate_plots.plot_heads(heads, *gate_claims.head_heading(study, heads)).axes
    assert gate_plots.plot_reliability(calibration, *claims[2].heading).axes
    parts = gate_analysis.attribution(study, 2).table()
    assert gate_plots.plot_attribution(parts, *gate_claims.attribution_heading(study, parts)).axes


def patched(study: Study, deltas: dict[str, np.ndarray]) -> pd.DataFrame:
    """Effects after the last block on text, a pair a topic: for each span by how much it moves v_s from 0.1."""
    where = {"direction": INSERT, "site": str(study.omni().n_layers - 1), "head": -1, "surface": "text"}
    return pd.DataFrame(
        {**where, "span": span, "pair": f"p{number}", "topic": f"t{number:02d}", "v_s": 0.1, "v_s_donor": 0.9,
         "v_s_patched": 0.1 + delta}
        for span, values in deltas.items() for number, delta in enumerate(values)
    )  # fmt: skip


def test_the_span_through_which_harm_passes_is_measured_where_it_was_not_chosen(study: Study) -> None:
    """Of twenty topics ten choose; on the others the word moves v_s by 0.5, the header by 0.2: exact p = 2 / 2**10."""
    effects = patched(study, {"the word": np.full(20, 0.5), "the header": np.full(20, 0.2), "system": np.zeros(20)})
    claim = gate_claims.patching_claim(study, effects)
    assert (claim.n, claim.value, claim.p) == (10, pytest.approx(0.3), 2 / 2**10)
    assert "the word move a benign text's v_s by +0.50" in claim.title and "of 0.80 (n = 10)" in claim.statement
    other = gate_claims.patching_claim(
        study, patched(study, {"the word": np.zeros(20), "the header": np.full(20, -0.2)})
    )
    assert other.value == pytest.approx(0.2), "the sign is first minus second, not their sizes"


def test_the_best_of_spans_without_a_difference_is_no_better(study: Study) -> None:
    """Eight spans alike but for chance: chosen and compared on the same pairs most would differ; 5 % of 200 may."""
    rng, p_values = np.random.default_rng(12), []
    for _ in range(200):
        effects = patched(study, {f"span {number}": rng.normal(size=20) for number in range(8)})
        p_values.append(gate_claims.patching_claim(study, effects).p)
    least, most = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert least <= np.sum(np.array(p_values) <= 0.05) <= most


def test_what_the_ablated_direction_costs_has_its_sign(study: Study) -> None:
    """Five topics of two texts: none is flagged without the direction, all without random ones."""
    flagged = {gate_claims.NOTHING: 1.0, gate_claims.REFUSAL: 0.0, gate_claims.OWN: 0.5, gate_claims.RANDOM: 1.0}
    ablated = pd.DataFrame(
        {"label": "harmful", "surface": "text", "query_id": f"q{number}", "topic": f"t{number // 2}", "run": run,
         "unsafe": share}
        for number in range(10) for run, share in flagged.items()
    )  # fmt: skip
    claim = gate_claims.ablation_claim(study, ablated)
    assert (claim.n, claim.value, claim.p) == (10, -1.0, 2 / 2**5)
    assert "without the refusal direction 0% of harmful texts get the unsafe token, with it 100%" in claim.title


def test_calibration_says_which_way_and_counts_requests_once(study: Study) -> None:
    """Twelve requests of either label under three attacks, all scored 0.3: half are harmful, so 0.2 too low."""
    readings = pd.DataFrame(
        {"attack": attack, "label": label, "topic": f"{label}{number}", "v_s": 0.3}
        for attack in ("plain", "image", "audio", "spelled") for label in ("harmful", "benign") for number in range(12)
    )  # fmt: skip
    claim = gate_claims.calibration_claim(study, readings, {})
    assert claim.n == 72 and claim.value == pytest.approx(0.2) and "0.20 too low" in claim.title
    # Each of 24 topics adds three times 0.4 * (1 - 0.3) or 0.4 * (0 - 0.3): Z is their sum over their own spread.
    sums = np.repeat([3 * 0.4 * 0.7, -3 * 0.4 * 0.3], 12)
    assert claim.p == pytest.approx(2 * stats.t.sf(sums.sum() / np.sqrt(24 * sums.var(ddof=1)), 23))
    assert "is not a calibrated probability" not in claim.title, "24 draws do not show what 72 would"
    turned = gate_claims.calibration_claim(study, readings.assign(v_s=0.7), {})
    assert "0.20 too high" in turned.title and turned.p == pytest.approx(claim.p)


def test_prefill_tables_and_claims(study: Study) -> None:
    tables = prefill_analysis.prefill_tables(study, 5, (0, 2, 6))
    assert set(tables.replies["system"]) == {"pretrained", "SSFT", "CASA"}
    assert len(tables.lengths) == len(tables.replies) == 3 * 5 * 3
    casa = tables.lengths[tables.lengths["system"] == "CASA"]
    assert casa.groupby("query_id")["unsafe_a"].nunique().max() == 1
    assert np.allclose(casa.groupby("query_id")["v_s"].agg(np.ptp), 0, atol=1e-6)
    lengths, tokens = prefill_analysis.length_data(tables, 0), prefill_analysis.token_data(tables, 0)
    depth = prefill_analysis.depth_data(tables, 0)
    claims = [
        prefill_claims.success_claim(study, tables),
        prefill_claims.order_claim(study, tables),
        prefill_claims.depth_claim(study, tables),
    ]
    assert all(0 <= claim.p <= 1 and claim.n == 5 for claim in claims)
    study.save_table("prefill", claim_rows(study, claims))
    headings = [prefill_claims.length_heading(*claims[:2]), prefill_claims.token_heading(study, tokens)]
    for title in (*(claim.title for claim in claims), *(heading.title for heading in headings)):
        assert_one_line(title)
    assert prefill_plots.plot_lengths(lengths, *headings[0]).axes
    assert prefill_plots.plot_depth(depth, *claims[2].heading).axes
    assert prefill_plots.plot_tokens(tokens, *headings[1]).axes


def test_prefill_tables_are_made_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = prefill_analysis.prefill_tables(study, 5, (0, 2, 6))
    monkeypatch.setattr(prefill_analysis, "_measured", None)
    again = prefill_analysis.prefill_tables(study, 5, (0, 2, 6))
    pd.testing.assert_frame_equal(again.depth, tables.depth)
