"""Tiny random checkpoints of every family of models that can be studied, in the hub's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TEXT_ONLY = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")
FAMILIES = (*TEXT_ONLY, "qwen2_5_vl", "qwen2_audio")

CHATML_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES: Mapping[str, str] = {
    "chatml": CHATML_TURNS,
    "chatml with a system prompt": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        + CHATML_TURNS
    ),
    "thinking": CHATML_TURNS.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ),
    "llama": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string }}\n\n{{ said }}<|eot_id|>"
        "{% for m in rest %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
        "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('no system') }}"
        "{% endif %}{% endfor %}"
    ),
    "phi": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
}
"""A template of each format."""
TEMPLATE_OF = {"llama": "llama", "qwen3": "thinking", "mistral": "mistral", "gemma3_text": "gemma", "phi3": "phi"}
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|AUDIO|>", "<|audio_bos|>",
    "<|audio_eos|>",
)  # fmt: skip


def byte_tokenizer(template: str = "chatml", texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every byte, the words of `texts`, and every format's special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    if texts:
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(
            texts, BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
        )
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    fast.chat_template = TEMPLATES[template]
    return fast


TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.3,
}  # fmt: skip


def save_family(family: str, folder: Path, texts: Sequence[str] = ()) -> Path:
    """Write a tiny random checkpoint of `family`, with a tokenizer of the words of `texts`, to `folder`; returns it."""
    tokenizer = byte_tokenizer(TEMPLATE_OF.get(family, "chatml with a system prompt"), texts)
    id_of: Callable[[str], int] = tokenizer.convert_tokens_to_ids  # type: ignore[assignment]
    ids = {"bos_token_id": id_of("<s>"), "eos_token_id": id_of("</s>"), "pad_token_id": id_of("</s>")}
    text = {**TEXT, "vocab_size": len(tokenizer), **ids}
    torch.manual_seed(0)
    if family == "qwen2_5_vl":
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=id_of("<|image_pad|>"),
            video_token_id=id_of("<|video_pad|>"),
            vision_start_token_id=id_of("<|vision_start|>"),
            vision_end_token_id=id_of("<|vision_end|>"),
        )
        Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64).save_pretrained(folder)
    elif family == "qwen2_audio":
        audio = {
            "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
            "num_mel_bins": 80,
        }  # fmt: skip
        config = transformers.Qwen2AudioConfig(
            text_config={**text, "model_type": "qwen2"}, audio_config=audio, audio_token_index=id_of("<|AUDIO|>")
        )
        WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    else:
        name = {"gemma3_text": "Gemma3TextConfig", "phi3": "Phi3Config"}.get(family, f"{family.title()}Config")
        extra = {"head_dim": 8, "sliding_window": 16} if family == "gemma3_text" else {}
        config = getattr(transformers, name)(**text, **extra)
    classes = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen2_audio": "Qwen2AudioForConditionalGeneration"}
    model_class = classes.get(family) or {"gemma3_text": "Gemma3"}.get(family, family.title()) + "ForCausalLM"
    model = getattr(transformers, model_class)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    return folder
