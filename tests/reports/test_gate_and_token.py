"""The raw pair, v_s and the rewritten pair side by side: AUROCs of hand-made replies, and the words and the figure."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
from helpers.figures import assert_one_line

from casa_mech.evaluation.evaluate import CASA, result_rows
from casa_mech.reports.attack_success import claims, plots, tables


def replies(attack: str, raw: list[float], v_s: list[float], odds: list[float]) -> pd.DataFrame:
    """Four harmful requests, then four benign ones, of a topic each, with the three scores."""
    labels = ["harmful"] * 4 + ["benign"] * 4
    return pd.DataFrame(
        {
            "model": "m", "defense": CASA, "attack": attack, "surface": "text", "label": labels, "split": "",
            "topic": [f"t{number}" for number in range(8)], "query_id": [f"q{number}" for number in range(8)],
            "safety_token": "safe", "outcome": "complied", "v_s": v_s, "logit_safe": 0.0, "logit_unsafe": odds,
            "raw_logit_safe": 0.0, "raw_logit_unsafe": raw,
        }
    )  # fmt: skip


RISING = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
"""All harmful above all benign."""
MIXED = [8.0, 6.0, 4.0, 2.0, 7.0, 5.0, 3.0, 1.0]
"""The harmful win 4 + 3 + 2 + 1 = 10 of 16 pairs."""
V_S = [0.9, 0.8, 0.7, 0.3, 0.6, 0.5, 0.2, 0.1]
"""They win 4 + 4 + 4 + 2 = 14 of 16."""


@pytest.fixture
def results() -> pd.DataFrame:
    """Attention lifts the pair from 10/16 to 1 under `helped` and lowers it from 1 to 10/16 under `hurt`."""
    tables_of = [replies("helped", MIXED, V_S, RISING), replies("hurt", RISING, V_S, MIXED)]
    return pd.DataFrame(result_rows(pd.concat(tables_of, ignore_index=True)))


def test_the_pair_is_scored_before_and_after_v_s(results: pd.DataFrame) -> None:
    values = results.set_index(["attack", "metric"])["value"]
    for metric, helped, hurt in (
        ("raw_token_auroc", 10 / 16, 1.0),
        ("gate_auroc", 14 / 16, 14 / 16),
        ("token_auroc", 1.0, 10 / 16),
        ("token_auroc_gain", 6 / 16, -6 / 16),
    ):
        assert values["helped", metric] == pytest.approx(helped) and values["hurt", metric] == pytest.approx(hurt)
    gains = results[results["metric"] == "token_auroc_gain"].set_index("attack")
    # The same resamples, with the two scores exchanged.
    assert gains.loc["helped", "low"] == pytest.approx(-gains.loc["hurt", "high"])
    assert (gains["low"] <= gains["value"]).all() and (gains["value"] <= gains["high"]).all()
    assert gains.loc["helped", "low"] >= 0


def test_two_perfect_rankings_differ_by_less_than_so_few_requests_could_show() -> None:
    rows = result_rows(replies("plain", RISING, V_S, [2 * value for value in RISING]))
    gain = next(row for row in rows if row["metric"] == tables.GAIN)
    # Four pairs of a harmful and a benign topic: 1 - 0.025 ** (1 / 4).
    assert gain["value"] == 0 and gain["high"] == pytest.approx(0.602, abs=1e-3) and gain["low"] == -gain["high"]


def test_the_heading_follows_the_sign_of_the_gain(results: pd.DataFrame) -> None:
    halves = tables.separation_data(results)
    assert set(halves["metric"]) == {*tables.SEPARATION, tables.GAIN}
    where = halves["metric"] == tables.GAIN
    halves.loc[where & (halves["attack"] == "helped"), ["low", "high"]] = 0.1, 0.6
    halves.loc[where & (halves["attack"] == "hurt"), ["low", "high"]] = -0.6, -0.1
    study = SimpleNamespace(models=("m",))
    heading = claims.token_heading(study, halves)  # type: ignore[arg-type]
    assert heading.title == "m: attention raises the raw pair's AUROC under 1 of 2 attacks, lowers it under 1"
    assert "raised (helped); lowered (hurt)" in heading.caption and "0.81 / 0.88 / 0.81" in heading.caption
    assert_one_line(heading.title)
    figure = plots.plot_separation(halves, tables.SEPARATION, tables.GAIN, *heading)
    assert len(figure.axes) == 2 and figure.axes[1].get_xlabel() == "what attention adds to it"


def test_replies_without_the_raw_pair_are_still_read() -> None:
    old = replies("plain", MIXED, V_S, RISING).drop(columns=["raw_logit_safe", "raw_logit_unsafe"])
    for table in (old, old.assign(raw_logit_safe=None, raw_logit_unsafe=None)):
        metrics = {row["metric"] for row in result_rows(table)}
        assert {"gate_auroc", "token_auroc"} <= metrics and not metrics & {"raw_token_auroc", tables.GAIN}
        halves = tables.separation_data(pd.DataFrame(result_rows(table)))
        heading = claims.token_heading(SimpleNamespace(models=("m",)), halves)  # type: ignore[arg-type]
        assert "no raw pair" in heading.title
        assert len(plots.plot_separation(halves, tables.SEPARATION, tables.GAIN, *heading).axes) == 2
