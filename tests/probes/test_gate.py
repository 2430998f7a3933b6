"""What safety attention reads and what its decision rests on, against counts, sums and brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.patching import request
from scipy import stats

from casa_mech import vocabulary
from casa_mech.casa import Casa, CasaConfig
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Query
from probes.gate.attribution import GATE, attribute_token_difference
from probes.gate.calibration import reliability, spiegelhalter
from probes.gate.pairs import MatchedPair, aligned_pairs, pair_spans
from probes.gate.patching import INSERT, REMOVE, PatchEffects, Target, ablate_directions, patch_effects
from probes.gate.plots import plot_attention_maps
from probes.gate.positions import KEY, position_roles
from probes.gate.removal import PERMUTED, SCORES, Removal, _permuted, minimal_sets, sets_table
from probes.gate.safety_attention import (
    attention_maps,
    attention_shares,
    cosine_table,
    gate_directions,
    gate_inputs,
    whole_states,
)


def stirred(omni: Omni, config: CasaConfig = CasaConfig()) -> Casa:
    """A gate whose LoRA, rows and safety attention do something."""
    torch.manual_seed(1)
    casa = Casa.attach(omni, config)
    with torch.no_grad():
        for group in casa.parts.groups():
            for value in group.values():
                value.add_(0.3 * torch.randn_like(value))
    casa.parts.tokens.write()
    return casa


@pytest.fixture
def casa(tiny_omni: Omni) -> Casa:
    return stirred(tiny_omni)


@pytest.fixture
def pairs() -> list[MatchedPair]:
    words = [("bomb", "cake"), ("bomb", "tea"), ("name", "spell")]
    return [
        MatchedPair(request(one, "harmful", f"q{i}"), request(two, "benign", f"t{i}"))
        for i, (one, two) in enumerate(words)
    ]


def test_roles_and_spans_cover_the_prompt_once(
    casa: Casa, mixed_queries: list[Query], pairs: list[MatchedPair]
) -> None:
    batch = casa.omni.encode(mixed_queries)
    roles = position_roles(batch)
    assert torch.equal(roles >= 2, batch.prompt_mask)
    assert torch.equal(roles == 0, batch.inputs["attention_mask"] == 0)
    one, other = (casa.omni.encode([getattr(pair, side) for pair in pairs]) for side in ("harmful", "benign"))
    spans = pair_spans(one, other)
    assert spans[KEY].sum(dim=1).tolist() == [1, 1, 1]
    parts = torch.stack([mask for name, mask in spans.items() if name != "whole prompt"])
    assert torch.equal(parts.sum(dim=0) == 1, spans["whole prompt"]) and int(parts.sum(dim=0).max()) == 1


def test_pairs_of_another_layout_are_left_out(casa: Casa, pairs: list[MatchedPair]) -> None:
    longer = MatchedPair(pairs[0].harmful, Query.from_text("how do i make the cake today please ?", id="longer"))
    assert aligned_pairs(casa.omni, [*pairs, longer]) == pairs
    with pytest.raises(InputError, match="one layout"):
        aligned_pairs(casa.omni, [longer])


@pytest.mark.parametrize("form", ["mean", "pooled", "compete"])
def test_maps_hold_what_the_gate_reports(tiny_omni: Omni, mixed_queries: list[Query], form: str) -> None:
    casa = stirred(tiny_omni, CasaConfig(form=form))
    maps = attention_maps(casa, mixed_queries, batch_size=2)
    for reply, found in zip(casa.decide(mixed_queries, attention=True, merge=False), maps, strict=True):
        assert reply.query_id == found.query_id and reply.attention is not None
        np.testing.assert_allclose(found.weights, reply.attention, atol=1e-4)
        assert found.v_s == pytest.approx(reply.v_s, abs=1e-4)
    picture, clip = maps[3].media
    assert (picture.kind, clip.kind) == ("image", "audio")
    assert picture.weights.shape == (1, 3) and picture.content.shape == (28, 84, 3) and clip.content.shape[0] == 80
    assert picture.weights.sum() + clip.weights.sum() <= maps[3].weights.sum() + 1e-5
    shares = attention_shares(maps).groupby("query_id")
    np.testing.assert_allclose(shares["share"].sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(shares["even"].sum(), 1, rtol=1e-5)


def test_maps_can_be_drawn(casa: Casa, mixed_queries: list[Query]) -> None:
    figure = plot_attention_maps(attention_maps(casa, mixed_queries), "what it reads")
    assert len(figure.axes) >= 4


def test_key_word_has_its_share(casa: Casa, pairs: list[MatchedPair]) -> None:
    shares = attention_shares(attention_maps(casa, [pair.harmful for pair in pairs]))
    assert (shares[shares["span"] == KEY]["positions"] == 1).all()
    assert set(shares["span"]) == {KEY, "other text", "header"}


def test_cosines_are_those_of_numpy_and_chance_is_that_of_random_directions(casa: Casa) -> None:
    directions = gate_directions(casa)
    assert set(directions) == {"query", "read-out", "token difference"}
    rng = np.random.default_rng(0)
    states, harmful = rng.standard_normal((60, 64)), np.arange(60) % 2 == 0
    states[harmful] += 3 * directions["read-out"] / np.linalg.norm(directions["read-out"])
    table = cosine_table(directions, {"itself": directions["query"]}, states, harmful, list(range(60)))
    found = table.set_index(["gate_direction", "direction"])["cosine"]
    assert found["query", "itself"] == pytest.approx(1)
    gap = states[harmful].mean(axis=0) - states[~harmful].mean(axis=0)
    unit = directions["read-out"] / np.linalg.norm(directions["read-out"])
    assert found["read-out", "difference in means"] == pytest.approx(gap @ unit / np.linalg.norm(gap))
    row = table[(table["gate_direction"] == "read-out") & (table["direction"] == "difference in means")].iloc[0]
    assert row["low"] < row["cosine"] < row["high"] + 0.1
    random = rng.standard_normal((20_000, 64))
    share = np.mean(np.abs(random[:, 0] / np.linalg.norm(random, axis=1)) < table["chance"].iloc[0])
    assert share == pytest.approx(0.95, abs=0.01)


def test_whole_exchanges_make_the_whole_difference(casa: Casa, pairs: list[MatchedPair]) -> None:
    effects = patch_effects(casa, pairs, batch_size=2)
    table = effects.deltas()
    assert set(table["direction"]) == {INSERT, REMOVE} and table["span"].nunique() == 4
    whole = table[(table["span"] == "whole prompt") & table["site"].isin(["embeddings", "0", "1"])]
    np.testing.assert_allclose(whole["v_s_patched"], whole["v_s_donor"], atol=1e-5)
    np.testing.assert_allclose(whole["log_odds_patched"], whole["log_odds_donor"], atol=1e-3)
    np.testing.assert_allclose(table["v_s_patched"], 1 / (1 + np.exp(-table["log_odds_patched"])), atol=1e-5)
    np.testing.assert_allclose(whole["logit_patched"], whole["logit_donor"], atol=1e-4)
    entering = table[table["site"] == "embeddings"]
    key = entering[entering["span"] == KEY]
    np.testing.assert_allclose(key["v_s_patched"], key["v_s_donor"], atol=1e-5)
    elsewhere = entering[entering["span"].isin(["other text", "header"])]
    np.testing.assert_allclose(elsewhere["delta_v_s"], 0, atol=1e-6)
    # The last block's header is all that the language model's own logits are read from.
    header = table[(table["site"] == "1") & (table["span"] == "header")]
    np.testing.assert_allclose(header["logit_patched"], header["logit_donor"], atol=1e-4)
    summary = effects.summary()
    assert (summary["n"] == 3).all() and (summary["delta_v_s_low"] <= summary["delta_v_s_mean"] + 1e-9).all()


def test_batches_of_pairs_do_not_matter(casa: Casa, pairs: list[MatchedPair]) -> None:
    targets = [Target(0, KEY), Target("z.1", "whole prompt", 1)]
    tables = [patch_effects(casa, pairs, targets, size).effects for size in (1, 3)]
    keys = ["pair", "direction", "site"]
    one, other = (table.sort_values(keys).reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(one, other, atol=1e-5)


def test_heads_together_are_the_place(casa: Casa, pairs: list[MatchedPair]) -> None:
    """One head's exchange changes that head alone: exchanging every head at once is not what one of them does."""
    alone = [patch_effects(casa, pairs, [Target("z.1", "header", head)]).effects for head in (0, 1)]
    every = patch_effects(casa, pairs, [Target("z.1", "header")]).effects
    assert not np.allclose(alone[0]["logit_patched"], alone[1]["logit_patched"])
    assert not np.allclose(alone[0]["logit_patched"], every["logit_patched"])


def test_targets_that_do_not_exist_are_named(casa: Casa, pairs: list[MatchedPair]) -> None:
    with pytest.raises(InputError, match="no span 'verb'"):
        patch_effects(casa, pairs, [Target(0, "verb")])
    with pytest.raises(InputError, match=r"no head 9 at z\.0"):
        patch_effects(casa, pairs, [Target("z.0", KEY, 9)])
    with pytest.raises(InputError, match="no head 0 at 0"):
        patch_effects(casa, pairs, [Target(0, KEY, 0)])


def test_ablated_directions_are_gone_from_every_state(casa: Casa, mixed_queries: list[Query]) -> None:
    direction = np.random.default_rng(0).standard_normal((2, 64))
    table = ablate_directions(casa, mixed_queries, direction)
    assert sorted(table["ablated"].unique()) == [-1, 0, 1] and len(table) == 12
    nothing = table[table["ablated"] == -1].set_index("query_id")["v_s"]
    for reply in casa.decide(mixed_queries, merge=False):
        assert nothing[reply.query_id] == pytest.approx(reply.v_s, abs=1e-5)
    # Where the token rows lie along the direction, nothing is left for the model's own two logits to differ by.
    with torch.no_grad():
        norm = casa.omni.norm.weight
        rows = casa.omni.head.weight[list(casa.token_ids)]
        along = ((rows[1] - rows[0]) * norm).numpy()
    gone = ablate_directions(casa, mixed_queries, along)
    np.testing.assert_allclose(gone[gone["ablated"] == 0]["logit"], 0, atol=1e-4)
    with pytest.raises(InputError, match="not zero"):
        ablate_directions(casa, mixed_queries, np.zeros(64))


def test_contributions_sum_to_the_logit_difference(casa: Casa, mixed_queries: list[Query]) -> None:
    found = attribute_token_difference(casa, mixed_queries, batch_size=3)
    np.testing.assert_allclose(found.contributions.sum(axis=1), found.difference, atol=1e-4)
    replies = casa.decide(mixed_queries, merge=False)
    own = [reply.logit_unsafe - reply.logit_safe for reply in replies]
    np.testing.assert_allclose(found.difference, own, atol=1e-4)
    gate = found.contributions[:, found.components.index(GATE)]
    odds = [np.log(reply.v_s / (1 - reply.v_s)) for reply in replies]
    np.testing.assert_allclose(gate, odds, atol=1e-3)  # rule add_log adds the log-odds of v_s
    assert len(found.components) == 1 + 2 * (2 + 1) + 1
    assert {"component", "label", "mean", "low", "high", "n"} <= set(found.table().columns)


@pytest.mark.parametrize("removed_from", ["model", "gate"])
def test_minimal_sets_are_greedy_and_flip(casa: Casa, pairs: list[MatchedPair], removed_from: str) -> None:
    queries = [pair.harmful for pair in pairs]
    found = minimal_sets(casa, queries, removed_from, largest=9)
    assert [entry.query_id for entry in found] == [query.id for query in queries]
    for entry in found:
        assert len(entry.v_s) == len(entry.positions) + 1 == len(entry.tokens) + 1
        assert len(set(entry.positions)) == len(entry.positions) < entry.readable
        most = min(9, entry.readable - 1)
        assert entry.flipped or len(entry.positions) == most
        assert all(1 <= size <= most and (flipped or size == most) for size, flipped in entry.permuted)
    table = sets_table(found)
    assert (table[table["search"] == SCORES]["size"] == [len(entry.positions) for entry in found]).all()
    assert (table[table["search"] == PERMUTED]["query_id"].value_counts() == 8).all()


def test_removals_are_those_of_brute_force(tiny_omni: Omni) -> None:
    """With rule replace v_s decides alone: the first removal is the one that moves v_s most towards the other side,
    and a decision that no single removal turns needs more than one."""
    casa = stirred(tiny_omni, CasaConfig(rule="replace", ce_support="two_way"))
    query = request("bomb", "harmful", "q")
    entry = minimal_sets(casa, [query], "gate")[0]
    _, sweep, mask = gate_inputs(casa, [query])
    places = mask[0].nonzero()[:, 0].tolist()
    found = {}
    for place in places:
        less = mask.clone()
        less[0, place] = False
        found[place] = float(casa.attention(whole_states(sweep), less)[0].detach())
    before = entry.v_s[0]
    best = min(places, key=lambda place: found[place] if before > 0.5 else -found[place])
    assert entry.positions[0] == best and entry.v_s[1] == pytest.approx(found[best], abs=1e-6)
    assert (len(entry.positions) == 1) == ((found[best] > 0.5) != (before > 0.5))


def test_searches_on_permuted_scores_take_positions_as_they_come() -> None:
    """Of twelve positions one decides alone: a random order meets it at each size alike, and within 3 in a quarter."""

    class Prompt:
        readable = torch.ones(13, dtype=torch.bool)
        removable = torch.arange(13) < 12

        def read(self, removed: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
            margins = torch.tensor([-1.0 if 5 in positions else 1.0 for positions in removed])
            return margins.sigmoid(), margins

    every = _permuted(Prompt(), 12, 3000, np.random.default_rng(0), 1.0)  # type: ignore[arg-type]
    sizes = np.array([size for size, _ in every])
    assert all(flipped for _, flipped in every)
    np.testing.assert_allclose(np.bincount(sizes, minlength=13)[1:] / 3000, 1 / 12, atol=0.02)
    few = _permuted(Prompt(), 3, 3000, np.random.default_rng(1), 1.0)  # type: ignore[arg-type]
    assert np.mean([flipped for _, flipped in few]) == pytest.approx(0.25, abs=0.03)
    assert {size for size, flipped in few if not flipped} == {3}


def test_a_gate_without_attention_is_refused(tiny_omni: Omni, pairs: list[MatchedPair]) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig(form="none"))
    for call in (attention_maps, minimal_sets):
        with pytest.raises(InputError, match="no safety attention"):
            call(casa, [pairs[0].harmful])


def test_reliability_knows_a_calibrated_score_from_a_bold_one() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(size=4000)
    harmful = rng.uniform(size=4000) < chance
    honest, bold = reliability(chance, harmful), reliability(np.where(chance > 0.5, 0.99, 0.01), harmful)
    assert honest.ece[0] < 0.03 < 0.2 < bold.ece[0] and honest.ece[1] <= honest.ece[2]
    assert honest.brier[0] == pytest.approx(1 / 6, abs=0.01) and honest.bias[1] < 0 < honest.bias[2]
    assert (honest.curve["low"] <= honest.curve["share"]).all() and honest.curve["n"].sum() == honest.n == 4000
    from sklearn.metrics import brier_score_loss

    assert honest.brier[0] == pytest.approx(brier_score_loss(harmful, chance))


def test_calibration_s_p_is_spiegelhalter_s_where_queries_are_independent() -> None:
    """Z by hand: scores of 0.2 and 0.8, so (1 - 2v)(y - v) is -0.12 or 0.48 and its variance 0.36 * 0.16."""
    scores, harmful = np.repeat([0.2, 0.8], 50), np.repeat([True, False, True, False], [5, 45, 45, 5])
    z = (90 * 0.12 - 10 * 0.48) / np.sqrt(100 * 0.36 * 0.16)
    assert z == pytest.approx(2.5) and spiegelhalter(scores, harmful) == pytest.approx(2 * stats.t.sf(2.5, 99))
    assert spiegelhalter([0.0, 1.0], [False, True]) == 1 and spiegelhalter([0.0, 1.0, 1.0], [False, True, False]) == 0


def test_a_request_under_five_attacks_is_one_draw() -> None:
    """Calibrated scores whose outcome is one for all five renderings: 5 % of 300 sets, binomial bounds of 99.9 %."""
    rng, clustered, rows = np.random.default_rng(11), [], []
    topics = np.repeat(np.arange(30), 5).tolist()
    for _ in range(300):
        scores = np.repeat(rng.uniform(0.05, 0.95, 30), 5)
        harmful = np.repeat(rng.uniform(size=30), 5) < scores
        clustered.append(spiegelhalter(scores, harmful, topics))
        rows.append(spiegelhalter(scores, harmful))
    most = stats.binom.ppf(0.9995, 300, 0.05)
    assert np.sum(np.array(clustered) <= 0.05) <= most < np.sum(np.array(rows) <= 0.05)
    bold = np.where(harmful, 0.1, 0.9)
    assert spiegelhalter(bold, harmful, topics) < 1e-6, "wrong scores are still found"
    wide, narrow = reliability(scores, harmful, topics).curve, reliability(scores, harmful).curve
    assert ((wide["high"] - wide["low"]) >= (narrow["high"] - narrow["low"]) - 1e-9).all()
    assert (wide["high"] - wide["low"]).mean() > 1.3 * (narrow["high"] - narrow["low"]).mean()


def test_reliability_names_what_it_cannot_use() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        reliability([0.2, 1.4], [True, False])
    with pytest.raises(InputError, match="one label a score"):
        reliability([], [])


def test_effects_can_be_summarised_by_hand() -> None:
    row = {"direction": INSERT, "site": "0", "head": -1, "span": KEY}
    readings = {
        "v_s": 0.1,
        "v_s_donor": 0.9,
        "v_s_patched": 0.5,
        "logit": -1.0,
        "logit_donor": 1.0,
        "logit_patched": 0.0,
    }
    odds = {"log_odds": -9.0, "log_odds_donor": 11.0, "log_odds_patched": -4.0}
    table = pd.DataFrame([{**row, **readings, **odds, "pair": str(i), "topic": str(i % 3)} for i in range(6)])
    found = PatchEffects(table).summary().iloc[0]
    assert found["delta_v_s_mean"] == pytest.approx(0.4) and found["gap_v_s"] == pytest.approx(0.8)
    assert found["delta_log_odds_mean"] == pytest.approx(5) and found["gap_log_odds"] == pytest.approx(20)
    assert found["delta_logit_low"] == pytest.approx(1.0) and found["n"] == 6


@pytest.mark.parametrize("removed_from", ["model", "gate"])
def test_minimal_sets_are_searched_in_chunks(
    tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch, removed_from: Removal
) -> None:
    casa, query = stirred(tiny_omni), request("bomb", "harmful", "q")
    whole = minimal_sets(casa, [query], removed_from, largest=3)
    rows: list[int] = []
    attend = casa.attention.forward
    monkeypatch.setattr(casa.attention, "forward", lambda states, mask: rows.append(len(mask)) or attend(states, mask))
    monkeypatch.setattr(vocabulary, "CHUNK", 4 * max(tiny_omni.vocab_size, whole[0].readable * tiny_omni.d_model))
    found = minimal_sets(casa, [query], removed_from, largest=3)
    assert 1 < max(rows) <= 4
    assert found[0].positions == whole[0].positions and found[0].permuted == whole[0].permuted
    assert found[0].v_s == pytest.approx(whole[0].v_s, abs=1e-6)
