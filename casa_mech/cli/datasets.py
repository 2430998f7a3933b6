"""`casa-mech datasets`: the public benchmarks that are read by name, what is on this machine, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casa_mech.cli.app import app, note
from casa_mech.cli.options import Data, Json, command
from casa_mech.cli.printing import show
from casa_mech.errors import CasaMechError, InputError

if TYPE_CHECKING:
    from casa_mech.queries import LoadedQueries, Query

_NOT_COUNTED = dict.fromkeys(("read", "dropped", "no_picture"), "-")

datasets_app = typer.Typer(help="The public benchmarks: list them, and compare them.", invoke_without_command=True)
app.add_typer(
    datasets_app,
    name="datasets",
    epilog="Example:  casa-mech datasets --data ~/benchmarks --count   "
    "(and: casa-mech datasets overlap advbench redteam-2k)",
)


@datasets_app.callback()
def datasets(
    context: typer.Context,
    data: Data = None,
    count: Annotated[bool, typer.Option("--count", help="Read what is found and count its rows (slower).")] = False,
    as_json: Json = False,
) -> None:
    """List the public benchmarks: modality, label, rows, licence, where to get them, and whether they are found.

    Rows are those the publishers state. With --count, of the files found here: `read`, `dropped` (left out because they
    mention minors in a sexual or harmful setting) and `no_picture` (read as text, for want of their picture).
    """
    if context.invoked_subcommand is not None:
        return
    from casa_mech.queries.benchmarks.locate import data_folder, listing
    from casa_mech.queries.benchmarks.registry import BENCHMARKS

    folder = _folder(data) or data_folder()
    files = listing(folder) if folder else ()
    rows = [_row(name, folder, files, count) for name in BENCHMARKS]
    if folder is None:
        note("no folder to look in: give --data, or set CASA_MECH_DATA")
    show({"data": str(folder) if folder else None, "datasets": rows}, as_json)


@command(datasets_app, example="casa-mech datasets overlap advbench redteam-2k mine.csv:prompt --data ~/sets")
def overlap(
    sets: Annotated[list[str], typer.Argument(help="Benchmarks (name or name:split), or files (file, file:column).")],
    data: Data = None,
    pairs: Annotated[Path | None, typer.Option(help="Write every matching pair of ids to this CSV file.")] = None,
    as_json: Json = False,
) -> None:
    """Count what sets share: the same text (normalised), and nearly the same (common word 8-grams over half of it).

    A set beside itself shows how much it repeats. `exact` and `near` count queries of the first that the second has.
    """
    from dataclasses import asdict

    from casa_mech.queries.overlap import overlaps

    if len(set(sets)) != len(sets):
        raise InputError("a set is named twice; each is compared with itself anyway")
    folder = _folder(data)
    readers = {name: _reader(name, folder) for name in sets}
    queries = {name: _queries(name, reader()) for name, reader in readers.items()}
    if pairs is not None:
        _write_pairs(queries, pairs)
    rows = [asdict(overlap) for overlap in overlaps(queries)]
    show({"pairs": str(pairs) if pairs else None, "overlaps": rows}, as_json)


def _folder(data: Path | None) -> Path | None:
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data} is no folder; give the one that holds the data sets")
    return data


def _row(name: str, folder: Path | None, files: tuple[Path, ...], count: bool) -> dict[str, Any]:
    from casa_mech.queries.benchmarks.locate import find_files
    from casa_mech.queries.benchmarks.registry import BENCHMARKS

    benchmark = BENCHMARKS[name]
    by_split = find_files(benchmark, folder, files, shared=True) if folder else {}
    places = [path for paths in by_split.values() for path in paths]
    row: dict[str, Any] = {
        "name": name,
        "modality": benchmark.modality,
        "label": benchmark.label or "both",
        "rows": benchmark.rows,
        "found": str(places[0]) if places else "-",
    }
    if count:
        row |= _counts(name, folder) if places else _NOT_COUNTED
    return row | {"licence": benchmark.licence, "origin": benchmark.origin, "splits": " ".join(benchmark.splits) or "-"}


def _counts(name: str, folder: Path | None) -> Mapping[str, int | str]:
    from casa_mech.queries.benchmarks import BenchmarkSource

    try:
        loaded = BenchmarkSource(name, data=folder).read(missing_media="text")
    except CasaMechError as error:  # one damaged set is no reason not to count the others
        note(f"{name} cannot be read: {error}")
        return {**_NOT_COUNTED, "read": "damaged"}
    return {"read": len(loaded.queries), "dropped": len(loaded.dropped), "no_picture": loaded.without_media}


def _reader(name: str, folder: Path | None) -> Callable[[], LoadedQueries]:
    """A function that reads the set, so that a wrong name is said before any set is read."""
    from casa_mech.queries.benchmarks import BENCHMARKS, named_benchmark
    from casa_mech.queries.benchmarks.read import TABLE, read_benchmark

    if (named := named_benchmark(name, folder)) is not None:
        return partial(named.read, missing_media="text")
    if Path(name).is_file():
        return partial(read_benchmark, TABLE, name)
    stem, _, last = name.rpartition(":")
    if stem and Path(stem).exists():
        return partial(read_benchmark, TABLE, stem, columns={"column": last})
    raise InputError(
        f"'{name}' is neither a benchmark ({', '.join(BENCHMARKS)}) nor a file, alone or with its column "
        "(file.csv:prompt)"
    )


def _queries(name: str, loaded: LoadedQueries) -> tuple[Query, ...]:
    if loaded.dropped:
        note(f"{name}: left out {len(loaded.dropped)} rows that mention minors in a sexual or harmful setting")
    return loaded.queries


def _write_pairs(sets: Mapping[str, Sequence[Query]], target: Path) -> None:
    from dataclasses import asdict

    import pandas as pd

    from casa_mech.files import writing
    from casa_mech.queries.overlap import duplicates, matches

    rows = [
        {"first_set": first, "second_set": second, **asdict(match)}
        for first, queries in sets.items()
        for second, others in sets.items()
        for match in (duplicates(queries) if first == second else matches(queries, others))
    ]
    columns = ["first_set", "second_set", "first", "second", "kind", "share"]
    with writing(target) as temporary:
        pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False)
