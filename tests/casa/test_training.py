"""Training: on text only, balanced, logged, interrupted and resumed, stopped early; what it does to v_s."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.casa import SETTINGS, examples

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.checkpoint import FILE, METRICS
from casa_mech.casa.examples import BalancedBatches, split_examples
from casa_mech.casa.supervised import Parts, Supervised
from casa_mech.casa.trainer import Trainer
from casa_mech.errors import InputError, RunError
from casa_mech.locks import LOCK
from casa_mech.omni import Omni
from casa_mech.queries import Example, Query

TIMES = ("seconds",)


def weights_of(casa: Casa) -> dict[str, torch.Tensor]:
    slow, fast = casa.parts.groups()
    return {name: value.detach().clone() for name, value in (slow | fast).items()}


def untimed(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in log]


@pytest.mark.parametrize(
    "fields",
    [{}, {"form": "mean"}, {"form": "top_k", "k": 3}, {"form": "compete"}, {"rule": "scale_above"}, {"rule": "scale"},
     {"rule": "replace", "ce_support": "two_way"}, {"layer": 0, "positions": "user"}, {"query_source": "learned_free"}],
)  # fmt: skip
def test_v_s_parts_the_classes(tiny_omni: Omni, fields: dict[str, object]) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig.model_validate(fields))
    settings = SETTINGS.model_copy(update={"max_steps": 25, "lr_attention": 1e-2, "validation": 0.0})
    log = casa.train(examples(), settings, progress=False)
    first, last = log[0], log[-1]
    assert last["loss"] < first["loss"]
    assert last["v_harmful"] - last["v_benign"] > max(0.02, first["v_harmful"] - first["v_benign"])
    assert not tiny_omni.model.training
    ids = list(casa.token_ids)
    assert torch.equal(tiny_omni.embedding.weight[ids], casa.parts.tokens.rows.embedding)


def test_metrics_are_written_each_step(tiny_omni: Omni, tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni)
    log = casa.train(examples(), SETTINGS, tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert rows == log and [row["step"] for row in rows] == list(range(1, 9))
    needed = {"loss", "token_harmful", "token_benign", "reply_harmful", "reply_benign", "v_harmful", "v_benign"}
    assert needed | {"token_accuracy", "lr", "grad_norm", "seconds"} <= rows[0].keys()
    assert "validation_loss" in rows[3] and "validation_loss" not in rows[2]
    assert casa.training is not None and casa.training.steps == 8


def test_parts_of_a_batch_add_up(tiny_omni: Omni) -> None:
    """Gradients do not depend on how a batch is cut (dropout off)."""
    metrics = []
    for size in (8, 3):
        casa = Casa.attach(tiny_omni, CasaConfig(lora_dropout=0.0, beta=0.3))
        settings = SETTINGS.model_copy(update={"max_steps": 1, "micro_batch_size": size})
        row = casa.train(examples(), settings, progress=False)[0]
        metrics.append((row["loss"], row["v_harmful"], row["grad_norm"]))
        casa.detach()
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


def test_parts_of_a_batch_are_of_like_length(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    casa, lengths = Casa.attach(tiny_omni), list[list[int]]()
    monkeypatch.setattr(
        Parts, "objective", lambda self, rows, weights, limit: lengths.append([len(row.query.text) for row in rows])
    )
    for by_length in (True, False):
        settings = SETTINGS.model_copy(update={"micro_batch_size": 4, "by_length": by_length, "validation": 0.0})
        list(Supervised(casa.parts, examples(), settings).losses(0))
    ordered, plain = lengths[:2], lengths[2:]
    assert sorted(ordered[0] + ordered[1]) == sorted(plain[0] + plain[1])
    assert max(ordered[0]) <= min(ordered[1]) and not max(plain[0]) <= min(plain[1])


@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_resumed_training_equals_uninterrupted(
    tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    settings = SETTINGS.model_copy(update={"precision": precision})
    casa = Casa.attach(tiny_omni)
    whole = casa.train(examples(), settings, tmp_path / "whole", progress=False)
    expected = weights_of(casa)
    casa.detach()

    casa = Casa.attach(tiny_omni)
    gradients = Trainer._gradients

    def interrupted(self: Trainer) -> list[dict[str, float]]:
        sums = gradients(self)
        if self._progress.step == 5:
            raise KeyboardInterrupt
        return sums

    monkeypatch.setattr(Trainer, "_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        casa.train(examples(), settings, tmp_path / "cut", progress=False)
    casa.detach()
    monkeypatch.undo()
    with (tmp_path / "cut" / METRICS).open("a") as stream:
        stream.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')

    casa = Casa.attach(tiny_omni, seed=9)
    with pytest.raises(RunError, match="already"):
        casa.train(examples(), settings, tmp_path / "cut", progress=False)
    resumed = casa.train(examples(), settings, tmp_path / "cut", resume=True, progress=False)
    assert untimed(resumed) == untimed(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(casa).items())
    rows = [json.loads(line) for line in (tmp_path / "cut" / METRICS).read_text().splitlines()]
    assert rows == resumed
    assert casa.train(examples(), settings, tmp_path / "cut", resume=True, progress=False) == resumed


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    casa = Casa.attach(tiny_omni)
    whole = casa.train(examples(), SETTINGS, progress=False)
    casa.detach()
    casa = Casa.attach(tiny_omni)
    update = Trainer._update

    def killed(self: Trainer, sums: list[dict[str, float]]) -> dict[str, float]:
        row = update(self, sums)
        if self._progress.step == 5:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(Trainer, "_update", killed)
    with pytest.raises(KeyboardInterrupt):
        casa.train(examples(), SETTINGS, tmp_path, progress=False)
    casa.detach()
    monkeypatch.undo()
    resumed = Casa.attach(tiny_omni).train(examples(), SETTINGS, tmp_path, resume=True, progress=False)
    assert untimed(resumed) == untimed(whole)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, METRICS, LOCK}


def test_checkpoints_of_other_runs_are_refused(tiny_omni: Omni, tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni)
    casa.train(examples(), SETTINGS, tmp_path, progress=False)
    with pytest.raises(RunError, match="other data, settings or model"):
        casa.train(examples(27), SETTINGS, tmp_path, resume=True, progress=False)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:50])
    with pytest.raises(RunError, match=FILE):
        casa.train(examples(), SETTINGS, tmp_path, resume=True, progress=False)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="cannot write"):
        casa.train(examples(), SETTINGS, file, progress=False)


def test_training_stops_early_and_keeps_the_best(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    casa = Casa.attach(tiny_omni)
    losses = iter([3.0, 2.0, 2.5, 2.4, 9.0])
    kept: dict[str, torch.Tensor] = {}

    def validate(self: Trainer) -> dict[str, float]:
        loss = next(losses)
        if loss == 2.0:
            kept.update(weights_of(casa))
        return {"loss": loss}

    monkeypatch.setattr(Trainer, "_validate", validate)
    settings = SETTINGS.model_copy(update={"max_steps": 20, "validate_every": 2, "patience": 2})
    log = casa.train(examples(), settings, progress=False)
    assert len(log) == 8
    assert kept and all(torch.equal(value, kept[name]) for name, value in weights_of(casa).items())


def test_training_leaves_the_base_and_the_generators_alone(tiny_omni: Omni) -> None:
    before = {name: value.clone() for name, value in tiny_omni.model.state_dict().items()}
    casa = Casa.attach(tiny_omni)
    state = torch.get_rng_state()
    casa.train(examples(), SETTINGS, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    casa.detach()
    assert all(torch.equal(value, before[name]) for name, value in tiny_omni.model.state_dict().items())


def test_what_casa_is_not_trained_on(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = Casa.attach(tiny_omni)
    image = Example(query=mixed_queries[1], reply="no")
    with pytest.raises(InputError, match="image: CASA is trained on text only"):
        casa.train([*examples(), image], SETTINGS, progress=False)
    with pytest.raises(InputError, match="no harmful example"):
        casa.train([example for example in examples() if example.query.label == "benign"], SETTINGS, progress=False)
    bare = Example(query=Query.from_text("hear", id="q5"), reply="sure")
    with pytest.raises(InputError, match="q5: a training example needs a label"):
        casa.train([*examples(), bare], SETTINGS, progress=False)


def test_batches_are_balanced_and_depend_on_the_step_alone() -> None:
    rows = examples(30)
    batches = BalancedBatches(rows, 8, seed=3)
    assert batches.steps(2) == 10
    first = [batches.batch(step) for step in range(10)]
    assert all(sum(row.query.label == "harmful" for row in batch) == 4 for batch in first)
    assert BalancedBatches(rows, 8, seed=3).batch(7) == first[7]
    seen = [row.query.id for batch in first[:5] for row in batch if row.query.label == "benign"]
    assert len(set(seen)) == 20
    train, held = split_examples(rows, 0.2, seed=0)
    assert len(held) == 6 and sum(row.query.label == "harmful" for row in held) == 2
    assert not {row.query.id for row in train} & {row.query.id for row in held}


def test_half_precision_trains_and_generates(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    """A bfloat16 model: LoRA, safety attention and token rows stay in float32, replies and v_s are finite."""
    tiny_omni.model.to(torch.bfloat16)
    casa = Casa.attach(tiny_omni, CasaConfig(layer=1))
    log = casa.train(examples(), SETTINGS, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(value.dtype == torch.float32 for value in weights_of(casa).values())
    for merge in (False, True):
        replies = casa.generate(mixed_queries, merge=merge)
        assert all(0 < (reply.v_s or 0) < 1 for reply in replies)
    casa.detach()
    assert {value.dtype for value in tiny_omni.model.parameters()} == {torch.bfloat16}
