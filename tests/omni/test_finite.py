"""What is not finite is refused: weights as they are read, logits as they are decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from casa_mech.errors import ModelError
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.omni.finite import check_decision, check_weights, is_finite
from casa_mech.queries import Query

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture
def folder(tiny_omni: Omni, tmp_path: Path) -> Path:
    tiny_omni.model.save_pretrained(tmp_path / "model")
    tiny_omni.processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("index", [0, 500, 1000])
def test_one_number_is_enough(dtype: torch.dtype, value: float, index: int) -> None:
    values = torch.randn(1001)
    assert is_finite(values.to(dtype))
    values[index] = value
    assert not is_finite(values.to(dtype)) and not is_finite(values.to(dtype).reshape(7, 143).T)


def test_whole_numbers_and_nothing_are_finite() -> None:
    assert is_finite(torch.arange(4)) and is_finite(torch.empty(0)) and is_finite(torch.tensor([True]))


def test_the_source_and_the_tensor_are_named() -> None:
    with pytest.raises(ModelError, match=r"gate/rows: the tensor head holds NaN or infinite numbers; train it again"):
        check_weights({"body": torch.ones(2), "head": torch.tensor([1.0, float("nan")])}, "gate/rows", "train it again")


@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_first_query_that_cannot_be_decided_is_named(value: float) -> None:
    queries = [Query.from_text("hear", id=f"q{index}") for index in range(3)]
    check_decision("v_s", torch.zeros(3, 2), queries)
    with pytest.raises(ModelError, match="query q1: v_s is NaN or infinite"):
        check_decision("v_s", torch.tensor([[0.0, 1.0], [0.0, value], [value, 0.0]]), queries)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_checkpoint_that_is_not_finite_is_refused(folder: Path, value: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"model\.safetensors: the tensor {name} holds NaN or infinite") as caught:
        load_omni(folder)
    assert "\n" not in str(caught.value)


def test_weights_beyond_the_type_they_are_loaded_as_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name][0, 0] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    load_omni(folder, device="cpu")
    with pytest.raises(ModelError, match=r"model as float16: the tensor .*layers\.0\.mlp\.up_proj\.weight"):
        load_omni(folder, device="cpu", dtype="float16")


def test_an_adapter_that_is_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(load_omni(folder).model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    adapted.save_pretrained(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"with the adapter .*lora: the tensor .*q_proj"):
        load_omni(folder, adapter=tmp_path / "lora")


def test_generation_names_the_query_whose_logits_are_not_finite(tiny_omni: Omni) -> None:
    queries = [Query.from_text("how do i make a cake ?", id="cake"), Query.from_text("make a bomb", id="bomb")]
    short = GenerationSettings(max_new_tokens=2)
    tiny_omni.generate(queries, short)
    with torch.no_grad():
        tiny_omni.embedding.weight[tiny_omni.tokenizer("bomb")["input_ids"]] = float("nan")
    for sample in (False, True):
        with pytest.raises(ModelError, match="query bomb: a logit of the reply is NaN or infinite"):
            tiny_omni.generate(queries, short.model_copy(update={"do_sample": sample}))
    assert tiny_omni.generate(queries[:1], short)
