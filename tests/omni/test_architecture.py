"""`Architecture`: every part is where the record says, and nothing else in the project names a part's path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT

from casa_mech.errors import ModelError
from casa_mech.omni import Omni, load_omni
from casa_mech.omni.architecture import (
    ARCHITECTURES,
    QWEN2_5_OMNI,
    QWEN2_5_VL,
    architecture_of,
    known_lora_targets,
    part_at,
)
from casa_mech.queries import Query

PARTS = re.compile(
    r"\b(lm_head|[qkvo]_proj|down_proj|audio_tower|rope_deltas|language_model|embed_tokens|self_attn|visual)\b"
)
INHERENT = {"organism/architecture.py", "lens/adapter.py"}
"""One builds the model's configuration; the other maps it to TransformerLens, vision tower included."""


def test_parts_are_where_the_record_says(tiny_omni: Omni) -> None:
    thinker = tiny_omni.model.model
    text = thinker.language_model
    assert tiny_omni.backbone is thinker and tiny_omni.text_model is text
    assert tiny_omni.embedding is text.embed_tokens and tiny_omni.head is tiny_omni.model.lm_head
    assert tiny_omni.blocks is text.layers and tiny_omni.norm is text.norm
    assert tiny_omni.tower("image") is thinker.visual and tiny_omni.tower("audio") is thinker.audio_tower
    assert tiny_omni.writers(1) == (text.layers[1].self_attn.o_proj, text.layers[1].mlp.down_proj)
    assert not tiny_omni.tied


def test_what_writes_to_the_residual_stream_is_as_wide_as_it(tiny_omni: Omni) -> None:
    writers = [writer for layer in range(tiny_omni.n_layers) for writer in tiny_omni.writers(layer)]
    writers += [part_at(tiny_omni.tower(name), tower.projection) for name, tower in QWEN2_5_OMNI.towers.items()]
    assert [writer.out_features for writer in writers] == [tiny_omni.d_model] * 6
    attention = part_at(tiny_omni.blocks[0], QWEN2_5_OMNI.attention)
    assert tiny_omni.n_heads * tiny_omni.d_head == part_at(attention, QWEN2_5_OMNI.query).out_features


def test_blocks_hold_every_lora_target(tiny_omni: Omni) -> None:
    linears = {
        name.rpartition(".")[2] for name, part in tiny_omni.blocks.named_modules() if hasattr(part, "in_features")
    }
    assert linears == set(QWEN2_5_OMNI.lora_targets) < set(known_lora_targets())


def test_envoys_stand_for_the_modules(tiny_omni: Omni) -> None:
    for part in ("backbone", "text_model", "embedding", "blocks", "norm", "head"):
        assert tiny_omni.envoy(part)._module is getattr(tiny_omni, part)


def test_the_text_offset_is_the_models_own(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    with torch.no_grad():
        tiny_omni.model(**tiny_omni.encode(mixed_queries).inputs)
    offset = tiny_omni.text_offset(len(mixed_queries))
    assert torch.equal(offset, tiny_omni.model.model.rope_deltas)
    assert offset.shape == (len(mixed_queries), 1)
    tiny_omni.set_text_offset(offset[:1])
    assert tiny_omni.model.model.rope_deltas.shape == (1, 1)


def test_an_unknown_architecture_is_named(tiny_omni: Omni, tmp_path: Path) -> None:
    types = [name for architecture in ARCHITECTURES for name in architecture.model_types]
    assert len(set(types)) == len(types)
    assert [architecture_of(name) for name in types][:3] == [QWEN2_5_OMNI, QWEN2_5_OMNI, QWEN2_5_VL]
    with pytest.raises(ModelError, match=r"'llava'.*qwen2_5_omni"):
        architecture_of("llava")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ModelError, match=f"{tmp_path.name} .*'llava'"):
        load_omni(tmp_path)
    tiny_omni.model.config.model_type = "llava"
    with pytest.raises(ModelError, match=r"tiny .*'llava'"):
        Omni(tiny_omni.model, tiny_omni.processor, "tiny")


def test_parts_are_named_in_the_record_alone() -> None:
    found = []
    for package in ("casa_mech", "probes"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT / package).as_posix()
            if name == "omni/architecture.py" or name in INHERENT:
                continue
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            found += [f"{package}/{name}:{number}: {line.strip()}" for number, line in lines if PARTS.search(line)]
    assert found == []
