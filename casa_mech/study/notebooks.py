"""The notebooks: where they are, and their parameters, checked before any kernel starts."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from casa_mech.errors import InputError, RunError
from casa_mech.study.settings import CLONE

TAG = "parameters"
PATH_PARAMETERS = ("checkpoints", "judge", "judge_model", "map_tables", "plan", "queries")
"""Parameters that may name files or folders, several separated by commas; a kernel's working directory is another."""


@dataclass(frozen=True)
class Notebook:
    """A notebook of the suite."""

    path: Path
    """The file."""
    parameters: Mapping[str, Any]
    """Defaults of its parameters, by name."""

    @property
    def name(self) -> str:
        """The file's name without its suffix, such as `02_casa_training`."""
        return self.path.stem

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called on the command line: its name, its number, and its name without the number."""
        return (self.name, *self.name.split("_", 1))


def find_notebooks(only: Sequence[str] = (), folder: Path | None = None) -> list[Notebook]:
    """The suite in its order, or those that `only` names (by full name, number, or name without number).

    Raises:
        RunError: no notebooks beside the package or under the working directory. InputError: a name that none has.
    """
    places = [folder] if folder else [CLONE / "notebooks", Path.cwd() / "notebooks"]
    listings = [sorted(place.glob("[0-9]*.ipynb")) for place in places]
    paths = next((listing for listing in listings if listing), [])
    if not paths:
        raise RunError(f"no notebooks in {places[0]}: run from a clone of casa-mech, which holds them")
    notebooks = [read_notebook(path) for path in paths]
    if not only:
        return notebooks
    for wanted in only:
        if not any(wanted in book.names for book in notebooks):
            raise InputError(f"no notebook '{wanted}'; there are {', '.join(book.name for book in notebooks)}")
    return [book for book in notebooks if set(only) & set(book.names)]


def read_notebook(path: Path) -> Notebook:
    """A notebook with its parameters.

    Raises:
        RunError: unreadable, or without a cell tagged `parameters`.
    """
    try:
        content = nbformat.read(path, as_version=4)
        cell = next(cell for cell in content.cells if TAG in cell.metadata.get("tags", ()))
        return Notebook(path, _assignments(cell.source))
    except StopIteration:
        raise RunError(f"{path} has no cell tagged '{TAG}': restore the file") from None
    except (OSError, ValueError, SyntaxError, nbformat.reader.NotJSONError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read as a notebook ({first}): restore the file") from None


def check_parameters(notebooks: Sequence[Notebook], parameters: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """For each notebook's name, the parameters that it takes, in the type of their defaults.

    A path in one of `PATH_PARAMETERS` that exists from the working directory is made absolute.

    Raises:
        InputError: a parameter that none of the notebooks has (the message names those there are), or a value of
            another type.
    """
    known = {name: type(value) for book in notebooks for name, value in book.parameters.items()}
    values: dict[str, Any] = {}
    for name, value in parameters.items():
        if name not in known:
            raise InputError(f"no notebook parameter '{name}'; there are {', '.join(known)}")
        values[name] = _as_type(name, value, known[name])
        if name in PATH_PARAMETERS:
            values[name] = ",".join(_absolute(path) for path in values[name].split(","))
    return {book.name: {name: value for name, value in values.items() if name in book.parameters} for book in notebooks}


def _absolute(path: str) -> str:
    path = path.strip()
    return os.path.abspath(path) if path and Path(path).exists() else path


def _as_type(name: str, value: object, kind: type) -> Any:
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float) and isinstance(value, str):
            return kind(value)
    except (KeyError, ValueError):
        pass
    raise InputError(f"notebook parameter {name}={value!r} must be of type {kind.__name__}")


def _assignments(source: str) -> dict[str, Any]:
    """Values of the variables that a cell sets, by name."""
    values: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    return values
