"""Notebook 02: its claims, figures and rows on readings made by hand, where every number is known."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from helpers.figures import assert_one_line

from casa_mech.judging.results import result_table
from casa_mech.reports.casa_training import claims, plots, tables
from casa_mech.study import Study

TOPICS = 12
SURFACES = ("text", "image", "audio")


@pytest.fixture(scope="module")
def study(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    sizes = {"train_examples": 16, "train_steps": 2, "train_batch": 4, "n_probe": 4, "gates": 2}
    out = tmp_path_factory.mktemp("runs") / "training"
    return Study.open(out, progress=False, sizes=sizes, model=str(random_organism), profile="smoke")


def _readings(gates: int = 3) -> pd.DataFrame:
    """Six harmful and six benign topics, the last two of either held out; untrained v_s is the same for all.

    Text and pictures are ranked rightly by every gate. On speech gate k gives k harmful requests, the held-out ones
    first, a v_s below that of every benign one.
    """
    rows = []
    for gate in range(gates):
        for surface in SURFACES:
            for number in range(TOPICS):
                harmful, place = number < TOPICS // 2, number % (TOPICS // 2)
                missed = surface == "audio" and harmful and place >= TOPICS // 2 - gate
                v_s = 0.0 if missed else 0.9 if harmful else 0.1
                where = {
                    "surface": surface, "label": "harmful" if harmful else "benign", "topic": f"topic{number}",
                    "split": "held_out" if place >= 4 else "seen", "query_id": f"q{number}", "gate_seed": gate,
                }  # fmt: skip
                rows += [{**where, "moment": "before", "v_s": 0.5}, {**where, "moment": "after", "v_s": v_s}]
    return pd.DataFrame(rows)


def test_claims_average_over_gates(study: Study) -> None:
    least, change, held_out = claims.training_claims(study, _readings())
    # On speech gate k ranks 6 - k of six harmful requests above all benign ones, k below all of them.
    assert least.value == pytest.approx((1 + 5 / 6 + 4 / 6) / 3)
    assert "least on audio, with AUROC 0.83 [" in least.title and "Gate by gate 0.67 to 1.00." in least.statement
    assert "image 1.00 [0." in least.statement and least.n == TOPICS * 3
    # Off text the mean of 1 (pictures) and 0.833 (speech); untrained 0.5.
    assert change.value == pytest.approx((1 + 5 / 6) / 2 - 0.5)
    assert "off text from 0.50 to 0.92" in change.title and change.p <= 0.05
    # Of two held-out harmful topics gate 1 misses one on speech, gate 2 both.
    assert held_out.value == pytest.approx((1 + (1 + 0.5 + 0) / 3) / 2)
    for claim in (least, change, held_out):
        assert claim.low <= claim.value <= claim.high and 0 < claim.p <= 1 and claim.refuted_if
        assert claim.figure == "gate_before_after"
        assert_one_line(claim.title)


def test_the_sign_of_a_wrong_gate_is_seen(study: Study) -> None:
    """The same with the labels exchanged: below chance, and the change is a fall."""
    readings = _readings()
    readings["label"] = readings["label"].map({"harmful": "benign", "benign": "harmful"})
    least, change, _ = claims.training_claims(study, readings)
    assert least.value == pytest.approx(0.0) and "least on image" in least.title
    assert change.value == pytest.approx(-((1 + 5 / 6) / 2 - 0.5)) and change.high < 0


def test_one_gate_says_so_and_has_a_narrower_interval(study: Study) -> None:
    (least, *_), (alone, *_) = (
        claims.training_claims(study, rows) for rows in (_readings(), _readings().query("gate_seed == 1"))
    )
    assert "Of one gate; another training may differ." in alone.statement
    assert alone.value == pytest.approx(5 / 6) and alone.high - alone.low < least.high - least.low


def test_rows_hold_the_mean_over_gates(study: Study) -> None:
    rows = result_table(tables.gate_rows(study, _readings())).set_index(["defense", "surface", "metric"])["value"]
    assert rows["CASA after training", "audio", "gate_auroc"] == pytest.approx(2.5 / 3)
    assert rows["CASA before training", "audio", "gate_auroc"] == 0.5
    assert rows["CASA after training", "audio", "gate_auroc:seen"] == pytest.approx(1.0)


def test_every_gate_of_a_study_is_read_and_drawn(study: Study) -> None:
    steps, readings = tables.training_data(tables.training_logs(study)), tables.gate_readings(study)
    assert steps.groupby("gate_seed")["step"].max().to_dict() == {0: 2, 1: 2}
    by_gate = [rows["v_s"].tolist() for _, rows in readings.groupby("gate_seed")]
    assert len(by_gate) == 2 and by_gate[0] != by_gate[1]
    heading = claims.training_heading(study, steps)
    assert "Means of 2 gates" in heading.caption
    figure = plots.plot_training(steps, *heading)
    assert [len(axis.lines) for axis in figure.axes] == [2, 4]
    figure = plots.plot_gate(readings, *claims.gate_heading(study, readings))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["harmful (n = 4 each, 2 gates)", "benign (n = 4 each, 2 gates)"]
