"""Processors: text, pictures and clips into a model's inputs; without video, and so without torchvision.

The library's own processors of pictures insist on a video processor, which needs torchvision. Here only the parts that
the text, image and audio paths use are built; how many tokens a picture or clip takes is still the library's own code.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import (
    Qwen2_5OmniProcessor,
    _get_feat_extract_output_lengths,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import OmniModalProcessorMixin

from casa_mech.errors import ModelError, reason_of
from casa_mech.omni.chat import ChatFormat, MediaMarks, chat_format
from casa_mech.queries.media import SAMPLE_RATE

SPECIAL_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


class Processor(Protocol):
    """What turns prompts into a model's inputs."""

    tokenizer: PreTrainedTokenizerFast
    """Of the text."""
    image_processor: Any
    """The library's, of pictures; None where the model sees none."""
    feature_extractor: Any
    """The library's, of clips; None where the model hears none."""
    chat: ChatFormat
    """What stands between the texts of a conversation."""
    marks: Mapping[str, MediaMarks]
    """How a prompt shows each kind of medium that the model reads."""
    token_types: bool
    """Whether the model has to be told which tokens are pictures (`mm_token_type_ids`)."""
    gate_tokens: dict[str, str]
    """While a gate is attached: its safety tokens' strings by name."""

    def images(self, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The model's inputs for pictures, and for each the run of placeholder tokens it takes in the prompt."""

    def audio(self, clips: list[np.ndarray]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The model's inputs for clips (16 kHz), and for each its run of placeholders."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Write the files that `load_processor` reads."""


def placeholder_ids(processor: Processor) -> dict[str, int]:
    """The id of each medium's placeholder token."""
    tokenizer = processor.tokenizer
    return {kind: tokenizer.convert_tokens_to_ids(marks.token) for kind, marks in processor.marks.items()}


class OmniProcessor(Qwen2_5OmniProcessor):
    """Text, images and audio into the thinker's inputs; mirrors `transformers.Qwen2_5OmniProcessor` minus video."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        where: str = "this model",
    ) -> None:
        OmniModalProcessorMixin.__init__(
            self, image_processor, feature_extractor, tokenizer, chat_template=chat_template
        )
        self.token_types, self.gate_tokens = False, dict[str, str]()
        for name, token in SPECIAL_TOKENS.items():
            text = getattr(tokenizer, name, None) or token
            setattr(self, name, text)
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(text))
        self.chat = chat_format(tokenizer, chat_template, where)
        self.marks = {
            "image": MediaMarks(self.image_token, self.vision_bos_token, self.vision_eos_token),
            "audio": MediaMarks(self.audio_token, self.audio_bos_token, self.audio_eos_token),
        }

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


class TextProcessor:
    """Text alone into a model's inputs."""

    image_processor: Any = None
    feature_extractor: Any = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, where: str = "this model") -> None:
        self.tokenizer = tokenizer
        self.chat = chat_format(tokenizer, None, where)
        self.marks: Mapping[str, MediaMarks] = {}
        self.token_types, self.gate_tokens = False, dict[str, str]()

    def images(self, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Refused before it comes here (`chat_pieces`)."""
        raise NotImplementedError

    def audio(self, clips: list[np.ndarray]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Refused before it comes here (`chat_pieces`)."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Write the tokenizer's files."""
        return self.tokenizer.save_pretrained(save_directory, **kwargs)


class VisionProcessor(TextProcessor):
    """Text and pictures into the inputs of Qwen2.5-VL; mirrors `transformers.Qwen2_5_VLProcessor` minus video."""

    def __init__(
        self, image_processor: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerFast, where: str = "this model"
    ) -> None:
        super().__init__(tokenizer, where)
        self.image_processor = image_processor
        self.marks = {"image": MediaMarks("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")}
        self.token_types = True

    def images(self, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Patches and grids of `images`, and for each the run of placeholder tokens it takes in the prompt."""
        features = self.image_processor(images, return_tensors="pt")
        counts = features["image_grid_thw"].prod(dim=-1) // self.image_processor.merge_size**2
        return dict(features), [self.marks["image"].token * int(count) for count in counts]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Write the tokenizer's files and the pictures' settings."""
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, **kwargs)


class AudioProcessor(TextProcessor):
    """Text and speech into the inputs of Qwen2-Audio; mirrors `transformers.Qwen2AudioProcessor`."""

    def __init__(
        self, feature_extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerFast, where: str = "this model"
    ) -> None:
        super().__init__(tokenizer, where)
        self.feature_extractor = feature_extractor
        self.marks = {"audio": MediaMarks("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")}

    def audio(self, clips: list[np.ndarray]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Log-mel features `[clip, mel, frame]` and mask of `clips` (16 kHz), and for each its run of placeholders.

        The encoder takes its full window of 30 s; what is longer is cut there, as the library's processor does.
        """
        features = self.feature_extractor(
            clips, sampling_rate=SAMPLE_RATE, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        mask = features["attention_mask"]
        # Two strided steps: the second convolution, then the pooling behind the encoder (Qwen2AudioEncoder).
        counts = ((mask.sum(dim=-1) - 1) // 2 + 1 - 2) // 2 + 1
        inputs = {"input_features": features["input_features"], "feature_attention_mask": mask}
        return inputs, [self.marks["audio"].token * int(count) for count in counts]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Write the tokenizer's files and the clips' settings."""
        self.feature_extractor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, **kwargs)


def load_processor(directory: Path, reads: Collection[str] = ("image", "audio")) -> Processor:
    """The processor saved beside a checkpoint (`preprocessor_config.json` and the tokenizer's files).

    Args:
        directory: of the checkpoint.
        reads: the media that the model has an encoder for.

    Raises:
        ModelError: a file is missing or does not parse, or the chat template cannot be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        settings = _preprocessor_settings(directory) if reads else {}
        image_processor = Qwen2VLImageProcessorPil.from_dict(settings["image"]) if "image" in reads else None
        feature_extractor = WhisperFeatureExtractor.from_dict(settings["audio"]) if "audio" in reads else None
    except Exception as error:  # the library raises many kinds for files that are not its own
        raise ModelError(
            f"{directory}: the processor cannot be loaded ({reason_of(error)}); download the checkpoint again"
        ) from None
    where = str(directory)
    if image_processor is None and feature_extractor is None:
        return TextProcessor(tokenizer, where)
    if feature_extractor is None:
        return VisionProcessor(image_processor, tokenizer, where)
    if image_processor is None:
        return AudioProcessor(feature_extractor, tokenizer, where)
    template = getattr(tokenizer, "chat_template", None)
    return OmniProcessor(image_processor, feature_extractor, tokenizer, template, where)


def _preprocessor_settings(directory: Path) -> dict[str, dict[str, Any]]:
    """Settings of the image and audio processors: one merged file (hub) or `processor_config.json` (transformers 5)."""
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
