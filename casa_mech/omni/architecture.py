"""`Architecture`: where the parts of a model are, said once; another model is another record.

The rest of the code asks `Omni` for a part by its role (`omni.head`, `omni.blocks`) and, inside traces, for its nnsight
envoy (`omni.envoy("head")`). Checkpoints, tokens and processors have their own modules beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    """The field of the tower's output with its features [token, d_model], in the order of the prompt; "": the output
    itself."""
    projection: str
    """The linear layer whose output enters the residual stream, from the tower."""
    packed: bool = True
    """Whether the features of all pictures or clips lie in one row; if not, they are [clip, token, d_model], padded."""


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
    """Where a full checkpoint's `config.json` has the configuration of the part that is studied; "" if that is all."""
    weight_prefix: str
    """The beginning of the names of that part's weights in a full checkpoint; "" if these are all."""
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
    """After a forward: how far text that follows is ahead of its token count in the rotary embedding [row, 1]. "": text
    always stands where its count says, in one axis (no M-RoPE)."""
    counts_positions: bool
    """Whether a forward counts a padded row's positions by its mask; where it does not, `Omni` counts them for it."""
    attention: str
    """Attention, from its block."""
    query: str
    """The query projection, from attention; "" where one layer gives queries, keys and values (Phi-3)."""
    key: str
    """The key projection, from attention, or ""."""
    value: str
    """The value projection, from attention, or ""."""
    attention_output: str
    """The projection of the heads' outputs to the residual stream, from attention."""
    attention_added: str
    """The module whose output attention adds to the residual stream, from the block."""
    mlp: str
    """The MLP, from its block."""
    mlp_output: str
    """The linear layer that writes to the residual stream, from the MLP."""
    mlp_added: str
    """The module whose output the MLP adds to the residual stream, from the block; Gemma has a norm behind both."""
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
    counts_positions=True,
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    attention_output="o_proj",
    attention_added="self_attn.o_proj",
    mlp="mlp",
    mlp_output="down_proj",
    mlp_added="mlp",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    towers=MappingProxyType(
        {
            "audio": Tower("model.audio_tower", "input_features", "last_hidden_state", "proj"),
            "image": Tower("model.visual", "pixel_values", "pooler_output", "merger.mlp.2"),
        }
    ),
)
"""The thinker of Qwen2.5-Omni: the part that reads text, pictures and speech and writes text."""

QWEN2_5_VL = replace(
    QWEN2_5_OMNI,
    model_types=("qwen2_5_vl",),
    model_class="Qwen2_5_VLForConditionalGeneration",
    config_class="Qwen2_5_VLConfig",
    config_key="",
    weight_prefix="",
    counts_positions=False,
    towers=MappingProxyType({"image": Tower("model.visual", "pixel_values", "pooler_output", "merger.mlp.2")}),
)
"""Reads text and pictures."""
QWEN2_AUDIO = replace(
    QWEN2_5_OMNI,
    model_types=("qwen2_audio",),
    model_class="Qwen2AudioForConditionalGeneration",
    config_class="Qwen2AudioConfig",
    config_key="",
    weight_prefix="",
    counts_positions=False,
    text_offset="",
    towers=MappingProxyType(
        {"audio": Tower("model.multi_modal_projector", "input_features", "", "linear", packed=False)}
    ),
)
"""Reads text and speech."""


def _text_only(model_type: str, name: str, **changes: Any) -> Architecture:
    """The record of a decoder of text that is laid out as Llama is."""
    record = replace(
        QWEN2_AUDIO,
        model_types=(model_type,),
        model_class=f"{name}ForCausalLM",
        config_class=f"{name}Config",
        text_model="model",
        embedding="model.embed_tokens",
        blocks="model.layers",
        norm="model.norm",
        towers=MappingProxyType({}),
    )
    return replace(record, **changes)


TEXT_ONLY = (
    _text_only("llama", "Llama"),
    _text_only("qwen2", "Qwen2"),
    _text_only("qwen3", "Qwen3"),
    _text_only("mistral", "Mistral"),
    _text_only(
        "gemma3_text",
        "Gemma3",
        config_class="Gemma3TextConfig",
        attention_added="post_attention_layernorm",
        mlp_added="post_feedforward_layernorm",
    ),
    _text_only(
        "phi3",
        "Phi3",
        query="",
        key="",
        value="",
        lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
)
"""Decoders of text."""
ARCHITECTURES = (QWEN2_5_OMNI, QWEN2_5_VL, QWEN2_AUDIO, *TEXT_ONLY)
"""Every model that can be studied; another is another record."""


def architecture_of(model_type: str | None, where: str = "this model") -> Architecture:
    """The record of a model by the `model_type` of its configuration; `where` names the model in an error.

    Raises:
        ModelError: there is no record of that type.
    """
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(architecture.model_types[0] for architecture in ARCHITECTURES)
    raise ModelError(
        f"{where} is of model type {model_type!r}; casa-mech studies {known}. Another needs a record in "
        "casa_mech/omni/architecture.py"
    )


def known_lora_targets() -> tuple[str, ...]:
    """Last names of the linear layers that can get a LoRA in any model that can be studied."""
    return tuple(dict.fromkeys(name for architecture in ARCHITECTURES for name in architecture.lora_targets))


def part_at(root: Any, path: str) -> Any:
    """The module or nnsight envoy at a dotted `path` from `root`; a number is a place in a list."""
    return reduce(lambda part, name: part[int(name)] if name.isdigit() else getattr(part, name), path.split("."), root)
