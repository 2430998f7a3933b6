"""Tables of patching made by hand: shares, paths, and how far attribution patching agrees."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from casa_mech.judging.hypothesis import PERMUTATIONS
from casa_mech.reports.safety_attention import claims, patch_tables
from casa_mech.reports.safety_attention.patch_tables import PATHS, TOTAL
from probes.gate.patching import INSERT, REMOVE
from probes.gate.paths import DIRECT, INDIRECT
from probes.gate.removal import PERMUTED, SCORES

STUDY = SimpleNamespace(name="m", title="m", settings=SimpleNamespace(seed=0))


def effect(surface: str, span: str, change: float, gap: float = 10.0, **fields: object) -> list[dict[str, object]]:
    """Four pairs of two topics in which a span moves the log-odds of v_s by `change`, and the logits twice as far."""
    odds = {"log_odds": -5.0, "log_odds_donor": gap - 5, "log_odds_patched": change - 5}
    logit = {"logit": -8.0, "logit_donor": 2 * gap - 8, "logit_patched": 2 * change - 8}
    v_s = {"v_s": 0.0, "v_s_donor": 1.0, "v_s_patched": 0.5}
    row = {"surface": surface, "span": span, "direction": INSERT, "site": "1", "head": -1, **odds, **logit, **v_s}
    row |= {"log_odds_estimated": change, "logit_estimated": 2 * change}
    return [{**row, "pair": f"{surface}{number}", "topic": f"t{number % 2}", **fields} for number in range(4)]


def test_spans_are_named_surface_by_surface() -> None:
    rows = [
        *effect("text", "header", 9.0), *effect("text", "key word", 1.0),
        *effect("image", "header", 1.0, gap=20.0), *effect("image", "image", 15.0, gap=20.0),
        *effect("image", "whole prompt", 20.0, gap=20.0), *effect("text", "header", 3.0, site="0"),
        *effect("text", "header", -9.0, direction=REMOVE),
    ]  # fmt: skip
    spans = patch_tables.span_data(pd.DataFrame(rows), 1, 0)
    shares = spans.set_index(["surface", "span"])["value"]
    assert shares.to_dict() == pytest.approx(
        {("text", "header"): 0.9, ("text", "key word"): 0.1, ("image", "header"): 0.05, ("image", "image"): 0.75}
    )
    heading = claims.span_heading(STUDY, spans)  # type: ignore[arg-type]
    assert heading.title == "m: v_s takes harm from header (text) and image (image)"
    assert "text 90% [90%, 90%] of a gap of 10.0, image 5% [5%, 5%] of a gap of 20.0" in heading.caption


def test_attention_is_named_surface_by_surface() -> None:
    rows = [
        {"surface": surface, "span": span, "label": "harmful", "n": 9, "mean": mean, "low": mean - 0.05,
         "high": mean + 0.05, "even": 0.2}
        for surface, span, mean in (
            ("text", "header", 0.9), ("text", "key word", 0.1), ("image", "image", 0.8), ("image", "header", 0.2),
            ("audio", "audio", 0.9), ("audio", "header", 0.1),
        )
    ]  # fmt: skip
    heading = claims.share_heading(STUDY, pd.DataFrame(rows))  # type: ignore[arg-type]
    assert heading.title == "m: safety attention lies most on header (text), image (image) and audio (audio)"
    assert "gives on text." in heading.caption


def test_a_heads_total_stands_beside_its_paths() -> None:
    effects = pd.DataFrame(
        [
            *effect("text", "whole prompt", 6.0, site="z.0", head=3),
            *effect("text", "whole prompt", 1.0, site="z.1", head=0),
            *effect("text", "whole prompt", -6.0, site="z.0", head=3, direction=REMOVE),
        ]
    )  # fmt: skip
    split = pd.DataFrame(
        [
            {"surface": "text", "site": site, "head": head, "path": path, "pair": f"text{number}",
             "topic": f"t{number % 2}", "delta_log_odds": change, "delta_logit": 2 * change, "delta_v_s": 0.0}
            for site, head, direct, indirect in (("z.0", 3, 0.5, 5.0), ("z.1", 0, 1.0, 0.0))
            for path, change in ((DIRECT, direct), (INDIRECT, indirect))
            for number in range(4)
        ]
    )  # fmt: skip
    data = patch_tables.path_data(effects, split, 0)
    means = data.set_index(["site", "head", "path"])["delta_log_odds_mean"]
    assert [means["z.0", 3, path] for path in PATHS] == [6.0, 0.5, 5.0]
    assert [means["z.1", 0, path] for path in PATHS] == [1.0, 1.0, 0.0]
    assert set(data["gap_log_odds"]) == {10.0} and set(data["gap_logit"]) == {20.0} and PATHS[0] == TOTAL
    heading = claims.path_heading(STUDY, data)  # type: ignore[arg-type]
    assert "later blocks than directly in 2 of 2 cases" in heading.title
    assert "text 0.3: total +6.00 [+6.00, +6.00], direct +0.50" in heading.caption


def points(estimated: np.ndarray, patched: np.ndarray) -> pd.DataFrame:
    """A row a pair and target of the text's log-odds, from matrices [pair, target]."""
    pairs, targets = patched.shape
    return pd.DataFrame(
        {
            "surface": "text", "measure": "log_odds", "part": "input",
            "pair": np.repeat([f"p{number}" for number in range(pairs)], targets),
            "topic": np.repeat([f"t{number // 2}" for number in range(pairs)], targets),
            "target": np.tile([f"site {number}" for number in range(targets)], pairs),
            "patched": patched.ravel(), "estimated": estimated.ravel(),
        }
    )  # fmt: skip


def test_agreement_is_pearsons_and_leaves_empty_exchanges_out() -> None:
    rows = [
        *effect("text", "header", 2.0, site="embeddings"), *effect("text", "key word", 4.0),
        *effect("text", "other text", 0.0), *effect("text", "whole prompt", 10.0),
        *effect("text", "whole prompt", 3.0, site="mlp.1", log_odds_estimated=-1.0),
    ]  # fmt: skip
    table = patch_tables.estimates(pd.DataFrame(rows))
    assert set(table["part"]) == {"input", "stream after block 1", "MLP"}
    odds = table[table["measure"] == "log_odds"]
    assert len(odds) == 12 and set(odds["patched"]) == {2.0, 4.0, 3.0}
    agreement = patch_tables.agreement(table, 0).set_index(["measure", "part"])
    row = agreement.loc[("log_odds", "all")]
    assert row["value"] == pytest.approx(np.corrcoef(odds["patched"], odds["estimated"])[0, 1])
    assert row["same_sign"] == pytest.approx(2 / 3) and (row["n"], row["pairs"]) == (12, 4)
    assert row["slope"] == pytest.approx((2 * 2 + 4 * 4 - 3) / (2 * 2 + 4 * 4 + 1))
    assert agreement.loc[("logit", "all"), "value"] == pytest.approx(1)
    assert row["low"] <= row["value"] <= row["high"]


def test_estimates_that_say_nothing_are_called_significant_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(200):
        # Targets differ in size, and pairs share them: what the permutation has to keep together.
        patched, estimated = (
            rng.standard_normal((6, 1)) * 0.3 + 3 * rng.standard_normal((1, 12)) + 0.5 * rng.standard_normal((6, 12))
            for _ in range(2)
        )
        p_values.append(patch_tables.agreement_p(points(estimated, patched), int(rng.integers(1000)), draws=99))
    false = sum(p <= 0.05 for p in p_values)
    low, high = binom.ppf([0.005, 0.995], 200, 0.05)
    assert low <= false <= high
    changes = rng.standard_normal((6, 12))
    assert patch_tables.agreement_p(points(changes, changes), 0) == 1 / (1 + PERMUTATIONS)


def test_the_greedy_search_stands_beside_permuted_scores() -> None:
    shared = {"surface": "text", "label": "harmful", "decision": "unsafe", "readable": 9, "v_s": 0.9}
    rows = [
        {**shared, "query_id": f"q{number}", "topic": f"t{number}", "search": search, "flipped": flipped, "size": size}
        for number in range(4)
        for search, size, flipped in ((SCORES, 2, True), (PERMUTED, 2, True), (PERMUTED, 5, True), (PERMUTED, 2, False))
    ]
    heading = claims.removal_heading(STUDY, pd.DataFrame(rows))  # type: ignore[arg-type]
    # Of three permuted searches one flips with no more than two positions.
    assert "hiding 2 positions (median)" in heading.title and heading.title.endswith("on permuted scores 33%")
