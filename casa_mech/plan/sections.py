"""The sections of a plan or comparison read: queries of one label from a set, and an attack on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from casa_mech.attacks import PROMPT_SLOTS, apply_attack, read_prompt
from casa_mech.errors import InputError
from casa_mech.organism.wording import wording_of
from casa_mech.plan.records import AS_IT_IS, AttackSection, QuerySection
from casa_mech.queries import Label, Query, read_benchmark
from casa_mech.queries.benchmarks import BenchmarkSource
from casa_mech.queries.benchmarks.read import TABLE
from casa_mech.queries.draws import sample
from casa_mech.queries.files import with_columns
from casa_mech.queries.media import check_media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Note = Callable[[str], None]


def read_section(
    section: QuerySection,
    label: Label,
    data: Path | None,
    seed: int = 0,
    note: Note = lambda line: None,
    name: str = "",
) -> list[Query]:
    """The section's queries of a label.

    Args:
        section: where they are.
        label: of those that are kept; a table without labels has it on all rows.
        data: the folder of the public sets.
        seed: of the draw where the section has a limit.
        note: called with what was left out, one line each.
        name: what the lines call the set.

    Raises:
        InputError: a set that cannot be read, or holds no query of the label.
    """
    fields = {**section.columns, "label": label, "other_labels": "leave_out"} if section.set == TABLE else None
    shared = None if section.set == TABLE else BenchmarkSource(section.set, data=data).place
    reading = read_benchmark(
        section.set, section.path or shared, section.split, None, seed, missing_media=section.missing_media,
        columns=fields,
    )  # fmt: skip
    name = name or section.title
    if reading.dropped:
        note(f"{name}: left out {len(reading.dropped)} rows that mention minors in a harmful setting")
    if reading.without_media:
        note(f"{name}: {reading.without_media} queries have no picture, only their text")
    queries = [query for query in reading.queries if query.label == label]
    if section.meta:
        queries = with_columns(queries, Path(str(section.path)), section.meta)
    if not queries:
        raise InputError(f"{label}: {section.title} holds no {label} query")
    return sample(queries, section.limit, seed)


def under_attack(
    options: AttackSection,
    name: str,
    attack: str,
    queries: Sequence[Query],
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
    note: Note = lambda line: None,
) -> list[Query]:
    """`queries` under `attack`, their `meta["attack"]` the column's `name`.

    Raises:
        InputError: a query that the attack cannot be used on (with `skip_unfit` it is left out and noted), or none that
            it can, or a picture or clip that cannot be read.
    """
    attacked: list[Query] = []
    reasons: list[str] = []
    prompt = None
    if attack in PROMPT_SLOTS:
        prompt = None if options.prompt_file is None else read_prompt(options.prompt_file, attack)
        if prompt is None:
            note(f"{name}: the text of {attack} is our own wording (prompt_file takes the published one)")
    for query in queries:
        try:
            if attack != AS_IT_IS:
                (query,) = apply_attack(
                    attack, [query], seed, tokenizer=tokenizer, wrappers=options.wrappers, picture=options.picture,
                    wording=wording_of(query), prompt=prompt,
                )  # fmt: skip
            attacked.append(query.model_copy(update={"meta": {"surface": query.surface, **query.meta, "attack": name}}))
        except InputError as error:
            if not options.skip_unfit:
                raise InputError(f"{error} (or set skip_unfit: true)") from None
            reasons.append(str(error))
    if reasons:
        note(f"{name}: left out {len(reasons)} queries that {attack} does not fit: {reasons[0]}")
    if not attacked:
        raise InputError(f"{attack} fits none of its {len(queries)} queries: {reasons[0] if reasons else 'none given'}")
    check_media(attacked)
    return attacked
