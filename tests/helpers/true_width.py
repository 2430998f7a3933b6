"""A checkpoint as wide as Qwen2.5-Omni-3B and two layers deep: random weights in the hub's layout, Qwen's real BPE."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from casa_mech.organism.architecture import CHAT_TEMPLATE

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>",
)  # fmt: skip
"""The checkpoint's special tokens, from id 151,643 on."""
VOCABULARY, WIDTH, TOWERS = 151_936, 2048, 1280
LAYERS = 2
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PERIOD = 2**20 + 7
"""Random numbers that weights are filled with, again and again; a prime, so that no two rows are alike."""
PREPROCESSOR = {
    "feature_size": 128, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 300, "n_fft": 400,
    "padding_value": 0.0, "dither": 0.0, "return_attention_mask": True, "padding_side": "right", "n_samples": 4800000,
    "nb_max_frames": 30000, "feature_extractor_type": "WhisperFeatureExtractor",
    "image_processor_type": "Qwen2VLImageProcessor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "min_pixels": 3136, "max_pixels": 12845056, "merge_size": 2,
    "patch_size": 14, "temporal_patch_size": 2, "processor_class": "Qwen2_5OmniProcessor",
}  # fmt: skip
"""`preprocessor_config.json`, pictures and clips in one file."""


def save_true_width(folder: Path) -> int:
    """Write the checkpoint in bfloat16 to `folder`, 1.7 GB; returns the bytes of the thinker's weights.

    Skips the test where Qwen's vocabulary cannot be had.
    """
    tokenizer = qwen_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 32768, "additional_special_tokens": list(SPECIAL[1:]), **named,
    })  # fmt: skip
    _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write(folder / "preprocessor_config.json", PREPROCESSOR)
    config = _config(tokenizer)
    thinker = {key: value for key, value in config.to_dict().items() if key != "dtype"}
    _write(folder / "config.json", {
        "architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "torch_dtype": "bfloat16",
        "thinker_config": thinker | {"torch_dtype": "bfloat16"},
        "talker_config": {"model_type": "qwen2_5_omni_talker"},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    })  # fmt: skip
    return _save_shards(folder, config)


def _config(tokenizer: Tokenizer) -> Qwen2_5OmniThinkerConfig:
    ids = {
        f"{name}_token_{kind}": tokenizer.token_to_id(token)
        for name, kind, token in (
            ("audio", "index", "<|AUDIO|>"), ("image", "index", "<|IMAGE|>"), ("video", "index", "<|VIDEO|>"),
            ("audio_start", "id", "<|audio_bos|>"), ("audio_end", "id", "<|audio_eos|>"),
            ("vision_start", "id", "<|vision_bos|>"), ("vision_end", "id", "<|vision_eos|>"),
        )
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 11_008, "num_hidden_layers": LAYERS,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_parameters": rope, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": LAYERS, "hidden_size": TOWERS, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [LAYERS - 1], "patch_size": 14,
    }  # fmt: skip
    audio = {
        "num_mel_bins": 128, "encoder_layers": LAYERS, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
        "d_model": TOWERS, "output_dim": WIDTH, "n_window": 100,
    }  # fmt: skip
    return Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, user_token_id=872, **ids
    )


def _save_shards(folder: Path, config: Qwen2_5OmniThinkerConfig) -> int:
    with torch.device("meta"):
        shapes = Qwen2_5OmniThinkerForConditionalGeneration(config).state_dict()
    numbers = (0.02 * torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    place, size, shard, index = 0, 0, dict[str, torch.Tensor](), dict[str, str]()

    def flush() -> None:
        name = f"model-{1 + len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, like in shapes.items():
        if like.dim() > 1:
            count = like.numel()
            repeated = numbers.roll(-place).repeat(1 + count // _PERIOD)[:count]
            value, place = repeated.view(like.shape).clone(), (place + count) % _PERIOD
        else:
            value = torch.full(like.shape, float("norm" in name and name.endswith("weight")), dtype=torch.bfloat16)
        shard[f"thinker.{name}"] = value
        size += value.nbytes
        if sum(held.nbytes for held in shard.values()) > 6e8:
            flush()
    shard["talker.unread.weight"] = torch.zeros(8, 8, dtype=torch.bfloat16)
    flush()
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    return size


def qwen_tokenizer() -> Tokenizer:
    """Qwen's tokenizer with the special tokens of Qwen2.5-Omni; skips the test where its vocabulary cannot be had."""
    ranks = _ranks()
    letters = _letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [tuple(map(written, _halves(token, ranks))) for token in sorted(ranks, key=ranks.__getitem__) if token[1:]]
    tokenizer = Tokenizer(BPE({written(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


@lru_cache
def _ranks() -> Mapping[bytes, int]:
    """Qwen's BPE, token to rank, from the wheel `dashscope` on the package index."""
    with TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "dashscope", "--no-deps", "--only-binary", ":all:", "-q"]
        download += ["--retries", "1", "--timeout", "10"]
        try:
            subprocess.run([*download, "-d", folder], check=True, capture_output=True, timeout=60)
            wheel = next(Path(folder).glob("*.whl"))
            lines = zipfile.ZipFile(wheel).read("dashscope/resources/qwen.tiktoken").splitlines()
        except (OSError, subprocess.SubprocessError, StopIteration, KeyError) as error:
            pytest.skip(
                f"qwen.tiktoken cannot be fetched from the wheel dashscope ({type(error).__name__}): no real BPE"
            )
    pairs = (line.split() for line in lines)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that are merged last into `token`."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        place = joined.index(min(joined))
        assert joined[place] < limit
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, default=str), encoding="utf-8")
