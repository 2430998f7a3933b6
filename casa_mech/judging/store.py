"""Verdicts kept on disk under all that they depend on, and `judge_all`, which gets those that are not there yet."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from casa_mech.errors import InputError, RunError
from casa_mech.files import reading_error, storage_error
from casa_mech.identity import SHORT, json_digest
from casa_mech.judging.verdict import (
    Judge,
    JudgeDown,
    Outcome,
    Pair,
    StreamingJudge,
    Verdict,
    judge_identity,
    reply_text,
    request_text,
)
from casa_mech.queries import Query, Reply

_READ_META = ("topic", "compliance", "answer")


def verdict_key(judge: Judge, query: Query, reply: Reply | str) -> str:
    """SHA-256 of all that a verdict depends on: the judge, what it reads of the query, the prefill and the reply.

    The query's id, label and attack are not part of it: the same words get the same verdict, made once.
    """
    read = {name: query.meta[name] for name in _READ_META if name in query.meta}
    content = [judge_identity(judge), request_text(query), query.prefill, reply_text(reply), read]
    return json_digest(content)


class _Line(BaseModel):
    """One line of the file, which says by `check` that nobody changed it since."""

    model_config = ConfigDict(extra="forbid")

    key: str
    judge: str
    outcome: Outcome
    score: float | None = None
    reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    check: str = ""
    """Digest of the other fields; "" on lines of earlier releases."""

    def digest(self) -> str:
        """What `check` has to be."""
        return json_digest(self.model_dump(exclude={"check"}))[:SHORT]


class VerdictStore:
    """Verdicts in a JSONL file, or in memory with `path=None`. Each is on the disk as soon as it is added.

    A process killed while writing leaves at most a broken last line, which is dropped; a broken line elsewhere means a
    damaged file.

    Raises:
        RunError: the file cannot be read or written, or is damaged.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, key: str, query_id: str) -> Verdict | None:
        """The verdict stored under `key`, given to `query_id`; None where there is none."""
        line = self._lines.get(key)
        return None if line is None else Verdict(query_id=query_id, **line.model_dump(exclude={"key", "check"}))

    def add(self, key: str, verdict: Verdict) -> None:
        """Store a verdict; it takes the place of an earlier one under the same key."""
        line = _Line(key=key, **verdict.model_dump(exclude={"query_id"}))
        line.check = line.digest()
        with self._lock:
            self._lines[key] = line
            if self.path is not None:
                self._append(self.path, line.model_dump_json() + "\n")

    def _append(self, path: Path, line: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise storage_error(error, path) from None

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise reading_error(error, path) from None
        whole, _, cut = content.rpartition(b"\n")
        for number, text in enumerate(whole.split(b"\n") if whole else (), start=1):
            try:
                line = _Line.model_validate_json(text)
            except ValidationError:
                raise RunError(f"{path} line {number} is no stored verdict: remove the line, or the file") from None
            if line.check and line.check != line.digest():
                raise RunError(
                    f"{path} line {number} was changed since the judge gave its verdict: remove the line, and it is "
                    "judged again"
                )
            self._lines[line.key] = line
        if cut:
            os.truncate(path, len(content) - len(cut))


def judge_all(
    judge: Judge,
    queries: Sequence[Query],
    replies: Sequence[Reply | str],
    store: VerdictStore | Path | str | None = None,
    *,
    retry_undecided: bool = False,
    progress: bool = False,
) -> list[Verdict]:
    """The verdicts on `replies`, in their order; those that the store holds are not made again.

    Args:
        judge: any judge; one that is a `StreamingJudge` gets all replies that are missing at once.
        queries, replies: as many of each.
        store: where verdicts are kept, or the path of such a file; None: nothing is kept.
        retry_undecided: judge again where the stored verdict is `undecided`.
        progress: whether to draw a bar.

    Raises:
        InputError: another number of replies than of queries, or a query that the judge cannot read.
        RunError: the judge is down; the message says how many verdicts are kept, and the same call continues.
    """
    if len(queries) != len(replies):
        raise InputError(f"{len(queries)} queries but {len(replies)} replies: give one reply a query")
    verdicts = store if isinstance(store, VerdictStore) else VerdictStore(store)
    keys = [verdict_key(judge, query, reply) for query, reply in zip(queries, replies, strict=True)]
    missing = {key: place for place, key in enumerate(keys) if _is_missing(verdicts.get(key, ""), retry_undecided)}
    pairs: list[Pair] = [(queries[place], replies[place]) for place in missing.values()]
    missing_keys = list(missing)
    from tqdm import tqdm

    with tqdm(total=len(pairs), desc=f"judge {judge.name}", unit="reply", disable=not progress) as bar:
        done = 0
        try:
            for place, verdict in _stream(judge, pairs):
                verdicts.add(missing_keys[place], verdict)
                done += 1
                bar.update()
        except JudgeDown as error:
            path = verdicts.path
            way_out = f"the same command continues from {path}" if path else "give a store to keep them"
            problem = f"{error} ({len(missing_keys) - done} of {len(keys)} replies are not judged; {way_out})"
        else:
            problem = ""
    if problem:
        raise RunError(problem)
    of_replies = [verdicts.get(key, query.id) for key, query in zip(keys, queries, strict=True)]
    return [verdict for verdict in of_replies if verdict is not None]


def _is_missing(stored: Verdict | None, retry_undecided: bool) -> bool:
    return stored is None or (retry_undecided and not stored.decided)


def _stream(judge: Judge, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
    if isinstance(judge, StreamingJudge):
        yield from judge.judge_stream(pairs)
        return
    for place, (query, reply) in enumerate(pairs):
        yield place, judge.judge(query, reply)


def stored_tokens(verdicts: Sequence[Verdict]) -> Mapping[str, Any]:
    """Tokens behind the verdicts, those of earlier runs included: `input_tokens`, `output_tokens`."""
    return {
        "input_tokens": sum(verdict.input_tokens for verdict in verdicts),
        "output_tokens": sum(verdict.output_tokens for verdict in verdicts),
    }
