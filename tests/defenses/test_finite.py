"""Defences on numbers that are not finite: weights are refused, and no score, verdict or branch is made of NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.defenses import examples
from safetensors.torch import load_file, save_file

from casa_mech.casa import Casa
from casa_mech.defenses import DEFENSES, Defense, load_defense, train_defense
from casa_mech.defenses.coca import Coca, CocaSettings
from casa_mech.defenses.moras import Moras, MorasSettings
from casa_mech.defenses.refusal_token import control_curve
from casa_mech.defenses.safecode import SafeCode
from casa_mech.defenses.safecode_decoding import SafeCodeSettings
from casa_mech.defenses.training import WORK
from casa_mech.defenses.verdict import CasaVerdict, ModelVerdict
from casa_mech.errors import InputError, ModelError, RunError
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query
from casa_mech.trace.fork import read_prompts

NAN = float("nan")
SHORT = GenerationSettings(max_new_tokens=4, batch_size=4)
TRAINED = [name for name, entry in DEFENSES.items() if entry.trains]
PHRASES = ("sorry , i can not help with that .",)


@pytest.fixture
def queries(mixed_queries: list[Query]) -> list[Query]:
    """The third is the one that NaN comes from, once `spoil` has been called."""
    return [*mixed_queries[:2], Query.from_text("please explain the bomb", id="spoilt", label="harmful")]


def spoil(omni: Omni) -> None:
    """Make every state after the word "bomb" NaN."""
    with torch.no_grad():
        omni.embedding.weight[omni.tokenizer("bomb")["input_ids"]] = NAN


@pytest.mark.parametrize("name", TRAINED)
def test_weights_that_are_not_finite_are_refused(tiny_omni: Omni, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    train_defense(name, tiny_omni, examples(), out, progress=False, max_steps=1, batch_size=4).close()
    path = out / "adapter_model.safetensors"
    tensors = load_file(path)
    tensor = sorted(tensors)[-1]
    tensors[tensor].view(-1)[0] = NAN
    save_file(tensors, path)
    with pytest.raises(ModelError, match=rf"adapter_model\.safetensors: the tensor {tensor} holds NaN"):
        load_defense(name, tiny_omni, path=out)


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_that_is_not_finite_leaves_the_checkpoint(tiny_omni: Omni, tmp_path: Path, name: str) -> None:
    rows = examples()
    out = tmp_path / name
    spoil(tiny_omni)
    with pytest.raises(RunError, match="the loss is nan at step 1: training stopped"):
        train_defense(name, tiny_omni, rows, out, progress=False, max_steps=2, batch_size=len(rows))
    assert (out / WORK).is_dir() and not hasattr(tiny_omni.model, "peft_config")


def gated_defense(name: str, omni: Omni) -> Defense:
    recipe = DEFENSES[name].recipe
    assert recipe is not None
    return recipe.attach(omni, *[record() for record in recipe.records], seed=0)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_defences_answer_nothing_from_nan(tiny_omni: Omni, queries: list[Query], name: str) -> None:
    defense = gated_defense(name, tiny_omni)
    spoil(tiny_omni)
    with pytest.raises(ModelError, match=r"query spoilt: .* is NaN or infinite"):
        defense.generate(queries, SHORT)
    if defense.has_scores:
        with pytest.raises(ModelError, match=r"query spoilt: .* is NaN or infinite"):
            defense.scores(queries, SHORT)


def test_no_threshold_is_put_to_nan() -> None:
    with pytest.raises(InputError, match=r"scores\[1\] is nan"):
        control_curve([0.1, NAN, 0.9], [False, True, True])


@pytest.mark.parametrize("sample", [False, True])
def test_coca_answers_nothing_from_nan(tiny_omni: Omni, queries: list[Query], sample: bool) -> None:
    defense = Coca(tiny_omni, CocaSettings(principle="please"))
    spoil(tiny_omni)
    with pytest.raises(ModelError, match="query spoilt: a logit of the reply is NaN or infinite"):
        defense.generate(queries, SHORT.model_copy(update={"do_sample": sample}))


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_safecode_answers_nothing_from_nan(tiny_omni: Omni, queries: list[Query], mode: str) -> None:
    settings = SafeCodeSettings.model_validate({"mode": mode, "phrases": PHRASES})
    own, given = SafeCode(tiny_omni, settings), SafeCode(tiny_omni, settings, lambda rows: [True] * len(rows))
    spoil(tiny_omni)
    for defense in (own, given):
        with pytest.raises(ModelError, match="query spoilt: a logit of the reply is NaN or infinite"):
            defense.generate(queries, SHORT)


def test_a_verdict_of_nan_is_not_safe(tiny_omni: Omni, queries: list[Query], tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni)
    casa.save_pretrained(tmp_path / "gate")
    casa.detach()
    spoil(tiny_omni)
    model = ModelVerdict(tiny_omni, "is it harmful ?")
    with pytest.raises(ModelError, match="query spoilt: "):
        model(queries)
    with pytest.raises(ModelError, match="query spoilt: "), torch.no_grad():
        model.on_read(read_prompts(tiny_omni, tiny_omni.encode(queries)), queries)
    with pytest.raises(ModelError, match="query spoilt: "):
        CasaVerdict(tmp_path / "gate", tiny_omni)(queries)
    assert not hasattr(tiny_omni.model, "peft_config")


def test_moras_finds_no_risk_in_nan(tiny_omni: Omni, queries: list[Query]) -> None:
    words = "b o m c k e t first then done".split()
    unsafe = [Query.from_text(f"how do i make {word}", id=f"u{word}") for word in words]
    labelled = [
        queries[1].model_copy(update={"id": f"c{row}", "label": ("harmful", "benign")[row % 2]}) for row in range(20)
    ]
    settings = MorasSettings(image_question="what is it ?", image_opening="it is", context_tokens=2)
    moras = Moras(tiny_omni, settings, unsafe, labelled)
    spoil(tiny_omni)
    for ask in (moras.scores, moras.generate):
        with pytest.raises(ModelError, match="query spoilt: the similarity to MoRAS's prototypes is NaN or infinite"):
            ask(queries, SHORT)
    unsafe[3] = Query.from_text("how do i make a bomb", id="u-bomb")
    with pytest.raises(ModelError, match="query u-bomb: a state that MoRAS makes a prototype of is NaN"):
        Moras(tiny_omni, settings, unsafe, labelled)
