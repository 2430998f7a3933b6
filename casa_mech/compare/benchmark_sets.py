"""The columns of a comparison at full size: public sets, each under its attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from casa_mech.attacks import apply_attack, paired
from casa_mech.compare.config import AS_IT_IS, CompareConfig, SetPlan, Source
from casa_mech.compare.sets import LABELS, Cell
from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import check_media
from casa_mech.omni import Omni
from casa_mech.organism.wording import wording_of
from casa_mech.queries import Label, Query, read_benchmark
from casa_mech.queries.benchmarks import BenchmarkSource
from casa_mech.queries.benchmarks.read import TABLE
from casa_mech.queries.draws import sample
from casa_mech.queries.files import with_columns


@dataclass
class BenchmarkSets:
    """The sets of a configuration.

    config: the file's content. note: told what was left out, one line each.
    """

    config: CompareConfig
    note: Callable[[str], None] = print
    _made: dict[tuple[str, int], dict[Label, list[Query]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def micro_world(self) -> bool:
        """Never."""
        return False

    def cells(self) -> list[Cell]:
        """The harmful and the benign column of each set that has them."""
        return [
            Cell(plan.name, label) for plan in self.config.sets for label in LABELS if getattr(plan, label) is not None
        ]

    def queries(self, cell: Cell, seed: int, omni: Omni) -> list[Query]:
        """The queries of one column, read and attacked when they are first asked for.

        Raises:
            InputError: a set that cannot be read, or a query that the attack cannot be used on; it names the set.
        """
        wanted = cell.attack, seed
        if wanted not in self._made:
            self._made = {known: made for known, made in self._made.items() if known[1] == seed}
            (plan,) = (plan for plan in self.config.sets if plan.name == cell.attack)
            try:
                self._made[wanted] = self._attacked(plan, seed, omni)
            except InputError as error:
                raise InputError(f"set {plan.name!r}: {error}") from None
        return self._made[wanted][cell.label]

    def _attacked(self, plan: SetPlan, seed: int, omni: Omni) -> dict[Label, list[Query]]:
        read = {label: self._read(plan.name, source, label, seed) for label, source in _sources(plan).items()}
        if len(read) == 2 and len(read["harmful"]) == len(read["benign"]):
            read["harmful"], read["benign"] = paired(read["harmful"], read["benign"])
        return {label: self._under(plan, queries, seed, omni) for label, queries in read.items()}

    def _read(self, name: str, source: Source, label: Label, seed: int) -> list[Query]:
        fields = {**source.columns, "label": label, "other_labels": "leave_out"} if source.set == TABLE else None
        shared = None if source.set == TABLE else BenchmarkSource(source.set, data=self.config.data).place
        reading = read_benchmark(
            source.set, source.path or shared, source.split, None, seed, missing_media=source.missing_media,
            columns=fields,
        )  # fmt: skip
        if reading.dropped:
            self.note(f"{name}: left out {len(reading.dropped)} rows that mention minors in a harmful setting")
        if reading.without_media:
            self.note(f"{name}: {reading.without_media} queries have no picture, only their text")
        queries = [query for query in reading.queries if query.label == label]
        if source.meta:
            queries = with_columns(queries, Path(str(source.path)), source.meta)
        if not queries:
            raise InputError(f"{label}: {source.set} holds no {label} query")
        return sample(queries, source.limit, seed)

    def _under(self, plan: SetPlan, queries: list[Query], seed: int, omni: Omni) -> list[Query]:
        kept: list[Query] = []
        reasons: list[str] = []
        for query in queries:
            try:
                kept.append(_apply(plan, query, seed, omni))
            except InputError as error:
                if not plan.skip_unfit:
                    raise InputError(f"{error} (or set skip_unfit: true)") from None
                reasons.append(str(error))
        if reasons:
            self.note(f"{plan.name}: left out {len(reasons)} queries that {plan.attack} does not fit: {reasons[0]}")
        if not kept:
            raise InputError(f"{plan.attack} fits none of its {len(queries)} queries: {reasons[0]}")
        check_media(kept)
        return kept


def _sources(plan: SetPlan) -> Mapping[Label, Source]:
    return {label: source for label in LABELS if (source := getattr(plan, label)) is not None}


def _apply(plan: SetPlan, query: Query, seed: int, omni: Omni) -> Query:
    if plan.attack != AS_IT_IS:
        (query,) = apply_attack(
            plan.attack, [query], seed, tokenizer=omni.tokenizer, wrappers=plan.wrappers, picture=plan.picture,
            wording=wording_of(query),
        )  # fmt: skip
    return query.model_copy(update={"meta": {"surface": query.surface, **query.meta, "attack": plan.name}})
