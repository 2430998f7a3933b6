"""Notebook 03: its claims, table and bars on replies made by hand, where every number is known."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from helpers.figures import assert_one_line

from casa_mech.audit.names import PATHS
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.reports.attack_success import claims, plots, tables
from casa_mech.study import Study

MODEL, CONTROL = "left/first", "left/second"
TOPICS = 8


def _outcomes(model: str, defense: str, label: str, gate: int) -> list[tuple[str, str | None]]:
    """How the replies to eight topics end, and their tokens.

    First model, harmful: six answered and two refused before CASA; under gate k two answered without a flag, one with
    it, k fall apart after a flag, one without it, and the others are refused after a flag. On the control gates change
    one answer into a refusal. Benign requests: none refused before, k under gate k.
    """
    if label == "benign":
        refused = gate if defense == CASA else 0
        return [("refused", "unsafe")] * refused + [("complied", "safe" if defense == CASA else None)] * (8 - refused)
    if defense == PRETRAINED:
        return [("complied", None)] * 6 + [("refused", None)] * 2
    if model == CONTROL:
        return [("complied", "safe")] * 5 + [("refused", "unsafe")] * 3
    flagged = [("complied", "unsafe")] + [("incoherent", "unsafe")] * gate + [("refused", "unsafe")] * (4 - gate)
    return [("complied", "safe")] * 2 + [("wrong_topic", "safe")] + flagged


class _Replies(Study):
    """A study whose replies are `_outcomes`, under two attacks."""

    def replies(self, model: str, defense: str, attack: str, label: str, gate: int = 0) -> pd.DataFrame:  # type: ignore[override]
        outcomes = _outcomes(model, defense, label, gate)
        n = len(outcomes)
        return pd.DataFrame(
            {
                "model": model, "defense": defense, "attack": attack, "label": label,
                "query_id": [f"{label}{k}" for k in range(n)], "topic": [f"topic{k}" for k in range(n)],
                "outcome": [outcome for outcome, _ in outcomes], "safety_token": [token for _, token in outcomes],
                "gate_seed": pd.array([gate if defense == CASA else pd.NA] * n, dtype="Int64"),
            }
        )  # fmt: skip


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    for columns in ("attacks", "benign_attacks"):
        monkeypatch.setattr(Study, columns, ("plain", "image"))
    return _Replies.open(
        tmp_path / "run", model=MODEL, plan="world", control=CONTROL, profile="smoke", sizes={"gates": 3}
    )


def _rates(study: Study) -> pd.DataFrame:
    rows = [
        {"model": model, "defense": defense, "attack": attack, "metric": "attack_success", "value": value}
        for model in study.models
        for defense, value in ((PRETRAINED, 0.75), (CASA, 0.375))
        for kinds in claims.KINDS.values()
        for attack in kinds
    ]
    return pd.DataFrame(rows)


def test_claims_pair_each_gate_with_the_pretrained_replies(study: Study) -> None:
    success, refusal, fall, control = claims.attack_claims(study, _rates(study))
    # Six of eight answered before, three under each gate; three gates, two attacks.
    assert success.value == pytest.approx(-3 / 8) and success.n == 8 * 3 * 2
    assert "mean attack success from 75 to 38 %" in success.title
    assert "Gate by gate -37.5, -37.5, -37.5." in success.statement
    # Of eight benign requests gate k refuses k.
    assert refusal.value == pytest.approx((0 + 1 + 2) / 3 / 8) and "from 0 to 12 %" in refusal.title
    assert "Gate by gate +0.0, +12.5, +25.0." in refusal.statement
    # Refusals: from two to four, three and two; fall apart: from none to one, two and three.
    refused, failed = (2 + 1 + 0) / 3 / 8, (1 + 2 + 3) / 3 / 8
    assert fall.value == pytest.approx(refused - failed) and fall.figure == "reply_paths"
    assert "change by +12 points, replies that fall apart by +25" in fall.title
    assert (
        "CASA flags 62 % of the requests: 38 % are flagged and refused, 12 % flagged and answered all the same, 12 %"
        in (fall.statement)
    )
    assert control.value == pytest.approx(-3 / 8 + 1 / 8) and "by -38 points on first, -12 on second" in control.title
    for claim in (success, refusal, fall, control):
        assert claim.low <= claim.value <= claim.high and 0 < claim.p <= 1 and claim.refuted_if
        assert_one_line(claim.title)


def test_gates_that_differ_widen_the_interval(study: Study) -> None:
    """Refusals of benign requests are 0, 1 and 2 of 8: three seeds cannot exclude none, one gate alone seems to."""
    several = claims.refusal_claim(study)
    study.sizes = study.sizes.model_copy(update={"gates": 1})
    alone = claims.refusal_claim(study)
    assert several.low <= 0 and several.p > 0.05 and "Of one gate" in alone.statement
    assert alone.value == 0


def test_the_bar_holds_every_request_once(study: Study) -> None:
    data = tables.path_data(study)
    sums = data.groupby(["model", "defense", "attack"])["value"].sum()
    assert sums.tolist() == pytest.approx([1.0] * 8)
    cells = {
        where: rows.set_index("path")["value"]
        for where, rows in data[data["model"] == MODEL].groupby(["defense", "attack"])
    }
    shares = cells[CASA, "plain"]
    assert list(shares.index) == list(PATHS)
    # By gate, in eighths: flagged and fall apart 0, 1, 2; flagged and refused 4, 3, 2.
    eighths = {"complied": 2, "flagged, complied": 1, "flagged, failed": 1, "failed": 1, "refused": 0}
    expected = {name: value / 8 for name, value in eighths.items()} | {"flagged, refused": 3 / 8}
    assert shares.to_dict() == pytest.approx(expected)
    before = cells[PRETRAINED, "image"]
    assert before[before > 0].to_dict() == {"complied": 0.75, "refused": 0.25}
    assert data.groupby("defense")["n"].unique().map(list).to_dict() == {PRETRAINED: [8], CASA: [24]}


def test_bars_are_drawn_in_the_order_of_the_paths(study: Study) -> None:
    data = tables.path_data(study)
    figure = plots.plot_paths(data, PATHS, "a title", "A caption.")
    axis = figure.axes[0]
    assert axis.get_title() == "first (n ≥ 8)" and len(figure.axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(PATHS.values())
    # The lower bar of the first attack, CASA's: widths and starts in percent.
    bars = sorted(
        (bar for bar in axis.patches if 0 < bar.get_y() + bar.get_height() / 2 < 0.5), key=lambda bar: bar.get_x()
    )
    assert [bar.get_width() for bar in bars if bar.get_width()] == pytest.approx([25, 12.5, 12.5, 12.5, 37.5])
    assert next(bar.get_facecolor()[:3] for bar in bars if bar.get_width()) == pytest.approx((0xBB / 255,) * 3)


def test_a_rate_that_no_reply_has_is_said_in_words() -> None:
    row = {"model": "m", "defense": "CASA", "attack": "plain", "surface": "text", "label": "harmful", "seed": 0}
    results = pd.DataFrame([{**row, "metric": "attack_success", "n": 4, "value": 0.5, "low": 0.2, "high": 0.8}])
    assert (
        tables.attack_table(results, "attack_success").loc["plain", ("m", "CASA")].startswith("50.0 [20.0, 80.0] n=4")
    )
    empty = tables.attack_table(results, "attack_success:held_out")
    assert empty["note"].tolist() == ["no replies here have the rate attack_success:held_out"]
