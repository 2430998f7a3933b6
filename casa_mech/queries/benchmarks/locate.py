"""Finding a benchmark's files in a folder, and its tables on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks.benchmark import WHOLE, Benchmark

DATA_VARIABLE = "CASA_MECH_DATA"
_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def data_folder() -> Path | None:
    """The folder that the environment variable CASA_MECH_DATA names, if it is set.

    Raises:
        InputError: it names no folder.
    """
    named = os.environ.get(DATA_VARIABLE, "").strip()
    if not named:
        return None
    if not Path(named).is_dir():
        raise InputError(f"{DATA_VARIABLE}={named} is no folder; set it to the folder that holds the data sets")
    return Path(named)


def listing(folder: Path) -> tuple[Path, ...]:
    """All files in `folder` and the folders in it, in order; hidden ones are passed over."""
    files: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return tuple(files)


def find_files(
    benchmark: Benchmark, folder: Path, files: Sequence[Path] | None = None, *, shared: bool = False
) -> dict[str, list[Path]]:
    """Where the benchmark's files are in `folder`, by split; splits without a file are left out.

    Args:
        benchmark: what to look for. folder: where. files: its `listing`, if it is at hand.
        shared: the folder holds many sets. Clips, which have no telling names, are then looked for in the folder of the
            set's name only.

    Raises:
        InputError: two files of one name at the same depth, so that it is not known which is meant.
    """
    files = listing(folder) if files is None else files
    if shared and benchmark.modality == "audio":
        files = [file for file in files if file.is_relative_to(folder / benchmark.name)]
    matched = {split: _matching(benchmark, patterns, files) for split, patterns in benchmark.files.items()}
    return {split: paths for split, paths in matched.items() if paths}


def _matching(benchmark: Benchmark, patterns: Sequence[str], files: Sequence[Path]) -> list[Path]:
    for pattern in patterns:
        matches = [file for file in files if file.match(pattern)]
        if benchmark.modality == "audio":  # in folders by setting or topic
            nearest = matches
        else:
            depth = min((len(file.parts) for file in matches), default=0)
            nearest = [file for file in matches if len(file.parts) == depth]
            folders = sorted({str(file.parent) for file in nearest})
            if len(folders) > 1:
                places = " and ".join(folders)
                raise InputError(f"{benchmark.name}: {pattern} is in {places}; give the path of the one that is meant")
        if nearest:
            return nearest
    return []


def from_hub(benchmark: Benchmark, split: str) -> list[dict[str, Any]]:
    """The records of a split, through `datasets`, which keeps them for the next time.

    Raises:
        InputError: `datasets` is not installed, the set is not to be had that way, or it cannot be reached; the message
            says what to download and where to put it.
    """
    address = benchmark.remote.get(split)
    if address is None:
        raise InputError(f"{benchmark.name} cannot be read from the hub. {where_to_get(benchmark)}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"{benchmark.name} is not on this machine, and reading it from the hub needs datasets (pip install "
            f"'casa-mech[hub]'). {where_to_get(benchmark)}"
        ) from None
    builder = _BUILDERS[Path(address).suffix]
    try:
        loaded = load_dataset(builder, data_files={"train": address}, split="train")
    except Exception as error:  # each builder and each file system has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{benchmark.name}: {address} cannot be read ({reason}). {where_to_get(benchmark)}") from None
    return [dict(record) for record in loaded]


def where_to_get(benchmark: Benchmark) -> str:
    """One sentence that says what to download and where to put it."""
    names = ", ".join(dict.fromkeys(patterns[0] for patterns in benchmark.files.values()))
    place = f"into {benchmark.name}/ in" if benchmark.modality == "audio" else "anywhere in"
    return f"Get {names} from {benchmark.origin} and give the path, or put it {place} the folder {DATA_VARIABLE} names"


def files_to_read(benchmark: Benchmark, files: dict[str, list[Path]], split: str | None) -> list[tuple[str, Path]]:
    """The (split, file) pairs to read; all splits when `split` is None, the whole when it is chosen by row."""
    splits = [split] if split in benchmark.files else list(files)
    return [(name, path) for name in splits if name is not None for path in files.get(name, [])]


def of_file(benchmark: Benchmark, path: Path, split: str | None) -> dict[str, list[Path]]:
    """A single file as `find_files` gives it: of the split asked for, or of the one whose name it bears."""
    by_name = (name for name, patterns in benchmark.files.items() if any(path.match(pattern) for pattern in patterns))
    name = split if split in benchmark.files else next(by_name, WHOLE)
    return {name or WHOLE: [path]}
