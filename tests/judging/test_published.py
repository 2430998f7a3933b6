"""The arithmetic of the published tables."""

from __future__ import annotations

import numpy as np
import pytest

from casa_mech.judging.published import (
    ABLATION,
    MAIN,
    fitting_sizes,
    possible_counts,
    published_checks,
    published_means,
    published_rates,
    published_table,
)


@pytest.mark.parametrize(
    ("size", "model", "prompt", "mean", "change"),
    [
        ("3B", "Pretrained", False, 49.53, 0.0),
        ("3B", "SSFT", False, 28.05, -43.4),
        ("3B", "Circuit Breaker", False, 3.05, -93.8),
        ("3B", "CASA", False, 4.025, -91.9),
        ("3B", "CASA", True, 0.65, -98.7),
        ("7B", "Pretrained", False, 43.43, 0.0),
        ("7B", "SSFT", False, 10.33, -76.2),
        ("7B", "Circuit Breaker", False, 8.95, -79.4),
        ("7B", "CASA", False, 2.70, -93.8),
        ("7B", "CASA", True, 0.43, -99.0),
    ],
)
def test_four_set_means_of_the_published_table(size, model, prompt, mean, change):
    means = published_means().set_index(["model", "defense"])
    row = means.loc[f"Qwen2.5-Omni-{size}", model + (" + safety prompt" if prompt else "")]
    assert row["mean of four, %"] == pytest.approx(mean, abs=0.0101)
    assert row["against pretrained, %"] == pytest.approx(change, abs=0.051)


def test_published_rates_imply_their_test_set_sizes():
    assert fitting_sizes("JailbreakV-28k")[0] == 280
    assert fitting_sizes("AIAH")[0] == 176
    assert fitting_sizes("JB-Prompt")[:2] == [331, 343]
    assert fitting_sizes("MM-SafetyBench", up_to=799) == []
    assert possible_counts("65.3", 176) == [115] and possible_counts("84.7", 176) == [149]
    rates = published_rates()
    two_of_280 = rates[np.isclose(rates["value"], 0.007)].iloc[0]
    assert (two_of_280["low"], two_of_280["high"]) == pytest.approx((0.002, 0.026), abs=5e-4)
    assert len(rates) == 2 * 5 * 4 + 4 * 3 == len(published_rates(MAIN)) + len(published_rates(ABLATION))
    assert rates[rates["n"].isna()]["low"].isna().all() and set(rates[rates["n"].isna()]["attack"]) == {
        "MM-SafetyBench"
    }


def test_rounding_of_rates_is_half_up():
    assert possible_counts("0.3", 400) == [1]  # 0.25 rounds up; banker's rounding would give 0.2
    assert possible_counts("12.5", 8) == [1] and possible_counts("12.4", 8) == []
    assert possible_counts("100.0", 7) == [7] and possible_counts("0.0", 7) == [0]


def test_what_arithmetic_says_of_the_paper():
    checks = published_checks()
    assert set(checks[~checks["holds"]]["check"]) == {
        "3B without safety prompt: reduction above 97 %",
        "7B without safety prompt: reduction above 97 %",
        "3B without prompt: CASA below Circuit Breaker",
        "3B CASA without prompt, MM-SafetyBench: main table equals ablation",
    }


def test_published_numbers_stand_apart() -> None:
    rates = published_rates()
    row = rates[(rates["table"] == "main") & (rates["attack"] == "AIAH") & (rates["defense"] == "CASA")].iloc[0]
    assert (row["model"], row["value"], row["n"]) == ("Qwen2.5-Omni-3B", 0.023, 176)
    assert row["low"] < 0.023 < row["high"]
    assert rates[rates["attack"] == "MM-SafetyBench"]["n"].isna().all()
    means = published_means().set_index(["model", "defense"])
    assert means.loc[("Qwen2.5-Omni-3B", "CASA"), "against pretrained, %"] == -91.9
    checks = published_checks().set_index("check")["holds"]
    assert not checks["3B without safety prompt: reduction above 97 %"]
    assert checks["3B with safety prompt: reduction above 97 %"]


def test_the_table_to_read_holds_the_printed_numbers() -> None:
    table = published_table()
    assert table.loc[("main", "Qwen2.5-Omni-3B", "CASA"), "AIAH"].startswith("2.3 [")
    assert table.loc[("main", "Qwen2.5-Omni-3B", "CASA"), "MM-SafetyBench"] == "9.2 [–]"
    assert published_checks()["holds"].dtype == bool
