"""Prompts as texts, labels by their usual names, ids that do not collide; what is wrong is said in one line."""

from __future__ import annotations

import numpy as np
import pytest

from casa_mech.errors import InputError
from casa_mech.queries import Query, TextPart, as_queries
from casa_mech.queries.labels import label_named, label_of


def test_texts_become_queries_named_by_their_text() -> None:
    own = Query.from_text("make tea", id="mine", label="benign")
    queries = as_queries(["make tea", own, "make soup", "make tea"])
    assert queries[1] is own and [query.text for query in queries] == ["make tea", "make tea", "make soup", "make tea"]
    assert queries[0].id == queries[3].id != queries[2].id and own.id == "mine"
    assert Query.from_text("a").id != Query.from_text("b").id


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("make tea", "`prompts` is a single prompt: give a list of prompts"),
        (Query.from_text("make tea"), "`prompts` is a single prompt"),
        (["tea", 3], "`prompts` number 1 is a int: give texts or queries"),
        (["tea", "  "], "`prompts` number 1 is an empty text"),
        ([Query.from_text("tea", id="q", label="benign")], "query q is labelled benign, and was given as harmful"),
    ],
)
def test_what_is_no_prompt_is_named(prompts: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_queries(prompts, label="harmful")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, True, np.True_, np.int64(1), 1.0, "unsafe", "Harmful", "harmful"])
def test_harmful_by_its_usual_names(value: object) -> None:
    assert label_of(value) == Query.from_text("x", label=value).label == "harmful"


@pytest.mark.parametrize("value", [0, False, np.False_, 0.0, "safe", "benign", "harmless"])
def test_benign_by_its_usual_names(value: object) -> None:
    assert label_of(value) == Query.from_text("x", label=value).label == "benign"


@pytest.mark.parametrize("value", [None, "", float("nan")])
def test_no_label(value: object) -> None:
    assert label_of(value) is None is Query.from_text("x", label=value).label


@pytest.mark.parametrize("value", ["toxic", 2, -1, "1", [1]])
def test_other_labels_are_one_line(value: object) -> None:
    with pytest.raises(InputError, match="write harmful or benign") as error:
        Query.from_text("x", label=value)
    assert "\n" not in str(error.value) and repr(value) in str(error.value)


def test_numbers_in_files_stay_unread() -> None:
    """Public sets do not agree on which number is the harmful one."""
    assert label_named("1") is None and label_named("harmless") == "benign"


def test_a_record_with_a_wrong_field_is_one_line() -> None:
    with pytest.raises(InputError, match=r"Query: lable: Extra inputs are not permitted"):
        Query.from_text("x", lable="benign")
    with pytest.raises(InputError, match=r"Query: parts"):
        Query(id="x", parts="make tea")
    with pytest.raises(InputError, match=r"TextPart: text: Input should be a valid string"):
        TextPart(text=3)
