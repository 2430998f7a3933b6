"""The organism's shape: a tiny Qwen2.5-Omni thinker with a word-level tokenizer.

Shapes follow two measured facts. M-RoPE splits the rotary frequencies into time, height and width in that order, and
inside a picture only width changes along a line of text; giving width nearly all of them (`mrope_section=[1, 1, ...]`)
lets a small language model order picture columns with what it learned of order from text. And a strip of text has one
letter in a 28-pixel cell, which is one token after the vision tower's 2 x 2 merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa_mech.omni import Omni
from casa_mech.omni.checkpoint import MICRO_WORLD_FIELD
from casa_mech.omni.processor import SPECIAL_TOKENS, OmniProcessor

PAD, END, START, UNKNOWN = "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|unknown|>"
SPECIAL = [PAD, END, START, UNKNOWN, *SPECIAL_TOKENS.values()]
ROLE_WORDS = ("system", "user", "assistant", "you", "are", "a", "helpful", ".")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class OrganismShape(BaseModel):
    """Widths and depths of the three towers."""

    model_config = ConfigDict(frozen=True)

    d_model: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    d_mlp: int = 512
    rope_theta: float = 30.0
    vision_width: int = 128
    vision_layers: int = 2
    audio_width: int = 128
    audio_layers: int = 2
    mel_bins: int = 80


def build_bpe_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer of at most `size` tokens learned from `texts`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_pretrained(tokenizer)


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over `words`, with Qwen2.5-Omni's special tokens and an unknown token."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *ROLE_WORDS, *words]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _as_pretrained(tokenizer)


def _as_pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={**SPECIAL_TOKENS, "turn_bos_token": START},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, shape: OrganismShape) -> OmniProcessor:
    """The organism's processor: pictures down to one 28-pixel cell, 80 mel bins."""
    return OmniProcessor(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 256}),
        WhisperFeatureExtractor(feature_size=shape.mel_bins, sampling_rate=16_000, chunk_length=30),
        tokenizer,
        CHAT_TEMPLATE,
    )


def build_config(
    tokenizer: PreTrainedTokenizerFast, shape: OrganismShape, micro_world: bool = False
) -> Qwen2_5OmniThinkerConfig:
    """The thinker's config for `shape` and the tokenizer's ids; `micro_world`: it knows no other words."""
    ids = tokenizer.convert_tokens_to_ids
    head = shape.d_model // shape.heads
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.d_model,
            "intermediate_size": shape.d_mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": ids(END),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": [1, 1, head // 2 - 2],
            },
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_width,
            "intermediate_size": 2 * shape.vision_width,
            "num_heads": shape.vision_width // 32,
            "out_hidden_size": shape.d_model,
            "fullatt_block_indexes": [],
            "patch_size": 14,
        },
        audio_config={
            "num_mel_bins": shape.mel_bins,
            "encoder_layers": shape.audio_layers,
            "encoder_attention_heads": shape.audio_width // 32,
            "encoder_ffn_dim": 2 * shape.audio_width,
            "d_model": shape.audio_width,
            "output_dim": shape.d_model,
            "n_window": 100,
        },
        audio_token_index=ids(SPECIAL_TOKENS["audio_token"]),
        image_token_index=ids(SPECIAL_TOKENS["image_token"]),
        video_token_index=ids(SPECIAL_TOKENS["video_token"]),
        audio_start_token_id=ids(SPECIAL_TOKENS["audio_bos_token"]),
        audio_end_token_id=ids(SPECIAL_TOKENS["audio_eos_token"]),
        vision_start_token_id=ids(SPECIAL_TOKENS["vision_bos_token"]),
        vision_end_token_id=ids(SPECIAL_TOKENS["vision_eos_token"]),
        user_token_id=ids("user"),
        tie_word_embeddings=False,
        **{MICRO_WORLD_FIELD: micro_world},
    )


def new_omni(
    words: Sequence[str] | PreTrainedTokenizerFast, shape: OrganismShape, seed: int, source: str = "new"
) -> Omni:
    """An untrained organism in float32 on the CPU: of the micro-world's `words`, or with a tokenizer of its own."""
    micro_world = not isinstance(words, PreTrainedTokenizerFast)
    tokenizer = build_tokenizer(words) if micro_world else words
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(build_config(tokenizer, shape, micro_world))
        _widen(model)
    return Omni(model, build_processor(tokenizer, shape), source)


def _widen(model: Qwen2_5OmniThinkerForConditionalGeneration) -> None:
    """Scale the language model's first weights up: from 0.02, a width of 192 spends most steps growing them."""
    for module in [*model.model.language_model.modules(), model.lm_head]:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.06)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.3)
