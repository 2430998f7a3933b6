"""Replies kept in parts while a run is on, so that one which is killed goes on where it was.

A reply is stored under the digest of all that it depends on: the weights as they are, the settings, and the query with
its media. What is there is never generated again; what another model or other settings made lies beside it, unused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from casa_mech.errors import RunError
from casa_mech.files import storage_error, writing
from casa_mech.identity import digest_of, json_digest, query_digest
from casa_mech.queries import Query, Reply

Generate = Callable[[Sequence[Query], int], list[Reply]]
"""Replies to queries, in their order; the number is the seed of sampling."""
BATCHES_A_PART, LEAST_A_PART = 4, 64
"""Batches in a part, and its least number of queries: a stop loses at most one part, a run makes few files."""
_LOCK = ".lock"


class ReplyParts:
    """A folder of parts.

    Args:
        folder: where they are.
        identity: JSON values that say which system answers, and how.

    Raises:
        RunError: the folder cannot be read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json_digest(dict(identity))
        self._replies: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("part-*.parquet")):
            self._replies |= _read_part(path)

    def collect(
        self, queries: Sequence[Query], generate: Generate, groups: Callable[[Sequence[Query]], Iterator[list[int]]],
        seed: int = 0, progress: bool = False,
    ) -> list[Reply]:  # fmt: skip
        """Replies to all `queries`, in their order; the missing ones are generated and stored, one group at a time.

        Args:
            queries: all of them.
            generate: answers a group.
            groups: cuts queries into groups of similar length. Must not depend on more than their order by length, so
                that what is left after a stop is grouped as it would have been.
            seed: with it and the group's queries each group's own seed is made.
            progress: whether to draw a bar.

        Raises:
            RunError: another process is at work on the folder, or it cannot be written to.
        """
        from tqdm import tqdm

        keys = [digest_of(f"{self._identity}\n{query_digest(query)}") for query in queries]
        missing = [place for place, key in enumerate(keys) if key not in self._replies]
        with (
            self._locked(bool(missing)),
            tqdm(total=len(keys), initial=len(keys) - len(missing), disable=not progress, unit="query") as bar,
        ):
            for group in groups([queries[place] for place in missing]):
                places = [missing[index] for index in group]
                group_keys = [keys[place] for place in places]
                name = digest_of("\n".join(group_keys))
                replies = generate([queries[place] for place in places], (seed + int(name[:12], 16)) % 2**31)
                records = [reply.model_dump(exclude={"attention"}) for reply in replies]
                self._write(name, group_keys, records)
                self._replies |= zip(group_keys, records, strict=True)
                bar.update(len(places))
        return [Reply(**self._replies[key]) for key in keys]

    def _write(self, name: str, keys: list[str], records: list[dict[str, Any]]) -> None:
        with writing(self.folder / f"part-{name[:16]}.parquet") as temporary:
            pd.DataFrame({"key": keys, "reply": [json.dumps(record) for record in records]}).to_parquet(temporary)

    @contextmanager
    def _locked(self, needed: bool) -> Iterator[None]:
        if not needed:
            yield
            return
        lock = FileLock(self.folder / _LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.folder} is in use by another run: wait for it, or choose another --out") from None
        except OSError as error:
            raise storage_error(error, self.folder) from None
        try:
            yield
        finally:
            lock.release()


def _read_part(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table = pd.read_parquet(path)
        return {key: json.loads(text) for key, text in zip(table["key"], table["reply"], strict=True)}
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are of these
        raise RunError(f"{path} is damaged ({type(error).__name__}): remove it, its replies are made again") from None
