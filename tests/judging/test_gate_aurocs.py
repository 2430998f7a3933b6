"""AUROCs averaged over surfaces and gates: known answers, gates that disagree, and the test's errors on noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from casa_mech.judging.gate_aurocs import auroc_change, mean_auroc


def _readings(scores: dict[tuple[int, str], list[float]], harmful: list[bool]) -> pd.DataFrame:
    """Scores of each gate and surface, request by request; each request has a topic of its own."""
    tables = [
        pd.DataFrame(
            {
                "query_id": [f"q{k}" for k in range(len(harmful))], "topic": [f"t{k}" for k in range(len(harmful))],
                "label": np.where(harmful, "harmful", "benign"), "surface": surface, "gate_seed": gate, "v_s": values,
            }
        )
        for (gate, surface), values in scores.items()
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def test_surfaces_are_averaged_within_gates_and_gates_over_all() -> None:
    harmful = [True, True, False, False]
    right, wrong, tied = [4.0, 3, 2, 1], [1.0, 2, 3, 4], [1.0] * 4
    readings = _readings({(0, "image"): right, (0, "audio"): wrong, (1, "image"): tied, (1, "audio"): right}, harmful)
    # (1 + 0) / 2 for gate 0 and (0.5 + 1) / 2 for gate 1.
    estimate, p = mean_auroc(readings.sample(frac=1, random_state=1))
    assert estimate.value == pytest.approx((0.5 + 0.75) / 2)
    assert estimate.low <= estimate.value <= estimate.high and p > 0.2


def test_gates_that_disagree_show_nothing() -> None:
    """Of forty requests one gate ranks all rightly, one wrongly, one rightly: 2/3, and labels alone are no test."""
    harmful = [k % 2 == 0 for k in range(40)]
    right = [float(label) + k / 1000 for k, label in enumerate(harmful)]
    wrong = [-value for value in right]
    agreeing = _readings({(gate, "image"): right for gate in range(3)}, harmful)
    value, p = mean_auroc(agreeing)
    # Nothing to draw from: the exact bound for twenty pairs of topics.
    assert value == pytest.approx((1.0, 1 - (1 - 0.025 ** (1 / 20)), 1.0)) and p <= 0.002
    mixed = _readings({(0, "image"): right, (1, "image"): wrong, (2, "image"): right}, harmful)
    estimate, p = mean_auroc(mixed)
    assert estimate.value == pytest.approx(2 / 3) and p > 0.3 and estimate.low == 0.0 and estimate.high == 1.0


def test_change_is_after_less_before() -> None:
    harmful = [k % 2 == 0 for k in range(40)]
    rng = np.random.default_rng(0)
    after = _readings({(gate, "image"): [label + 0.1 * rng.random() for label in harmful] for gate in (0, 1)}, harmful)
    before = _readings({(gate, "image"): [1.0] * 40 for gate in (1, 0)}, harmful)
    change, p = auroc_change(before, after)
    assert change.value == pytest.approx(0.5) and p <= 0.01
    change, p = auroc_change(after, after)
    assert change.value == change.low == change.high == 0 and p == 1


def test_noise_is_called_an_effect_in_five_percent_of_cases_at_most() -> None:
    """Topics of several requests and three gates whose noise shares the topics': 200 sets, binomial bound."""
    falls = 0
    for number in range(200):
        rng = np.random.default_rng([7, number])
        topics = np.repeat(np.arange(20), 3)
        harmful = np.repeat(rng.permutation(20) < 10, 3)
        common = rng.normal(size=20)[topics]
        scores = {(gate, "image"): list(common + 0.5 * rng.normal(size=60)) for gate in range(3)}
        readings = _readings(scores, list(harmful)).assign(topic=[f"t{topic}" for topic in topics] * 3)
        falls += mean_auroc(readings, number)[1] <= 0.05
    assert falls <= binom.ppf(0.999, 200, 0.05)
