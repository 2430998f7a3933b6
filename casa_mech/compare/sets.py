"""The columns of a comparison: attacks on matched pairs of requests of the micro-world, or on sets of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from casa_mech.attacks import STUDY_ATTACKS, apply_to_pairs, attack_named
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.organism.wording import MICRO_WORLD
from casa_mech.organism.world import default_world
from casa_mech.plan import StudyData
from casa_mech.queries import Label, Query

DEFAULT_ATTACKS = (*STUDY_ATTACKS, "multi-turn", "split")
LABELS: tuple[Label, ...] = ("harmful", "benign")


@dataclass(frozen=True)
class Cell:
    """One column: requests of one label under one attack."""

    attack: str
    """The attack's name, or that of a set."""
    label: Label
    """Of the requests."""


class QuerySets(Protocol):
    """Where the queries of a comparison come from."""

    @property
    def micro_world(self) -> bool:
        """True where the exact judge can judge the replies."""
        ...

    def cells(self) -> list[Cell]:
        """The columns, in their order."""
        ...

    def queries(self, cell: Cell, seed: int, omni: Omni) -> list[Query]:
        """The queries of one column; their `meta["attack"]` is its name."""
        ...


@dataclass
class WorldSets:
    """Matched pairs of requests in held-out phrasings on all topics.

    The harmful and the benign one of a pair have the same wording, and get the same draws of every attack.
    """

    attacks: Sequence[str] = DEFAULT_ATTACKS
    """Which attacks, by name."""
    n: int = 200
    """Requests of each label."""
    _attacked: dict[tuple[str, int], tuple[list[Query], list[Query]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if not self.attacks or self.n < 1:
            raise InputError("a comparison needs at least one attack and one request (--attacks, --n)")
        for name in self.attacks:
            attack_named(name)
        twice = next((name for name in self.attacks if list(self.attacks).count(name) > 1), None)
        if twice is not None:
            raise InputError(f"the attack {twice!r} is named twice")

    @property
    def micro_world(self) -> bool:
        """Always."""
        return True

    def cells(self) -> list[Cell]:
        """Every attack on harmful and on benign requests."""
        return [Cell(attack, label) for attack in self.attacks for label in LABELS]

    def queries(self, cell: Cell, seed: int, omni: Omni) -> list[Query]:
        """The requests of one column."""
        key = cell.attack, seed
        if key not in self._attacked:
            # Clips are large, and a grid goes through the seeds one by one.
            self._attacked = {old: pairs for old, pairs in self._attacked.items() if old[1] == seed}
            # One seed for both labels: the draws of a pair are the same but for the topic.
            harmful, benign = (
                default_world().requests(self.n, Draw.EVALUATION + seed, label, templates="held_out")
                for label in LABELS
            )
            self._attacked[key] = apply_to_pairs(
                cell.attack, harmful, benign, Draw.EVALUATION + seed, tokenizer=omni.tokenizer, wording=MICRO_WORLD
            )
        return self._attacked[key][LABELS.index(cell.label)]


@dataclass
class PlanSets:
    """The evaluation sets of a study plan, each label drawn from its own."""

    data: StudyData
    """The plan's prompts."""
    attacks: Sequence[str]
    """Columns of its attack table."""
    n: int
    """Prompts of each label, at most."""

    @property
    def micro_world(self) -> bool:
        """That of the plan."""
        return self.data.micro_world

    def cells(self) -> list[Cell]:
        """Every column on harmful and on benign prompts."""
        return [Cell(attack, label) for attack in self.attacks for label in LABELS]

    def queries(self, cell: Cell, seed: int, omni: Omni) -> list[Query]:
        """The prompts of one column."""
        return self.data.queries(cell.attack, cell.label, self.n, Draw.EVALUATION + seed, omni.tokenizer)
