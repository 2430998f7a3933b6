"""Qwen2.5-Omni's processor without video, and so without torchvision.

The library's `Qwen2_5OmniProcessor` insists on a video processor, which needs torchvision. Here only the parts that the
text, image and audio paths use are built; how many tokens a picture or clip takes is still the library's own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import (
    Qwen2_5OmniProcessor,
    _get_feat_extract_output_lengths,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import OmniModalProcessorMixin

from casa_mech.errors import ModelError
from casa_mech.omni.media import SAMPLE_RATE

SPECIAL_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


class OmniProcessor(Qwen2_5OmniProcessor):
    """Text, images and audio into the thinker's inputs; mirrors `transformers.Qwen2_5OmniProcessor` minus video."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
    ) -> None:
        OmniModalProcessorMixin.__init__(
            self, image_processor, feature_extractor, tokenizer, chat_template=chat_template
        )
        self.gate_tokens: dict[str, str] = {}  # set while a gate is attached: its safety tokens' strings by name
        for name, token in SPECIAL_TOKENS.items():
            text = getattr(tokenizer, name, None) or token
            setattr(self, name, text)
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(text))

    def images(self, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Patches and grids of `images`, and for each the run of placeholder tokens it takes in the prompt."""
        features, runs = self._process_images(images, return_tensors="pt")
        return dict(features), runs

    def audio(self, clips: list[np.ndarray]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Log-mel features `[clip, mel, frame]` and mask of `clips` (16 kHz), and for each its run of placeholders.

        The library pads every clip to the extractor's full window (300 s in the published checkpoints). Padding to the
        longest clip plus one second gives the same values at every real frame, since each such frame then still sees
        only zeros beyond the clip's end, at a hundredth of the work.
        """
        longest = max(len(clip) for clip in clips) + self.feature_extractor.sampling_rate
        features = self.feature_extractor(
            clips,
            sampling_rate=SAMPLE_RATE,
            padding="max_length",
            max_length=longest,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = features["attention_mask"]
        frames = int(mask.sum(-1).max())
        lengths = _get_feat_extract_output_lengths(mask.sum(-1))
        inputs = {
            "input_features": features["input_features"][:, :, :frames],
            "feature_attention_mask": mask[:, :frames],
        }
        return inputs, [self.audio_token * int(n) for n in lengths]


def load_processor(directory: Path) -> OmniProcessor:
    """The processor saved beside a checkpoint (`preprocessor_config.json` and the tokenizer's files).

    Raises:
        ModelError: a file is missing or does not parse.
    """
    import json

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        settings = _preprocessor_settings(directory)
        image_processor = Qwen2VLImageProcessorPil.from_dict(settings["image"])
        feature_extractor = WhisperFeatureExtractor.from_dict(settings["audio"])
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{directory}: the processor cannot be loaded ({first}); download the checkpoint again"
        ) from None
    return OmniProcessor(image_processor, feature_extractor, tokenizer, getattr(tokenizer, "chat_template", None))


def _preprocessor_settings(directory: Path) -> dict[str, dict[str, Any]]:
    """Settings of the image and audio processors: one merged file (hub) or `processor_config.json` (transformers 5)."""
    import json

    nested = directory / "processor_config.json"
    if nested.is_file():
        config = json.loads(nested.read_text())
        if "image_processor" in config and "feature_extractor" in config:
            return {"image": config["image_processor"], "audio": config["feature_extractor"]}
    merged = json.loads((directory / "preprocessor_config.json").read_text())
    drop = {"image_processor_type", "feature_extractor_type", "processor_class"}
    merged = {key: value for key, value in merged.items() if key not in drop}
    audio_keys = {
        "feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "padding_value", "dither",
        "return_attention_mask", "padding_side", "n_samples", "nb_max_frames",
    }  # fmt: skip
    audio = {
        key: value for key, value in merged.items() if key in audio_keys and key not in ("n_samples", "nb_max_frames")
    }
    image = {key: value for key, value in merged.items() if key not in audio_keys}
    return {"image": image, "audio": audio}
