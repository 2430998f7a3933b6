"""The notebooks: where they are, and their parameters, checked before any kernel starts."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from casa_mech.errors import InputError, RunError
from casa_mech.study.settings import CLONE

TAG = "parameters"


@dataclass(frozen=True)
class Notebook:
    """A notebook file and the defaults of its parameters, by name."""

    path: Path
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name without its suffix, such as `02_casa_training`."""
        return self.path.stem


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
    chosen: list[Notebook] = []
    for wanted in only:
        found = [book for book in notebooks if wanted in (book.name, *book.name.split("_", 1))]
        if not found:
            raise InputError(f"no notebook '{wanted}'; there are {', '.join(book.name for book in notebooks)}")
        chosen += [book for book in found if book not in chosen]
    return sorted(chosen, key=lambda book: book.name)


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


def check_parameters(notebooks: Sequence[Notebook], given: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """For each notebook's name, the given parameters that it takes, in the type of their defaults.

    Raises:
        InputError: a parameter that no chosen notebook has (the message names those there are), or a value of
            another type.
    """
    known = {name: type(value) for book in notebooks for name, value in book.parameters.items()}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"no notebook parameter '{name}'; there are {', '.join(known)}")
        values[name] = _as_type(name, value, known[name])
    return {book.name: {name: value for name, value in values.items() if name in book.parameters} for book in notebooks}


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
    found: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found
