"""`Architecture`: where the parts of a model are, said once; another model is another record.

The rest of the code asks `Omni` for a part by its role (`omni.head`, `omni.blocks`) and, inside traces, for its nnsight
envoy (`omni.envoy("head")`). Checkpoints, tokens and processors have their own modules beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from types import MappingProxyType
from typing import Any

from casa_mech.errors import ModelError


@dataclass(frozen=True)
class Tower:
    """The encoder of one modality."""

    path: str
    """The tower, from the model."""
    features: str
    """The model's input that holds what the tower encodes."""
    output: str
    """The field of the tower's output with its features [token, d_model], packed in the order of the prompt."""
    projection: str
    """The linear layer whose output enters the residual stream, from the tower."""


@dataclass(frozen=True)
class Architecture:
    """Names of a model's classes and dotted paths of its parts; a path starts at the model unless it says otherwise."""

    model_types: tuple[str, ...]
    """`model_type` in a checkpoint's `config.json`: the full model's, and that of the part which is studied."""
    model_class: str
    """The class of `transformers` that is studied."""
    config_class: str
    """The class of its configuration."""
    config_key: str
    """Where a full checkpoint's `config.json` has the configuration of the part that is studied."""
    weight_prefix: str
    """The beginning of the names of that part's weights in a full checkpoint."""
    backbone: str
    """All but the head: towers and text model. It gives the states after the final norm, and the cache."""
    text_model: str
    """The transformer over text and the towers' features: embedding, blocks and final norm."""
    embedding: str
    """The word embeddings [vocab, d_model]."""
    blocks: str
    """The list of transformer blocks."""
    norm: str
    """The final norm."""
    head: str
    """The unembedding [vocab, d_model]."""
    text_offset: str
    """After a forward: how far text that follows is ahead of its token count in the rotary embedding [row, 1]."""
    attention: str
    """Attention, from its block."""
    query: str
    """The query projection, from attention."""
    key: str
    """The key projection, from attention."""
    value: str
    """The value projection, from attention."""
    attention_output: str
    """The projection of the heads' outputs to the residual stream, from attention."""
    mlp: str
    """The MLP, from its block."""
    mlp_output: str
    """The linear layer that writes to the residual stream, from the MLP."""
    lora_targets: tuple[str, ...]
    """Last names of the linear layers of a block that can get a LoRA."""
    towers: Mapping[str, Tower] = field(default_factory=lambda: MappingProxyType({}))
    """The encoders by modality, in the order in which they run."""

    @property
    def features(self) -> tuple[str, ...]:
        """The model's inputs that hold what the towers encode."""
        return tuple(tower.features for tower in self.towers.values())


QWEN2_5_OMNI = Architecture(
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    model_class="Qwen2_5OmniThinkerForConditionalGeneration",
    config_class="Qwen2_5OmniThinkerConfig",
    config_key="thinker_config",
    weight_prefix="thinker.",
    backbone="model",
    text_model="model.language_model",
    embedding="model.language_model.embed_tokens",
    blocks="model.language_model.layers",
    norm="model.language_model.norm",
    head="lm_head",
    text_offset="model.rope_deltas",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    attention_output="o_proj",
    mlp="mlp",
    mlp_output="down_proj",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    towers=MappingProxyType(
        {
            "audio": Tower("model.audio_tower", "input_features", "last_hidden_state", "proj"),
            "image": Tower("model.visual", "pixel_values", "pooler_output", "merger.mlp.2"),
        }
    ),
)
"""The thinker of Qwen2.5-Omni: the part that reads text, pictures and speech and writes text."""

ARCHITECTURES = (QWEN2_5_OMNI,)
"""Every model that can be studied."""


def architecture_of(model_type: str | None, where: str = "this model") -> Architecture:
    """The record of a model by the `model_type` of its configuration; `where` names the model in an error.

    Raises:
        ModelError: there is no record of that type.
    """
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(architecture.model_types[0] for architecture in ARCHITECTURES)
    raise ModelError(f"{where} is of model type {model_type!r}, which casa-mech does not know; it studies {known}")


def known_lora_targets() -> tuple[str, ...]:
    """Last names of the linear layers that can get a LoRA in any model that can be studied."""
    return tuple(dict.fromkeys(name for architecture in ARCHITECTURES for name in architecture.lora_targets))


def part_at(root: Any, path: str) -> Any:
    """The module or nnsight envoy at a dotted `path` from `root`; a number is a place in a list."""
    return reduce(lambda part, name: part[int(name)] if name.isdigit() else getattr(part, name), path.split("."), root)
