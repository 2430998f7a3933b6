"""Options of the method (`CasaConfig`) and of a training run (`TrainSettings`).

CASA is arXiv 2604.00310. Its equations are not public, so several readings are offered; docs/method.md §1 gives the
evidence for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from casa_mech.errors import InputError
from casa_mech.limits import GREATEST_SEED
from casa_mech.omni.architecture import known_lora_targets

Form = Literal["mean", "top_k", "pooled", "compete", "none"]
Rule = Literal["scale", "replace", "add_log", "scale_above"]
QuerySource = Literal["pooled_text_hidden", "input_embedding_rows", "lm_head_rows", "learned_free"]
PromptPositions = Literal["user+header", "user", "header", "all"]

OLD_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "form": {"R1-mean": "mean", "R1-topk": "top_k", "R2": "pooled", "R3": "compete"},
        "rule": {"S1": "scale", "S2": "replace", "S3": "add_log", "S4": "scale_above"},
    }
)
"""Names of the forms and rules in gates saved before version 0.2, and their present names; `storage` reads both."""


class Settings(BaseModel):
    """A frozen record of options, with a doc sentence under each field.

    Raises:
        InputError: on making one with an unknown field (the known ones are listed) or a value that does not fit; one
            line that names the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **fields: object) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            # One line for the user instead of pydantic's report.
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(type(self).model_fields) or "none"
                raise InputError(f"{type(self).__name__} has no field {field!r}; its fields: {known}") from None
            fault = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{type(self).__name__}: {field + ': ' if field else ''}{fault}") from None


class LoraSettings(Settings):
    """The LoRA that every trained defence shares, so that they differ in nothing else (docs/method.md §1.5, §5.1)."""

    lora_r: int = Field(default=16, ge=1)
    """Rank of the update of each linear layer."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the update, which is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of a linear layer's inputs that the update does not see at a training step."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers of the language model's blocks that get a LoRA; none named: all of them."""

    @model_validator(mode="after")
    def _known_targets(self) -> Self:
        known = known_lora_targets()
        unknown = set(self.lora_targets) - set(known)
        if unknown:
            raise InputError(f"lora_targets must be some of {', '.join(known)}; got {', '.join(sorted(unknown))}")
        return self


class InferenceSettings(Settings):
    """What training does not depend on: options beyond the paper, all of them off by default (docs/method.md §1.10),
    and the rule at inference.

    It needs no training: `Casa.use` changes it on a trained gate. What re-centring, rescaling and the false-positive
    rate need to know comes from `Casa.calibrate`.
    """

    recentre: bool = False
    """Shift what safety attention and the pair read of a prompt with media by text's mean state minus that of the
    prompt's surface."""
    rescale: bool = False
    """After re-centring, stretch the states along text's difference of means (harmful minus benign) until a surface
    spreads along it as text does."""
    fpr: float = Field(default=0.0, ge=0, lt=1)
    """Choose unsafe where the pair's log-odds are above their (1 - fpr) quantile on benign calibration prompts; 0:
    where they are above 0, that is, the likelier token."""
    fpr_by_surface: bool = True
    """Take that quantile over the benign prompts of the prompt's own surface, where the calibration has some; else over
    text's."""
    drop_after_safe: bool = False
    """After the safe token, write the reply with the base model from the plain prompt, without token and adapter."""
    recheck_every: int = Field(default=0, ge=0)
    """Decide again after every so many tokens of a reply, and after a prefill, at the assistant's header inserted anew;
    0: decide once."""
    inference_rule: Rule | None = None
    """How v_s changes the two logits at inference, where that is not the rule of training: one account of the paper
    scales in training and replaces at inference (docs/method.md §1.2, conflict C); None: `CasaConfig.rule`."""

    @property
    def reading(self) -> str:
        """How log-odds come about: from states as they are, re-centred, or re-centred and rescaled, and under which
        rule, where that is not the one of training."""
        states = "rescaled" if self.rescale else "recentred" if self.recentre else "plain"
        return f"{states}+{self.inference_rule}" if self.inference_rule else states

    @model_validator(mode="after")
    def _centred_before_scaled(self) -> Self:
        if self.rescale and not self.recentre:
            raise InputError("rescale stretches states about text's mean: switch recentre on, too")
        return self


MENDED: Mapping[str, Any] = MappingProxyType(
    {"counterfactual": 0.4, "recentre": True, "fpr": 0.05, "drop_after_safe": True}
)
"""The options beyond the paper that `CasaConfig.mended` and the defence casa-mended switch on."""


class CasaConfig(InferenceSettings, LoraSettings):
    """The method: form of safety attention, what it reads, how it changes the logits, the objective and the adapter."""

    form: Form = "pooled"
    """How attention becomes v_s (docs/method.md §1.2). "mean" and "top_k" average sigmoid scores, over all positions or
    the `k` highest; "pooled" pools values with a softmax and reads the result out; "compete" lets the safe and the
    unsafe query compete at each position. "none": safety tokens without safety attention, a neutral gate that leaves
    the logits alone; v_s is then the unsafe token's share of the pair."""
    k: int | None = Field(default=None, ge=1)
    """Form "top_k" only: how many positions are averaged (8 when not given)."""
    query_source: QuerySource = "pooled_text_hidden"
    """Where the class embeddings come from: pooled states of `class_phrases` in the frozen base model, its embedding or
    head rows of `class_words`, or free parameters."""
    class_words: tuple[str, str] = ("safe", "unsafe")
    """Words for the two classes, safe first; their pieces' rows also initialise the safety tokens."""
    class_phrases: tuple[str, str] = ("a harmless request", "a harmful request")
    """Phrases that name the two classes, safe first; read by `pooled_text_hidden`."""
    layer: Literal["norm"] | int = "norm"
    """Which states are read: after the final norm, or the output of block 0, 1, ... """
    positions: PromptPositions = "user+header"
    """Which positions count as the prompt: user turns with their media and the assistant header, either of them alone,
    or all real positions up to the gate (system prompt and control tokens included)."""
    width: int = Field(default=256, ge=1)
    """Size of queries, keys and values; no more than the model's own width is used."""
    rule: Rule = "add_log"
    """How v_s changes the two logits (docs/method.md §1.2, conflict C): "scale" multiplies them (the paper), "replace"
    puts v_s and 1 - v_s in their place, "add_log" adds log v_s and log(1 - v_s), "scale_above" multiplies their height
    above the smallest logit."""
    safe_token: str = "<|safe|>"
    """The safe token's string, added to the tokenizer as a special token."""
    unsafe_token: str = "<|unsafe|>"
    """The unsafe token's string, added to the tokenizer as a special token."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of harmful sequences in the loss; benign ones get 1 - beta (docs/method.md §1.4)."""
    lambda_tok: float = Field(default=1.0, gt=0)
    """Weight of the safety token's loss beside the mean loss of the reply's tokens."""
    ce_support: Literal["full", "two_way"] = "full"
    """Softmax of the safety token's loss: over the whole vocabulary, or over the two tokens."""
    counterfactual: float = Field(default=0.0, ge=0, le=1)
    """Share of the benign examples that are given a second time with the unsafe token before a refusal, so that the
    reply has to read the token, not the prompt again (docs/method.md §1.10)."""

    @classmethod
    def paper(cls, **changes: Any) -> CasaConfig:
        """The reading closest to the paper: softmax-pooled attention and scaled logits."""
        return cls(**{"form": "pooled", "rule": "scale", **changes})

    @classmethod
    def mended(cls, **changes: Any) -> CasaConfig:
        """The options beyond the paper that are worth their cost (`MENDED`), and `changes`."""
        return cls(**{**MENDED, **changes})

    @property
    def inference(self) -> InferenceSettings:
        """Those of the options that training does not depend on."""
        return InferenceSettings(**{name: getattr(self, name) for name in InferenceSettings.model_fields})

    def changed(self, **changes: Any) -> CasaConfig:
        """The same with `changes`, checked anew."""
        return CasaConfig(**{**self.model_dump(), **changes})

    @property
    def top_k(self) -> int:
        """How many positions the form "top_k" averages."""
        return self.k or 8

    @model_validator(mode="after")
    def _no_contradictions(self) -> CasaConfig:
        if self.k is not None and self.form != "top_k":
            raise InputError(f"k={self.k} is read by form top_k only, not {self.form}: leave k out or change the form")
        if self.form == "none" and self.inference_rule is not None:
            raise InputError("inference_rule says what v_s does to the logits, and form none has no v_s: leave it out")
        if self.rule == "replace" and self.ce_support == "full":
            raise InputError(
                "rule replace sets the two logits to v_s and 1 - v_s, which mean nothing beside the other logits: "
                "use ce_support='two_way'"
            )
        if self.safe_token == self.unsafe_token or not self.safe_token.strip() or not self.unsafe_token.strip():
            raise InputError("safe_token and unsafe_token must be two different, non-empty strings")
        if isinstance(self.layer, int) and self.layer < 0:
            raise InputError(f"layer={self.layer}: blocks are counted from 0; use 'norm' for the final states")
        return self


class TrainSettings(Settings):
    """One training run. The defaults for the learning rates and the batch depend on the model's size."""

    epochs: float = Field(default=3.0, gt=0)
    """Passes over the larger class; ignored when `max_steps` is given."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimiser steps."""
    batch_size: int = Field(default=64, ge=2)
    """Examples a step, half of them harmful."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Examples a forward; the gradients of a batch's parts are summed. Halved, with a warning, where they do not fit
    into memory."""
    forward_tokens: int | None = Field(default=None, ge=1)
    """Positions a forward, padding included, in place of `micro_batch_size`: many short examples then share a forward,
    or a few long ones. An example with more positions has a forward of its own."""
    gradient_checkpointing: bool = False
    """Hold the blocks' inputs alone and compute the rest again in the backward pass: a fraction of the memory, about a
    third more time, the same gradients."""
    lr_lora: float | None = Field(default=None, gt=0)
    """Learning rate of LoRA and of the token rows; by default 1e-4 from d_model 1024 on, else 1e-3."""
    lr_attention: float | None = Field(default=None, gt=0)
    """Learning rate of safety attention; by default 5e-4 from d_model 1024 on, else 2e-3."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay, the same for all parameters."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; after them it falls along a cosine."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient; a longer one is scaled down to it."""
    by_length: bool = True
    """Cut a batch into parts of like length, which has less padding; the gradients' sum stays what it is, but for the
    draws of LoRA's dropout."""
    precision: Literal["auto", "full", "bfloat16"] = "auto"
    """Of the matrix products: "full" is the model's own; "bfloat16" halves them, and weights, the gate and losses stay
    float32 (`omni.precision`). "auto": bfloat16 for a model in float32 on a CPU that multiplies it faster."""
    max_reply_tokens: int = Field(default=256, ge=1)
    """Replies are cut to this many tokens."""
    seed: int = Field(default=0, ge=0, le=GREATEST_SEED)
    """Of the batches, the validation split and LoRA's dropout."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share of the examples of each class held out for validation; 0 turns validation off."""
    validate_every: int = Field(default=50, ge=1)
    """Steps between validations."""
    patience: int | None = Field(default=5, ge=1)
    """Stop after this many validations without a lower loss, and keep the best weights; None never stops early."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints (only with an output folder)."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainSettings:
        if self.batch_size % 2:
            raise InputError(f"batch_size={self.batch_size}: batches are half harmful, half benign, so it must be even")
        return self

    def learning_rates(self, d_model: int) -> tuple[float, float]:
        """Learning rates (LoRA and token rows, safety attention) for a model of width `d_model`."""
        large = d_model >= 1024
        return self.lr_lora or (1e-4 if large else 1e-3), self.lr_attention or (5e-4 if large else 2e-3)
