"""`casa-mech attack`: queries from anywhere under one attack, written as an index with their pictures and clips."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from casa_mech.attacks import Speech, apply_attack, attack_named, find_font, paired, read_wrappers, wrappers_of
from casa_mech.attacks.fonts import Use
from casa_mech.draws import BENIGN
from casa_mech.errors import InputError
from casa_mech.identity import file_sha256, folder_sha256
from casa_mech.queries import Label, Query
from casa_mech.queries.files import with_columns
from casa_mech.queries.index import read_index, write_index

WORLD = "world"
_WORLD_N = 100
_FONTS: Mapping[str, Use] = {
    "figstep": "figstep",
    "typo": "typo",
    "sd-typo": "typo",
    "split": "typo",
    "rendered": "page",
}


@dataclass(frozen=True)
class QueryChoice:
    """Which queries are attacked.

    source: "world" (the micro-world), a benchmark (`name` or `name:split`), a table, a folder of media or an index.
    n: at most so many (the micro-world: 100 unless given). label: only harmful or benign ones of the micro-world; what
    the rows of a table are. column, meta: a table's column of prompts, and of what attacks need to know (`Query.meta`
    key -> column). data: the folder that holds the benchmark. other_labels: as for `QuerySource`.
    """

    source: str
    n: int | None = None
    label: Label | None = None
    column: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    other_labels: Literal["refuse", "leave_out"] = "refuse"


@dataclass(frozen=True)
class AttackChoice:
    """The attack and its options. wrappers: a split of ours or a file. model: whose tokenizer counts a prefill.

    skip_unfit: leave out queries that the attack cannot be used on, instead of stopping at the first.
    """

    name: str
    seed: int = 0
    wrappers: str = "held_out"
    speech: Speech = field(default_factory=Speech)
    picture: Path | None = None
    model: str = "organism"
    skip_unfit: bool = False


def write_attacked(
    attack: AttackChoice,
    choice: QueryChoice,
    out: Path,
    twins: QueryChoice | None = None,
    note: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Attack the chosen queries and write them, with their media, to `out`; a stopped call continues.

    Args:
        attack: what is done to them. choice: the queries. out: a new or empty folder, or one that this wrote.
        twins: benign queries, one for each, that get the same draws (their rows follow their partners').
        note: told what was left out and which font stood in, one line each.
        progress: whether to draw a bar.

    Returns:
        A summary: the attack, how many queries and media were written, how many were made now and left out, and why.

    Raises:
        InputError: a source or an option that cannot be used, or a query that the attack does not fit (unless skipped).
        RunError: `out` holds something else or cannot be written to.
    """
    attack_named(attack.name)
    if attack.speech.name not in (None, *attack.speech.names):
        raise InputError(f"unknown voice {attack.speech.name!r}; known voices: {', '.join(attack.speech.names)}")
    queries, partners = _chosen(choice, attack.seed, note), {}
    if twins is not None:
        benign = _chosen(_of_number(twins, len(queries), choice), attack.seed, note)[: len(queries)]
        first, second = paired(queries, benign)
        partners = {one.id: two for one, two in zip(first, second, strict=True)}
        partners |= {two.id: one for one, two in zip(first, second, strict=True)}
        queries = [query for pair in zip(first, second, strict=True) for query in pair]
    make = _Maker(attack, partners)
    if attack.name in _FONTS and (font := find_font(_FONTS[attack.name])).note:
        note(font.note)
    made = write_index(out, queries, make, key=make.key(queries), progress=_bar if progress else iter)
    written = read_index(out)
    if make.unfit:
        reason, count = make.unfit.most_common(1)[0]
        note(f"left out {sum(make.unfit.values())} queries that {attack.name} does not fit; of {count}: {reason}")
    return _summary(attack.name, out, written, made, len(queries))


class _Maker:
    """The attack as a function of one query; with partners, a query whose partner is unfit is left out too."""

    def __init__(self, attack: AttackChoice, partners: Mapping[str, Query]) -> None:
        self.attack, self.partners = attack, partners
        own_file = Path(attack.wrappers).suffix or Path(attack.wrappers).is_file()
        self.wrappers = read_wrappers(attack.wrappers) if own_file else wrappers_of(attack.wrappers)
        self.tokenizer: Any = None
        self.unfit: Counter[str] = Counter()

    def key(self, queries: Sequence[Query]) -> str:
        """All that attacked `queries` depend on, beside the queries; pictures count by their content."""
        pictures = _picture_digests(self.attack.picture, queries) if self.attack.name == "sd-typo" else []
        speech = {name: getattr(self.attack.speech, name) for name in ("name", "speed", "pitch", "snr_db")}
        fonts = [find_font(use).name for use in ("figstep", "typo", "page")]
        model = self.attack.model if self.attack.name.startswith("prefill") else ""
        own = [self.attack.name, self.attack.seed, self.wrappers, speech, pictures, model, fonts]
        return json.dumps([*own, self.attack.skip_unfit])

    def __call__(self, query: Query) -> Query | None:
        try:
            if self.attack.skip_unfit and query.id in self.partners:
                self._attacked(self.partners[query.id])
            return self._attacked(query)
        except InputError as error:
            if not self.attack.skip_unfit:
                hint = " (a table's column: --meta KEY=COLUMN)" if "set meta[" in str(error) else ""
                raise InputError(f"{error}{hint}") from None
            self.unfit[str(error).replace(repr(query.id), "…")] += 1
            return None

    def _attacked(self, query: Query) -> Query:
        attack = self.attack
        if query.modalities != {"text"}:
            from casa_mech.evaluation.evaluate import check_media

            check_media([query])
        if self.tokenizer is None and attack.name.startswith("prefill"):
            self.tokenizer = _tokenizer(attack.model)
        from casa_mech.organism.wording import wording_of

        shared: dict[str, Any] = {"tokenizer": self.tokenizer, "speech": attack.speech, "picture": attack.picture}
        return apply_attack(
            attack.name, [query], attack.seed, wrappers=self.wrappers, wording=wording_of(query), **shared
        )[0]


def _picture_digests(picture: Path | None, queries: Sequence[Query]) -> list[Any]:
    """What `sd-typo` may put above its text: the content of each file, and of each file of a folder."""
    named = {query.meta["picture_file"] for query in queries if query.meta.get("picture_file")}
    paths = sorted({Path(name) for name in named} | ({picture} if picture else set()))
    return [folder_sha256(path) if path.is_dir() else file_sha256(path) for path in paths if path.exists()]


def _chosen(choice: QueryChoice, seed: int, note: Callable[[str], None]) -> list[Query]:
    from casa_mech.queries.benchmarks import chosen_source, read_chosen

    if choice.source == WORLD:
        from casa_mech.organism.world import default_world

        drawn = seed + BENIGN * (choice.label == "benign")  # the two labels apart, as in the study
        return default_world().requests(choice.n or _WORLD_N, drawn, choice.label, templates="held_out")
    fields = {"column": choice.column, "label": choice.label, "other_labels": choice.other_labels}
    reading = read_chosen(chosen_source(choice.source, choice.data, choice.n, seed, **fields))
    if reading.dropped:
        note(f"{reading.name}: left out {len(reading.dropped)} rows that mention minors in a harmful setting")
    if not choice.meta:
        return list(reading.queries)
    return with_columns(reading.queries, Path(choice.source), choice.meta)


def _of_number(twins: QueryChoice, n: int, choice: QueryChoice) -> QueryChoice:
    label = twins.label or "benign"
    return replace(twins, n=n, label=label, data=twins.data or choice.data, other_labels="leave_out")


def _tokenizer(model: str) -> Any:
    from casa_mech.omni.load import find_checkpoint
    from casa_mech.omni.processor import load_processor

    return load_processor(find_checkpoint(model)).tokenizer


def _summary(name: str, out: Path, written: Sequence[Query], made: int, asked: int) -> dict[str, Any]:
    kinds = Counter(part.kind for query in written for part in query.parts)
    return {
        "attack": name,
        "out": str(out),
        "queries": len(written),
        "made_now": made,
        "left_out": asked - len(written),
        "labels": dict(Counter(query.label or "unlabelled" for query in written)),
        "pictures": kinds["image"],
        "clips": kinds["audio"],
        "fonts": sorted({query.meta["font"] for query in written if "font" in query.meta}),
    }


def _bar(numbers: Iterable[int]) -> Iterable[int]:
    from tqdm import tqdm

    found: Iterable[int] = tqdm(numbers, desc="attack", unit="part")
    return found
