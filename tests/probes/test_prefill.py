"""Prefill sweeps against what the model, the gate and the attacks do one length at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from casa_mech.attacks import apply_attack
from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging import MicroWorldJudge
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.reports.prefill_dynamics.plots import plot_depth, plot_lengths, plot_tokens
from casa_mech.timing.prefill import prefill_sides
from probes.linear.refusal_direction import opening_ids
from probes.prefill.depth import ALL, EARLIER, LAST, depth_effects, depth_shares
from probes.prefill.replies import judge_replies, replies_by_length, trajectories
from probes.prefill.sweep import AttackedModel, prefill_sweep, refusal_axes

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
    axes = refusal_axes(system, queries, default_world().requests(6, 4, "benign"), [0, "norm"])
    found = replies_by_length(system, queries, LENGTHS, 6)
    table = trajectories(system, found, 4, [5, 6], axes, batch_size=7)
    sweep = prefill_sweep(system, queries, LENGTHS, [5, 6], [0, "norm"]).table(axes)
    first = table[table["token"] == 0].sort_values(["query_id", "length"])
    expected = sweep.sort_values(["query_id", "length"])
    for column in ("opening", "kl", "projection 0", "projection norm"):
        np.testing.assert_allclose(first[column], expected[column], rtol=1e-3, atol=1e-4)
    plain = table[table["length"] == 0]
    np.testing.assert_allclose(plain["kl"], 0, atol=1e-6)
    assert table.groupby(["query_id", "length"])["token"].max().max() == 3
    with pytest.raises(InputError, match="add length 0"):
        trajectories(system, [entry for entry in found if entry.length], 4, [5], axes)


def test_axes_put_the_means_at_nought_and_one(omni: Omni, queries: list[Query]) -> None:
    benign = default_world().requests(6, 4, "benign")
    system = AttackedModel("pretrained", omni)
    axes = refusal_axes(system, queries, benign, [0, "norm"])
    for site, axis in axes.items():
        for group, value in ((queries, 1.0), (benign, 0.0)):
            states = prefill_sweep(system, group, [0], [0], [site]).states[site][:, 0]
            assert axis.project(states).mean() == pytest.approx(value, abs=1e-4)


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
        shares = depth_shares(effects)
        assert (shares["n"] == 6).all() and (shares[shares["span"] == ALL]["share"].round(3) == 1).all()


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


def test_figures_can_be_drawn() -> None:
    rows = [
        {"measure": m, "system": s, "length": k, "token": t, "value": 0.5, "low": 0.4, "high": 0.6, "n": 7}
        for m in ("attack success", "KL") for s in ("pretrained", "CASA") for k in LENGTHS for t in (0, 1)
    ]  # fmt: skip
    data = pd.DataFrame(rows)
    assert len(plot_lengths(data, "a claim").axes) == 3
    assert len(plot_tokens(data, "a claim").axes) == 4
    depth = [
        {"system": "CASA", "site": site, "span": span, "share": 0.5, "low": 0.4, "high": 0.6, "n": 7, "gap": 2.0}
        for site in ("embeddings", "0") for span in (EARLIER, LAST)
    ]  # fmt: skip
    assert len(plot_depth(pd.DataFrame(depth), "a claim").axes) == 1
