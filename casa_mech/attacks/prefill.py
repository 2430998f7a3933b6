"""Prefill attacks: the first k content tokens of a complying answer are put into the assistant's mouth.

After Qi et al., "Safety alignment should be made more than just a few tokens deep" (arXiv 2406.05946), with the lengths
of the CASA paper. Their `encode` counts a BOS token where the tokenizer adds one; here a BOS token is never counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from casa_mech.attacks.text import marked
from casa_mech.errors import InputError
from casa_mech.queries import Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_LENGTHS = (2, 4, 9, 12)


def prefill(query: Query, k: int, tokenizer: PreTrainedTokenizerBase) -> Query:
    """`query` with the first `k` tokens of `meta["compliance"]` as its prefill; no special token is counted.

    The text is decoded from the tokens and encodes to exactly `k` tokens again. Where a cut inside a word would read
    back as fewer or more, the opening nearest in length that is `k` tokens is taken. With `k` 0 there is no prefill.

    Raises:
        InputError: `k` below 0, no compliance text, one of fewer than `k` tokens, or one that no cut makes `k` tokens
            (possible where a single character is several tokens).
    """
    if k < 0:
        raise InputError(f"a prefill cannot have {k} tokens: give 0 or more")
    meta = marked(query, surface=query.surface, attack=f"prefill-{k}")
    if k == 0:
        return query.model_copy(update={"prefill": "", "meta": meta})
    text = query.meta.get("compliance", "").strip()
    if not text:
        raise InputError(f"query {query.id!r} has no complying answer to take a prefill from: set meta['compliance']")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) < k:
        raise InputError(f"query {query.id!r}: its complying answer has {len(tokens)} tokens, prefill-{k} needs {k}")
    opening = tokenizer.decode(tokens[:k], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in opening or _count(opening, tokenizer) != k:
        opening = _nearest(text, len(opening), k, tokenizer, query.id)
    return query.model_copy(update={"prefill": opening, "meta": meta})


def _count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _nearest(text: str, length: int, k: int, tokenizer: PreTrainedTokenizerBase, id: str) -> str:
    """The beginning of `text` that encodes to `k` tokens and whose length in characters is nearest to `length`."""
    for end in sorted(range(1, len(text) + 1), key=lambda end: abs(end - length)):
        candidate = text[:end].rstrip()
        if _count(candidate, tokenizer) == k:
            return candidate
    raise InputError(f"query {id!r}: no beginning of its complying answer is {k} tokens long; choose another k")
