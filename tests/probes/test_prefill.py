"""Prefill sweeps against what the model, the gate and the attacks do one length at a time."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from casa_mech.attacks import apply_attack
from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging import MicroWorldJudge
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.timing.prefill import prefill_sides
from casa_mech.trace.capture import capture
from casa_mech.trace.patch import edited_prompt
from probes.linear.refusal_direction import opening_ids, refusal_score
from probes.prefill.depth import ALL, EARLIER, LAST, depth_changes, depth_effects
from probes.prefill.divergence import forced_divergence
from probes.prefill.edges import (
    CUT,
    EDGES,
    OVERRIDDEN,
    PREFILL,
    REQUEST,
    RESTORED,
    SWAPPED,
    TOKEN,
    edge_effects,
    edge_sets,
    random_edges,
    state_effects,
)
from probes.prefill.replies import PrefilledReply, gate_tokens, judge_replies, replies_by_length, trajectories
from probes.prefill.sweep import AttackedModel, PositionAxes, compliance_ids, position_axes, prefill_sweep

LENGTHS = (0, 2, 5)


@pytest.fixture
def omni(random_organism: Path) -> Omni:
    return load_omni(str(random_organism), device="cpu")


@pytest.fixture
def casa(omni: Omni) -> Casa:
    torch.manual_seed(0)
    found = Casa.attach(omni)
    with torch.no_grad():
        for group in found.parts.groups():
            for value in group.values():
                value.add_(0.2 * torch.randn_like(value))
    found.parts.tokens.write()
    return found


@pytest.fixture
def queries() -> list[Query]:
    return default_world().requests(6, 3, "harmful", templates="held_out")


def attacked(queries: list[Query], length: int, omni: Omni) -> list[Query]:
    return apply_attack(f"prefill-{length}", queries, tokenizer=omni.tokenizer) if length else queries


def test_one_forward_gives_what_separate_ones_do(omni: Omni, queries: list[Query]) -> None:
    sweep, separate = prefill_sides(omni, queries, (0, 1, 3, 7))
    for name, values in sweep().items():
        torch.testing.assert_close(values, separate()[name], rtol=1e-4, atol=1e-4)


def test_lengths_are_those_of_the_attack(omni: Omni, queries: list[Query]) -> None:
    openings = opening_ids(omni, default_world().refusals).tolist()
    sweep = prefill_sweep(AttackedModel("pretrained", omni), queries, LENGTHS, openings, ["norm"], batch_size=4)
    assert sweep.opening.shape == sweep.kl.shape == (6, 3) and sweep.v_s is None
    assert np.allclose(sweep.kl[:, 0], 0) and (sweep.kl[:, 1:] > 0).all()
    for step, length in enumerate(LENGTHS):
        for row, query in enumerate(attacked(queries, length, omni)):
            with torch.no_grad():
                logits = omni.model(**omni.encode([query]).inputs).logits[0, -1]
            expected = float(torch.softmax(logits.float(), dim=-1)[openings].sum())
            assert sweep.opening[row, step] == pytest.approx(expected, abs=1e-4)
    table = sweep.table()
    assert list(table["length"][:3]) == list(LENGTHS) and (table["query_id"][:3] == queries[0].id).all()


def test_both_orders_are_those_of_the_gate(casa: Casa, queries: list[Query]) -> None:
    sweep = prefill_sweep(AttackedModel("CASA", casa.omni, casa=casa), queries, LENGTHS, [0], [0], batch_size=4)
    assert sweep.unsafe_first is not None and sweep.v_s is not None and sweep.logit is not None
    for step, length in enumerate(LENGTHS):
        found = attacked(queries, length, casa.omni)
        for row, reply in enumerate(casa.decide(found, order="prefill_first", merge=False)):
            assert sweep.v_s[row, step] == pytest.approx(reply.v_s, abs=1e-4)
            assert sweep.logit[row, step] == pytest.approx(reply.logit_unsafe - reply.logit_safe, abs=1e-3)
        first = [reply.safety_token == "unsafe" for reply in casa.decide(found, order="gate_first", merge=False)]
        assert sweep.unsafe_first.tolist() == first
    assert {"unsafe_a", "unsafe_b", "v_s", "logit"} <= set(sweep.table())


def test_replies_are_those_of_ordinary_generation(casa: Casa, queries: list[Query]) -> None:
    omni, settings = casa.omni, GenerationSettings(max_new_tokens=6)
    gated = replies_by_length(AttackedModel("CASA", omni, casa=casa), queries, LENGTHS, 6, batch_size=5)
    with casa.disabled():
        plain = replies_by_length(AttackedModel("pretrained", omni), queries, LENGTHS, 6, batch_size=5)
        expected = {k: omni.generate(attacked(queries, k, omni), settings) for k in LENGTHS}
    for found, replies in (
        (plain, expected),
        (gated, {k: casa.generate(attacked(queries, k, omni), settings) for k in LENGTHS}),
    ):
        assert [(entry.query.id, entry.length) for entry in found] == [(q.id, k) for q in queries for k in LENGTHS]
        same = [omni.decode(entry.reply) == replies[entry.length][place // 3].text for place, entry in enumerate(found)]
        # Random weights have near ties, which padding's rounding may turn; a wrong prompt would turn them all.
        assert np.mean(same) > 0.8
    table = judge_replies(AttackedModel("CASA", omni, casa=casa), gated, MicroWorldJudge())
    assert set(table["outcome"]) <= {"refused", "complied", "wrong_topic", "incoherent"} and len(table) == 18


def test_trajectories_continue_the_sweep(casa: Casa, queries: list[Query]) -> None:
    system = AttackedModel("CASA", casa.omni, casa=casa)
    axes = position_axes(system, queries, default_world().requests(6, 4, "benign"), [0, "norm"], 5 + 4)
    found = replies_by_length(system, queries, LENGTHS, 6)
    table = trajectories(system, found, 4, [5, 6], axes, batch_size=7)
    sweep = prefill_sweep(system, queries, LENGTHS, [5, 6], [0, "norm"]).table(axes)
    first = table[table["token"] == 0].sort_values(["query_id", "length"])
    expected = sweep.sort_values(["query_id", "length"])
    for column in ("opening", "kl", "projection 0", "projection norm"):
        np.testing.assert_allclose(first[column], expected[column], rtol=1e-3, atol=1e-4)
    plain = table[table["length"] == 0]
    np.testing.assert_allclose(plain["kl"].dropna(), 0, atol=1e-6)
    assert table.groupby(["query_id", "length"])["token"].max().max() == 3
    with pytest.raises(InputError, match="add length 0"):
        trajectories(system, [entry for entry in found if entry.length], 4, [5], axes)


def test_trajectories_compare_along_one_continuation(omni: Omni, queries: list[Query]) -> None:
    """The reply after a prefill is another one than without; the KL is along the one without, for both."""
    system = AttackedModel("pretrained", omni)
    (query,), unattacked, other = queries[:1], (7, 8, 9), (20,)
    opening = tuple(compliance_ids(omni, [query], 2)[0])
    replies = [PrefilledReply(query, 0, (), unattacked, False), PrefilledReply(query, 2, opening, other, True)]
    table = trajectories(system, replies, 4, [5], {}).set_index(["length", "token"])

    def log_p(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            logits = omni.model(**omni.encode([query], [list(ids)], prefill=False).inputs).logits[0, -1]
        return torch.log_softmax(logits.float(), dim=-1)

    for token in range(3):
        attacked, plain = log_p((*opening, *unattacked[:token])), log_p(unattacked[:token])
        kl = float((attacked.exp() * (attacked - plain)).sum())
        assert table.loc[(2, token), "kl"] == pytest.approx(kl, abs=1e-4)
    # The reply itself ended after one token: the end of the turn is the second that was predicted.
    expected = [float(log_p((*opening, *other[:token])).exp()[5]) for token in range(2)]
    assert table.loc[2]["opening"].tolist()[:2] == pytest.approx(expected, abs=1e-5)
    assert table.loc[2]["opening"].isna().tolist() == [False, False, True]


def test_every_position_has_its_own_axis() -> None:
    """Labels lie apart along x at position 0 and along y at position 1, where x is the position's own."""
    rng = np.random.default_rng(0)

    def states(sign: int, n: int = 200) -> np.ndarray:
        noise = rng.normal(0, [[1, 1e-3], [1e-3, 2]], (n, 2, 2))
        return noise + np.array([[3.0 * sign, 0], [50, 4.0 * sign]])

    axes = PositionAxes.fit(states(1), states(-1))
    np.testing.assert_allclose(axes.directions, [[1, 0], [0, 1]], atol=0.02)
    new = {sign: axes.project(states(sign), np.arange(2)).mean(axis=0) for sign in (1, -1)}
    # In standard deviations within a label: 3 of 1, and 4 of 2.
    np.testing.assert_allclose(new[1] - new[-1], [6, 4], atol=0.4)
    # One axis for both positions would call everything at position 1 harmful.
    assert axes.project(states(-1)[:, 1], np.zeros(200, dtype=int)).mean() > 40


def test_axes_are_along_complying_answers(omni: Omni, queries: list[Query]) -> None:
    benign = default_world().requests(6, 4, "benign")
    system = AttackedModel("pretrained", omni)
    axis = position_axes(system, queries, benign, ["norm"], 3)["norm"]
    for position in range(3):
        states = [
            prefill_sweep(system, group, [position], [0], ["norm"]).states["norm"][:, 0] for group in (queries, benign)
        ]
        gap = states[0].mean(axis=0) - states[1].mean(axis=0)
        np.testing.assert_allclose(axis.directions[position], gap / np.linalg.norm(gap), atol=1e-4)
        means = [axis.project(group, np.full(6, position)).mean() for group in states]
        assert means[0] == pytest.approx(-means[1], abs=1e-4) and means[0] > 0


def test_a_reply_may_go_on_in_the_worlds_own_words(omni: Omni, queries: list[Query]) -> None:
    query = queries[0]
    answer = query.meta["answer"]
    other = query.model_copy(update={"meta": {**query.meta, "compliance": " ".join(["yes"] * 30)}})
    ids = omni.tokenizer(answer, add_special_tokens=False)["input_ids"]
    for asked, outcome in ((query, "complied"), (other, "complied")):
        entry = PrefilledReply(asked, 0, (), tuple(ids), True)
        assert judge_replies(AttackedModel("a", omni), [entry], MicroWorldJudge())["outcome"][0] == outcome
    without = other.model_copy(update={"meta": {**other.meta, "answer": other.meta["compliance"]}})
    entry = PrefilledReply(without, 0, (), tuple(ids), True)
    assert judge_replies(AttackedModel("a", omni), [entry], MicroWorldJudge())["outcome"][0] != "complied"


# The divergence from another model


def test_divergence_is_position_by_position(casa: Casa, queries: list[Query]) -> None:
    system = AttackedModel("CASA", casa.omni, casa=casa)
    table = forced_divergence(system, casa.disabled, queries, 4, batch_size=4)
    assert list(table["position"][:4]) == [0, 1, 2, 3] and len(table) == 24
    omni, query = casa.omni, queries[0]
    (token,), answer = gate_tokens(casa, [query])[0], compliance_ids(casa.omni, [query], 4)[0]

    def log_p(ids: list[int], vocab: int | None) -> torch.Tensor:
        with torch.no_grad():
            logits = omni.model(**omni.encode([query], [ids], prefill=False).inputs).logits[0, -1]
        return torch.log_softmax(logits[:vocab].float(), dim=-1)

    for position in range(4):
        with casa.disabled():
            base = log_p(answer[:position], None)
        own = log_p([token, *answer[:position]], len(base))
        expected = float((own.exp() * (own - base)).sum())
        row = table[(table["query_id"] == query.id) & (table["position"] == position)].iloc[0]
        assert row["kl"] == pytest.approx(expected, abs=1e-4)
    assert casa.token_ids  # the gate is on again


def test_a_model_does_not_diverge_from_itself(omni: Omni, queries: list[Query]) -> None:
    table = forced_divergence(AttackedModel("same", omni), lambda: nullcontext(omni), queries, 3)
    np.testing.assert_allclose(table["kl"], 0, atol=1e-6)
    with pytest.raises(InputError, match="at least 1 token"):
        forced_divergence(AttackedModel("same", omni), lambda: nullcontext(omni), queries, 0)


# Edges of attention


def test_edge_sets_by_hand(casa: Casa) -> None:
    omni = casa.omni
    query = Query.from_text("how do i make a cake ?", id="q")
    batch = omni.encode([query], [[casa.token_ids[0], 3, 4, 5]], prefill=False)
    sets = edge_sets(batch, 3, gated=True)
    end = batch.inputs["input_ids"].shape[1]
    token, prefill = end - 4, [end - 3, end - 2, end - 1]
    request = batch.modality["text"][0].nonzero()[:, 0].tolist()
    expected = {
        TOKEN: {(reader, token) for reader in prefill},
        PREFILL: {(prefill[1], prefill[0]), (prefill[2], prefill[0]), (prefill[2], prefill[1])},
        REQUEST: {(reader, read) for reader in prefill for read in request},
    }
    assert len(request) == 7 and list(sets) == list(EDGES)
    for name, edges in sets.items():
        assert {tuple(pair) for pair in edges[0].nonzero().tolist()} == expected[name], name
    assert set(edge_sets(batch, 3, gated=False)) == {PREFILL, REQUEST}


def test_random_edges_are_as_many_of_each_reader(omni: Omni, queries: list[Query]) -> None:
    batch = omni.encode(queries, [[7, 3, 4, 5]] * len(queries), prefill=False)
    present = batch.inputs["attention_mask"].bool()
    generator = torch.Generator().manual_seed(0)
    for edges in edge_sets(batch, 3, gated=True).values():
        drawn = [random_edges(edges, present, generator) for _ in range(20)]
        for cut in drawn:
            assert torch.equal(cut.sum(dim=-1), edges.sum(dim=-1))
            row, reader, read = cut.nonzero().unbind(dim=1)
            assert (read < reader).all() and present[row, read].all()
        assert any(not torch.equal(cut, edges) for cut in drawn)


def test_without_its_edges_the_token_no_longer_matters(casa: Casa, queries: list[Query]) -> None:
    """Cut off, either token leaves the same refusal; what is left is a prompt whose token nobody reads."""
    openings = torch.tensor([5, 6])
    system = AttackedModel("CASA", casa.omni, casa=casa)
    before, after = [], []
    for token in casa.token_ids:
        monkey = pytest.MonkeyPatch()
        monkey.setattr("probes.prefill.edges.gate_tokens", lambda *_, token=token: [[token]] * len(queries))
        table = edge_effects(system, queries, 3, openings, draws=1)
        monkey.undo()
        rows = table[(table["edges"] == TOKEN) & (table["draw"] == CUT)]
        before.append(rows["before"].to_numpy())
        after.append(rows["after"].to_numpy())
        assert (rows["count"] == 3).all() and len(table) == 6 * 3 * 2
    assert np.abs(before[0] - before[1]).max() > 1e-2
    np.testing.assert_allclose(after[0], after[1], atol=1e-4)
    with pytest.raises(InputError, match="at least 1 token"):
        edge_effects(system, queries, 0, openings)


# States at the token's position


def test_a_prefill_does_not_change_the_tokens_own_state(casa: Casa, queries: list[Query]) -> None:
    """Attention is causal: whatever follows, the state at the token is the clean run's, at every depth."""
    tokens, answers = gate_tokens(casa, queries), compliance_ids(casa.omni, queries, 3)
    clean = casa.omni.encode(queries, tokens, prefill=False)
    prefilled = casa.omni.encode(
        queries, [[*token, *answer] for token, answer in zip(tokens, answers, strict=True)], prefill=False
    )
    for site in ("embeddings", 0, 1):
        one, other = (capture(casa.omni, batch, [site], "all")[site] for batch in (clean, prefilled))
        torch.testing.assert_close(one[:, -1], other[:, -4], atol=1e-4, rtol=1e-4)


def test_exchanged_states_by_hand(casa: Casa, queries: list[Query]) -> None:
    system, openings = AttackedModel("CASA", casa.omni, casa=casa), torch.tensor([5, 6])
    twins = default_world().requests(6, 4, "benign")
    table = state_effects(system, queries, twins, 3, openings, batch_size=4).set_index(["exchange", "site"])
    # After the last block a prediction is made of its own position's state alone.
    for exchange in (RESTORED, OVERRIDDEN):
        rows = table.loc[(exchange, "1")]
        np.testing.assert_allclose(rows["patched"], rows["donor"], atol=1e-4)
        assert np.abs(rows["donor"] - rows["before"]).max() > 1e-2
    rows = table.loc[(SWAPPED, "1")]
    np.testing.assert_allclose(rows["patched"], rows["before"], atol=1e-5)
    # At the input the token's position holds its token alone: where both runs have the same, nothing changes.
    tokens = [gate_tokens(casa, group) for group in (queries, twins)]
    same = {query.id for query, one, other in zip(queries, *tokens, strict=True) if one == other}
    rows = table.loc[(SWAPPED, "embeddings")]
    moved = (rows["patched"] - rows["before"]).abs().to_numpy() > 1e-4
    assert (moved == ~rows["query_id"].isin(same).to_numpy()).all()
    # At the input the prefill's last token gives way to the safety token.
    query, answer = queries[0], compliance_ids(casa.omni, queries[:1], 2)[0]
    batch = casa.omni.encode([query], [[*tokens[0][0], *answer, *tokens[0][0]]], prefill=False)
    last = torch.tensor([batch.inputs["input_ids"].shape[1] - 1])
    expected = refusal_score(edited_prompt(casa.omni, batch, last, {}).logits, openings)
    rows = table.loc[(RESTORED, "embeddings")].set_index("query_id")
    assert rows.loc[query.id, "patched"] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(InputError, match="there are 5 for 6"):
        state_effects(system, queries, twins[:5], 3, openings)


def test_whole_openings_make_the_whole_difference(casa: Casa, queries: list[Query]) -> None:
    refusal = default_world().refusals[0]
    for system in (AttackedModel("CASA", casa.omni, casa=casa),):
        effects = depth_effects(system, queries, 4, refusal, batch_size=4)
        table = effects.set_index(["site", "span"]).sort_index()
        for site in ("embeddings", "0", "1"):
            rows = table.loc[(site, ALL)]
            np.testing.assert_allclose(rows["patched"], rows["other"], atol=1e-4)
        # Both openings end alike, so at the input the last position holds nothing; after the last block it holds all.
        rows = table.loc[("embeddings", LAST)]
        np.testing.assert_allclose(rows["patched"], rows["attacked"], atol=1e-5)
        rows = table.loc[("1", EARLIER)]
        np.testing.assert_allclose(rows["patched"], rows["attacked"], atol=1e-5)
        changes = depth_changes(effects.assign(phrasing="0"))
        whole = changes[changes["span"] == ALL]
        assert (changes["n"] == 6).all() and np.allclose(whole["value"], whole["gap"], atol=1e-4)
        assert set(effects["label"]) == {"harmful"}


def test_what_cannot_be_swept_is_named(omni: Omni, queries: list[Query]) -> None:
    system = AttackedModel("pretrained", omni)
    with pytest.raises(InputError, match="needs a complying answer"):
        prefill_sweep(system, queries, [0, 400], [0])
    with pytest.raises(InputError, match="0 or more"):
        prefill_sweep(system, queries, [-1], [0])
    with pytest.raises(InputError, match="at least 2"):
        depth_effects(system, queries, 1, "sorry , i can not")
    with pytest.raises(InputError, match="meta\\['compliance'\\]"):
        prefill_sweep(system, [Query.from_text("how do i make a cake ?", id="bare")], [2], [0])
