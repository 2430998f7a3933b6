"""Commands that take a model, on one as wide as Qwen2.5-Omni-3B: memory, precision of the loss, what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import psutil
import pytest
import soundfile
import torch
from helpers.command import run
from helpers.true_width import LAYERS, VOCABULARY, WIDTH, save_true_width
from PIL import Image
from torch import Tensor

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.objective import sequence_losses
from casa_mech.casa.supervised import is_harmful
from casa_mech.omni import Omni, load_omni
from casa_mech.queries import Example, Query
from casa_mech.trace.gate import gated_targets
from probes.activations import ActivationStore

pytestmark = pytest.mark.slow
NEEDED = 6 * 2**30
"""Bytes that these tests take at most."""
CPU = ("--device", "cpu", "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    if psutil.virtual_memory().available < NEEDED:
        pytest.skip(f"a model of 3B's widths needs {NEEDED / 2**30:.0f} GiB of free memory")
    with TemporaryDirectory() as name:
        save_true_width(Path(name))
        yield Path(name)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight examples of unequal length."""
    rows = [
        {
            "prompt": f"How do I {'pick a lock' if harmful else 'bake a cake'}{', in detail' * number}?",
            "reply": "I cannot help with that." if harmful else "Heat the oven, stir the dough, and bake it.",
            "label": "harmful" if harmful else "benign",
        }
        for number in range(4)
        for harmful in (True, False)
    ]
    path = tmp_path_factory.mktemp("data") / "examples.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.timeout(900)
def test_commands_that_take_a_model(
    folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("one", "other"):
        Image.fromarray(rng.integers(0, 255, (84, 112, 3), dtype=np.uint8)).save(pictures / f"{name}.png")
    soundfile.write(tmp_path / "clip.wav", 0.1 * rng.standard_normal(16_000), 16_000)
    model, gate = ("--model", folder, *CPU), tmp_path / "gate"

    def told(*arguments: object) -> dict[str, object]:
        status, out, errors = run(capsys, *arguments, *model, "--json")
        assert status == 0, errors
        return json.loads(out)

    assert told("doctor")
    options = ("--option", "forward_tokens=120", "--option", "gradient_checkpointing=true", "--option", "validation=0")
    trained = told("train", "--data", table, "--out", gate, "--steps", 2, "--batch-size", 4, *options)
    assert trained["steps"] == 2 and 5 < trained["last"]["loss"] < 40  # type: ignore[index,operator]
    media = ("--image", pictures / "one.png", "--audio", tmp_path / "clip.wav")
    asked = ("generate", "What is this?", *media, "--max-new-tokens", 3)
    assert told(*asked)["tokens"] == 3
    assert 0 < told(*asked, "--gate", gate)["v_s"] < 1  # type: ignore[operator]
    sources = ("--queries", table, "--column", "prompt")
    unlabelled = ("--queries", pictures, "--label-column", "-")
    assert told("calibrate", "--gate", gate, "--out", tmp_path / "calibrated", "--recentre", *sources, *unlabelled)
    found = told(
        "evaluate", "--gate", tmp_path / "calibrated", *sources, "--max-new-tokens", 2, "--out", tmp_path / "results"
    )
    assert found and len(pd.read_parquet(tmp_path / "results" / "replies.parquet")) == 8
    audited = told("audit", "--gate", gate, "--queries", table, "--max-new-tokens", 1, "--out", tmp_path / "audit")
    assert audited and len(list((tmp_path / "audit").glob("*.csv")))
    (tmp_path / "sets.yaml").write_text(
        f"sets: [{{name: own, harmful: {{set: table, path: {table}, limit: 2, columns: "
        "{column: prompt, label_column: label}}}]\n"
        f"training: {{examples: {{path: {table}}}, settings: {{max_steps: 1, batch_size: 2, validation: 0}}}}\n"
        "generation: {max_new_tokens: 1}\nseeds: [0]\ntiming_rounds: 0\ndefenses: [none, ssft, casa]\n"
    )
    compared = told("compare", "--queries-config", tmp_path / "sets.yaml", "--out", tmp_path / "compare")
    assert {row["defense"] for row in compared["defenses"]} == {"none", "ssft", "casa"}  # type: ignore[index,attr-defined]


@pytest.fixture(scope="module")
def omni(folder: Path) -> Omni:
    return load_omni(folder, device="cpu", dtype="bfloat16")


def test_the_loss_of_a_bfloat16_model_is_that_of_its_logits(omni: Omni, table: Path) -> None:
    """Within 1e-3 of the loss from the same states in float64, and no float32 tensor of [target, vocabulary]."""
    assert (omni.d_model, omni.n_layers, omni.vocab_size) == (WIDTH, LAYERS, VOCABULARY)
    rows = [
        Example(query=Query.from_text(row.prompt, id=str(row.Index), label=row.label), reply=30 * row.reply)
        for row in pd.read_csv(table).itertuples()
    ]
    casa = Casa.attach(omni, CasaConfig(lora_dropout=0.0))
    harmful = is_harmful(rows)
    ids = casa.token_ids
    targets = [[ids[int(bad)], *omni.reply_ids(row.reply)[:40]] for row, bad in zip(rows, harmful, strict=True)]
    batch = omni.encode([row.query for row in rows], targets, prefill=False)
    forward = gated_targets(omni, batch, casa.safety_gate, casa.parts.tokens.rows)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        losses = sequence_losses(casa.config, forward, harmful)
    assert len(forward.logits) > 300 and forward.logits.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.bfloat16 or tensor.numel() < forward.logits.numel() / 4 for tensor in held)
    wide = replace(forward, logits=forward.logits.detach().double(), gated=forward.gated.detach().double())
    exact = sequence_losses(casa.config, wide, harmful)
    for name in ("token", "reply"):
        loss, truth = getattr(losses, name), getattr(exact, name)
        assert loss.dtype == torch.float32 and ((loss - truth).abs() / truth).max() < 1e-3
    (losses.token + losses.reply).mean().backward()
    assert all(torch.isfinite(value.grad).all() for value in casa.parts.adapter.parameters().values())
    casa.detach()


def test_states_are_collected(omni: Omni, tmp_path: Path) -> None:
    queries = [Query.from_text(f"what is {number} ?", id=str(number)) for number in range(4)]
    store = ActivationStore.collect(omni, queries, None, ("last", "mean"), tmp_path / "store")
    assert store.tensor("norm", "last").shape == (4, WIDTH) and store.tensor(0, "mean").dtype == torch.bfloat16
