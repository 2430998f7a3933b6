"""The two safety tokens: registered with the tokenizer, one id each, with trainable rows in embedding and head.

Which strings they are is a choice of ours (docs/method.md §1.3).

The rows are written straight into the model's matrices, so decoding costs nothing extra and any generation sees them.
Spare rows are used where the matrices have more rows than the tokenizer has tokens (as the hub checkpoints do);
otherwise the matrices grow. `remove` undoes either exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedTokenizerBase

from casa_mech.errors import InputError
from casa_mech.omni import Omni


def register(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[int]:
    """Ids of `strings` as special tokens, added to the tokenizer if it lacks them.

    Raises:
        InputError: a string is an ordinary token already, so a user's text could hold it.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    for string in strings:
        if string in vocabulary and string not in special:
            raise InputError(f"safety token {string!r} is an ordinary token of this tokenizer; choose another string")
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [string for string in strings if string not in special]},
        replace_extra_special_tokens=False,
    )
    ids = [tokenizer(string, add_special_tokens=False)["input_ids"] for string in strings]
    for string, pieces in zip(strings, ids, strict=True):
        if len(pieces) != 1:
            raise InputError(f"safety token {string!r} is {len(pieces)} tokens, not one; choose another string")
    return [pieces[0] for pieces in ids]


def word_rows(omni: Omni, words: Sequence[str], matrix: Tensor) -> Tensor:
    """For each word the mean [d_model] of its pieces' rows in `matrix` [vocab, d_model]; float32 [word, d_model]."""
    ids = [omni.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return torch.stack([matrix[pieces].detach().to(torch.float32).mean(dim=0) for pieces in ids])


class TokenRows(nn.Module):
    """Trainable rows [2, d_model] (safe, unsafe) of embedding and head, in float32; one parameter where they are tied.

    In a training forward they stand in for the matrices' rows, so that nothing but these two rows gets a gradient.
    """

    def __init__(self, ids: LongTensor, embedding: Tensor, head: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.embedding = nn.Parameter(embedding.clone())
        self.head = None if head is None else nn.Parameter(head.clone())

    @property
    def head_rows(self) -> Tensor:
        """Rows of the head [2, d_model]."""
        return self.embedding if self.head is None else self.head

    def embed(self, embeddings: Tensor, input_ids: LongTensor) -> Tensor:
        """`embeddings` [batch, position, d_model] with the rows at positions where `input_ids` is a safety token."""
        for token, row in zip(self.ids, self.embedding.to(embeddings.dtype), strict=True):
            embeddings = torch.where((input_ids == token).unsqueeze(-1), row, embeddings)
        return embeddings

    def score(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """`logits` [row, vocab] with the two tokens' columns computed in their dtype from `hidden` [row, d_model]."""
        scores = hidden.to(logits.dtype) @ self.head_rows.to(logits.dtype).T
        return logits.index_copy(1, self.ids, scores)


class SafetyTokens:
    """The two tokens in one model. `ids`: long [2] (safe, unsafe); `rows`: their `TokenRows`.

    Args:
        omni: the model; its tokenizer gets the tokens, its matrices the rows.
        strings: the two tokens' strings, safe first.
        words: words whose pieces' mean rows are the start, safe first.
    """

    def __init__(self, omni: Omni, strings: Sequence[str], words: Sequence[str]) -> None:
        self._omni = omni
        self._names = dict(zip(("safe", "unsafe"), strings, strict=True))
        self.ids = torch.tensor(register(omni.tokenizer, strings), device=omni.device)
        matrices = self._matrices()
        rows = [word_rows(omni, words, weight) for weight in matrices]
        self.rows = TokenRows(self.ids, rows[0], rows[1] if len(rows) > 1 else None)
        self._size = matrices[0].shape[0]
        self._inside = self.ids < self._size
        self._before = [weight[self.ids[self._inside]].detach().clone() for weight in matrices]
        self.write()

    def write(self) -> None:
        """Put the current rows into the model's matrices."""
        needed = max(self._size, int(self.ids.max()) + 1)
        self._omni.processor.gate_tokens = self._names
        with torch.no_grad():
            for weight, rows in zip(self._matrices(), (self.rows.embedding, self.rows.head_rows), strict=False):
                missing = needed - weight.shape[0]
                if missing > 0:
                    weight.data = torch.cat([weight.data, weight.data.new_zeros(missing, weight.shape[1])])
                weight[self.ids] = rows.to(weight.dtype)
        self._resized(needed)

    def remove(self) -> None:
        """Give the matrices back their size and values; the tokenizer keeps the tokens, which no text can produce."""
        self._omni.processor.gate_tokens = {}
        with torch.no_grad():
            for weight, before in zip(self._matrices(), self._before, strict=True):
                weight[self.ids[self._inside]] = before
                weight.data = weight.data[: self._size]
        self._resized(self._size)

    def _matrices(self) -> list[nn.Parameter]:
        """The embedding's and the head's weight [vocab, d_model]; one where they are the same parameter."""
        embedding, head = self._omni.embedding.weight, self._omni.head.weight
        return [embedding] if head is embedding else [embedding, head]

    def _resized(self, size: int) -> None:
        self._omni.embedding.num_embeddings = size
        self._omni.head.out_features = size
        self._omni.model.config.get_text_config().vocab_size = size
        self._omni.model.vocab_size = size
