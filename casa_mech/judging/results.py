"""The project's one result schema: a tidy table of measured values with intervals, kept as parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa_mech.errors import InputError, RunError
from casa_mech.files import writing
from casa_mech.judging.stats import auroc_interval

if TYPE_CHECKING:
    import pandas as pd

RESULT_COLUMNS = (
    "model", "defense", "attack", "surface", "label", "metric", "seed", "n", "value", "low", "high",
)  # fmt: skip
RESULT_SCHEMA_VERSION = 1
_TEXTS = RESULT_COLUMNS[:6]
_VERSION_KEY = b"casa_mech_result_schema"

Row = dict[str, Any]


def value_row(
    *,
    model: str,
    defense: str,
    attack: str,
    surface: str,
    label: str,
    metric: str,
    seed: int,
    n: int,
    value: float,
    low: float = float("nan"),
    high: float = float("nan"),
) -> Row:
    """One result; `low` and `high` are NaN when the value has no interval. Rates are fractions."""
    numbers = {"seed": int(seed), "n": int(n), "value": float(value), "low": float(low), "high": float(high)}
    texts = {"model": model, "defense": defense, "attack": attack, "surface": surface, "label": label, "metric": metric}
    return {**texts, **numbers}


def auroc_row(
    *,
    model: str,
    defense: str,
    attack: str,
    surface: str,
    metric: str,
    seed: int,
    scores: Sequence[float],
    labels: Sequence[int | bool],
    clusters: Sequence[Any] | None = None,
) -> Row:
    """AUROC of harmful against benign with its cluster-bootstrap interval; `label` is "both"."""
    estimate = auroc_interval(scores, labels, clusters, seed)
    return value_row(
        model=model, defense=defense, attack=attack, surface=surface, label="both", metric=metric, seed=seed,
        n=len(scores), **estimate._asdict(),
    )  # fmt: skip


def result_table(rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """The rows as a frame with the schema's columns, order and types.

    Raises:
        InputError: a column is missing or too many, or a value does not fit; it names the row or column.
    """
    import pandas as pd

    if isinstance(rows, pd.DataFrame):
        frame = rows.copy()
    else:
        listed = [dict(row) for row in rows]
        for place, row in enumerate(listed):
            _check_columns(set(row), f"result row {place}")
        frame = pd.DataFrame(listed, columns=list(RESULT_COLUMNS))
    _check_columns(set(frame.columns), "the result table")
    frame = frame[list(RESULT_COLUMNS)].reset_index(drop=True)
    for column in _TEXTS:
        if not frame[column].map(lambda text: isinstance(text, str) and bool(text)).all():
            raise InputError(f"the result column {column!r} must hold text in every row")
    try:
        frame = frame.astype(dict.fromkeys(_TEXTS, "string"))
        frame = frame.astype({"seed": "int64", "n": "int64", "value": "float64", "low": "float64", "high": "float64"})
    except (TypeError, ValueError) as error:
        raise InputError(f"a result column does not hold numbers: {error}") from error
    if (frame["n"] <= 0).any():
        raise InputError("a result needs n above 0: every row counts the draws behind its value")
    # NaN (no interval) compares false, so only true contradictions are caught; 1e-9 forgives rounding at 0 and 1.
    outside = (frame["value"] < frame["low"] - 1e-9) | (frame["value"] > frame["high"] + 1e-9)
    if outside.any():
        row = frame[outside].iloc[0]
        raise InputError(
            f"result {row['metric']} of {row['model']}: {row['value']} is not between {row['low']}, {row['high']}"
        )
    return frame


def _check_columns(columns: set[str], where: str) -> None:
    missing, extra = set(RESULT_COLUMNS) - columns, columns - set(RESULT_COLUMNS)
    if missing or extra:
        wrong = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        wrong += [f"has {', '.join(sorted(extra))} too many"] if extra else []
        raise InputError(f"{where} {' and '.join(wrong)}; the columns are {', '.join(RESULT_COLUMNS)}")


def write_table(rows: Iterable[Mapping[str, Any]] | pd.DataFrame, path: Path | str) -> Path:
    """The path of `rows`, checked and written as parquet (or CSV, by the name), whole or not at all.

    Raises:
        InputError: as `result_table`, or another suffix. RunError: the place cannot be written to.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path, frame = Path(path), result_table(rows)
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"{path}: result tables are written as .parquet or .csv")
    with writing(path) as temporary:
        if path.suffix == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            table = pa.Table.from_pandas(frame, preserve_index=False)
            version = {_VERSION_KEY: str(RESULT_SCHEMA_VERSION).encode()}
            parquet.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **version}), temporary)
    return path


def read_table(path: Path | str) -> pd.DataFrame:
    """A result table written by `write_table`.

    Raises:
        RunError: it is missing, broken or of another schema.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise RunError(f"no result table at {path}: run the study first, or check the run folder")
    try:
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise RunError(f"{path} is not a readable table ({_first_line(error)}): remove it and run again") from error
    try:
        return result_table(frame)
    except InputError as error:
        raise RunError(f"{path}: {error}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
