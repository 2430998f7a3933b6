"""Tables from files (CSV, TSV, JSON, JSONL, parquet), with one-line errors for what is wrong with them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from casa_mech.errors import InputError, reason_of
from casa_mech.limits import check_text

if TYPE_CHECKING:
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_SEPARATORS: Mapping[str, str] = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_FORMULA = re.compile("'*[-=+@\t\r]")
"""How a text begins that a spreadsheet takes for a formula, also behind an apostrophe that it had before."""


def read_table(path: Path) -> pd.DataFrame:
    """The table in `path`; the cells of CSV and TSV are text. A byte-order mark is passed over.

    Raises:
        InputError: an empty file, another separator than the suffix says, rows longer than the headings, or content
            that is no table of that type; the message names the file.
    """
    suffix = path.suffix.lower()
    _check_file(path)
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; download or export it again")
        if suffix in (".csv", ".tsv"):
            return _separated(path, "," if suffix == ".csv" else "\t")
        if suffix == ".parquet":
            return _from_parquet(path)
        return _records_table(read_json(path), path)
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:  # parser, decoder and Arrow errors are all ValueErrors
        raise unreadable(path, error) from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of `read_table`, each a mapping from column to cell; a `.txt` file gives one row `{"text": line}` each.

    Raises:
        InputError: as `read_table`.
    """
    if path.suffix.lower() == ".txt":
        return [{"text": line} for line in read_lines(path)]
    return cast("list[dict[str, Any]]", read_table(path).to_dict("records"))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        InputError: the file is empty or no UTF-8 text, or a line is too long.
    """
    return [check_text(line, f"{path} line {number}") for number, line in _numbered_lines(path)]


def _check_file(path: Path) -> None:
    """InputError for what is not there, and for a pipe, which would be waited for."""
    if not path.is_file():
        raise InputError(f"{path}: {'this is no file' if path.exists() else 'no such file'}; check the path")


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers in the file, from 1."""
    _check_file(path)
    try:
        lines = [line.rstrip("\r\n") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (ValueError, OSError) as error:
        raise unreadable(path, error) from None
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty; download or export it again")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a `.json` file, or the list of the lines' contents of a `.jsonl` file.

    Raises:
        InputError: no JSON; the message names the file and the place.
    """
    if path.suffix.lower() == ".jsonl":
        return [_parsed_line(path, number, line) for number, line in _numbered_lines(path)]
    _check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise unreadable(path, error) from None


def _parsed_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"line {number} column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        reason = f"line {number}: {reason_of(error)}"
    raise InputError(f"{path}: not a readable jsonl table ({reason}); check the file") from None


class CellError(InputError):
    """A cell that holds no text, or too much of it. The message does not say where it is."""


def cell(value: object) -> str:
    """A cell as text without outer blanks; "" for nothing (None, NaN, NA).

    Raises:
        CellError: a list, mapping or bytes, or a text that `limits.check_text` refuses.
    """
    import pandas as pd

    if isinstance(value, bytes) or not pd.api.types.is_scalar(value):
        raise CellError(f"a cell holds {type(value).__name__}, not text; give one text a row")
    if pd.isna(value):
        return ""
    try:
        return check_text(str(value).strip(), "the cell")
    except InputError as error:
        raise CellError(str(error)) from None


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Errors of cells that are read in a block, with the file and row that they are in."""
    try:
        yield
    except CellError as error:
        raise InputError(f"{where}: {error}") from None


def defused(table: pd.DataFrame) -> pd.DataFrame:
    """`table` for a CSV file: an apostrophe before each text that a spreadsheet would run as a formula."""
    import pandas as pd

    def apart(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value

    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    return table.assign(**{name: table[name].astype(object).map(apart) for name in texts})


def undefused(text: str) -> str:
    """A text of a CSV file that `defused` wrote, as it was before."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def unreadable(path: Path, error: Exception) -> InputError:
    """The one line for a file that is not what its suffix says."""
    reason = reason_of(error)
    hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "check the file"
    return InputError(f"{path}: not a readable {path.suffix.lower()[1:]} table ({reason}); {hint}")


def _from_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
        for name in table:
            if isinstance(table[name].dtype, pd.StringDtype):
                table[name].astype(object)  # texts are decoded late, and broken ones would be met by whoever reads them
    except Exception as error:  # of a broken file pyarrow raises what it likes
        raise unreadable(path, error) from None
    return table


def _separated(path: Path, separator: str) -> pd.DataFrame:
    import pandas as pd

    with path.open(encoding="utf-8-sig") as lines:
        headings = lines.readline()
    others = [other for other in _SEPARATORS if other != separator and other in headings]
    if separator not in headings and others:
        raise InputError(
            f"{path}: its columns are separated by {_SEPARATORS[others[0]]}, but a {path.suffix} file is read with "
            f"{_SEPARATORS[separator]}; save it with commas as .csv, or with tabs as .tsv"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            # Without index_col=False, a row longer than the headings would shift all columns without a word.
            return pd.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
            )
        except pd.errors.ParserWarning:
            raise InputError(
                f"{path}: rows have more cells than there are headings; put cells that hold a separator in quotes"
            ) from None


def _records_table(content: object, path: Path) -> pd.DataFrame:
    import pandas as pd

    if isinstance(content, dict):
        # A mapping with one list of records in it ({"data": [...]}) is as common as a bare list.
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(f"{path}: expected a list of objects, one for each query")
    return pd.DataFrame(cast("list[dict[str, object]]", content))
