"""The sources of queries that repeated command-line options describe; read without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks import BENCHMARKS, BenchmarkSource, chosen_source, read_chosen
from casa_mech.queries.files import QuerySource
from casa_mech.queries.loaded import LoadedQueries
from casa_mech.queries.query import ImagePart, Part, Query, TextPart

NONE = "-"
NO_ATTACK = "none"
"""The attack of queries that none was named for."""


def query_sources(
    queries: Sequence[str | Path],
    labels: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    text: str | None = None,
    limit: int | None = None,
    *,
    data: Path | None = None,
    seed: int = 0,
) -> list[QuerySource | BenchmarkSource]:
    """The sources that the command line's repeated options describe.

    Each option is given once for all, or once each in the order of `queries`; `-` stands for none. Column options may
    leave out what is no table, and labels the public sets, whose rows carry their own.

    Args:
        queries: paths, or public sets as `name` or `name:split`; a path that exists wins over a name.
        labels, columns: their values; the columns by the name of their field.
        text, limit: as for `QuerySource`.
        data, seed: as for `BenchmarkSource`.

    Raises:
        InputError: another number of values, what is neither a path nor a set, one source twice, a label that is
            neither harmful nor benign, or one for a set that is labelled otherwise.
    """
    sources = [chosen_source(str(entry), data, limit, seed, text=text) for entry in queries]
    files = [place for place, source in enumerate(sources) if isinstance(source, QuerySource)]
    tables = [place for place in files if cast(QuerySource, sources[place]).is_table]
    fields: dict[int, dict[str, str | None]] = {place: {} for place in range(len(sources))}
    for place, label in _spread("label", labels, len(sources), files).items():
        fields[place]["label"] = None if label == NONE else label
    for name, values in columns.items():
        for place, column in _spread(name, values, len(sources), tables).items():
            fields[place][name] = "" if column == NONE else column
    if len(labels) == 1 and not files:
        fields[0]["label"] = labels[0]
    described = [_with_fields(source, fields[place], place in tables) for place, source in enumerate(sources)]
    same = [_resolved(source) for source in described]
    twice = next((entry for place, entry in enumerate(queries) if same[place] in same[:place]), None)
    if twice is not None:
        raise InputError(f"--queries {twice} is given twice, so that each of its rows would count twice: leave one out")
    return described


def _resolved(source: QuerySource | BenchmarkSource) -> QuerySource | BenchmarkSource:
    """The source by the path that all its names lead to."""
    return source.model_copy(update={"path": source.path.resolve()}) if isinstance(source, QuerySource) else source


def load_sources(sources: Sequence[QuerySource | BenchmarkSource]) -> list[LoadedQueries]:
    """The queries of each source. InputError: one that cannot be read, or a row that cannot be used."""
    return [read_chosen(source) for source in sources]


def under_attack(query: Query, attack: str) -> Query:
    """The query under the attack's name, unless nothing was named and it knows its own (an index does)."""
    if attack == NO_ATTACK and "attack" in query.meta:
        return query
    return query.model_copy(update={"meta": {**query.meta, "attack": attack}})


def both_labels(queries: Sequence[Query]) -> list[tuple[str, str]]:
    """The ids of each harmful query with those of a benign one of the very same prompt; media count by their path."""
    benign: dict[Any, str] = {}
    for query in queries:
        if query.label == "benign":
            benign.setdefault(_prompt(query), query.id)
    harmful = [query for query in queries if query.label == "harmful"]
    return [(query.id, benign[_prompt(query)]) for query in harmful if _prompt(query) in benign]


def _prompt(query: Query) -> Any:
    parts = [part for turns in (*(turn.parts for turn in query.history), query.parts) for part in turns]
    return query.system, query.prefill, tuple(_content(part) for part in parts)


def _content(part: Part) -> Any:
    if isinstance(part, TextPart):
        return part.text.casefold()
    medium = part.image if isinstance(part, ImagePart) else part.audio
    return medium if isinstance(medium, Path) else id(medium)  # in memory each is another, whatever it holds


def check_labels(queries: Sequence[Query]) -> None:
    """Refuse queries that are not all harmful or benign.

    Raises:
        InputError: there are none, or one has no label; it names the first.
    """
    if not queries:
        raise InputError("an audit needs labelled queries; there are none")
    query = next((query for query in queries if query.label is None), None)
    if query is not None:
        raise InputError(
            f"an audit needs labelled queries; {query.id} has no label: give --label harmful or benign, or a column of "
            "labels with --label-column"
        )


def _with_fields(
    source: QuerySource | BenchmarkSource, fields: Mapping[str, str | None], table: bool
) -> QuerySource | BenchmarkSource:
    label = fields.get("label")
    if label not in (None, "harmful", "benign"):
        raise InputError(f"--label {label}: use harmful, benign or {NONE}")
    if isinstance(source, QuerySource):
        return source.model_copy(update=dict(fields) if table else {"label": label})
    if label not in (None, BENCHMARKS[source.name].label):
        raise InputError(f"--label {label}: the rows of {source.name} have labels of their own; give {NONE} for it")
    return source


def _spread(name: str, values: Sequence[str], n: int, takers: Sequence[int]) -> dict[int, str]:
    """The option's values by place among the `n` sources; `takers` are those it has a meaning for."""
    if len(values) == 1:
        return dict.fromkeys(takers, values[0])
    if len(values) == n:
        return dict(enumerate(values))
    if values and len(values) != len(takers):
        option = "--" + name.replace("_", "-")
        raise InputError(
            f"{option} is given {len(values)} times for {len(takers)} files: give it once, or once for each --queries "
            f"in their order ({NONE} for none)"
        )
    return dict(zip(takers, values, strict=False))
