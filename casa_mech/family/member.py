"""One member of the map: built, read, then gated; each step is kept, and a member that was stopped goes on.

The order is part of the result: the predictors lie on the disk, whole, before a gate is trained, and every later part
is kept under a key that holds theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.audit import audit
from casa_mech.casa import Casa
from casa_mech.casa.storage import CONFIG as GATE_FILE
from casa_mech.compare.sets import WorldSets
from casa_mech.compare.weights import TrainingPlan
from casa_mech.defenses.casa import CasaDefense
from casa_mech.defenses.training import train_defense
from casa_mech.errors import RunError
from casa_mech.family.measures import answered_table, organism_table, split_table, transfer_table
from casa_mech.family.mends import MENDS, Mend
from casa_mech.family.plan import Member, Plan
from casa_mech.family.predictors import predictor_table
from casa_mech.files import TEMPORARY, write_text
from casa_mech.identity import SHORT, digest_of, key_digest
from casa_mech.judging import MicroWorldJudge
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.organism.build import CHECKPOINT, build
from casa_mech.organism.card import CARD
from casa_mech.organism.premise_rows import SURFACES
from casa_mech.organism.recipe import Recipe, stage_keys, train_organism
from casa_mech.organism.training import Checkpoint
from casa_mech.queries import Query
from casa_mech.study.folder import RunFolder, is_complete
from casa_mech.study.manifest import now
from casa_mech.study.settings import slug

MADE = "made.json"
"""In every part: when it was begun and finished."""
MEMBERS, WEIGHTS = "members", "weights"
BATCH_SIZE = 64
ORGANISM, PREDICTORS, AUDIT, MENDED = "organism", "predictors", "audit", "mend"
"""Kinds of parts, in their order."""


@dataclass(frozen=True)
class Part:
    """A step of a member whose result is kept."""

    step: str
    """Its name, and that of its folder."""
    key: dict[str, Any]
    """All that it depends on."""
    tables: tuple[str, ...]
    """The tables it leaves, by the name of their file without `.csv`."""


class MemberRun:
    """The parts of one member in the folder of a map.

    Args:
        member: which.
        plan: with the sizes, and the other members, whose first stages may be this one's.
        folder: the map's.
        keep: whether the weights of organism and gates stay.
        mends: whether mends are tried where the member asks for them.
        progress: whether to draw bars.
        note: called with a line when a part is finished.
    """

    def __init__(
        self,
        member: Member,
        plan: Plan,
        folder: RunFolder,
        keep: bool = False,
        mends: bool = True,
        progress: bool = False,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.member, self.folder = member, folder
        self._plan, self._sizes = plan, plan.sizes
        self._keep, self._progress, self._note = keep, progress, note
        self._mends: tuple[Mend, ...] = tuple(MENDS.values()) if mends and member.mends else ()

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.folder.path(MEMBERS, self.member.name)

    @property
    def finished(self) -> bool:
        """True where every part is there, whole, and no weights are left that are not to be kept."""
        return not any(map(self._missing, self.parts)) and (self._keep or not (self.path / WEIGHTS).exists())

    @cached_property
    def parts(self) -> list[Part]:
        """All of them, in the order in which they are made."""
        sizes = self._sizes.model_dump(mode="json", exclude={"card", "states", "gate_seeds"})
        key: dict[str, Any] = {"build": digest_of(self._stage_keys[-1]), "card": self._sizes.card}
        key |= {"seed": self.member.seed, "scale": self.member.scale, "premises": self.member.premises.model_dump()}
        parts = [Part(ORGANISM, dict(key), ("organisms",))]
        key |= {"states": self._sizes.states, "draws": self._sizes.seed}
        parts.append(Part(PREDICTORS, dict(key), ("predictors",)))
        for seed in self._sizes.gate_seeds:
            gated = {**key, "sizes": sizes, "gate_seed": seed}
            parts.append(Part(f"{AUDIT}-{seed}", gated, ("transfer", "split")))
            parts += [
                Part(f"{MENDED}-{seed}-{slug(mend.name)}", {**gated, **mend.key}, ("mends",)) for mend in self._mends
            ]
        return parts

    def table(self, name: str) -> pd.DataFrame:
        """Its rows of the table `name`, from the parts that are there."""
        tables = [
            pd.read_csv(self.path / part.step / f"{name}.csv")
            for part in self.parts
            if name in part.tables and not self._missing(part)
        ]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def order(self) -> list[dict[str, Any]]:
        """When each part that is there was begun and finished: `member, step, began, finished`."""
        steps = []
        for part in self.parts:
            if not self._missing(part):
                times = json.loads((self.path / part.step / MADE).read_text(encoding="utf-8"))
                steps.append({"member": self.member.name, "step": part.step, **times})
        return steps

    def run(self) -> None:
        """Make the parts that are missing, then remove the weights unless they are kept.

        Raises:
            RunError: the folder cannot be written, or holds a build with other options.
        """
        for left in list(self.path.glob(f"**/{TEMPORARY}*")):  # of a killed process
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        organism, predictors, *gated = self.parts
        self._make(organism, self._measure)
        self._make(predictors, self._predict)
        for seed in self._sizes.gate_seeds:
            mine = [part for part in gated if part.key["gate_seed"] == seed and self._missing(part)]
            for part in mine:
                if self._missing(predictors):
                    raise RunError(f"{self.path}: a gate is trained after the predictors are written, not before")
                if part.step.startswith(AUDIT):
                    self._make(part, partial(self._audit, seed))
                else:
                    self._make(part, partial(self._mend, seed, MENDS[part.key["mend"]]))
            if not self._keep:
                for left in [self.path / WEIGHTS / f"gate-{seed}", *(self.path / WEIGHTS).glob(f"gate-{seed}-*")]:
                    shutil.rmtree(left, ignore_errors=True)
        if not self._keep:
            shutil.rmtree(self.path / WEIGHTS, ignore_errors=True)
        for large in ("_omni", "_queries"):  # or a process would hold those of every member it made
            self.__dict__.pop(large, None)

    def _missing(self, part: Part) -> bool:
        return not is_complete(self.path / part.step, part.key)

    def _make(self, part: Part, build: Callable[[Path], None]) -> None:
        if not self._missing(part):
            return
        began = now()

        def timed(new: Path) -> None:
            build(new)
            write_text(new / MADE, json.dumps({"began": began, "finished": now()}) + "\n")

        self.folder.artifact(MEMBERS, f"{self.member.name}/{part.step}", part.key, timed)
        self._note(f"{self.member.name}: {part.step} is done")

    # The organism

    @cached_property
    def _recipe(self) -> Recipe:
        return self.member.recipe

    @cached_property
    def _stage_keys(self) -> list[str]:
        return stage_keys(self._recipe, self.member.seed)

    @cached_property
    def _omni(self) -> Omni:
        return load_omni(self._built(), device="cpu", dtype="float32")

    def _built(self) -> Path:
        """The folder of the organism's weights; built, or the build continued, where they are not there."""
        target = self.path / WEIGHTS / ORGANISM
        begun = (target / CARD).exists() or (target / CHECKPOINT).exists()
        card = build(
            self.member.name, target, self.member.premises, self.member.seed, self._sizes.card, self.member.scale,
            self._progress, start=None if begun else self._shared_start(),
        )  # fmt: skip
        measured = self.path / ORGANISM / CARD
        if not self._missing(self.parts[0]):
            known = json.loads(measured.read_text(encoding="utf-8"))
            if card["fingerprint"] != known["fingerprint"]:
                raise RunError(f"{target} has other weights than {measured}: remove {self.path}, and it is made anew")
        if card["n"] != self._sizes.card:
            raise RunError(
                f"{target} was measured with n={card['n']}, not {self._sizes.card}: remove it, or keep to it"
            )
        return target

    def _shared_start(self) -> Path | None:
        """The state after the stages that this member has in common with another of the plan; None without any.

        Trained once, by the member that comes first.
        """
        own = self._stage_keys
        others = [stage_keys(member.recipe, member.seed) for member in self._plan.members if member != self.member]
        # Key number k stands for all stages before k; a whole training is no beginning of another.
        shared = max((k for keys in others for k in range(1, len(own) - 1) if keys[k : k + 1] == [own[k]]), default=0)
        if not shared:
            return None
        name = digest_of(own[shared])[:SHORT]
        recipe = Recipe(self._recipe.stages[:shared], self._recipe.shared_code, self._recipe.shape)

        def train(new: Path) -> None:
            # Outside the folder that comes into being, so that a stopped training goes on.
            work = self.folder.path("stages", f"{name}-{CHECKPOINT}")
            work.parent.mkdir(parents=True, exist_ok=True)
            checkpoint = Checkpoint(work, own[: shared + 1])
            train_organism(self.member.name, self.member.seed, recipe, self._progress, checkpoint)
            shutil.copy(work, new / CHECKPOINT)

        folder = self.folder.artifact("stages", name, {"stages": digest_of(own[shared])}, train)
        self.folder.path("stages", f"{name}-{CHECKPOINT}").unlink(missing_ok=True)
        return folder / CHECKPOINT

    def _measure(self, new: Path) -> None:
        card = self._card()
        write_text(new / CARD, json.dumps(card, indent=1) + "\n")
        _write(organism_table(self.member, card), new / "organisms.csv")

    def _card(self) -> dict[str, Any]:
        card: dict[str, Any] = json.loads((self._built() / CARD).read_text(encoding="utf-8"))
        return card

    def _predict(self, new: Path) -> None:
        table = predictor_table(self._omni, self._card(), self._sizes.states, self._sizes.seed)
        _write(self._named(table), new / "predictors.csv")

    # Its gates

    def _audit(self, seed: int, new: Path) -> None:
        with self._gate(seed) as casa:
            result = audit(casa, self._queries, MicroWorldJudge(), settings=self._generation, seed=self._sizes.seed)
        result.replies.to_parquet(new / "replies.parquet")
        for name, table in (("transfer", transfer_table(result)), ("split", split_table(result))):
            _write(self._named(table, gate_seed=seed), new / f"{name}.csv")

    def _mend(self, seed: int, mend: Mend, new: Path) -> None:
        with self._gate(seed, mend) as casa:
            mend.apply(casa, max(2, self._sizes.audit // 2), self._sizes.seed)
            replies = casa.generate(self._queries, self._generation)
        table = answered_table(self._queries, replies, self._sizes.seed)
        _write(self._named(table, gate_seed=seed, mend=mend.name), new / "mends.csv")

    @contextmanager
    def _gate(self, seed: int, mend: Mend | None = None) -> Iterator[Casa]:
        """A gate on the organism for the length of a block, trained as that of the default study or as `mend` says."""
        trained = mend if mend is not None and mend.trains else None
        # Mends that differ at inference alone share a gate.
        folder = self.path / WEIGHTS / (f"gate-{seed}" + (f"-{key_digest(trained.training_key)}" if trained else ""))
        if (folder / GATE_FILE).is_file():
            casa = Casa.from_pretrained(folder, self._omni)
        else:
            sizes = self._sizes
            options = {"max_steps": sizes.steps, "batch_size": sizes.batch, "micro_batch_size": min(32, sizes.batch)}
            examples = TrainingPlan(n_examples=sizes.examples).examples(
                seed, benign=trained.benign if trained else None
            )
            gate = train_defense(
                "casa", self._omni, examples, folder, seed=seed, progress=self._progress, **options,
                **(trained.training if trained else {}),
            )  # fmt: skip
            assert isinstance(gate, CasaDefense)
            casa = gate.casa
        try:
            yield casa
        finally:
            casa.detach()

    @cached_property
    def _generation(self) -> GenerationSettings:
        return GenerationSettings(max_new_tokens=self._sizes.max_new_tokens, batch_size=BATCH_SIZE)

    @cached_property
    def _queries(self) -> list[Query]:
        sets = WorldSets(tuple(SURFACES.values()), self._sizes.audit)
        return [query for cell in sets.cells() for query in sets.queries(cell, self._sizes.seed, self._omni)]

    def _named(self, table: pd.DataFrame, **columns: Any) -> pd.DataFrame:
        """`table` with the member's name, and `columns`, before its own."""
        first = {"member": self.member.name, **columns}
        return table.assign(**first)[[*first, *table.columns]]


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.6g")
