"""The comparison's arithmetic: means over attacks and seeds, paired tests, claims, ablations, published numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from casa_mech.casa.config import CasaConfig
from casa_mech.compare.ablations import AXES, FEW, PROMPT_AXIS, ablation_frame, systems_of, variants
from casa_mech.compare.comparison import Comparison
from casa_mech.compare.grid import COST_COLUMNS, GridResult
from casa_mech.compare.intervals import macro_interval
from casa_mech.compare.paired import effect, paired_tests, pairs_of
from casa_mech.compare.systems import training_records
from casa_mech.compare.tables import ALL, compact, grid_rows, summarise
from casa_mech.errors import InputError
from casa_mech.judging.published import published_rates
from casa_mech.judging.stats import wilson
from casa_mech.reports.ablations import claims as ablation_claims
from casa_mech.reports.ablations import tables as ablation_tables
from casa_mech.reports.ablations.plots import plot_ablations, plot_by_attack
from casa_mech.reports.defences import claims, tables
from casa_mech.reports.defences.plots import plot_grid, plot_tradeoff
from casa_mech.reports.published import plot_published_rates

ATTACKS = ("plain", "image")
N = 40


def comparison(failing: dict[str, float], seeds: Sequence[int] = (0,), scored: Sequence[str] = ()) -> GridResult:
    """Replies of systems that answer this share of attacks and refuse a tenth of the benign, topic by topic."""
    rows, costs = [], []
    for name, share in failing.items():
        for seed in seeds:
            costs.append({**dict.fromkeys(COST_COLUMNS, 0), "model": "m", "defense": name, "seed": seed,
                          "training_seconds": np.nan, "relative_seconds": 1.5, "relative_low": 1.4,
                          "relative_high": 1.6, "timed": 9})  # fmt: skip
            for attack in ATTACKS:
                for label in ("harmful", "benign"):
                    for i in range(N):
                        hit = i < share * N if label == "harmful" else i >= 0.1 * N
                        topic = f"{label}{i % 20}"
                        score = (label == "harmful") + 0.01 * i if name in scored else np.nan
                        rows.append({
                            "model": "m", "defense": name, "attack": attack, "label": label, "seed": seed,
                            "surface": "text" if attack == "plain" else attack, "topic": topic, "cluster": topic,
                            "split": "seen" if i % 2 else "held_out", "query_id": f"{label}{i}", "gate_score": score,
                            "outcome": "complied" if hit else "refused", "safety_token": None, "score": np.nan,
                        })  # fmt: skip
    return GridResult(pd.DataFrame(rows), pd.DataFrame(costs, columns=list(COST_COLUMNS)), len(rows), 0)


def test_a_mean_over_attacks_counts_each_once() -> None:
    hits = [True] * 10 + [False] * 10 + [True] * 40
    groups, clusters = ["a"] * 20 + ["b"] * 40, list(range(60))
    value, low, high = macro_interval(hits, groups, clusters)
    assert value == pytest.approx(0.75)
    assert 0.5 < low < 0.7 and 0.8 < high < 0.95
    # One group of independent draws is a plain rate.
    assert macro_interval(hits[:20], groups[:20], clusters[:20]) == (0.5, *wilson(10, 20))
    topics = [index % 10 for index in range(20)]
    assert macro_interval([False] * 20, ["a"] * 20, topics) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 10)))


def test_no_spread_is_no_certainty() -> None:
    """One attack that always works beside one that never does is not 50 % for sure."""
    hits, groups = [True] * 20 + [False] * 20, ["a"] * 20 + ["b"] * 20
    value, low, high = macro_interval(hits, groups, [f"{i % 20}" for i in range(40)])
    reach = (1 - 0.025 ** (1 / 20)) / 2
    assert (value, low, high) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach))
    value, low, high = macro_interval([0.0] * 20, ["a"] * 20, list(range(20)), limits=(-1.0, 1.0))
    assert (value, low, high) == pytest.approx((0.0, -2 * reach, 2 * reach))


def test_an_interval_over_seeds_covers_other_seeds() -> None:
    """Two attacks in three trainings: means of 0.2, 0.3 and 0.7, and Student's t of two degrees of freedom."""
    shares = {0: (0.1, 0.3), 1: (0.2, 0.4), 2: (0.6, 0.8)}
    rows = [
        (seed, attack, n, n < shares[seed][attack] * 100) for seed in shares for attack in (0, 1) for n in range(100)
    ]
    seeds, attacks, topics, hits = (list(column) for column in zip(*rows, strict=True))
    value, low, high = macro_interval(hits, attacks, topics, runs=seeds)
    half = stats.sem([0.2, 0.3, 0.7]) * stats.t.ppf(0.975, 2)
    assert value == pytest.approx(0.4)
    assert low == 0.0 and 0.4 + 0.85 * half < high <= 1.0, "0.4 - half is below 0"
    one = [row for row in rows if row[0] == 1]
    _, attacks, topics, hits = (list(column) for column in zip(*one, strict=True))
    value, low, high = macro_interval(hits, attacks, topics, runs=[1] * 200)
    assert value == pytest.approx(0.3) and low > 0.2 and high < 0.4, "of one seed the topics alone"


def test_the_summary_has_every_scope() -> None:
    result = comparison({"none": 0.5, "casa": 0.1}, seeds=(0, 1, 2), scored=["casa"])
    table = summarise(result)
    part = table[(table["defense"] == "casa") & (table["metric"] == "attack_success")].set_index("scope")
    assert list(part.index) == [ALL, "surface:text", "surface:image", "plain", "image"]
    assert part["value"].tolist() == pytest.approx([0.1] * 5)
    assert (part["seeds"] == 3).all() and part.loc[ALL, "n"] == 2 * 3 * N
    assert ((part["low"] <= part["value"]) & (part["value"] <= part["high"])).all()
    metrics = set(table["metric"])
    assert {"over_refusal", "benign_answered", "attack_success:held_out", "relative_seconds"} <= metrics
    gates = table[table["metric"] == "gate_auroc"]
    assert set(gates["defense"]) == {"casa"} and (gates["value"] == 1).all()
    assert compact(table).set_index("defense").loc["casa", "attack success"].startswith("10.0 [")
    assert len(grid_rows(result)[lambda rows: rows["metric"] == "relative_seconds"]) == 6


def test_rows_are_tested_against_casa_on_the_same_queries() -> None:
    result = comparison({"none": 0.5, "casa": 0.1, "coca": 0.1})
    tests = paired_tests(result.replies)
    assert set(tests["defense"]) == {"none", "coca"} and set(tests["against"]) == {"casa"}
    row = tests[(tests["defense"] == "none") & (tests["metric"] == "attack_success") & (tests["scope"] == "plain")]
    (row,) = row.to_dict("records")
    assert (row["only_defense"], row["only_against"], row["n"]) == (16, 0, N)
    # Queries 4 to 19 fail under the one alone: 16 topics, two of whose 2**16 swaps are as uneven.
    assert row["test"] == "permutation of topics" and row["p"] == pytest.approx(2 / 10000, abs=3e-4)
    assert (row["value"], row["value_against"], row["difference"]) == pytest.approx((0.5, 0.1, 0.4))
    assert row["low"] < 0.4 < row["high"]
    for overall in (False, True):
        family = tests[(tests["scope"] == ALL) == overall]
        assert list(family["p_holm"]) == pytest.approx(list(multipletests(family["p"], method="holm")[1]))
    same = tests[tests["defense"] == "coca"]
    assert (same["difference"] == 0).all() and (same["p"] == 1).all() and (same["low"] < 0).all()
    assert paired_tests(result.replies[result.replies["defense"] != "casa"]).empty


def pairs_by_topic(differing: dict[int, int], topics: int = 30, copies: int = 4) -> pd.DataFrame:
    """Pairs under one attack: by seed the number of topics in which the row alone fails, in all `copies`."""
    return pd.DataFrame(
        {"attack": "plain", "label": "harmful", "seed": seed, "query_id": f"{topic}-{copy}", "cluster": f"t{topic}",
         "outcome": "complied" if topic < number else "refused", "outcome_other": "refused"}
        for seed, number in differing.items() for topic in range(topics) for copy in range(copies)
    )  # fmt: skip


def test_under_one_attack_a_topic_is_one_draw() -> None:
    """Five topics of four requests each: exact p = 2 / 2**5, where twenty requests would give 2 / 2**20."""
    found = effect(pairs_by_topic({0: 5}))
    assert found.only_defense == 20 and found.p == pytest.approx(2 / 2**5)
    assert found.difference == pytest.approx(5 / 30) and found.high - found.low > 0.2, (
        "an interval of 30 draws, not of 120"
    )


@pytest.mark.parametrize(("differing", "certain"), [({0: 0, 1: 2, 2: 12}, False), ({0: 9, 1: 10, 2: 9}, True)])
def test_what_one_training_gave_is_no_difference_between_systems(differing: dict[int, int], certain: bool) -> None:
    """Seed differences of 0.0, 6.7 and 40 points have t = 1.2, of 30, 33 and 30 points t = 28."""
    found = effect(pairs_by_topic(differing))
    expected = [number / 30 for number in differing.values()]
    assert found.value == pytest.approx(np.mean(expected)) and found.value_against == 0
    assert found.test == "hierarchical bootstrap of topics and seeds"
    assert (found.p < 0.05) == certain == (found.low > 0)
    by_t = stats.ttest_1samp(expected, 0).pvalue
    assert found.p >= 0.9 * by_t, "topics on top of seeds make it no more certain"
    half = stats.sem(expected) * stats.t.ppf(0.975, 2)
    assert found.high - found.low >= 1.5 * half


def test_undecided_pairs_are_left_out_and_unequal_attacks_count_alike() -> None:
    replies = comparison({"none": 0.5, "casa": 0.1}).replies
    replies.loc[(replies["defense"] == "none") & (replies["query_id"] == "harmful0"), "outcome"] = "undecided"
    replies = replies[(replies["attack"] == "plain") | replies["query_id"].isin([f"harmful{i}" for i in range(1, 11)])]
    pairs = pairs_of(replies[replies["defense"] == "none"], replies[replies["defense"] == "casa"])
    found = effect(pairs, {"harmful": "complied"})
    assert found.n == 39 + 10
    assert found.value == pytest.approx((19 / 39 + 10 / 10) / 2)
    assert found.difference == pytest.approx(found.value - found.value_against)
    with pytest.raises(InputError, match="no query in common"):
        pairs_of(replies[replies["defense"] == "none"], replies[replies["defense"] == "casa"].assign(seed=9))


def test_claims_follow_the_data() -> None:
    found = _comparison(comparison({"none": 0.5, "casa": 0.1, "casa + safety prompt": 0.0, "coca": 0.2}))
    first, second, third = claims.success_claim(found), claims.refusal_claim(found), claims.rival_claim(found)
    assert first.value == pytest.approx(-0.4) and first.low < -0.4 < first.high < 0 and first.p < 0.05
    assert "from 50.0 to 10.0 %" in first.title and "-40.0 points" in first.statement
    assert second.value == 0 and second.p == 1
    assert "coca is the best other" in third.statement  # CASA with the prompt is no other
    worse = claims.success_claim(_comparison(comparison({"none": 0.1, "casa": 0.5})))
    assert worse.value == pytest.approx(0.4)
    assert all(claim.refuted_if for claim in (first, second, third))


def test_variants_change_one_thing_and_share_the_base() -> None:
    every = variants(4, 600)
    systems = systems_of(every)
    assert systems[0].label == "casa"
    assert len(systems) == 4 + 3 * 6 + 3  # the base and its three neighbours; one axis each
    for variant in every:
        if variant.axis != PROMPT_AXIS:
            assert len(variant.system.training) <= 1 + (variant.level == "replace")
    layers = [variant.level for variant in every if variant.axis == "layer"]
    assert layers == ["block 0", "block 2", "block 3", "norm"]
    sizes = [variant.system.examples for variant in every if variant.axis == "size"]
    assert sizes == [75, 150, 300, None]
    base = CasaConfig()
    for variant in every:
        if variant.system.label == "casa" and variant.axis in ("form", "rule", "beta", "positions"):
            assert str(getattr(base, variant.axis)) == variant.level
    few = variants(4, 600, only=FEW)
    assert len(systems_of(few)) == 8 and {variant.axis for variant in few} == {
        PROMPT_AXIS,
        "form",
        "rule",
        "beta",
        "size",
    }
    with pytest.raises(InputError, match="unknown ablation 'forms'; ablations: prompt, form"):
        variants(4, 600, ("forms",))
    with pytest.raises(InputError, match="unknown variant 'form=R9'; there are"):
        variants(4, 600, only=("form=R9",))
    assert set(AXES) >= {"prompt", "layer"}


def test_circuit_breakers_keep_their_own_schedule() -> None:
    from casa_mech.compare.systems import ComparedSystem

    shared = {"max_steps": 200, "batch_size": 32, "micro_batch_size": 32}
    given, records = training_records(ComparedSystem(defense="circuit-breaker"), shared, 3)
    assert given == {"max_steps": 150, "seed": 3} and records[0].batch_size == 16
    assert training_records(ComparedSystem(defense="circuit-breaker"), {"max_steps": 5}, 0)[0]["max_steps"] == 5
    given, records = training_records(ComparedSystem(defense="casa", training={"max_steps": 9}), shared, 3)
    assert (records[1].max_steps, records[1].batch_size, records[1].seed) == (9, 32, 3)


def test_figures_draw_what_there_is() -> None:
    result = comparison({"none": 0.5, "casa": 0.1, "casa + safety prompt": 0.0, "ssft-token": 0.3,
                         "ssft-token + safety prompt": 0.2, "casa, form mean": 0.3})  # fmt: skip
    chosen = variants(2, 64, ("prompt", "form"), ("form=mean",))
    found = _comparison(result)
    cells, points = tables.grid_data(found.summary), tables.tradeoff_data(found.summary)
    assert len(plot_grid(cells, "t").axes) == 2
    assert "not refused 10" in {text.get_text().splitlines()[-1] for text in plot_grid(cells, "t").axes[0].texts}
    assert len(points) == 6 and plot_tradeoff(points, "t").axes
    assert points.set_index("defense").loc["casa", "not_refused"] == pytest.approx(0.1)
    assert compact(found.summary).set_index("defense").loc["casa", "not refused"].startswith("10.0 [")
    found = Comparison(
        "m", result, grid_rows(result), ablation_frame(found.summary, chosen), found.tests, tuple(chosen)
    )
    assert ablation_claims.attention_claim(found).value == pytest.approx(-0.2)
    assert ablation_claims.prompt_claim(found).value == pytest.approx(-0.05)
    assert "form mean" in ablation_claims.variant_claim(found).title
    assert set(ablation_tables.prompt_data(found)["scope"]) == {ALL, *ATTACKS}
    assert ablation_tables.variant_table(found).shape == (6, 3)
    assert plot_by_attack(ablation_tables.prompt_data(found), "t").axes
    data = ablation_tables.ablation_data(found)
    assert set(data["level"]) == {"mean", "pooled"} and plot_ablations(data, "t").axes
    assert plot_published_rates(published_rates(), "t").axes


def _comparison(result: GridResult) -> Comparison:
    return Comparison("m", result, grid_rows(result), summarise(result), paired_tests(result.replies))
