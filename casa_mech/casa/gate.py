"""The gate: positions and layer that are read, safety attention over them, and the logit rule."""

from __future__ import annotations

import torch
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.casa.attention import UNSAFE, SafetyAttention, check_mask
from casa_mech.casa.config import CasaConfig, Rule
from casa_mech.casa.rules import rewrite
from casa_mech.casa.tokens import word_rows
from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.gate import GateReading
from casa_mech.trace.sites import Site


class SafetyGate:
    """Safety attention with its positions, layer and logit rule, as the traces of `casa_mech.trace.gate` take it.

    `token_ids`: long [2] (safe, unsafe). Without safety attention (form "none") the gate is neutral: it reports the
    pair of logits and leaves all alone.
    """

    def __init__(self, config: CasaConfig, attention: SafetyAttention | None, token_ids: LongTensor) -> None:
        self.layer: Site = config.layer
        self.attention = attention
        self.token_ids = token_ids
        self._config = config

    def under(self, rule: Rule | None) -> SafetyGate:
        """The same gate with another rule; itself for None."""
        if rule is None:
            return self
        return SafetyGate(self._config.changed(rule=rule, ce_support="two_way"), self.attention, self.token_ids)

    def mask(self, batch: OmniBatch) -> BoolTensor:
        """Positions [batch, position] that safety attention reads.

        Raises:
            InputError: a prompt that has none.
        """
        mask = prompt_positions(self._config, batch)
        check_mask(mask)
        return mask

    def __call__(self, states: Tensor, mask: BoolTensor, logits: Tensor) -> tuple[Tensor, GateReading]:
        """States [batch, position, d_model], mask [batch, position], logits [batch, vocab] → new logits, reading."""
        if self.attention is None:
            pair = logits[:, self.token_ids]
            pair = pair.to(torch.promote_types(pair.dtype, torch.float32))
            share = torch.softmax(pair, dim=-1)[:, UNSAFE]
            return logits, GateReading(share, pair, pair, torch.zeros_like(mask, dtype=pair.dtype))
        v_s, attention = self.attention(states, mask)
        logits, raw, pair = rewrite(self._config.rule, logits, self.token_ids, v_s)
        return logits, GateReading(v_s, pair, raw, attention)


def prompt_positions(config: CasaConfig, batch: OmniBatch) -> BoolTensor:
    """The positions [batch, position] that `config.positions` names."""
    user = torch.stack(list(batch.modality.values())).any(dim=0)
    if config.positions == "user+header":
        mask = batch.prompt_mask
    elif config.positions == "user":
        mask = user
    elif config.positions == "header":
        mask = batch.prompt_mask & ~user
    else:
        index = torch.arange(user.shape[1], device=user.device)
        mask = batch.inputs["attention_mask"].bool() & (index[None] <= batch.gate_position[:, None])
    return mask


def class_embeddings(omni: Omni, config: CasaConfig) -> Tensor:
    """Class embeddings [2, d_model] (safe, unsafe), computed once from the untouched base model.

    The sources are those of docs/method.md §1.2 (conflict A).

    Raises:
        InputError: form "compete" with a source that cannot tell the two classes apart on this tokenizer.
    """
    if config.query_source == "learned_free":
        return torch.randn(2, omni.d_model, device=omni.device)
    if config.query_source == "pooled_text_hidden":
        # No system prompt: nothing but the phrase itself should be in its states.
        queries = [Query.from_text(phrase, id=phrase, system="") for phrase in config.class_phrases]
        embeddings = capture(omni, omni.encode(queries), [config.layer], "mean:text")[config.layer]
        names = config.class_phrases
    else:
        matrix = omni.head if config.query_source == "lm_head_rows" else omni.embedding
        embeddings = word_rows(omni, config.class_words, matrix.weight)
        names = config.class_words
    if config.form == "compete" and torch.equal(embeddings[0], embeddings[1]):
        raise InputError(
            f"{names[0]!r} and {names[1]!r} are the same to this tokenizer; name the classes by other words"
        )
    return embeddings
