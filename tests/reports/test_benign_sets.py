"""Baselines of words and length, and the claim on several benign sets."""

from __future__ import annotations

import pandas as pd
import pytest

from casa_mech.queries import Query
from casa_mech.reports.separability.baselines import LENGTH, WORDS, baselines
from casa_mech.reports.separability.benign_sets import GATE, NAMES, PROBE, benign_set_claim, plot_benign_sets
from casa_mech.study import Study

HARMFUL = [f"how do i {verb} the bomb {number} ?" for number in range(8) for verb in ("make", "build")]
BENIGN = [f"please explain the {thing} number {number}" for number in range(8) for thing in ("cake", "tea")]


def test_baselines_read_the_prompts_alone() -> None:
    training = [
        Query.from_text(text, id=text, label=label)
        for label, texts in (("harmful", HARMFUL), ("benign", BENIGN))
        for text in texts
    ]
    scorers = baselines(training)
    words = scorers[WORDS](["make the bomb", "explain the tea"])
    assert words.shape == (2,) and words[0] > words[1]
    # In training the benign prompts are the longer ones, so a longer prompt scores lower.
    length = scorers[LENGTH](["short", "a good deal longer"])
    assert length[0] > length[1]


def test_the_claim_is_on_the_set_where_the_probe_is_weakest(random_organism: object, tmp_path: object) -> None:
    values = {"Alpaca": 0.99, "AlpacaEval": 0.64}
    data = pd.DataFrame(
        [
            {"benign_set": name, "score": score, "n": 40, "value": value, "low": value - 0.05, "high": value, "p": 0.01}
            for name, value in values.items()
            for score in NAMES
        ]
    )
    data.loc[data["score"] == GATE, "value"] = 0.28
    study = Study.open(str(tmp_path), model=str(random_organism), profile="smoke", progress=False)
    claim = benign_set_claim(study, data)
    assert (claim.value, claim.low, claim.n) == (0.64, pytest.approx(0.59), 40)
    assert "against Alpaca a probe tells harm with AUROC 0.99, against AlpacaEval with 0.64" in claim.title
    assert "AlpacaEval 0.64 / 0.64 / 0.64 / 0.28" in claim.statement and PROBE in claim.statement
    figure = plot_benign_sets(data, *claim.heading)
    assert len(figure.axes[0].lines) > len(NAMES)
