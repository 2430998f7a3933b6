"""Trained defences: their losses against plain arithmetic, their gates, training by name, folders, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.defenses import examples, logits_of, stir
from torch.nn import functional

from casa_mech.casa import Casa, CasaConfig, InferenceSettings
from casa_mech.casa.checkpoint import METRICS
from casa_mech.casa.config import MENDED
from casa_mech.casa.trainer import Trainer
from casa_mech.cli import main
from casa_mech.defenses import DEFENSES, Defense, load_defense, train_defense
from casa_mech.defenses.casa import CasaMended
from casa_mech.defenses.circuit_breaker import CircuitBreaker
from casa_mech.defenses.refusal_token import control_curve
from casa_mech.defenses.rerouting import CircuitBreakerSettings
from casa_mech.defenses.safety_token import SafetyTokenDefense
from casa_mech.defenses.ssft import Ssft, SsftToken
from casa_mech.defenses.training import WORK
from casa_mech.errors import InputError, ModelError, RunError
from casa_mech.evaluation.divergence import kl_to_base
from casa_mech.judging.stats import wilson
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query
from casa_mech.trace import gated_prompt, gated_targets, layer_states, plain_targets

SHORT = GenerationSettings(max_new_tokens=6, batch_size=3)
TRAINED = [name for name, entry in DEFENSES.items() if entry.trains]
FEW: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "checkpoint_every": 1}


def untrained(name: str, omni: Omni) -> Defense:
    recipe = DEFENSES[name].recipe
    assert recipe is not None
    return recipe.attach(omni, *[record() for record in recipe.records], seed=0)


# Fine-tuning, and tokens without safety attention


def test_traced_forwards_equal_plain_ones(tiny_omni: Omni) -> None:
    rows = examples(4)
    batch = tiny_omni.encode([row.query for row in rows], [tiny_omni.reply_ids(row.reply) for row in rows])
    plain = tiny_omni.model(**batch.inputs, labels=batch.labels, output_hidden_states=True)
    targets = plain_targets(tiny_omni, batch)
    assert functional.cross_entropy(targets.logits, targets.tokens).item() == pytest.approx(plain.loss.item(), rel=1e-5)
    states = layer_states(tiny_omni, batch, 1)
    assert states.shape[0] == 2 and torch.equal(states, torch.stack(plain.hidden_states[:2]))
    with pytest.raises(InputError, match="no site 2"):
        layer_states(tiny_omni, batch, 3)


def test_fine_tuning_is_the_balanced_mean_of_replies(tiny_omni: Omni) -> None:
    defense = Ssft(tiny_omni)
    rows, beta = examples(6), 0.3
    expected = 0.0
    for row in rows:
        batch = tiny_omni.encode([row.query], [tiny_omni.reply_ids(row.reply)])
        share = beta if row.query.label == "harmful" else 1 - beta
        expected += share / 3 * tiny_omni.model(**batch.inputs, labels=batch.labels).loss.item()
    parts = defense._learner(rows)._parts
    weights = torch.tensor([beta / 3, (1 - beta) / 3] * 3)
    loss, sums = parts.objective(rows, weights, 99)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (sums["n_harmful"], sums["n_benign"]) == (3, 3)
    defense.close()


def test_a_neutral_gate_changes_no_logit(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig(form="none"))
    batch = tiny_omni.encode(mixed_queries, prefill=False)
    prompt = gated_prompt(tiny_omni, batch, casa.safety_gate, batch.gate_position)
    plain = logits_of(tiny_omni, mixed_queries)
    assert torch.equal(prompt.logits, plain)
    pair = plain[:, list(casa.token_ids)]
    assert torch.equal(prompt.reading.v_s, torch.softmax(pair, dim=-1)[:, 1])
    # Training: the loss is that of plain fine-tuning on replies that begin with the token.
    rows = examples(4)
    targets = [
        [casa.token_ids[row.query.label == "harmful"], *tiny_omni.reply_ids(row.reply)] for row in rows
    ]  # fmt: skip
    batch = tiny_omni.encode([row.query for row in rows], targets, prefill=False)
    gated = gated_targets(tiny_omni, batch, casa.safety_gate, casa.parts.tokens.rows)
    torch.testing.assert_close(gated.logits, plain_targets(tiny_omni, batch).logits)
    assert {name.split(".")[0] for group in casa.parts.groups() for name in group} == {"model", "rows"}
    with pytest.raises(InputError, match="no safety attention"):
        _ = casa.attention
    casa.detach()


def test_the_token_alone_decides_and_conditions(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    defense = untrained("ssft-token", tiny_omni)
    assert isinstance(defense, SafetyTokenDefense)
    stir(defense)
    replies = defense.generate(mixed_queries, SHORT)
    ids = list(defense.casa.token_ids)
    pairs = logits_of(tiny_omni, mixed_queries)[:, ids]
    for query, reply, pair in zip(mixed_queries, replies, pairs, strict=True):
        chosen = int(pair.argmax())
        assert reply.safety_token == ("safe", "unsafe")[chosen]
        batch = tiny_omni.encode([query], [[ids[chosen]]])
        new = tiny_omni.model.generate(**batch.inputs, max_new_tokens=6, do_sample=False)
        row = tiny_omni.until_end(new[0, batch.inputs["input_ids"].shape[1] :].tolist())
        assert reply.text == tiny_omni.decode(row)
    assert defense.scores(mixed_queries) == pytest.approx([reply.v_s for reply in replies], rel=1e-4)
    defense.close()


def test_a_threshold_moves_refusal_tokens(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    scores: list[float] = []
    tokens = {}
    for threshold in (0.0, None, 1.0):
        defense = untrained("refusal-token", tiny_omni)
        assert isinstance(defense, SafetyTokenDefense)
        stir(defense)
        scores = scores or defense.scores(mixed_queries)
        chosen = sorted(scores)[1] + 1e-4 if threshold is None else threshold
        defense.settings = defense.settings_type(threshold=chosen)
        tokens[threshold] = [reply.safety_token for reply in defense.generate(mixed_queries, SHORT)]
        defense.close()
    assert set(tokens[0.0]) == {"unsafe"} and set(tokens[1.0]) == {"safe"}
    above = sorted(scores)[1] + 1e-4
    assert tokens[None] == ["unsafe" if score > above else "safe" for score in scores]


def test_control_curve() -> None:
    scores, harmful = [0.9, 0.6, 0.2, 0.7, 0.1, 0.05], [True, True, True, False, False, False]
    curve = control_curve(scores, harmful, thresholds=[0.0, 0.5, 0.65, 1.0])
    assert [point.attack_success for point in curve] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [point.over_refusal for point in curve] == pytest.approx([1, 1 / 3, 1 / 3, 0])
    assert curve[1].attack_interval == wilson(1, 3) and curve[1].refusal_interval == wilson(1, 3)
    assert curve[0].n_harmful == curve[0].n_benign == 3
    # With what the model does after each token: one attack fails unflagged, one works although flagged.
    passed, flagged = [True, False, True, False, False, False], [True, False, False, True, True, False]
    points = control_curve(scores, harmful, passed, flagged, [0.0, 0.5])
    assert [point.attack_success for point in points] == pytest.approx([1 / 3, 2 / 3])
    assert [point.over_refusal for point in points] == pytest.approx([2 / 3, 1 / 3])
    rates = [point.attack_success for point in control_curve(scores, harmful)]
    assert rates == sorted(rates) and len(rates) == 8
    with pytest.raises(InputError, match="one class"):
        control_curve(scores, [True] * 6)
    with pytest.raises(InputError, match="one length"):
        control_curve(scores, harmful, [True])


# All of them: training by name, folders, batches, giving the model back


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the batches that the model is asked to encode."""
    sizes: list[int] = []
    encode = Omni.encode

    def counted(self: Omni, queries: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(queries))
        return encode(self, queries, *rest, **named)

    monkeypatch.setattr(Omni, "encode", counted)
    yield sizes


@pytest.mark.parametrize("name", TRAINED)
def test_train_save_load_and_give_back(
    name: str, tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path, batches: list[int]
) -> None:
    before = {key: value.clone() for key, value in tiny_omni.model.state_dict().items()}
    plain = [reply.text for reply in load_defense("none", tiny_omni).generate(mixed_queries, SHORT)]
    out = tmp_path / "defense"
    defense = train_defense(name, tiny_omni, examples(), out, progress=False, **FEW)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and not (out / "training").exists()
    assert "| steps | 3 of" in (out / "README.md").read_text()
    stir(defense)
    defense.save_pretrained(out)
    logits = logits_of(tiny_omni, mixed_queries)
    queries = mixed_queries[::-1]
    batches.clear()
    replies = defense.generate(queries, SHORT)
    assert max(batches) == 3 and [reply.query_id for reply in replies] == [query.id for query in queries]
    described = defense.describe()
    assert described.name == name and described.trained_parameters > 0 and "weights" in described.changes
    identity = defense.identity
    defense.close()
    after = tiny_omni.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert [reply.text for reply in tiny_omni.generate(mixed_queries, SHORT)] == plain

    with load_defense(name, tiny_omni, path=out) as again:
        assert torch.equal(logits_of(tiny_omni, mixed_queries), logits)
        reloaded = again.generate(mixed_queries, SHORT)
        assert [reply.text for reply in reloaded] == [reply.text for reply in replies[::-1]]
        assert again.identity == identity and json.dumps(identity)
        assert again.has_scores == (name in ("ssft-token", "refusal-token", "casa", "casa-mended"))


@pytest.mark.parametrize("name", ["ssft", "circuit-breaker"])
def test_stopped_training_goes_on(name: str, tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_defense(name, tiny_omni, examples(), tmp_path / "whole", progress=False, **FEW)
    expected = {key: value.detach().clone() for key, value in whole.adapter.parameters().items()}  # type: ignore[attr-defined]
    whole.close()
    gradients = Trainer._gradients

    def interrupted(self: Trainer) -> list[dict[str, float]]:
        if self._progress.step == 2:
            raise KeyboardInterrupt
        return gradients(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_defense(name, tiny_omni, examples(), tmp_path / "cut", progress=False, **FEW)
    assert (tmp_path / "cut" / "training").is_dir() and not hasattr(tiny_omni.model, "peft_config")
    resumed = train_defense(name, tiny_omni, examples(), tmp_path / "cut", progress=False, **FEW)
    weights = resumed.adapter.parameters()  # type: ignore[attr-defined]
    assert all(torch.equal(value, weights[key]) for key, value in expected.items())
    resumed.close()
    with pytest.raises(RunError, match="holds a trained defence"):
        train_defense(name, tiny_omni, examples(), tmp_path / "cut", progress=False, **FEW)


def test_seeds_differ_and_repeat(tiny_omni: Omni, tmp_path: Path) -> None:
    adapters = []
    for number, seed in enumerate((0, 0, 1)):
        defense = train_defense("ssft", tiny_omni, examples(), tmp_path / str(number), seed=seed, progress=False, **FEW)
        assert isinstance(defense, Ssft) and defense.training is not None and defense.training.settings.seed == seed
        adapters.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
        defense.close()
    assert adapters[0] == adapters[1] != adapters[2]


def test_casa_by_name_is_casa(tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig(form="compete", rule="scale"))
    casa.save_pretrained(tmp_path / "gate")
    prefilled = [query.model_copy(update={"prefill": "sure , here"}) for query in mixed_queries]
    expected = {order: casa.generate(prefilled, SHORT, order=order) for order in ("gate_first", "prefill_first")}
    casa.detach()
    for order, replies in expected.items():
        with load_defense("casa", tiny_omni, path=tmp_path / "gate", order=order, form="compete") as defense:
            repeated = defense.generate(prefilled, SHORT)
            assert [(reply.text, reply.v_s) for reply in repeated] == [(reply.text, reply.v_s) for reply in replies]
    with load_defense("casa", tiny_omni, path=tmp_path / "gate", hard=True, refusal="no .") as defense:
        assert all((reply.text == "no .") == (reply.safety_token == "unsafe") for reply in defense.generate(prefilled))
    with pytest.raises(InputError, match="trained with rule scale, not add_log"):
        load_defense("casa", tiny_omni, path=tmp_path / "gate", rule="add_log")
    assert not hasattr(tiny_omni.model, "peft_config")


def test_the_safety_prompt_is_a_switch_on_all(tiny_omni: Omni, tmp_path: Path) -> None:
    queries = [example.query for example in examples(3)]
    ssft = Ssft(tiny_omni)
    stir(ssft)
    ssft.save_pretrained(tmp_path / "ssft")
    ssft.close()
    with load_defense("ssft", tiny_omni, path=tmp_path / "ssft", safety_prompt=True) as defense:
        assert defense.describe().safety_prompt and defense.label == "ssft + safety prompt"
        prompted = defense._prepared(queries)
        assert all(query.system for query in prompted)
        expected = [reply.text for reply in load_defense("none", tiny_omni).generate(prompted, SHORT)]
        with_prompt = [reply.text for reply in defense.generate(queries, SHORT)]
        assert with_prompt == expected
    alone = load_defense("safety-prompt", tiny_omni)
    assert alone.describe().changes == ("prompt",) and alone.label == "safety-prompt"


# Mistakes


def test_a_swapped_adapter_is_not_taken_for_its_own(tiny_omni: Omni, tmp_path: Path) -> None:
    for name, scale in (("own", 0.1), ("other", 0.2)):
        ssft = Ssft(tiny_omni)
        stir(ssft, scale)
        ssft.save_pretrained(tmp_path / name)
        ssft.close()
    swapped = tmp_path / "own" / "adapter_model.safetensors"
    swapped.write_bytes((tmp_path / "other" / swapped.name).read_bytes())
    with pytest.raises(ModelError, match=f"{swapped.name} is not the file that was saved"):
        load_defense("ssft", tiny_omni, path=tmp_path / "own")
    assert not hasattr(tiny_omni.model, "peft_config")
    (tmp_path / "own" / "defense.json").write_text('{"schema_version": 1, "defense": 3}')
    with pytest.raises(
        ModelError, match=r"defense.json is missing or corrupt \(defense: Input should be a valid string"
    ):
        load_defense("ssft", tiny_omni, path=tmp_path / "own")


def test_mistakes_are_named(tiny_omni: Omni, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown defense 'moat'; defenses: none, safety-prompt, ssft"):
        load_defense("moat", tiny_omni)
    with pytest.raises(InputError, match=r"'refusal-token' has no option 'alpha'; its options: order, .*threshold"):
        load_defense("refusal-token", tiny_omni, path=tmp_path, alpha=1)
    with pytest.raises(InputError, match="threshold"):
        load_defense("refusal-token", tiny_omni, path=tmp_path, threshold=2)
    for name in TRAINED:
        with pytest.raises(InputError, match=f"{name}.*trained first: casa-mech train --defense {name} --out DIR"):
            load_defense(name, tiny_omni)
    with pytest.raises(InputError, match="nothing to load"):
        load_defense("none", tiny_omni, path=tmp_path)
    with pytest.raises(ModelError, match="holds no gate or other trained defense"):
        load_defense("ssft", tiny_omni, path=tmp_path)
    with pytest.raises(InputError, match="'none' needs no training; those that do: ssft, ssft-token"):
        train_defense("none", tiny_omni, examples(), tmp_path / "new")
    with pytest.raises(InputError, match=r"'ssft' has no option 'form'; its options: .*beta.*max_steps"):
        train_defense("ssft", tiny_omni, examples(), tmp_path / "new", form="R1")
    assert not (tmp_path / "new").exists()


def test_folders_that_do_not_fit(tiny_omni: Omni, tmp_path: Path) -> None:
    folder = tmp_path / "ssft"
    defense = Ssft(tiny_omni)
    defense.save_pretrained(folder)
    defense.close()
    with pytest.raises(ModelError, match="holds the defense 'ssft', not 'circuit-breaker'"):
        load_defense("circuit-breaker", tiny_omni, path=folder)
    record = json.loads((folder / "defense.json").read_text())
    for change, message in (
        ({"schema_version": 9}, "schema version 9"),
        ({"base": record["base"] | {"d_model": 32}}, "d_model 32"),
        ({"base": None}, "corrupt"),
    ):
        (folder / "defense.json").write_text(json.dumps(record | change))
        with pytest.raises(ModelError, match=message):
            load_defense("ssft", tiny_omni, path=folder)
    (folder / "defense.json").write_text(json.dumps(record | {"base": record["base"] | {"fingerprint": "x"}}))
    with pytest.warns(UserWarning, match="not on these weights"):
        load_defense("ssft", tiny_omni, path=folder).close()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="missing or corrupt"):
        load_defense("ssft", tiny_omni, path=folder)
    assert not hasattr(tiny_omni.model, "peft_config")


# On the command line


def _run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err  # type: ignore[arg-type]


def test_circuit_breakers_from_a_table(
    random_organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"is {word} {label}", "reply": "sure" if label == "benign" else "sorry", "label": label,
         "completion": "sure , here is" if label == "harmful" else None}
        for word in "abcd" for label in ("harmful", "benign")
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    shared = ("train", "--model", random_organism, "--defense", "circuit-breaker", "--data", tmp_path / "t.csv")
    shared += ("--out", tmp_path / "out", "--steps", "1", "--batch-size", "2")
    code, _, err = _run(capsys, *shared)
    assert code == 2 and "circuit breakers reroute a harmful completion" in err
    code, text, _ = _run(capsys, *shared, "--completion-column", "completion", "--json")
    assert code == 0 and json.loads(text)["examples"] == 8


def test_train_and_evaluate_by_name(random_organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"goal": ["how do i make a bomb", "how do i make a cake"]}).to_csv(tmp_path / "q.csv", index=False)
    model = ("--model", random_organism)
    shared = ("evaluate", *model, "--queries", tmp_path / "q.csv", "--column", "goal", "--label", "harmful")
    quick = ("--steps", "2", "--examples", "8", "--benign", "varied", "--json")
    for name in ("ssft-token", "circuit-breaker"):
        out = tmp_path / name
        code, text, _ = _run(capsys, "train", *model, "--defense", name, "--out", out, "--batch-size", "4", *quick)
        assert code == 0 and json.loads(text)["defense"] == name and json.loads(text)["steps"] == 2
        code, text, _ = _run(capsys, *shared, "--gate", out, "--max-new-tokens", "3", "--json")
        assert code == 0 and json.loads(text)["defense"] == name
    token = ("--gate", tmp_path / "ssft-token", "--defense", "refusal-token", "--safety-prompt")
    code, text, _ = _run(capsys, *shared, *token, "--option", "threshold=0", "--max-new-tokens", "3", "--json")
    record = json.loads(text)
    assert code == 0 and record["defense"] == "refusal-token + safety prompt" and record["sources"][0]["flagged"] == 1
    for wrong, message in (
        (("--defense", "moat"), "unknown defense 'moat'; defenses: none"),
        (("--defense", "ssft"), "trained first"),
        (("--defense", "none", "--option", "alpha=1"), "has no option 'alpha'"),
        (("--option", "alpha"), "NAME=VALUE"),
    ):
        code, text, err = _run(capsys, *shared, *wrong)
        assert code == 2 and text == "" and message in err and len(err.strip().splitlines()) == 1
    code, _, err = _run(capsys, "train", *model, "--defense", "none", "--out", tmp_path / "x")
    assert code == 2 and "needs no training" in err
    table = tmp_path / "q.csv"
    code, _, err = _run(capsys, "train", *model, "--data", table, "--benign", "varied", "--out", tmp_path / "x")
    assert code == 2 and "--benign varied is for the micro-world's examples" in err and err.count("\n") == 1
    code, _, err = _run(capsys, "train", *model, "--counterfactual", "1.5", "--out", tmp_path / "x")
    assert code == 2 and "counterfactual: Input should be less than or equal to 1" in err and err.count("\n") == 1


def test_other_trained_defences_are_measured_against_their_base_too(
    tiny_omni: Omni, mixed_queries: list[Query]
) -> None:
    settings = GenerationSettings(max_new_tokens=3, batch_size=3)
    config = CircuitBreakerSettings(layers=(1,))
    for make in (lambda: Ssft(tiny_omni), lambda: CircuitBreaker(tiny_omni, config)):
        with make() as defense:
            assert kl_to_base(defense, mixed_queries, settings) == [0.0] * 4, "an untrained LoRA is nothing"
            with torch.no_grad():
                for name, weight in tiny_omni.model.named_parameters():
                    if "lora_B" in name:
                        weight.add_(0.5)
            moved = kl_to_base(defense, mixed_queries, settings)
            assert min(moved) > 0 and kl_to_base(defense, mixed_queries, settings) == moved, "it is on again"
            defense.safety_prompt = True
            with pytest.raises(InputError, match="without a safety prompt"):
                kl_to_base(defense, mixed_queries, settings)
    with SsftToken(Casa.attach(tiny_omni, CasaConfig(form="none"))) as gated:
        assert kl_to_base(gated, mixed_queries, settings) == kl_to_base(gated.casa, mixed_queries, settings)
    with pytest.raises(InputError, match="the defence 'none' changes more than"):
        kl_to_base(load_defense("none", tiny_omni), mixed_queries, settings)


# CASA with options beyond the paper


def test_casa_mended_is_trained_with_the_preset_and_calibrated(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path
) -> None:
    defense = train_defense("casa-mended", tiny_omni, examples(), tmp_path / "gate", progress=False, seed=3, **FEW)
    assert isinstance(defense, CasaMended) and defense.casa.config == CasaConfig.mended()
    assert defense.casa.calibration.sizes() == {
        "unlabelled": {"text": 100, "image": 100, "audio": 100, "image+audio": 100},
        "benign": {"text": 50, "image": 50, "audio": 50, "image+audio": 50},
    }
    assert set(defense.casa.calibration.odds) == {"plain", "recentred", "rescaled"}
    scores, identity, described = defense.scores(mixed_queries), defense.identity, defense.describe()
    assert described.extra_forwards == 2.0 and described.forwards_per_token == 1.0
    defense.close()
    with load_defense("casa-mended", tiny_omni, path=tmp_path / "gate") as again:
        assert again.identity == identity and again.scores(mixed_queries) == scores
    # The same folder is a casa, too; its options can be switched off and on one by one.
    off = {name: type(value)() for name, value in MENDED.items() if name != "counterfactual"}
    with load_defense("casa", tiny_omni, path=tmp_path / "gate", **off) as plain:
        assert isinstance(plain, SafetyTokenDefense) and plain.casa.config.inference == InferenceSettings()
        assert plain.identity["gate"] != identity["gate"]
        assert plain.scores(mixed_queries[1:]) != pytest.approx(scores[1:], abs=1e-6)


def test_a_gate_is_calibrated_when_an_option_needs_it(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path
) -> None:
    casa = Casa.attach(tiny_omni)
    casa.save_pretrained(tmp_path / "gate")
    casa.detach()
    rows = [{"prompt": f"{'please ' * i} what is it ?", "label": ("harmful", "benign")[i % 2]} for i in range(6)]
    pd.DataFrame(rows).to_csv(tmp_path / "q.csv", index=False)
    source = [{"path": tmp_path / "q.csv", "column": "prompt", "label_column": "label"}]
    with load_defense("casa", tiny_omni, path=tmp_path / "gate", recheck_every=4) as defense:
        assert isinstance(defense, SafetyTokenDefense) and not defense.casa.calibration.tensors()
        assert defense.describe().forwards_per_token == 1.25
    with load_defense("casa", tiny_omni, path=tmp_path / "gate", fpr=0.1, calibration=source) as defense:
        assert isinstance(defense, SafetyTokenDefense)
        assert defense.casa.calibration.sizes() == {"unlabelled": {"text": 6}, "benign": {"text": 3}}
    with load_defense("casa", tiny_omni, path=tmp_path / "gate", recentre=True, n_calibration=2) as defense:
        assert isinstance(defense, SafetyTokenDefense)
        assert defense.casa.calibration.counts == {"text": 4, "image": 4, "audio": 4, "image+audio": 4}
    tiny_omni.model.config.micro_world = False
    with pytest.raises(InputError, match=r"fpr needs a calibration: .*, or set the option calibration to queries"):
        load_defense("casa", tiny_omni, path=tmp_path / "gate", fpr=0.1)
    with pytest.raises(InputError, match="rescale stretches states about text's mean"):
        load_defense("casa", tiny_omni, path=tmp_path / "gate", rescale=True)
    assert not hasattr(tiny_omni.model, "peft_config")


def test_a_training_that_is_stopped_while_it_is_saved_goes_on(
    tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and weights appear together, in the place of the checkpoints."""
    write = Path.write_text

    def stopped(self: Path, *arguments: Any, **options: Any) -> int:
        if self.name == METRICS:
            raise KeyboardInterrupt
        return write(self, *arguments, **options)

    out, settings = tmp_path / "out", {**FEW, "max_steps": 2, "progress": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", stopped)
        train_defense("ssft", tiny_omni, examples(), out, **settings)
    assert [path.name for path in out.iterdir()] == [WORK]
    train_defense("ssft", tiny_omni, examples(), out, **settings).close()
    assert {METRICS, "defense.json"} < {path.name for path in out.iterdir()}
    assert [json.loads(line)["step"] for line in (out / METRICS).read_text().splitlines()] == [1, 2]
