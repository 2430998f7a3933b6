"""The files of an activation store: safetensors shards beside parquet indexes.

A shard and its index have one number. The shard is written first and the index last, each whole or not at all, so a
shard counts from the moment its index is there; what a killed run left without one is written over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from casa_mech.errors import RunError
from casa_mech.files import write_text, writing
from casa_mech.identity import SHORT, digest_of

FORMAT = 3
"""3: a query without a topic has its request for one; in 2 it had none, and in 1 files were known by their path."""
ABOUT, SHARDS, INDEX, QUERIES = "store.json", "shards", "index", "queries.parquet"
_KEY = ["query_id", "digest"]


def write_about(root: Path, about: Mapping[str, Any]) -> None:
    """Write `store.json`."""
    write_text(root / ABOUT, json.dumps({"format": FORMAT, **about}, indent=2) + "\n")


def read_about(root: Path) -> dict[str, Any]:
    """The content of `store.json`.

    Raises:
        RunError: no store there, or one of another format.
    """
    try:
        about = dict(json.loads((root / ABOUT).read_text(encoding="utf-8")))
        version = about["format"]
    except FileNotFoundError:
        raise RunError(f"{root} is no activation store: it has no {ABOUT}; collect into it first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{root / ABOUT} is unreadable ({type(error).__name__}): delete the store, collect again"
        ) from None
    if version != FORMAT:
        raise RunError(f"{root} is an activation store of format {version}, this release reads {FORMAT}: collect again")
    return about


def write_orders(root: Path, order_of: Mapping[tuple[str, str], int]) -> None:
    """Write down the place in the store of each query, by its id and digest."""
    table = pd.DataFrame([*order_of], columns=_KEY).assign(order=list(order_of.values()))
    with writing(root / QUERIES) as temporary:
        table.to_parquet(temporary, index=False)


def read_orders(root: Path, index: pd.DataFrame) -> dict[tuple[str, str], int]:
    """What `write_orders` wrote; for a store of a release before it, what its `index` says.

    Raises:
        RunError: the file is unreadable.
    """
    path, table = root / QUERIES, index
    if path.is_file():
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is unreadable ({_first(error)}): delete the store, collect again") from None
    if not len(table):
        return {}
    keys = zip(table["query_id"], table["digest"], strict=True)
    return {key: int(order) for key, order in zip(keys, table["order"], strict=True)}


def write_shard(root: Path, number: int, states: Mapping[str, Tensor], rows: pd.DataFrame) -> None:
    """Write shard `number`: `states` [row, ...] by site, and beside them `rows`, the index, one for each vector."""
    # One entry: safetensors writes several in an order that differs from call to call.
    metadata = {"order": _order(rows)}
    with writing(_shard(root, number)) as temporary:
        save_file({site: value.contiguous() for site, value in states.items()}, temporary, metadata=metadata)
    with writing(_index(root, number)) as temporary:
        rows.to_parquet(temporary, index=False)


def read_index(root: Path, sites: list[str]) -> pd.DataFrame:
    """The rows of all shards, in the order of collection, checked against the shards' own headers.

    Raises:
        RunError: a shard is missing, cut short or unreadable, or holds other rows or sites than its index says.
    """
    tables = []
    for path in sorted((root / INDEX).glob("[0-9]*.parquet")):
        try:
            rows = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise _refused(path, f"is unreadable ({_first(error)})") from None
        _check(root, int(path.stem), rows, sites)
        tables.append(rows)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def shard_tensor(root: Path, number: int, site: str) -> Tensor:
    """A site's vectors [row, ...] in a shard, mapped from the file: only what is touched is read.

    Raises:
        RunError: the shard is missing, cut short or unreadable.
    """
    with _opened(_shard(root, number)) as shard:
        return shard.get_tensor(site)


def next_shard(root: Path) -> int:
    """The number of the shard to be written next."""
    return 1 + max((int(path.stem) for path in (root / INDEX).glob("[0-9]*.parquet")), default=-1)


def _check(root: Path, number: int, rows: pd.DataFrame, sites: list[str]) -> None:
    path = _shard(root, number)
    if not {"query_id", "position", "at", "shard", "row"} <= set(rows.columns):
        raise _refused(_index(root, number), "lacks columns of an activation store")
    with _opened(path) as shard:
        stored = set(shard.keys())
        if stored != set(sites):
            raise _refused(path, f"holds the sites {_list(stored)}, the store {_list(set(sites))}")
        lengths = {shard.get_slice(site).get_shape()[0] for site in stored}
        metadata = shard.metadata() or {}
    if lengths != {len(rows)}:
        raise _refused(path, f"holds {_list({str(length) for length in lengths})} vectors, its index {len(rows)} rows")
    if metadata.get("order") != _order(rows):
        raise _refused(path, "holds the vectors of other queries or positions than its index names")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise _refused(path, "is missing, and the index names it") from None
    except (SafetensorError, OSError) as error:
        raise _refused(path, f"is cut short or unreadable ({_first(error)})") from None


def _refused(path: Path, reason: str) -> RunError:
    number = path.stem
    return RunError(
        f"{path} {reason}: delete shard {number} from {SHARDS}/ and {INDEX}/ and collect again, which fills the gap"
    )


def _order(rows: pd.DataFrame) -> str:
    """A digest of which vector is where."""
    lines = rows["query_id"].astype(str) + "\t" + rows["position"].astype(str) + "\t" + rows["at"].astype(str)
    return digest_of("\n".join(lines))[:SHORT]


def _shard(root: Path, number: int) -> Path:
    return root / SHARDS / f"{number:05d}.safetensors"


def _index(root: Path, number: int) -> Path:
    return root / INDEX / f"{number:05d}.parquet"


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
