"""Labels by the words that stand for them in tables."""

from __future__ import annotations

from collections.abc import Mapping

from casa_mech.queries.query import Label

LABEL_WORDS: Mapping[str, Label] = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign"}
"""Numbers are not read: public sets do not agree on which of 0 and 1 is the harmful one."""


def label_named(text: str) -> Label | None:
    """The label that `text` means, whatever its case: harmful or unsafe, benign or safe; None for any other word."""
    return LABEL_WORDS.get(text.strip().casefold())
