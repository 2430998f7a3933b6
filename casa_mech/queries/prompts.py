"""Prompts as a user gives them: plain texts wherever queries are taken."""

from __future__ import annotations

from collections.abc import Sequence

from casa_mech.errors import InputError
from casa_mech.queries.labels import Label
from casa_mech.queries.query import Query

Prompt = str | Query
"""A text stands for the query of that text."""


def as_queries(prompts: Sequence[Prompt], name: str = "prompts", label: Label | None = None) -> list[Query]:
    """A query for each prompt, in their order; a text's is named by a digest of it.

    Args:
        prompts: texts, queries or both.
        name: of the argument, for errors.
        label: given to those that have none.

    Raises:
        InputError: a single prompt instead of a list, one that is neither text nor query, an empty text, or one that is
            labelled otherwise.
    """
    if isinstance(prompts, str | Query):
        raise InputError(f"`{name}` is a single prompt: give a list of prompts")
    queries = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError(f"`{name}` number {number} is an empty text")
            query = Query.from_text(prompt, label=label)
        elif not isinstance(prompt, Query):
            raise InputError(f"`{name}` number {number} is a {type(prompt).__name__}: give texts or queries")
        elif label is not None and prompt.label not in (None, label):
            raise InputError(f"query {prompt.id} is labelled {prompt.label}, and was given as {label}")
        else:
            query = prompt if label is None else prompt.model_copy(update={"label": label})
        queries.append(query)
    return queries
