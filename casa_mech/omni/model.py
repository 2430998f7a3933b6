"""`Omni`: the model under study with its processor: queries in, batches, replies out."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from casa_mech.errors import InputError
from casa_mech.identity import weights_digest
from casa_mech.limits import GREATEST_SEED
from casa_mech.omni.architecture import Architecture, architecture_of, part_at
from casa_mech.omni.batch import OmniBatch, encode, prompt_ids
from casa_mech.omni.checkpoint import MICRO_WORLD_FIELD
from casa_mech.omni.finite import finite_logits
from casa_mech.omni.memory import in_halves
from casa_mech.omni.processor import Processor
from casa_mech.omni.stream import ReplyStream
from casa_mech.progress import progress_bar
from casa_mech.queries import AudioPart, ImagePart, Prompt, Query, Reply, TextPart, as_queries
from casa_mech.queries.media import SAMPLE_RATE

if TYPE_CHECKING:
    import nnsight


_TEMPLATE_TOKENS, _SAMPLES_A_TOKEN = 64, 160
"""More tokens than a chat template has around a turn, and fewer 16 kHz samples than any encoder makes a token of."""


class GenerationSettings(BaseModel):
    """Options of generation. Greedy unless `do_sample`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_new_tokens: int = Field(64, ge=1)
    """Upper bound on the tokens of a reply."""
    do_sample: bool = False
    """Sample instead of taking the most likely token."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature when sampling."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass when sampling."""
    batch_size: int = Field(16, ge=1)
    """Queries in one forward."""
    seed: int = Field(0, ge=0, le=GREATEST_SEED)
    """Seed of the sampler."""
    system: str | None = None
    """System prompt for queries that bring none."""

    def kwargs(self) -> dict[str, object]:
        """The keyword arguments of `model.generate` that these settings stand for."""
        kwargs: dict[str, object] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample}
        if self.do_sample:
            kwargs |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return kwargs


class Omni:
    """The model under study and its processor.

    model: Qwen2.5-Omni's thinker, or another model that has an `Architecture`, in evaluation mode. architecture: where
    its parts are. source: where it came from, for records.

    Raises:
        ModelError: a model without an `Architecture`.
    """

    def __init__(self, model: PreTrainedModel, processor: Processor, source: str) -> None:
        self.architecture: Architecture = architecture_of(model.config.model_type, source)
        self.model = model.eval()
        self.processor = processor
        self.source = source
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        self.end_id: int = tokenizer.convert_tokens_to_ids(processor.chat.end_of_turn)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.model.generation_config = GenerationConfig(eos_token_id=self.end_id, pad_token_id=pad)
        if not self.architecture.counts_positions:
            self.backbone.register_forward_pre_hook(self._count_positions, with_kwargs=True)
        self._fingerprint = weights_digest([model])

    def _count_positions(self, backbone: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Positions of padded text by the mask, as `generate` counts them; a plain forward would count padding, too."""
        mask = inputs.get("attention_mask")
        if inputs.get("position_ids") is not None or inputs.get("image_grid_thw") is not None or mask is None:
            return args, inputs
        ids = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if self.architecture.text_offset:
            cache = inputs.get("past_key_values")
            if cache is None or not cache.get_seq_length():
                self.set_text_offset(torch.zeros(len(mask), 1, dtype=torch.long, device=mask.device))
        return args, {**inputs, "position_ids": self.text_positions(mask)[..., -ids.shape[1] :]}

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The text tokenizer."""
        return self.processor.tokenizer

    @property
    def backbone(self) -> nn.Module:
        """The model without its head: towers and text model."""
        return part_at(self.model, self.architecture.backbone)

    @property
    def text_model(self) -> nn.Module:
        """The transformer over text and the towers' features: embedding, blocks and final norm."""
        return part_at(self.model, self.architecture.text_model)

    @property
    def embedding(self) -> nn.Module:
        """The word embeddings, `weight` [vocab, d_model]."""
        return part_at(self.model, self.architecture.embedding)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return part_at(self.model, self.architecture.blocks)

    @property
    def norm(self) -> nn.Module:
        """The final norm, which the head reads."""
        return part_at(self.model, self.architecture.norm)

    @property
    def head(self) -> nn.Module:
        """The unembedding, `weight` [vocab, d_model]."""
        return part_at(self.model, self.architecture.head)

    @property
    def tied(self) -> bool:
        """True if word embeddings and head are one matrix."""
        return self.head.weight is self.embedding.weight

    def tower(self, modality: str) -> nn.Module:
        """The encoder of "image" or "audio"."""
        return part_at(self.model, self.architecture.towers[modality].path)

    def writers(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The linear layers by which attention and MLP of a block write to the residual stream."""
        names, block = self.architecture, self.blocks[layer]
        attention, mlp = part_at(block, names.attention), part_at(block, names.mlp)
        return part_at(attention, names.attention_output), part_at(mlp, names.mlp_output)

    def text_offset(self, rows: int) -> Tensor:
        """M-RoPE position minus token count [row, 1] of text that follows the prompts of the last forward; else zeros.

        The model keeps it from one forward to the next, and counts a decoded token's position with it.
        """
        if not self.architecture.text_offset:
            return torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        return part_at(self.model, self.architecture.text_offset)

    def set_text_offset(self, offset: Tensor) -> None:
        """Let the next tokens be counted with `offset` [row, 1]."""
        if self.architecture.text_offset:
            owner, _, name = self.architecture.text_offset.rpartition(".")
            setattr(part_at(self.model, owner) if owner else self.model, name, offset)

    def text_positions(self, mask: Tensor) -> Tensor:
        """Positions of text by its `mask` [row, position]: [row, position], or [3, row, position] for M-RoPE.

        After a picture, M-RoPE counts on from the picture's own positions.
        """
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0) + self.text_offset(len(mask))
        return positions[None].expand(3, -1, -1) if self.architecture.text_offset else positions

    @property
    def speaks_micro_world(self) -> bool:
        """True for an organism of the micro-world, which knows no other words; its checkpoint's config says so."""
        return bool(getattr(self.model.config, MICRO_WORLD_FIELD, False))

    @property
    def media_ids(self) -> set[int]:
        """Ids of the placeholders for pictures, clips and videos, as far as the model has them."""
        names = ("image_token_id", "audio_token_id", "video_token_id")
        return {token for name in names if (token := getattr(self.model.config, name, None)) is not None}

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads: "text", and "image" and "audio" where it has an encoder."""
        return ("text", *self.processor.marks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.model.dtype

    @property
    def _text_config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config()

    @property
    def n_positions(self) -> int | None:
        """How many positions the text model was made for; None where its configuration does not say."""
        positions = getattr(self._text_config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._text_config.hidden_size

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return self._text_config.num_hidden_layers

    @property
    def n_heads(self) -> int:
        """Number of attention heads of a block."""
        return self._text_config.num_attention_heads

    @property
    def d_head(self) -> int:
        """Size of a head's queries, keys and values."""
        config = self._text_config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding."""
        return self.head.weight.shape[0]

    @property
    def pad_id(self) -> int:
        """Id of the token that fills batches up."""
        return self.model.generation_config.pad_token_id

    @cached_property
    def nnsight(self) -> nnsight.NNsight:
        """The model wrapped once for tracing; only `casa_mech.trace` opens traces on it."""
        from nnsight import NNsight

        return NNsight(self.model)

    def envoy(self, part: str) -> Any:
        """nnsight's envoy of a part of the model, named as in `Architecture` ("head", "norm", "blocks", ...)."""
        return part_at(self.nnsight, getattr(self.architecture, part))

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and a sample of values of the weights as they were loaded."""
        return self._fingerprint

    def queries(self, prompts: Sequence[Prompt]) -> list[Query]:
        """A query for each prompt, text or query (`as_queries`); warns of texts with words that the model cannot know.

        Raises:
            InputError: as `as_queries`.
        """
        queries = as_queries(prompts)
        self.warn_of_unknown_words([prompt for prompt in prompts if isinstance(prompt, str)], 4)
        return queries

    def warn_of_unknown_words(self, texts: Sequence[str], stacklevel: int = 3) -> None:
        """Warn where an organism of the micro-world is given words from outside it, with their share.

        `stacklevel` is that of `warnings.warn`; by default the caller's caller is named.
        """
        share = self.unknown_share(texts) if self.speaks_micro_world else 0.0
        if share > 0:
            warnings.warn(
                f"{share:.0%} of the words are unknown to {self.source}, which speaks a micro-world's English only "
                f"(first: {', '.join(self._unknown_words(texts)[:3])}): what it makes of them says nothing",
                stacklevel=stacklevel,
            )

    def encode(
        self, queries: Sequence[Prompt], targets: Sequence[Sequence[int]] | None = None, prefill: bool = True
    ) -> OmniBatch:
        """`queries` as one left-padded batch on the model's device (see `OmniBatch`).

        Args:
            queries: texts, and any mixture of text, image and audio.
            targets: token ids appended to each prompt and set as labels, for teacher forcing.
            prefill: True if the queries' assistant prefill is part of the prompt.

        Raises:
            InputError: an empty prompt, unreadable media, or a prompt beyond the model's positions; the message names
                the query.
        """
        members = as_queries(queries, "queries")
        batch = encode(self.processor, members, targets, prefill)
        lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
        for query, length in zip(members, lengths, strict=True):
            if self.n_positions is not None and length > self.n_positions:
                raise InputError(
                    f"query {query.id}: its prompt has {length:,} tokens, and {self.source} reads at most "
                    f"{self.n_positions:,}: shorten it"
                )
        return batch.to(self.device, self.dtype)

    def check_lengths(self, queries: Iterable[Prompt], system: str | None = None) -> None:
        """Refuse prompts that are longer than the model's positions, before anything is run on any of them.

        Only a prompt that might be too long is tokenised: a token has at least a byte of the text.

        Raises:
            InputError: as `encode`; the message names the query.
        """
        for query in with_system(self.queries(list(queries)), system):
            if self.n_positions is not None and self._most_tokens(query) > self.n_positions:
                self.encode([query])

    def _most_tokens(self, query: Query) -> int:
        """An upper bound on a prompt's tokens, without encoding any of it: a token has at least a byte of text."""
        chat, turns = self.processor.chat, [*(turn.parts for turn in query.history), query.parts]
        texts = [chat.default_system + chat.preamble, query.system or "", query.prefill]
        n = _TEMPLATE_TOKENS * (1 + len(turns))
        for part in (part for parts in turns for part in parts):
            if isinstance(part, TextPart):
                texts.append(part.text)
            elif isinstance(part, AudioPart):
                n += _samples_of(part) // _SAMPLES_A_TOKEN
            else:
                n += self._most_picture_tokens
        return n + sum(len(text.encode("utf-8", "replace")) for text in texts)

    @cached_property
    def _most_picture_tokens(self) -> int:
        """An upper bound on a picture's tokens: those of the largest that the processor makes of any."""
        settings = self.processor.image_processor
        if settings is None:
            return 0
        side = settings.patch_size * settings.merge_size
        return _TEMPLATE_TOKENS + int(settings.size["longest_edge"]) // side**2

    def prompt_ids(self, batch: OmniBatch, queries: Sequence[Query]) -> list[list[int]]:
        """Token ids of the prompts of `queries`, row by row about the same pictures and clips as `batch`, which are not
        opened again; no padding."""
        return prompt_ids(self.processor, batch, queries)

    def batches(self, queries: Sequence[Query], batch_size: int) -> Iterator[list[int]]:
        """Indices of `queries` in groups of at most `batch_size` of similar length, each index once."""
        order = sorted(range(len(queries)), key=lambda index: _estimated_length(queries[index]))
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    @torch.inference_mode()
    def generate(
        self,
        queries: Sequence[Prompt],
        settings: GenerationSettings = GenerationSettings(),
        progress: bool | None = None,
    ) -> list[Reply]:
        """Ordinary generation, without any defence; replies in the order of the queries, which may be texts.

        `Reply.text` holds what the model wrote after the prefill, not the prefill itself. `progress`: whether to draw a
        bar; None: where a person watches (`casa_mech.progress`).

        Raises:
            InputError: an empty prompt or unreadable media. ModelError: logits that are not finite.
        """
        members = with_system(self.queries(queries), settings.system)

        def decode(group: list[int]) -> list[list[int]]:
            return self.write([members[index] for index in group], settings)

        return self.decoded(members, settings, decode, progress=progress)

    def stream(self, prompt: Prompt, settings: GenerationSettings = GenerationSettings()) -> ReplyStream:
        """The reply to one prompt while it is written: an iterator over its pieces of text, the tokens of `generate`.

        Example:
            ```python
            for piece in omni.stream("how do i make a cake ?"):
                print(piece, end="", flush=True)
            ```

        Raises:
            InputError: an empty prompt or unreadable media. ModelError: logits that are not finite.
        """
        (query,) = with_system(self.queries([prompt]), settings.system)
        return ReplyStream(self, query, settings)

    def write(self, queries: Sequence[Query], settings: GenerationSettings) -> list[list[int]]:
        """Token ids that the model writes after each prompt, end-of-turn tokens and all; `queries` are one batch."""
        batch = self.encode(queries)
        ids = self.model.generate(**batch.inputs, **settings.kwargs(), logits_processor=finite_logits(queries))
        new: list[list[int]] = ids[:, batch.inputs["input_ids"].shape[1] :].tolist()
        return new

    def decoded(
        self,
        queries: Sequence[Query],
        settings: GenerationSettings,
        decode: Callable[[list[int]], Sequence[Sequence[int]]],
        name: str = "generate",
        progress: bool | None = False,
    ) -> list[Reply]:
        """A reply to each query, by a decoding of one's own; otherwise as `in_batches`.

        `decode` takes the indices of the queries of one batch and gives the ids that the model wrote for each.
        """

        def work(group: list[int]) -> list[Reply]:
            began = time.perf_counter()
            rows = decode(group)
            seconds = (time.perf_counter() - began) / len(group)
            written = [self.until_end(row) for row in rows]
            return [
                Reply(query_id=queries[index].id, text=self.decode(ids), tokens=len(ids), seconds=seconds)
                for index, ids in zip(group, written, strict=True)
            ]

        return self.in_batches(queries, settings, work, name, progress)

    def in_batches(
        self,
        queries: Sequence[Query],
        settings: GenerationSettings,
        work: Callable[[list[int]], Sequence[Reply]],
        name: str = "generate",
        progress: bool | None = False,
    ) -> list[Reply]:
        """The replies of `work`, in the order of the queries: without gradients, seeded, a bar called `name`.

        `work` takes the indices of the queries of one batch (see `batches`) and gives a reply to each. A batch that
        does not fit into memory is halved, with a warning.
        """
        replies: dict[int, Reply] = {}
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            progress_bar(len(queries), name, progress) as bar,
        ):
            torch.manual_seed(settings.seed)
            for group, written in in_halves(self.batches(queries, settings.batch_size), work):
                replies |= zip(group, written, strict=True)
                bar.update(len(group))
        return [replies[index] for index in range(len(queries))]

    def reply_ids(self, text: str) -> list[int]:
        """Token ids of a reply and the end-of-turn token."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def until_end(self, ids: Sequence[int]) -> list[int]:
        """`ids` up to, without, the first end-of-turn token."""
        ids = list(ids)
        return ids[: ids.index(self.end_id)] if self.end_id in ids else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Share of words in `texts` that the tokenizer maps to its unknown token (0 where it has none, or no text)."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or not texts:  # a tokenizer refuses an empty list
            return 0.0
        ids = [token for row in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in row]
        return sum(token == unknown for token in ids) / len(ids) if ids else 0.0

    def _unknown_words(self, texts: Sequence[str]) -> list[str]:
        """The words of `texts` that the tokenizer maps to its unknown token, each once."""
        unknown = self.tokenizer.unk_token_id
        words: dict[str, None] = {}
        for text in texts:
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            words |= {text[start:end]: None for token, (start, end) in pairs if token == unknown}
        return list(words)


def with_system(queries: Sequence[Query], system: str | None) -> list[Query]:
    """`queries`, with `system` as the system prompt of those that bring none."""
    if system is None:
        return list(queries)
    return [query if query.system is not None else query.model_copy(update={"system": system}) for query in queries]


def _samples_of(part: AudioPart) -> int:
    """Samples of a clip at 16 kHz, of a file by its header; more than any model reads where that cannot be read."""
    if isinstance(part.audio, np.ndarray):
        return len(part.audio) * SAMPLE_RATE // (part.rate or SAMPLE_RATE)
    import soundfile

    try:
        return int(soundfile.info(str(part.audio)).duration * SAMPLE_RATE)
    except (RuntimeError, OSError, UnicodeError):  # encoding it says what is wrong
        return sys.maxsize


def _estimated_length(query: Query) -> tuple[int, int]:
    """A key that orders queries by length without opening a file: kinds of media, then text and media in memory."""
    kinds = sum({"text": 0, "image": 1, "audio": 2}[kind] for kind in query.modalities)
    length = len(query.prefill) + sum(len(turn.parts) * 64 for turn in query.history)
    for part in query.parts:
        if isinstance(part, TextPart):
            length += len(part.text)
        elif isinstance(part, AudioPart) and isinstance(part.audio, np.ndarray):
            length += part.audio.shape[0] * 100 // (part.rate or SAMPLE_RATE)
        elif isinstance(part, ImagePart) and isinstance(part.image, Image.Image):
            length += part.image.width * part.image.height // 200
    return kinds, length
