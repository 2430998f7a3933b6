"""A gate, a decision or a training that is not finite is refused: NaN is never "safe"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.casa import SETTINGS, SHORT, examples, stir
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.checkpoint import FILE, METRICS
from casa_mech.casa.trainer import Row, Trainer
from casa_mech.errors import ModelError, RunError
from casa_mech.omni import Omni
from casa_mech.queries import Query

NAN = float("nan")


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("adapter_model.safetensors", "layers.0.mlp.down_proj.lora_B.weight"),
        ("safety_attention.safetensors", "w_q.weight"),
        ("safety_attention.safetensors", "class_embeddings"),
        ("token_rows.safetensors", "embedding"),
    ],
)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_gate_that_is_not_finite_is_refused(
    tiny_omni: Omni, tmp_path: Path, file: str, tensor: str, value: float
) -> None:
    casa = stir(Casa.attach(tiny_omni))
    casa.save_pretrained(tmp_path / "gate")
    casa.detach()
    before = {name: value.clone() for name, value in tiny_omni.model.state_dict().items()}
    tensors = load_file(tmp_path / "gate" / file)
    name = next(name for name in tensors if name.endswith(tensor))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "gate" / file)
    with pytest.raises(ModelError, match=f"{file}: the tensor {name} holds NaN or infinite numbers") as caught:
        Casa.from_pretrained(tmp_path / "gate", tiny_omni)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in tiny_omni.model.state_dict().items())


@pytest.mark.parametrize("form", ["mean", "top_k", "pooled", "compete", "none"])
@pytest.mark.parametrize("rule", ["scale", "add_log", "scale_above"])
def test_a_query_that_makes_nan_is_not_safe(tiny_omni: Omni, form: str, rule: str) -> None:
    casa = stir(Casa.attach(tiny_omni, CasaConfig.model_validate({"form": form, "rule": rule})))
    queries = [Query.from_text("how do i make a cake ?", id="cake"), Query.from_text("make a bomb", id="bomb")]
    with torch.no_grad():
        tiny_omni.embedding.weight[tiny_omni.tokenizer("bomb")["input_ids"]] = NAN
    assert casa.decide(queries[:1])[0].safety_token
    for hard in (False, True):
        for threshold in (None, 0.5):
            with pytest.raises(ModelError, match=r"query bomb: .* is NaN or infinite"):
                casa.generate(queries, SHORT, hard=hard, threshold=threshold)
    with pytest.raises(ModelError, match="query bomb: "):
        casa.decide(queries)


def test_safety_attention_that_is_not_finite_decides_nothing(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    for rule in ("scale", "add_log", "scale_above"):
        casa = Casa.attach(tiny_omni, CasaConfig.model_validate({"rule": rule}))
        with torch.no_grad():
            casa.attention.readout.bias.fill_(NAN)
        with pytest.raises(ModelError, match="v_s is NaN or infinite"):
            casa.decide(mixed_queries)
        casa.detach()


@pytest.mark.parametrize(
    ("matrix", "words"), [("head", "a safety token's logit"), ("embedding", "a logit of the reply")]
)
def test_token_rows_that_are_not_finite_decide_nothing(
    tiny_omni: Omni, mixed_queries: list[Query], matrix: str, words: str
) -> None:
    casa = Casa.attach(tiny_omni)
    with torch.no_grad():
        getattr(casa.parts.tokens.rows, matrix).fill_(NAN)
    casa.parts.tokens.write()
    with pytest.raises(ModelError, match=f"query text: {words} is NaN or infinite"):
        casa.generate(mixed_queries[:1], SHORT)


def test_a_loss_that_is_not_finite_stops_training_at_its_step(
    tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    casa = Casa.attach(tiny_omni)
    gradients = Trainer._gradients

    def broken(self: Trainer) -> list[Row]:
        sums = gradients(self)
        return [row | {"loss": NAN} for row in sums] if self._progress.step == 5 else sums

    monkeypatch.setattr(Trainer, "_gradients", broken)
    with pytest.raises(RunError, match=rf"the loss is nan at step 6: .*{FILE} holds the last checkpoint; lower"):
        casa.train(examples(), SETTINGS, tmp_path, progress=False)
    assert not tiny_omni.model.training
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3, 4, 5]
    casa.detach()
    monkeypatch.undo()
    log = Casa.attach(tiny_omni).train(examples(), SETTINGS, tmp_path, resume=True, progress=False)
    assert [row["step"] for row in log] == list(range(1, 9)) and all(row["loss"] > 0 for row in log)


def test_a_gradient_that_is_not_finite_changes_no_weight(
    tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    casa = Casa.attach(tiny_omni)
    gradients = Trainer._gradients

    def broken(self: Trainer) -> list[Row]:
        sums = gradients(self)
        if self._progress.step == 4:
            next(iter(self._weights.values())).grad.fill_(NAN)
        return sums

    monkeypatch.setattr(Trainer, "_gradients", broken)
    with pytest.raises(RunError, match="the gradient's norm is nan at step 5"):
        casa.train(examples(), SETTINGS, tmp_path, progress=False)
    assert all(torch.isfinite(value).all() for group in casa.parts.groups() for value in group.values())
    assert all(torch.isfinite(value.float()).all() for value in load_file(tmp_path / FILE).values())


def test_a_validation_that_is_not_finite_stops_training(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_validate", lambda self: {"loss": NAN})
    with pytest.raises(RunError, match="the validation loss is nan at step 4"):
        Casa.attach(tiny_omni).train(examples(), SETTINGS, progress=False)


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(tiny_omni: Omni, tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni)
    casa.train(examples(), SETTINGS, tmp_path, progress=False)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / FILE)
    name = next(name for name in tensors if name.startswith("weights/"))
    tensors[name].view(-1)[0] = NAN
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    with pytest.raises(RunError, match=f"{FILE}: the tensor {name} holds NaN"):
        casa.train(examples(), SETTINGS, tmp_path, resume=True, progress=False)
