"""A gate on disk: loads bit-equal, says what it was trained on, refuses what does not fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.casa import SETTINGS, SHORT, examples, stir
from helpers.model import SHAPE, WORDS
from peft import PeftModel

from casa_mech.casa import Casa, CasaConfig, InferenceSettings
from casa_mech.errors import ModelError, RunError
from casa_mech.omni import Omni
from casa_mech.organism.architecture import new_omni
from casa_mech.queries import Query

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "casa_config.json",
    "safety_attention.safetensors",
    "token_rows.safetensors",
}


@pytest.fixture
def saved(tiny_omni: Omni, tmp_path: Path) -> Path:
    casa = stir(Casa.attach(tiny_omni, CasaConfig(form="compete", width=32)))
    casa.save_pretrained(tmp_path / "gate")
    casa.detach()
    return tmp_path / "gate"


def test_a_loaded_gate_is_bit_equal(tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni)
    casa.train(examples(), SETTINGS, progress=False)
    batch = tiny_omni.encode(mixed_queries)
    with torch.no_grad():
        logits = tiny_omni.model(**batch.inputs).logits
    replies = casa.generate(mixed_queries, SHORT, attention=True)
    casa.save_pretrained(tmp_path)
    casa.detach()
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for omni in (tiny_omni, new_omni(WORDS, SHAPE, seed=0, source="again")):
        loaded = Casa.from_pretrained(tmp_path, omni)
        with torch.no_grad():
            assert torch.equal(omni.model(**batch.inputs).logits, logits)
        again = loaded.generate(mixed_queries, SHORT, attention=True)
        times = {"seconds": 0.0}
        assert [r.model_copy(update=times) for r in again] == [r.model_copy(update=times) for r in replies]
        assert loaded.config == casa.config and loaded.training == casa.training


def test_the_adapter_is_plain_peft(tiny_omni: Omni, mixed_queries: list[Query], saved: Path) -> None:
    batch = tiny_omni.encode(mixed_queries)
    casa = Casa.from_pretrained(saved, tiny_omni)
    with torch.no_grad():
        expected = tiny_omni.model(**batch.inputs).logits[..., : tiny_omni.vocab_size - 2]
    casa.detach()
    other = new_omni(WORDS, SHAPE, seed=0, source="again")
    model = PeftModel.from_pretrained(other.model, str(saved)).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, expected)


def test_the_card_and_the_config_describe_the_run(tiny_omni: Omni, tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni)
    casa.save_pretrained(tmp_path / "untrained")
    assert "Not trained." in (tmp_path / "untrained" / "README.md").read_text()
    log = casa.train(examples(), SETTINGS, progress=False)
    casa.save_pretrained(tmp_path / "trained")
    best = min((row for row in log if "validation_loss" in row), key=lambda row: row["validation_loss"])
    card = (tmp_path / "trained" / "README.md").read_text()
    assert f"{best['v_harmful']:.4g}" in card and "8 harmful, 16 benign" in card
    stored = json.loads((tmp_path / "trained" / "casa_config.json").read_text())
    assert stored["schema_version"] == 1
    assert stored["base"]["source"] == "tiny" and stored["base"]["fingerprint"] == tiny_omni.fingerprint()


def test_another_base_of_the_same_shape_is_warned_about(saved: Path) -> None:
    other = new_omni(WORDS, SHAPE, seed=5, source="cousin")
    with pytest.warns(UserWarning, match="was trained on tiny, not on these weights of cousin"):
        Casa.from_pretrained(saved, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Casa.from_pretrained(saved, new_omni(WORDS, SHAPE, seed=0, source="again"))


def test_another_shape_is_refused(saved: Path) -> None:
    other = new_omni(WORDS, SHAPE.model_copy(update={"d_model": 96}), seed=0, source="wide")
    with pytest.raises(ModelError, match=r"trained on tiny with d_model 64.*wide with d_model 96"):
        Casa.from_pretrained(saved, other)
    deep = new_omni(WORDS, SHAPE.model_copy(update={"d_mlp": 80}), seed=0, source="thick")
    before = {name: value.clone() for name, value in deep.model.state_dict().items()}
    with pytest.raises(ModelError, match=r"adapter_model.*does not fit"):
        Casa.from_pretrained(saved, deep)
    assert all(torch.equal(value, before[name]) for name, value in deep.model.state_dict().items())


@pytest.mark.parametrize("name", sorted(FILES - {"README.md", "adapter_config.json"}))
@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_broken_folders_are_named(tiny_omni: Omni, saved: Path, name: str, harm: str) -> None:
    path = saved / name
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40])
    before = set(tiny_omni.model.state_dict())
    with pytest.raises(ModelError, match=name):
        Casa.from_pretrained(saved, tiny_omni)
    assert set(tiny_omni.model.state_dict()) == before


def test_other_schemas_and_empty_folders_are_refused(tiny_omni: Omni, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no gate"):
        Casa.from_pretrained(tmp_path, tiny_omni)
    stored = json.loads((saved / "casa_config.json").read_text())
    (saved / "casa_config.json").write_text(json.dumps(stored | {"schema_version": 99}))
    with pytest.raises(ModelError, match="schema version 99"):
        Casa.from_pretrained(saved, tiny_omni)


def test_saving_is_all_or_nothing(tiny_omni: Omni, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    casa = Casa.attach(tiny_omni)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("casa_mech.casa.casa.dump", full)
    with pytest.raises(RunError, match="no space left"):
        casa.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["gate"]


def test_a_gate_saved_under_the_old_names_loads(tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path) -> None:
    casa = stir(Casa.attach(tiny_omni, CasaConfig(form="compete", rule="scale")))
    expected = [reply.v_s for reply in casa.decide(mixed_queries)]
    casa.save_pretrained(tmp_path / "gate")
    casa.detach()
    path = tmp_path / "gate" / "casa_config.json"
    path.write_text(path.read_text().replace('"compete"', '"R3"').replace('"scale"', '"S1"'))
    again = Casa.from_pretrained(tmp_path / "gate", tiny_omni)
    assert (again.config.form, again.config.rule) == ("compete", "scale")
    assert [reply.v_s for reply in again.decide(mixed_queries)] == expected


def test_a_gate_saved_before_the_options_beyond_the_paper_loads(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path
) -> None:
    casa = stir(Casa.attach(tiny_omni))
    replies = casa.generate(mixed_queries, SHORT)
    casa.save_pretrained(tmp_path)
    casa.detach()
    path = tmp_path / "casa_config.json"
    stored = json.loads(path.read_text())
    for name in ("counterfactual", *InferenceSettings.model_fields):
        del stored["config"][name]
    del stored["calibration"]
    path.write_text(json.dumps(stored))
    loaded = Casa.from_pretrained(tmp_path, tiny_omni)
    assert loaded.config == CasaConfig() and loaded.calibration.tensors() == {}
    times = {"seconds": 0.0}
    again = loaded.generate(mixed_queries, SHORT)
    assert [r.model_copy(update=times) for r in again] == [r.model_copy(update=times) for r in replies]


def test_weights_of_another_gate_are_not_taken_for_its_own(tiny_omni: Omni, saved: Path, tmp_path: Path) -> None:
    other = stir(Casa.attach(tiny_omni, CasaConfig(form="compete", width=32)), scale=0.2)
    other.save_pretrained(tmp_path / "other")
    other.detach()
    for name in ("adapter_model.safetensors", "safety_attention.safetensors", "token_rows.safetensors"):
        own = (saved / name).read_bytes()
        (saved / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(ModelError, match=f"{name} is not the file that was saved with this gate"):
            Casa.from_pretrained(saved, tiny_omni)
        assert not hasattr(tiny_omni.model, "peft_config")
        (saved / name).write_bytes(own)
    Casa.from_pretrained(saved, tiny_omni).detach()
    config = json.loads((saved / "casa_config.json").read_text())
    del config["files"]  # as an earlier release wrote it
    (saved / "casa_config.json").write_text(json.dumps(config))
    Casa.from_pretrained(saved, tiny_omni).detach()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 3}, "base: Input should be"),
        ({"config": {"layer": -1}}, "config: layer=-1: blocks are counted from 0|layer=-1"),
        ({"config": []}, "is corrupt"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "is corrupt"),
    ],
)
def test_a_description_that_cannot_be_read_is_told_by_its_field(saved: Path, tiny_omni: Omni, change, message) -> None:
    path = saved / "casa_config.json"
    raw = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(raw | change))
    with pytest.raises(ModelError, match=message) as caught:
        Casa.from_pretrained(saved, tiny_omni)
    assert "validation error" not in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_without_a_gate_is_told_by_the_command_that_makes_one(tiny_omni: Omni, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="give the folder that casa-mech train wrote"):
        Casa.from_pretrained(tmp_path, tiny_omni)
