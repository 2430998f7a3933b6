"""Circuit breakers: the schedule and the losses against plain arithmetic, what is rerouted, what is retained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.defenses import examples, stir
from torch.nn import functional

from casa_mech.defenses import load_defense
from casa_mech.defenses.circuit_breaker import CircuitBreaker
from casa_mech.defenses.rerouting import (
    CircuitBreakerSettings,
    Rerouting,
    blanked,
    coefficients,
    reroute_loss,
    retain_loss,
)
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Example


def test_the_schedule_of_circuit_breakers() -> None:
    assert coefficients(0, 10.0, 300) == (10.0, 0.0)
    assert coefficients(150, 10.0, 300) == (5.0, 5.0)
    assert coefficients(300, 10.0, 300) == (0.0, 10.0)
    settings = CircuitBreakerSettings()
    assert (settings.scheduled, settings.two_t0, settings.alpha, settings.lora_r) == (150, 300, 10.0, 16)
    assert coefficients(20, 5.0, CircuitBreakerSettings(max_steps=20).two_t0) == (2.5, 2.5)
    with pytest.raises(InputError, match="horizon=100"):
        CircuitBreakerSettings(horizon=100)


def test_target_layers_by_depth() -> None:
    settings = CircuitBreakerSettings()
    layers = {depth: settings.target_layers(depth) for depth in (4, 28, 32, 36)}
    assert layers == {4: [1, 3], 28: [9, 18], 32: [10, 20], 36: [11, 23]}
    assert settings.depth(32) == 21 and settings.depth(4) == 4
    assert (settings.learning_rate(2048), settings.learning_rate(192)) == (1e-4, 1e-2)
    with pytest.raises(InputError, match="layers=\\(1, 9\\)"):
        CircuitBreakerSettings(layers=(1, 9)).target_layers(4)


def test_rerouting_is_one_for_the_same_states_and_zero_away_from_them() -> None:
    states = torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    assert reroute_loss(3 * states, states, mask) == pytest.approx(1.0)
    assert reroute_loss(-states, states, mask) == 0
    turned = torch.stack([-states[..., 1::2], states[..., ::2]], dim=-1).flatten(-2)  # a quarter turn in each plane
    assert reroute_loss(turned, states, mask) == pytest.approx(0.0, abs=1e-6)
    half = torch.where(mask.cumsum(1).unsqueeze(-1) == 1, -states, states)  # the first real position of each row
    assert reroute_loss(half, states, mask) == pytest.approx(6 / 9)


def test_padding_does_not_count_in_rerouting_and_counts_as_zero_in_retaining() -> None:
    states, frozen = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8)
    mask = torch.tensor([[0, 0, 1, 1]])
    cosine = functional.cosine_similarity(states, frozen, dim=-1)[:, :, 2:]
    distance = (states - frozen).norm(dim=-1)[:, :, 2:]
    for padding in (0.0, 1e4, float("nan")):
        states[:, :, :2] = padding
        assert reroute_loss(states, frozen, mask) == pytest.approx(float(cosine.clamp(min=0).mean()), rel=1e-5)
        assert retain_loss(states, frozen, mask) == pytest.approx(float(distance.sum() / 8), rel=1e-5)
    assert retain_loss(frozen, frozen, mask) == 0
    still = frozen.clone().requires_grad_()
    retain_loss(still, frozen, mask).backward()
    assert still.grad is not None and still.grad.isfinite().all()


def learner(omni: Omni, **settings: Any) -> tuple[CircuitBreaker, Rerouting]:
    defense = CircuitBreaker(omni, CircuitBreakerSettings(**{"batch_size": 4, **settings}))
    return defense, defense._learner(examples())


def test_rerouting_starts_at_alpha_and_reaches_lora_alone(tiny_omni: Omni) -> None:
    defense, run = learner(tiny_omni, layers=(1,), max_steps=10)
    rows = [row for _, row in run.losses(0)]
    assert run.summarise(rows) == pytest.approx(
        {"loss": 10.0, "reroute": 1.0, "c_s": 10.0, "retain": 0.0, "c_r": 0.0}, abs=1e-4
    )
    stir(defense)
    for loss, _ in run.losses(5):
        loss.backward()
    gradients = {name: value.grad for name, value in tiny_omni.model.named_parameters() if value.grad is not None}
    assert gradients.keys() == defense.adapter.parameters().keys()  # type: ignore[union-attr]
    assert all(float(value.abs().sum()) > 0 for value in gradients.values())
    row = run.summarise([row for _, row in run.losses(5)])
    assert row["loss"] == pytest.approx(row["c_s"] * row["reroute"] + row["c_r"] * row["retain"], rel=1e-5)
    assert (row["c_s"], row["c_r"]) == (7.5, 2.5) and row["reroute"] < 1 < 1 + row["retain"]
    defense.close()


def test_lora_ends_with_the_last_layer_that_is_read(tiny_omni: Omni) -> None:
    defense = CircuitBreaker(tiny_omni, CircuitBreakerSettings(layers=(1,)))
    assert {name.split(".layers.")[1][0] for name in defense.adapter.parameters()} == {"0", "1"}  # type: ignore[union-attr]
    defense.close()
    with pytest.raises(InputError, match="layers 1 to 2"):
        CircuitBreaker(tiny_omni, CircuitBreakerSettings(layers=(3,)))


def test_frozen_states_are_the_base_models(tiny_omni: Omni) -> None:
    batch = tiny_omni.encode([example.query for example in examples(4)])
    with torch.no_grad():
        before = tiny_omni.model(**batch.inputs, output_hidden_states=True).hidden_states
    defense, run = learner(tiny_omni)
    stir(defense)
    states, frozen, mask = run._both(batch, 2)
    assert torch.equal(frozen[:2], torch.stack(before[:2])) and not frozen.requires_grad
    assert torch.equal(tiny_omni.norm(frozen[2]), before[2])
    assert states.requires_grad and not torch.allclose(states[1:], frozen[1:])
    assert torch.equal(mask, batch.inputs["attention_mask"])
    defense.close()


def test_what_is_rerouted_and_what_is_retained(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    defense, run = learner(tiny_omni, refusal_share=0.5, blank_share=0.0)
    seen: list[tuple[Any, ...]] = []
    encode = Rerouting._encode

    def recorded(self: Rerouting, chosen: list[Example]) -> object:
        seen.append(tuple((example.query.label, example.reply.split()[0]) for example in chosen))
        return encode(self, chosen)  # type: ignore[arg-type]

    monkeypatch.setattr(Rerouting, "_encode", recorded)
    list(run.losses(0))
    assert seen == [(("harmful", "sure"),) * 4, (("benign", "sure"),) * 2 + (("harmful", "sorry"),) * 2]
    bare = [
        example.model_copy(update={"query": example.query.model_copy(update={"meta": {}})}) for example in examples()
    ]
    with pytest.raises(InputError, match=r"query e0: circuit breakers reroute a harmful completion.*compliance"):
        defense._learner(bare)
    defense.close()


def test_parts_of_a_rerouting_batch_average(tiny_omni: Omni) -> None:
    """Rows of one length, so that each part has as many positions."""
    rows = [example for example in examples(24) if len(example.query.text.split()) == 8]
    totals = []
    for size in (4, 2):
        config = CircuitBreakerSettings(batch_size=4, micro_batch_size=size, lora_dropout=0.0, refusal_share=0.0)
        defense = CircuitBreaker(tiny_omni, config)
        stir(defense)
        run = defense._learner(rows)
        totals.append(run.summarise([row for _, row in run.losses(2)]))
        defense.close()
    assert totals[0].keys() == totals[1].keys()
    assert totals[0]["retain"] == pytest.approx(totals[1]["retain"], rel=1e-4)
    assert totals[0]["c_s"] == pytest.approx(totals[1]["c_s"])


def test_a_blanked_request_is_as_if_it_were_not_there(tiny_omni: Omni) -> None:
    example = examples(2)[1]
    batch = tiny_omni.encode([example.query], [tiny_omni.reply_ids(example.reply)])
    hidden = blanked(batch, torch.tensor([True]))
    keep = hidden.inputs["attention_mask"][0].bool()
    assert int((~keep).sum()) == int(batch.modality["text"].sum()) > 0
    cut = {name: value[:, keep] for name, value in batch.inputs.items()}
    with torch.no_grad():
        expected = tiny_omni.model(**cut).logits
        blanked_logits = tiny_omni.model(**hidden.inputs).logits[:, keep]
    torch.testing.assert_close(blanked_logits, expected)
    assert torch.equal(blanked(batch, torch.tensor([False])).inputs["attention_mask"], batch.inputs["attention_mask"])


def test_training_goes_on_until_rerouting_has_fallen(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a mean over ten steps of 1 - fall or less, not before the schedule is over, not after the maximum."""
    settings = CircuitBreakerSettings(schedule_steps=12, max_steps=20, fall=0.4)

    def log(*values: float) -> list[dict[str, float]]:
        return [{"reroute": value} for value in values]

    assert settings.failure(log(*[1.0] * 5, *[0.5, 0.7] * 5)) == ""  # the mean of the last ten is 0.6
    assert settings.failure(log(*[0.61] * 14)) == "L_rr is 0.61 after 14 steps, more than 0.6"
    defense, run = learner(tiny_omni, schedule_steps=12, max_steps=20, fall=0.4, layers=(1,))
    assert not run.finished(log(*[0.1] * 11)) and run.finished(log(*[0.1] * 12))
    assert not run.finished(log(*[1.0] * 12)) and run.steps == 20
    weights = [run.summarise([row for _, row in run.losses(step)]) for step in (0, 12, 19)]
    assert [(row["c_s"], row["c_r"]) for row in weights] == [(10.0, 0.0), (5.0, 5.0), (5.0, 5.0)]
    defense.close()


@pytest.mark.parametrize(("falling", "steps", "failed"), [(True, 4, False), (False, 7, True)])
def test_a_failed_training_says_so(
    tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, falling: bool, steps: int, failed: bool
) -> None:
    weighted = Rerouting._weighted

    def scripted(self: Rerouting, name: str, *rest: Any) -> Any:
        loss, row = weighted(self, name, *rest)
        return loss, {**row, name: 0.2 if falling else 0.9}

    monkeypatch.setattr(Rerouting, "_weighted", scripted)
    settings = CircuitBreakerSettings(schedule_steps=4, max_steps=7, batch_size=4, layers=(1,))
    defense = CircuitBreaker(tiny_omni, settings)
    assert len(defense.train(examples(), tmp_path / "work", progress=False)) == steps
    defense.save_pretrained(tmp_path / "saved")
    defense.close()
    with load_defense("circuit-breaker", tiny_omni, path=tmp_path / "saved") as again:
        assert bool(again.describe().failed) == failed
    assert ("L_rr is 0.90 after 7 steps" in (tmp_path / "saved" / "README.md").read_text()) == failed
