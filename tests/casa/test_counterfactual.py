"""Counterfactual token examples: which rows are made, what they weigh, and that the reply comes to read the token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.casa import SETTINGS, examples
from torch.nn import functional

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.examples import BalancedBatches, Counterfactual, counterfactuals
from casa_mech.casa.objective import class_weights
from casa_mech.casa.supervised import Supervised, is_counterfactual, is_harmful
from casa_mech.errors import InputError
from casa_mech.omni import Omni

WHOLE = SETTINGS.model_copy(update={"validation": 0.0})


def test_a_share_of_the_benign_rows_gets_a_refusal_of_the_table() -> None:
    rows = examples(30)  # 10 harmful, 20 benign
    refusals = ["sorry , no .", "i can not help ."]
    added = counterfactuals(rows, 0.4, refusals, seed=3)
    assert len(added) == 8 and {row.reply for row in added.values()} == set(refusals)
    assert all(rows[index].query.label == "benign" and row.query == rows[index].query for index, row in added.items())
    assert added == counterfactuals(rows, 0.4, refusals, seed=3) != counterfactuals(rows, 0.4, refusals, seed=4)
    assert counterfactuals(rows, 0.0, refusals, seed=3) == {}
    assert len(counterfactuals(rows, 1.0, refusals, seed=3)) == 20


def test_a_row_brings_its_counterfactual_into_the_batch() -> None:
    rows = examples(24)
    added = counterfactuals(rows, 0.5, ["no ."], seed=0)
    plain, batches = BalancedBatches(rows, 8, 0), BalancedBatches(rows, 8, 0, added)
    with_one = {rows[index].query.id for index in added}
    for step in range(6):
        batch = batches.batch(step)
        assert batch[:8] == plain.batch(step)
        expected = [row.query.id for row in batch[:8] if row.query.id in with_one]
        assert [row.query.id for row in batch[8:]] == expected
        assert all(isinstance(row, Counterfactual) for row in batch[8:])


def test_weights_leave_the_other_rows_alone() -> None:
    harmful = torch.tensor([True, False, True, False, False])
    intervened = torch.tensor([False, False, False, False, True])
    weights = class_weights(harmful, 0.3, intervened)
    assert torch.equal(weights[:4], class_weights(harmful[:4], 0.3))
    assert weights.tolist() == pytest.approx([0.15, 0.35, 0.15, 0.35, 0.35])


def test_the_objective_by_hand(tiny_omni: Omni) -> None:
    """A counterfactual adds the loss of a refusal after the unsafe token, and nothing of the token's."""
    casa = Casa.attach(tiny_omni, CasaConfig(counterfactual=1.0, beta=0.3, lora_dropout=0.0))
    rows = examples(2)
    row = Counterfactual(query=rows[1].query, reply=rows[0].reply)
    parts = casa.parts
    plain, _ = parts.objective(rows, class_weights(is_harmful(rows), 0.3), 99)
    every = [*rows, row]
    weights = class_weights(is_harmful(every), 0.3, is_counterfactual(every))
    loss, sums = parts.objective(every, weights, 99)
    ids = [casa.token_ids[1], *tiny_omni.reply_ids(row.reply)]
    batch = tiny_omni.encode([row.query], [ids], prefill=False)
    logits = tiny_omni.model(**batch.inputs).logits[0, -len(ids) : -1]
    reply = functional.cross_entropy(logits, torch.tensor(ids[1:]))
    torch.testing.assert_close(loss, plain + 0.7 * reply, rtol=1e-4, atol=1e-5)
    assert sums["reply_counterfactual"] == pytest.approx(reply.item(), rel=1e-4)
    assert (sums["n_harmful"], sums["n_benign"], sums["n_counterfactual"]) == (1, 1, 1)


def test_no_row_of_a_run_answers_harm(tiny_omni: Omni) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig(counterfactual=1.0))
    learner = Supervised(casa.parts, examples(24), SETTINGS)
    refusal = examples(1)[0].reply
    for step in range(4):
        added = [row for row in learner._batches.batch(step) if isinstance(row, Counterfactual)]
        assert len(added) == 4 and all(row.query.label == "benign" and row.reply == refusal for row in added)
    assert sum(isinstance(row, Counterfactual) for row in learner._held_out) == 2


def test_the_refusal_after_the_unsafe_token_is_learned(tiny_omni: Omni) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig(counterfactual=1.0))
    log = casa.train(examples(), SETTINGS.model_copy(update={"max_steps": 12}), progress=False)
    assert log[-1]["reply_counterfactual"] < 0.8 * log[0]["reply_counterfactual"]
    assert "validation_reply_counterfactual" in log[-1]
    casa.detach()
    plain = Casa.attach(tiny_omni).train(examples(), WHOLE.model_copy(update={"max_steps": 1}), progress=False)
    assert "reply_counterfactual" not in plain[0]


def test_the_record_says_so_and_a_bad_share_is_refused(tiny_omni: Omni, tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig(counterfactual=0.4))
    casa.train(examples(), WHOLE.model_copy(update={"max_steps": 1}), progress=False)
    casa.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "casa_config.json").read_text())["config"]["counterfactual"] == 0.4
    assert "| counterfactual examples | beside 40% of the benign ones |" in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="counterfactual: Input should be less than or equal to 1"):
        CasaConfig(counterfactual=1.5)
