"""Notebook 09's tables, claims and figures, on a tiny untrained organism; and the bench of reading every depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.figures import assert_one_line

from casa_mech.judging.results import result_table
from casa_mech.omni import load_omni
from casa_mech.reports.claim import claim_table
from casa_mech.reports.lens import claims
from casa_mech.reports.lens.plots import plot_attention, plot_depth, plot_heads, plot_quality
from casa_mech.reports.lens.tables import (
    FROM_TEXT,
    LensTables,
    attention_data,
    best_heads,
    depth_data,
    head_data,
    lens_rows,
    lens_tables,
    quality_data,
)
from casa_mech.study import Study
from casa_mech.timing.lens import measure_extraction
from probes.lens.logit import LOGIT_LENS, TUNED_LENS


@pytest.fixture(scope="module")
def study(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    sizes = {"n_probe": 16, "train_examples": 32, "train_steps": 2, "train_batch": 8}
    out = tmp_path_factory.mktemp("runs") / "lens"
    return Study.open(out, progress=False, sizes=sizes, model=str(random_organism), profile="smoke")


@pytest.fixture(scope="module")
def tables(study: Study) -> LensTables:
    return lens_tables(study)


def test_tables_hold_every_request_and_are_found_again(study: Study, tables: LensTables) -> None:
    for table in (tables.depth, tables.quality):
        counts = table.groupby(["lens", "surface", "site", "label"]).size()
        # Text has one tuned lens, every other surface its own and that of text.
        assert len(counts) == (2 + 3 * 3) * 3 * 2 and set(counts) == {16}
        assert (FROM_TEXT, "text") not in {where[:2] for where in counts.index}
    assert not tables.depth.duplicated(["lens", "site", "query_id"]).any()
    assert len(tables.heads) == 2 * 2 * 3 * 2 * 8
    shares = tables.patterns.groupby(["query_id", "layer", "head"])["share"].sum()
    assert len(shares) == 3 * 48 and np.allclose(shares, 1, atol=1e-5)
    again = lens_tables(study)
    for name, table in vars(tables).items():
        pd.testing.assert_frame_equal(getattr(again, name), table)


def test_claims_stand_on_their_tables(study: Study, tables: LensTables) -> None:
    found = [make(study, tables) for make in (claims.depth_claim, claims.quality_claim, claims.head_claim)]
    for claim in found:
        assert claim.low <= claim.value <= claim.high and 0 < claim.p <= 1 and claim.n > 0
        assert claim.refuted_if and f"{claim.value:.2f}" in claim.statement
        assert_one_line(claim.title)
    assert [claim.figure for claim in found] == ["lens_depth", "lens_quality", "lens_heads"]
    (best,) = best_heads(tables.heads, 1)
    rows = tables.heads.set_index(["layer", "head"]).loc[[best]].query("surface == 'text' and split != 'seen'")
    assert found[2].value == pytest.approx(rows["support_logit"].mean()) and found[2].n == len(rows)
    assert list(claim_table(found).columns) == ["claim 1", "claim 2", "claim 3"]


def test_depth_claim_names_the_first_depth_that_separates(study: Study, tables: LensTables) -> None:
    rng = np.random.default_rng(0)
    sign = np.where(tables.depth["label"] == "harmful", 3.0, -3.0)
    signal = np.where(tables.depth["depth"] >= 2, sign, 0) + rng.standard_normal(len(sign))
    made = LensTables(tables.depth.assign(difference=signal), tables.quality, tables.heads, tables.patterns)
    claim = claims.depth_claim(study, made)
    assert "after block 1" in claim.title and claim.value > 0.95


def test_translators_fitted_on_a_surface_read_it_better_than_those_of_text(tables: LensTables) -> None:
    inner = tables.quality[tables.quality["depth"] < tables.quality["depth"].max()]
    means = inner.groupby(["surface", "lens"])["kl"].mean()
    for surface in ("image", "audio"):
        assert means[surface, TUNED_LENS] < means[surface, FROM_TEXT]


def test_quality_claim_says_whether_translators_of_text_carry_over(study: Study) -> None:
    """Hand-made: the logit lens at 2 nats, tuned on text at 3 or 1, tuned there at 0.5, on every request."""
    for carried, words in ((3.0, "no nearer to the model than none"), (1.0, "are nearer to the model than none")):
        kl = {LOGIT_LENS: 2.0, FROM_TEXT: carried, TUNED_LENS: 0.5}
        rows = [
            {"query_id": f"{surface}-{item}", "topic": f"t{item}", "surface": surface, "lens": lens, "depth": depth,
             "site": str(depth - 1), "kl": value if depth == 1 else 9.0}
            for surface in ("text", "image", "audio") for item in range(8)
            for lens, value in kl.items() for depth in (1, 2)
        ]  # fmt: skip
        claim = claims.quality_claim(study, LensTables(*(pd.DataFrame(rows) for _ in range(4))))
        assert claim.value == pytest.approx(carried - 2) and claim.n == 16 and words in claim.statement
        assert f"2.00 nats from the model, tuned on text {carried:.2f}, tuned there 0.50" in claim.title


def test_labels_are_permuted_over_topics() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"topic": [f"t{item // 3}" for item in range(60)], "label": ["harmful"] * 30 + ["benign"] * 30}
    )
    by_label = np.where(frame["label"] == "harmful", 1.0, -1.0)
    assert claims._label_permutation(frame.assign(difference=by_label), 1, 199) == pytest.approx(1 / 200)
    # Values that belong to topics, not to labels: 60 queries, but only 20 draws.
    by_topic = np.repeat(rng.standard_normal(20), 3)
    assert claims._label_permutation(frame.assign(difference=by_topic), 0, 199) > 0.05


def test_figures_are_drawn_from_what_they_say(study: Study, tables: LensTables) -> None:
    depth, heads, attention = depth_data(tables, 0), head_data(tables, 0), attention_data(tables, 0)
    assert (depth["low"] <= depth["high"]).all() and set(depth["measure"]) == {"auroc", "difference"}
    assert len(heads) == 2 * 3 * 4
    figures = [
        plot_depth(depth, "title"),
        plot_quality(quality_data(tables, 0), "title"),
        plot_heads(heads, "title"),
        plot_attention(attention, *claims.attention_heading(study, attention)),
    ]
    assert all(figure.axes for figure in figures)
    result_table(lens_rows(study, depth, heads))


def test_bench_times_every_side(random_organism: Path) -> None:
    found = measure_extraction(load_omni(random_organism, device="cpu"), repeats=1)
    assert set(found) == {"extraction_bare", "extraction_lens", "extraction_lens_filtered"}
    for side in found.values():
        assert side["ratio"] > 0 and side["nnsight_seconds"] > 0
