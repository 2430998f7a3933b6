"""How large a picture, clip, text or answer may be: one place, and an environment variable for each.

What is larger is refused with a line that names the variable, since a bad file can otherwise take all memory or never
come to an end. docs/howto/limits.md lists them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from casa_mech.errors import InputError


@dataclass(frozen=True)
class Limit:
    """One limit."""

    variable: str
    """The environment variable that moves it."""
    default: float
    """Where the variable is not set."""
    what: str
    """What is limited, with its unit."""

    @property
    def value(self) -> float:
        """The limit as it is now.

        Raises:
            InputError: the variable holds no positive number.
        """
        text = os.environ.get(self.variable, "").strip()
        if not text:
            return self.default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{self.variable}={text}: give a positive number, {self.what}")
        return value

    @property
    def way_out(self) -> str:
        """The end of a message that refuses what is beyond the limit."""
        return f"set {self.variable} for others"


PIXELS = Limit("CASA_MECH_MAX_PIXELS", 64_000_000, "pixels of a picture, width times height")
CLIP_SECONDS = Limit("CASA_MECH_MAX_CLIP_SECONDS", 300, "seconds of a clip")
LEAST_RATE = Limit("CASA_MECH_MIN_RATE", 4_000, "least sampling rate of a clip in hertz")
GREATEST_RATE = Limit("CASA_MECH_MAX_RATE", 384_000, "greatest sampling rate of a clip in hertz")
CHARACTERS = Limit("CASA_MECH_MAX_CHARACTERS", 200_000, "characters of a prompt or reply in a table or on a line")
ANSWER_BYTES = Limit("CASA_MECH_MAX_ANSWER_BYTES", 16 * 2**20, "bytes of one answer of a judge's server")
LIMITS = (PIXELS, CLIP_SECONDS, LEAST_RATE, GREATEST_RATE, CHARACTERS, ANSWER_BYTES)

LONGEST_TO_SHORTEST = 200
"""Of a picture's sides; the processors of the Qwen family refuse what is thinner."""
LOUDEST = 10.0
"""Largest sample of a clip, whose full scale is 1: more is a file of another scale, or a broken one."""
GREATEST_SEED = 2**62
"""Of random draws: torch takes 64 bits, and each purpose of a draw adds a number of its own."""


def check_text(text: str, where: str) -> str:
    """`text`, if it is not too long and can be encoded.

    Args:
        text: of a user.
        where: what to call it in an error, such as a file with its row.

    Raises:
        InputError: too many characters, or lone surrogates, which no UTF-8 text holds.
    """
    if len(text) > CHARACTERS.value:
        raise InputError(
            f"{where}: a text of {len(text):,} characters, and {CHARACTERS.value:,.0f} are read: shorten it, or "
            f"{CHARACTERS.way_out}"
        )
    if not _encodable(text):
        raise InputError(f"{where}: a text that is not UTF-8 ({text[:40]!a}…): give it as UTF-8")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
