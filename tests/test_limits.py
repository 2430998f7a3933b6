"""The limits are described where they say they are."""

import re

import pytest
from helpers.paths import ROOT

from casa_mech.errors import InputError
from casa_mech.limits import CHARACTERS, LIMITS, check_text


def test_the_page_has_every_limit_with_its_default() -> None:
    page = (ROOT / "docs" / "howto" / "limits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (.+) \|$", page, re.MULTILINE)
    assert [(name, float(default.replace(",", "")), what) for name, default, what in rows] == [
        (limit.variable, limit.default, limit.what) for limit in LIMITS
    ]


def test_a_text_has_to_be_short_enough_and_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHARACTERS.variable, " ")
    assert check_text("x" * 200_000, "here") == "x" * 200_000
    with pytest.raises(InputError, match="here: a text of 200,001 characters"):
        check_text("x" * 200_001, "here")
    with pytest.raises(InputError, match="here: a text that is not UTF-8"):
        check_text("a \udcff b", "here")
