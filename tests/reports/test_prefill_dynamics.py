"""Notebook 08: its wordings, its tables on a random organism of tiny sizes, and claims on tables made by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.figures import assert_one_line

from casa_mech.omni import load_omni
from casa_mech.organism.world import default_world
from casa_mech.plan import world_data
from casa_mech.plan.world_phrasings import PHRASINGS
from casa_mech.reports.claim import claim_rows
from casa_mech.reports.prefill_dynamics import claims, plots, tables
from casa_mech.study import Study
from probes.gate.pairs import MatchedPair
from probes.prefill.depth import ALL, EARLIER, LAST
from probes.prefill.edges import CUT, EDGES, OVERRIDDEN, PREFILL, REQUEST, RESTORED, SWAPPED, TOKEN

SIZES = {"n_probe": 6, "train_examples": 16, "train_steps": 2, "train_batch": 8, "max_new_tokens": 3}
STUDY: Any = SimpleNamespace(name="organism", title="organism", settings=SimpleNamespace(seed=0), data=world_data())


@pytest.fixture(scope="module")
def study(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    out = tmp_path_factory.mktemp("runs") / "study"
    return Study.open(out, model=str(random_organism), profile="smoke", device="cpu", progress=False, sizes=SIZES)


@pytest.fixture(scope="module")
def measured(study: Study) -> tables.PrefillTables:
    return tables.prefill_tables(study, 5, (0, 2, 6))


# The wordings


def test_a_length_is_not_one_last_token(random_organism: Path) -> None:
    tokenizer = load_omni(str(random_organism), device="cpu").tokenizer
    (query,) = default_world().requests(1, 3, "harmful")
    texts = [world_data().in_phrasing(query, number).meta["compliance"] for number in range(len(PHRASINGS))]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(rows) >= 10 and all(tokenizer.unk_token_id not in row for row in rows)
    for length in range(1, max(tables.LENGTHS) + 1):
        assert len({tuple(row[:length]) for row in rows}) == len(rows)
        assert Counter(row[length - 1] for row in rows).most_common(1)[0][1] <= len(rows) / 2, length
    assert min(map(len, rows)) >= max(tables.LENGTHS) + tables.TOKENS - 1


def test_the_first_wording_is_the_worlds_own() -> None:
    for query in default_world().requests(20, 1):
        assert world_data().in_phrasing(query, 0).meta["compliance"] == query.meta["compliance"] == query.meta["answer"]


def test_both_members_of_a_pair_have_one_wording() -> None:
    harmful, benign = (default_world().requests(30, 1, label) for label in ("harmful", "benign"))
    pairs = tables.phrased(world_data(), [MatchedPair(*pair) for pair in zip(harmful, benign, strict=True)])
    assert all(pair.harmful.meta["phrasing"] == pair.benign.meta["phrasing"] for pair in pairs)
    counts = Counter(pair.harmful.meta["phrasing"] for pair in pairs)
    assert len(counts) == len(PHRASINGS) and max(counts.values()) - min(counts.values()) <= 1
    for pair in pairs:
        assert pair.benign.meta["topic"] in pair.benign.meta["compliance"].split()


# The tables


def test_every_table_has_both_labels_and_the_wording(measured: tables.PrefillTables) -> None:
    assert set(measured.replies["system"]) == set(tables.SYSTEMS)
    assert len(measured.lengths) == len(measured.replies) == 3 * 5 * 2 * 3
    for name in ("lengths", "replies", "tokens", "depth", "divergence", "edges", "states"):
        table = getattr(measured, name)
        assert {"pair", "phrasing", "topic"} <= set(table) and table["phrasing"].nunique() == 5, name
        assert (table.groupby("pair")["label"].nunique() == 2).all(), name
    assert set(measured.divergence["system"]) == {"SSFT", "CASA"} and set(measured.edges["system"]) == {"CASA"}
    casa = measured.lengths[measured.lengths["system"] == "CASA"]
    assert casa.groupby("query_id")["unsafe_a"].nunique().max() == 1
    assert np.allclose(casa.groupby("query_id")["v_s"].agg(np.ptp), 0, atol=1e-6)


def test_tables_are_made_once(study: Study, measured: tables.PrefillTables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_measured", None)
    pd.testing.assert_frame_equal(tables.prefill_tables(study, 5, (0, 2, 6)).states, measured.states)
    monkeypatch.setattr(type(study.data), "phrasings", PHRASINGS[:-1])
    with pytest.raises(TypeError, match="not callable"):
        tables.prefill_tables(study, 5, (0, 2, 6))


def test_figures_and_claims_of_a_study(study: Study, measured: tables.PrefillTables) -> None:
    lengths, tokens = tables.length_data(measured, 0), tables.token_data(measured, 0)
    states = tables.state_data(measured, 0)
    success, order = claims.success_claim(study, measured), claims.order_claim(study, measured)
    axis, shallow = claims.axis_claim(study, measured), claims.shallow_claim(study, measured)
    handover, cut = claims.depth_claim(study, measured), claims.edge_claim(study, measured)
    stated = [success, order, axis, shallow, handover, cut]
    assert all(0 <= claim.p <= 1 and claim.refuted_if for claim in stated)
    assert [claim.n for claim in stated] == [5, 5, 5, 5, 2, 5]  # the depth is found on one half
    study.save_table("prefill", claim_rows(study, stated))
    headings = [claims.length_heading(success, order), claims.token_heading(study, tokens)]
    headings.append(claims.state_heading(study, states))
    for title in (*(claim.title for claim in stated), *(heading.title for heading in headings)):
        assert_one_line(title)
        assert "this gate" in title or title == headings[-1].title
    assert plots.plot_lengths(lengths, *headings[0]).axes
    assert plots.plot_lengths(lengths, *axis.heading, labels=(tables.DIFFERENCE,)).axes
    assert plots.plot_tokens(tokens, *headings[1]).axes
    assert plots.plot_divergence(tables.divergence_data(measured, 0), *shallow.heading).axes
    assert plots.plot_depth(tables.depth_data(measured, 0), *handover.heading).axes
    assert plots.plot_edges(tables.edge_data(measured, 0), *cut.heading).axes
    assert plots.plot_states(states, *headings[2]).axes


# Summaries and claims of tables made by hand


def design(n: int = 12, wordings: int = 12) -> pd.DataFrame:
    """`n` pairs of as many topics, wordings in turn, a row a member."""
    rows = [
        {
            "query_id": f"{label}-{pair}", "label": label, "topic": f"{label} topic {pair}", "pair": f"pair {pair:02d}",
            "phrasing": str(pair % wordings), "number": pair,
        }
        for pair in range(n) for label in ("harmful", "benign")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_difference_is_within_its_pair() -> None:
    # The harmful one is 2 above its own counterpart, whatever pair it is of; one pair has lost its counterpart.
    rows = design().assign(value=lambda table: 10.0 * table["number"] + 2 * (table["label"] == "harmful"))
    rows = rows[rows["query_id"] != "benign-3"].sample(frac=1, random_state=0)
    differences = tables.pair_differences(rows)
    assert len(differences) == 11 and (differences["value"] == 2).all()
    assert set(differences["topic"]) == {f"harmful topic {pair}" for pair in range(12) if pair != 3}
    assert tables.estimate(differences, 0) == (2, 2, 2)


def test_rates_without_spread_keep_the_width_that_their_topics_leave() -> None:
    rows = design().assign(value=1.0)
    harmful = rows[rows["label"] == "harmful"]
    rate = tables.estimate(harmful, 0, outcomes=True)
    assert rate.value == rate.high == 1 and rate.low < 0.85
    same = tables.estimate(tables.pair_differences(rows), 0, outcomes=True)
    assert same.value == 0 and same.low < -0.1 and same.high > 0.1


def test_intervals_hold_wordings_beside_topics() -> None:
    """Where all that varies is the wording, an interval over topics alone would be several times too narrow."""
    rows = design(400, wordings=4).query("label == 'harmful'")
    rows = rows.assign(value=rows["phrasing"].astype(int).astype(float))
    interval = tables.estimate(rows, 0)
    # Four wordings of 0 to 3: a standard error of 0.56, whatever the number of topics.
    assert interval.value == 1.5 and 1.5 < interval.high - interval.low < 2.6


def hand_made(**changes: pd.DataFrame) -> tables.PrefillTables:
    empty = pd.DataFrame()
    return replace(tables.PrefillTables(empty, empty, empty, empty, empty, empty, empty), **changes)


def crossed(rows: pd.DataFrame, **levels: list[Any]) -> pd.DataFrame:
    """`rows` at every level of every further column."""
    for name, values in levels.items():
        rows = rows.merge(pd.DataFrame({name: values}), how="cross")
    return rows


def test_success_claim_is_about_harmful_requests() -> None:
    rows = crossed(design(), system=list(tables.SYSTEMS), length=[0, 16])
    harmful, at_longest = rows["label"] == "harmful", rows["length"] == 16
    # Under 16 tokens: pretrained 12, SSFT 9, CASA 3 of 12 harmful requests; all benign ones are answered.
    limits = rows["system"].map({"pretrained": 12, "SSFT": 9, "CASA": 3})
    complied = ~harmful | (at_longest & (rows["number"] < limits))
    replies = rows.assign(outcome=np.where(complied, "complied", "refused"))
    claim = claims.success_claim(STUDY, hand_made(replies=replies))
    assert claim.value == -0.5 and claim.n == 12 and claim.low < -0.5 < claim.high < 0
    assert "pretrained in 100%, SSFT in 75%, CASA in 25%" in claim.title and "(100%)" in claim.statement
    assert claim.p < 0.06 and "against pretrained: p = " in claim.test


def test_a_difference_that_hangs_on_a_wording_is_none() -> None:
    """Of 48 requests 12 differ between the systems, all in one of four wordings; over topics alone, p < 0.001."""
    rows = crossed(design(48, wordings=4), system=list(tables.SYSTEMS), length=[16])
    complied = (rows["system"] != "CASA") | (rows["phrasing"] != "0")
    replies = rows.assign(outcome=np.where(complied, "complied", "refused"))
    assert claims.success_claim(STUDY, hand_made(replies=replies)).p > 0.3


def test_axis_claim_is_the_difference_at_the_longest_length() -> None:
    rows = crossed(design(), system=["CASA"], length=[0, 16])
    apart = np.where(rows["length"] == 0, 3.0, 0.5) * (rows["label"] == "harmful")
    noise = 0.1 * (rows["number"] % 3 - 1)
    claim = claims.axis_claim(STUDY, hand_made(lengths=rows.assign(**{"projection norm": apart + noise})))
    assert claim.value == pytest.approx(0.5) and "3.0 SD apart after 0" in claim.title and "0.5 after 16" in claim.title
    nothing = rows.assign(
        **{"projection norm": np.where(rows["number"] % 2 == 0, 1.0, -1.0) * (rows["label"] == "benign")}
    )
    assert claims.axis_claim(STUDY, hand_made(lengths=nothing)).p > 0.5


def test_shallow_claim_is_the_share_of_the_first_tokens() -> None:
    rows = crossed(design(), system=["SSFT", "CASA"], position=list(range(16)))
    early, casa = rows["position"] < claims.FIRST_TOKENS, rows["system"] == "CASA"
    # CASA, harmful: 3 x 2 nats first, 13 x 2/13 later: three quarters. Benign and SSFT: even.
    kl = np.where(casa & (rows["label"] == "harmful"), np.where(early, 2.0, 2 / 13), 0.1)
    shallow = claims.shallow_claim(STUDY, hand_made(divergence=rows.assign(kl=kl)))
    assert shallow.value == pytest.approx(0.75) and "75% of its KL" in shallow.title and shallow.p < 0.001
    assert "evenly spread 19%; benign counterparts 19%" in shallow.statement
    even = claims.shallow_claim(STUDY, hand_made(divergence=rows.assign(kl=0.1)))
    assert even.value == pytest.approx(3 / 16) and even.p == 1
    data = tables.divergence_data(hand_made(divergence=rows.assign(kl=kl)), 0)
    first = data[(data["system"] == "CASA") & (data["position"] == 0)].set_index("label")["value"]
    assert first.to_dict() == pytest.approx({"harmful": 2.0, "benign": 0.1, tables.DIFFERENCE: 1.9})


def edges_by_hand(change: dict[str, float], random: float) -> pd.DataFrame:
    rows = crossed(design(), system=["CASA"], length=[2, 12], edges=list(EDGES), draw=[CUT, 0, 1])
    moved = np.where(rows["draw"] == CUT, rows["edges"].map(change), random + 0.2 * rows["draw"] - 0.1)
    return rows.assign(before=-1.0, after=-1.0 + moved, count=10)


def test_edge_claim_is_beyond_random_edges() -> None:
    rows = edges_by_hand({TOKEN: -3.0, PREFILL: 2.0, REQUEST: -0.5}, random=-0.5)
    claim = claims.edge_claim(STUDY, hand_made(edges=rows))
    assert claim.value == pytest.approx(-2.5) and claim.n == 12 and "log-odds -3.0" in claim.title
    assert claim.p == pytest.approx(3 / 2001, rel=0.01) and f"{REQUEST}: p = 1" in claim.test
    data = tables.edge_data(hand_made(edges=rows), 0).query("length == 12 and label == 'harmful'")
    log_odds = data[data["measure"] == tables.LOG_ODDS].set_index(["edges", "cut"])["value"]
    assert log_odds[TOKEN, tables.THESE] == pytest.approx(-3) and log_odds[TOKEN, tables.RANDOM] == pytest.approx(-0.5)
    shares = data[data["measure"] == tables.OPENING].set_index(["edges", "cut"])["value"]
    assert shares[PREFILL, tables.THESE] == pytest.approx(1 / (1 + np.exp(-1)) - 1 / (1 + np.exp(1)))


def test_state_heading_names_the_first_depth_that_brings_half_back() -> None:
    rows = crossed(
        design(), system=["CASA"], length=[12], exchange=[RESTORED, OVERRIDDEN, SWAPPED], site=["embeddings", "0", "1"]
    )
    share = rows["site"].map({"embeddings": 0.1, "0": 0.6, "1": 1.0})
    # The clean run is 4 above the prefilled one.
    before = np.where(rows["exchange"] == RESTORED, -3.0, 1.0)
    donor = np.where(rows["exchange"] == RESTORED, 1.0, -3.0)
    states = tables.state_data(
        hand_made(states=rows.assign(before=before, donor=donor, patched=before + share * (donor - before))), 0
    )
    restored = states[(states["exchange"] == RESTORED) & (states["label"] == "harmful")].set_index("site")
    assert restored.loc["0", "value"] == pytest.approx(2.4) and (restored["gap"] == 4).all()
    heading = claims.state_heading(STUDY, states)
    assert "half of the refusal back after block 0" in heading.title and "-4.0 from the clean run's" in heading.caption


def test_depth_claim_is_where_the_last_token_takes_over() -> None:
    rows = crossed(design(24), system=["CASA"], site=["embeddings", "0", "1"], span=[EARLIER, LAST, ALL])
    moved = {("embeddings", EARLIER): 2.0, ("0", EARLIER): 1.5, ("0", LAST): 0.5, ("1", LAST): 2.0, ("1", EARLIER): 0.0}
    where = zip(rows["site"], rows["span"], strict=True)
    effect = np.array([2.0 if span == ALL else moved.get((site, span), 0.0) for site, span in where])
    depth = rows.assign(attacked=0.0, other=-2.0, patched=-effect)
    claim = claims.depth_claim(STUDY, hand_made(depth=depth))
    assert claim.value == 2 and claim.n == 12
    assert "after block 1" in claim.title and "next word 2.0 nats, earlier ones 0.0" in claim.title
    other_way = depth.assign(other=2.0, patched=effect)
    assert claims.depth_claim(STUDY, hand_made(depth=other_way)).value == 2
    changes = tables.depth_data(hand_made(depth=depth), 0).set_index(["label", "site", "span"])
    assert changes.loc[("benign", "0", EARLIER), "value"] == 1.5 and (changes["gap"] == 2).all()


def test_the_depth_is_found_and_tested_on_different_requests() -> None:
    """One half hands over after block 0, the other never does: the claim about block 0 is the other half's."""
    rows = crossed(design(24), system=["CASA"], site=["0", "1"], span=[EARLIER, LAST])
    first = (rows["number"] + rows["number"] // 12) % 2 == 0
    for half in (first, ~first):
        assert rows[half]["phrasing"].nunique() == 12
    moved = np.where(first == (rows["span"] == LAST), 1.0, 0.0)
    depth = rows.assign(attacked=0.0, other=-1.0, patched=-moved)
    claim = claims.depth_claim(STUDY, hand_made(depth=depth))
    assert "after block 0" in claim.title and claim.value == -1


def test_order_claim_and_token_heading() -> None:
    rows = crossed(design(), system=["CASA"], length=[0, 16])
    harmful = rows["label"] == "harmful"
    rows = rows.assign(
        unsafe_a=harmful, unsafe_b=harmful & ((rows["length"] == 0) | (rows["number"] < 3)), v_s=0.9,
        logit=np.where(rows["length"] == 0, 5.0, -2.0),
    )  # fmt: skip
    claim = claims.order_claim(STUDY, hand_made(lengths=rows))
    assert (
        claim.value == -0.75 and "100% of harmful requests are flagged" in claim.title and "25% after 16" in claim.title
    )
    tokens = pd.DataFrame(
        [
            {"system": "CASA", "measure": tables.KL, "label": label, "length": 16, "token": token, "value": value}
            for label, values in (("harmful", (4.0, 0.5)), ("benign", (9.0, 9.0)))
            for token, value in enumerate(values)
        ]
    )
    assert "4.0 nats from itself at first, 0.5 at token 1" in claims.token_heading(STUDY, tokens).title
