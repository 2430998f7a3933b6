"""Labels by the words and values that stand for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Literal

import numpy as np

from casa_mech.errors import InputError

Label = Literal["harmful", "benign"]
LABEL_WORDS: Mapping[str, Label] = {
    "harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign", "harmless": "benign",
}  # fmt: skip
"""Numbers in files are not read: public sets do not agree on which of 0 and 1 is the harmful one."""


def label_named(text: str) -> Label | None:
    """The label that `text` means, whatever its case: harmful or unsafe; benign, harmless or safe; None for others."""
    return LABEL_WORDS.get(text.strip().casefold())


def label_of(value: object) -> Label | None:
    """The label that a Python value means: a word (`label_named`), or 1 and True for harmful, 0 and False for benign.

    None, an empty text and NaN are no label.

    Raises:
        InputError: any other value.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and (label := label_named(value)):
        return label
    if isinstance(value, bool | np.bool_ | Real) and not isinstance(value, str):
        number = float(value)
        if math.isnan(number):
            return None
        if number in (0.0, 1.0):
            return "harmful" if number else "benign"
    raise InputError(
        f"label {value!r}: write harmful or benign (or unsafe, safe, harmless; as numbers 1 or True is harmful, 0 or "
        "False benign)"
    )
