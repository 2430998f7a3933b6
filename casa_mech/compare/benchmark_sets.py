"""The columns of a comparison at full size: public sets, each under its attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from casa_mech.attacks import PROMPT_SLOTS, apply_attack, paired, read_prompt
from casa_mech.compare.config import AS_IT_IS, CompareConfig, QuerySection, SetSection
from casa_mech.compare.sets import LABELS, Cell
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.omni.media import check_media
from casa_mech.organism.wording import wording_of
from casa_mech.queries import Label, Query, read_benchmark
from casa_mech.queries.benchmarks import BenchmarkSource
from casa_mech.queries.benchmarks.read import TABLE
from casa_mech.queries.draws import sample
from casa_mech.queries.files import with_columns


@dataclass
class BenchmarkSets:
    """The sets of a configuration."""

    config: CompareConfig
    """The file's content."""
    note: Callable[[str], None] = print
    """Called with what was left out, one line each."""
    _attacked_sets: dict[tuple[str, int], dict[Label, list[Query]]] = field(
        default_factory=dict, init=False, repr=False
    )

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
        """The queries of one column, read and attacked on the first call.

        Raises:
            InputError: a set that cannot be read, or a query that the attack cannot be used on; it names the set.
        """
        key = cell.attack, seed
        if key not in self._attacked_sets:
            # Media are large, and a grid goes through the seeds one by one.
            self._attacked_sets = {old: sets for old, sets in self._attacked_sets.items() if old[1] == seed}
            (plan,) = (plan for plan in self.config.sets if plan.name == cell.attack)
            try:
                self._attacked_sets[key] = self._attacked(plan, seed, omni)
            except InputError as error:
                raise InputError(f"set {plan.name!r}: {error}") from None
        return self._attacked_sets[key][cell.label]

    def _attacked(self, plan: SetSection, seed: int, omni: Omni) -> dict[Label, list[Query]]:
        queries = {label: self._read(plan.name, source, label, seed) for label, source in _sources(plan).items()}
        if len(queries) == 2 and len(queries["harmful"]) == len(queries["benign"]):
            queries["harmful"], queries["benign"] = paired(queries["harmful"], queries["benign"])
        return {label: self._under(plan, of_label, seed, omni) for label, of_label in queries.items()}

    def _read(self, name: str, source: QuerySection, label: Label, seed: int) -> list[Query]:
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

    def _under(self, plan: SetSection, queries: list[Query], seed: int, omni: Omni) -> list[Query]:
        attacked: list[Query] = []
        reasons: list[str] = []
        prompt = None if plan.prompt_file is None else read_prompt(plan.prompt_file, plan.attack)
        if prompt is None and plan.attack in PROMPT_SLOTS:
            self.note(
                f"{plan.name}: the text of {plan.attack} is our own wording (prompt_file takes the published one)"
            )
        for query in queries:
            try:
                attacked.append(_apply(plan, query, seed, omni, prompt))
            except InputError as error:
                if not plan.skip_unfit:
                    raise InputError(f"{error} (or set skip_unfit: true)") from None
                reasons.append(str(error))
        if reasons:
            self.note(f"{plan.name}: left out {len(reasons)} queries that {plan.attack} does not fit: {reasons[0]}")
        if not attacked:
            raise InputError(f"{plan.attack} fits none of its {len(queries)} queries: {reasons[0]}")
        check_media(attacked)
        return attacked


def _sources(plan: SetSection) -> Mapping[Label, QuerySection]:
    return {label: source for label in LABELS if (source := getattr(plan, label)) is not None}


def _apply(plan: SetSection, query: Query, seed: int, omni: Omni, prompt: str | None) -> Query:
    if plan.attack != AS_IT_IS:
        (query,) = apply_attack(
            plan.attack, [query], seed, tokenizer=omni.tokenizer, wrappers=plan.wrappers, picture=plan.picture,
            wording=wording_of(query), prompt=prompt,
        )  # fmt: skip
    return query.model_copy(update={"meta": {"surface": query.surface, **query.meta, "attack": plan.name}})
