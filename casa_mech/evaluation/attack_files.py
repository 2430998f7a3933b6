"""`casa-mech attack`: queries from anywhere under one attack, written as an index with their pictures and clips."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from casa_mech.attacks import (
    PROMPT_SLOTS,
    Speech,
    apply_attack,
    attack_named,
    find_font,
    paired,
    read_prompt,
    read_wrappers,
    wrappers_of,
)
from casa_mech.attacks.fonts import Use
from casa_mech.draws import BENIGN
from casa_mech.errors import InputError
from casa_mech.identity import file_sha256, folder_sha256
from casa_mech.queries import Label, Query
from casa_mech.queries.files import with_columns
from casa_mech.queries.index import read_index, write_index
from casa_mech.queries.media import check_media

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
    """Which queries are attacked."""

    source: str
    """"world" (the micro-world), a benchmark (`name` or `name:split`), a table, a folder of media or an index."""
    n: int | None = None
    """At most so many; None: all, or 100 of the micro-world's."""
    label: Label | None = None
    """Only harmful or benign ones of the micro-world; what rows of a table that bear no label are."""
    column: str | None = None
    """A table's column of prompts."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """A table's columns of what attacks need to know: `Query.meta` key -> column."""
    data: Path | None = None
    """The folder that holds the benchmark."""
    other_labels: Literal["refuse", "leave_out"] = "refuse"
    """As for `QuerySource`."""


@dataclass(frozen=True)
class AttackChoice:
    """The attack and its options."""

    name: str
    """As in `apply_attack`, like `speech` and `picture`."""
    seed: int = 0
    """Of the attack's draws."""
    wrappers: str = "held_out"
    """A split of the shipped jailbreak wrappers, or a file of them."""
    speech: Speech = field(default_factory=Speech)
    picture: Path | None = None
    prompt_file: Path | None = None
    """Published wording of FigStep's or AIAH's text (see `attacks.prompt_file`); None: our own."""
    model: str = "organism"
    """Whose tokenizer counts a prefill."""
    skip_unfit: bool = False
    """Leave out queries that the attack cannot be used on, instead of stopping at the first."""


def write_attacked(
    attack: AttackChoice,
    choice: QueryChoice,
    out: Path,
    counterparts: QueryChoice | None = None,
    note: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Attack the chosen queries and write them, with their media, to `out`; a stopped call continues.

    Args:
        attack: what is done to the queries.
        choice: the queries.
        out: a new or empty folder, or one that this wrote.
        counterparts: benign queries, one for each, that get the same draws; their rows follow their partners'.
        note: gets a line for what was left out, and for a font that stands in for a benchmark's own.
        progress: whether to draw a bar.

    Returns:
        A summary: the attack, how many queries and media were written, how many were made now and left out, and why.

    Raises:
        InputError: a source or an option that cannot be used, or a query that the attack does not fit (unless skipped).
        RunError: `out` holds something else or cannot be written to.
    """
    attack_named(attack.name)
    if attack.name in PROMPT_SLOTS and attack.prompt_file is None:
        note(f"{attack.name}: the text is our own wording of the published one; --prompt-file takes yours")
    if attack.speech.name not in (None, *attack.speech.names):
        raise InputError(f"unknown voice {attack.speech.name!r}; known voices: {', '.join(attack.speech.names)}")
    queries, partners = _chosen(choice, attack.seed, note), {}
    if counterparts is not None:
        data = counterparts.data or choice.data
        counterparts = replace(counterparts, n=len(queries), label="benign", data=data, other_labels="leave_out")
        harmful, benign = paired(queries, _chosen(counterparts, attack.seed, note)[: len(queries)])
        pairs = list(zip(harmful, benign, strict=True))
        partners = {one.id: other for one, other in pairs} | {other.id: one for one, other in pairs}
        queries = [query for pair in pairs for query in pair]
    make = _Maker(attack, partners)
    if attack.name in _FONTS and (font := find_font(_FONTS[attack.name])).note:
        note(font.note)
    made_now = write_index(out, queries, make, key=make.key(queries), progress=_bar if progress else iter)
    written = read_index(out)
    if make.unfit:
        reason, count = make.unfit.most_common(1)[0]
        note(f"left out {sum(make.unfit.values())} queries that {attack.name} does not fit; of {count}: {reason}")
    return _summary(attack.name, out, written, made_now, len(queries))


class _Maker:
    """The attack as a function of one query; with partners, a query whose partner is unfit is left out too."""

    def __init__(self, attack: AttackChoice, partners: Mapping[str, Query]) -> None:
        self.attack, self.partners = attack, partners
        is_file = Path(attack.wrappers).suffix or Path(attack.wrappers).is_file()
        self.wrappers = read_wrappers(attack.wrappers) if is_file else wrappers_of(attack.wrappers)
        self.prompt = read_prompt(attack.prompt_file, attack.name) if attack.prompt_file is not None else None
        self.tokenizer: Any = None
        self.unfit: Counter[str] = Counter()

    def key(self, queries: Sequence[Query]) -> str:
        """All that attacked `queries` depend on, beside the queries; pictures count by their content."""
        pictures = _picture_digests(self.attack.picture, queries) if self.attack.name == "sd-typo" else []
        speech = {name: getattr(self.attack.speech, name) for name in ("name", "speed", "pitch", "snr_db")}
        fonts = [find_font(use).name for use in ("figstep", "typo", "page")]
        model = self.attack.model if self.attack.name.startswith("prefill") else ""
        options = [self.attack.name, self.attack.seed, self.wrappers, speech, pictures, model, fonts, self.prompt]
        return json.dumps([*options, self.attack.skip_unfit])

    def __call__(self, query: Query) -> Query | None:
        try:
            if self.attack.skip_unfit and query.id in self.partners:
                self._attacked(self.partners[query.id])
            return self._attacked(query)
        except InputError as error:
            if not self.attack.skip_unfit:
                raise InputError(_with_options(str(error))) from None
            self.unfit[str(error).replace(repr(query.id), "…")] += 1
            return None

    def _attacked(self, query: Query) -> Query:
        attack = self.attack
        if query.modalities != {"text"}:
            check_media([query])
        if self.tokenizer is None and attack.name.startswith("prefill"):
            self.tokenizer = _tokenizer(attack.model)
        from casa_mech.organism.wording import wording_of

        shared: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "speech": attack.speech,
            "picture": attack.picture,
            "prompt": self.prompt,
        }
        return apply_attack(
            attack.name, [query], attack.seed, wrappers=self.wrappers, wording=wording_of(query), **shared
        )[0]


def _with_options(message: str) -> str:
    """A message about `Query.meta` as one about the option that fills it from a table's column."""
    return re.sub(r"meta\['(\w+)'\]", r"--meta \1=COLUMN", message.replace("set meta[", "give meta["))


def _picture_digests(picture: Path | None, queries: Sequence[Query]) -> list[Any]:
    """Digests of the pictures that `sd-typo` may put above its text: of each file, and of each file of a folder."""
    named = {query.meta["picture_file"] for query in queries if query.meta.get("picture_file")}
    paths = sorted({Path(name) for name in named} | ({picture} if picture else set()))
    return [folder_sha256(path) if path.is_dir() else file_sha256(path) for path in paths if path.exists()]


def _chosen(choice: QueryChoice, seed: int, note: Callable[[str], None]) -> list[Query]:
    """The queries of a choice; `note` gets a line if some were left out."""
    from casa_mech.queries.benchmarks import chosen_source, read_chosen

    if choice.source == WORLD:
        from casa_mech.organism.world import default_world

        draw = seed + BENIGN * (choice.label == "benign")  # the two labels apart, as in the study
        return default_world().requests(choice.n or _WORLD_N, draw, choice.label, templates="held_out")
    fields = {"column": choice.column, "label": choice.label, "other_labels": choice.other_labels}
    loaded = read_chosen(chosen_source(choice.source, choice.data, choice.n, seed, **fields))
    if loaded.dropped:
        note(f"{loaded.name}: left out {len(loaded.dropped)} rows that mention minors in a harmful setting")
    return with_columns(loaded.queries, Path(choice.source), choice.meta) if choice.meta else list(loaded.queries)


def _tokenizer(model: str) -> Any:
    from casa_mech.omni.load import find_checkpoint
    from casa_mech.omni.processor import load_processor

    return load_processor(find_checkpoint(model)).tokenizer


def _summary(name: str, out: Path, written: Sequence[Query], made_now: int, n_queries: int) -> dict[str, Any]:
    kinds = Counter(part.kind for query in written for part in query.parts)
    return {
        "attack": name,
        "out": str(out),
        "queries": len(written),
        "made_now": made_now,
        "left_out": n_queries - len(written),
        "labels": dict(Counter(query.label or "unlabelled" for query in written)),
        "pictures": kinds["image"],
        "clips": kinds["audio"],
        "prompt_wording": sorted({query.meta.get("prompt_wording", "") for query in written} - {""}),
        "fonts": sorted({query.meta["font"] for query in written if "font" in query.meta}),
    }


def _bar(numbers: Iterable[int]) -> Iterable[int]:
    from tqdm import tqdm

    bar: Iterable[int] = tqdm(numbers, desc="attack", unit="part")
    return bar
