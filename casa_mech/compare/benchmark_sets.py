"""The columns of a comparison at full size: public sets, each under its attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from casa_mech.attacks import paired
from casa_mech.compare.config import CompareConfig, SetSection
from casa_mech.compare.sets import LABELS, Cell
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.plan.records import QuerySection
from casa_mech.plan.sections import read_section, under_attack
from casa_mech.queries import Label, Query


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
        queries = {
            label: read_section(source, label, self.config.data, seed, self.note, plan.name)
            for label, source in _sources(plan).items()
        }
        if len(queries) == 2 and len(queries["harmful"]) == len(queries["benign"]):
            queries["harmful"], queries["benign"] = paired(queries["harmful"], queries["benign"])
        return {
            label: under_attack(plan, plan.name, plan.attack, of_label, seed, omni.tokenizer, self.note)
            for label, of_label in queries.items()
        }


def _sources(plan: SetSection) -> Mapping[Label, QuerySection]:
    return {label: source for label in LABELS if (source := getattr(plan, label)) is not None}
