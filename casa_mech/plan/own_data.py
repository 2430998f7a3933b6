"""The data of a plan file: public sets and a researcher's own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from casa_mech.attacks import media_of
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.identity import json_digest, queries_digest
from casa_mech.judging import KeywordJudge, load_judge
from casa_mech.plan.data import Answers, Pair
from casa_mech.plan.records import AttackSection, QuerySection, StudyPlan
from casa_mech.plan.sections import Note, read_section, under_attack
from casa_mech.queries import Example, Label, Query, decontaminate
from casa_mech.queries.draws import sample, unit_draw
from casa_mech.queries.overlap import Decontaminated, normalised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from casa_mech.judging.verdict import Judge

TRAINING, PHRASING, PAIR = "training", "phrasing", "pair"
_THIRD, _KINDS = 1 / 3, 3
HALVES = "first half", "second half"
"""`meta["split"]`: no prompt was seen in training, and what is chosen on one half is judged on the other."""
_FITTED = (Draw.GATE_DIRECTIONS, Draw.PREFILL_AXES, Draw.LENS_TRANSLATORS, Draw.CALIBRATION)
"""What is fitted takes prompts of the training sets, so that it is measured on others."""
_ANSWER_COLUMNS = ("reply", "reference")


class OwnData:
    """The prompts of a plan. Sets are read when they are first asked for, and kept.

    Which prompts are drawn depends on the seed and their ids. What is evaluated, probed and paired is taken out of the
    training sets, whatever the plan says.
    """

    micro_world = False

    def __init__(self, plan: StudyPlan, note: Note = lambda line: None) -> None:
        """Args:
        plan: the file's content.
        note: called with what was left out, one line each.
        """
        self.plan = plan
        self._note = note
        self._read: dict[str, list[Query]] = {}
        self._columns = {
            column: (entry, attack) for entry in plan.evaluation for column, attack in entry.columns.items()
        }

    @property
    def name(self) -> str:
        """The plan's."""
        return self.plan.name

    @property
    def attacks(self) -> tuple[str, ...]:
        """The evaluation sets, each under its attacks."""
        return tuple(self._columns)

    @property
    def benign_attacks(self) -> tuple[str, ...]:
        """All of them: every set has benign counterparts."""
        return self.attacks

    @property
    def surfaces(self) -> Mapping[str, str]:
        """Those of the probing sets."""
        return self.plan.probing.surfaces

    @property
    def benign_sets(self) -> tuple[str, ...]:
        """Those of the probing sets."""
        return tuple(self.plan.probing.benign)

    @property
    def refusals(self) -> tuple[str, ...]:
        """The plan's templates."""
        return self.plan.training.refusal_texts

    @property
    def phrasings(self) -> tuple[str, ...]:
        """The plan's prefills."""
        return self.plan.prefills

    def lacks(self, part: str) -> str:
        """See `StudyData`."""
        if part == "pairs" and self.plan.pairs is None:
            return f"plan {self.name} names no pairs, so no states are exchanged between matched prompts"
        if part == "exact judge":
            return f"plan {self.name} is judged by {self.plan.judge.name}, and no exact judge knows its replies"
        if part == "benign sets" and len(self.plan.probing.benign) < 2:
            return f"plan {self.name} has one benign probing set"
        if part == "kinds":
            for label in get_args(Label):
                if len({query.meta.get("category", "") for query in self._probing(label)}) < _KINDS:
                    return f"plan {self.name}: its {label} probing set has fewer than {_KINDS} categories to leave out"
        return ""

    def key(self) -> dict[str, Any]:
        """The plan's text and all prompts that it reads."""
        return {"plan": self._digest}

    def media(self, attack: str) -> frozenset[str]:
        """See `StudyData`."""
        if attack not in self._columns:
            return media_of(attack)
        entry, name = self._columns[attack]
        queries = [*self._set(entry.harmful, "harmful"), *self._set(entry.benign, "benign")]
        return media_of(name).union(*(query.modalities - {"text"} for query in queries))

    def queries(
        self, attack: str, label: Label, n: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[Query]:
        """See `StudyData`: a column's own prompts, or those of the probing sets under an attack."""
        if attack in self._columns:
            entry, name = self._columns[attack]
            pool = self._set(entry.harmful if label == "harmful" else entry.benign, label)
            return self._under(entry, attack, name, sample(pool, n, seed), seed, tokenizer)
        pool = self.training_prompts(label) if _purpose(seed) in _FITTED else self._probing(label)
        return self.attacked(attack, sample(pool, n, seed), seed, tokenizer)

    def attacked(
        self, attack: str, queries: Sequence[Query], seed: int, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[Query]:
        """See `StudyData`."""
        entry, name = self._columns.get(attack, (AttackSection(skip_unfit=True), attack))
        return self._under(entry, attack, name, queries, seed, tokenizer)

    def benign_set(self, name: str, n: int, seed: int) -> list[Query]:
        """See `StudyData`."""
        return sample(self._set(self.plan.probing.benign[name], "benign"), n, seed)

    def counterparts(self, query: Query, attempt: int) -> Query | None:
        """The benign prompt of the query's pair, at the first attempt."""
        return next((pair.benign for pair in self.pairs if pair.harmful.id == query.id), None) if attempt == 0 else None

    def paired_prompts(self, n: int, seed: int) -> list[Query]:
        """All harmful prompts of the pairs, in the order of the draw: many pairs have two lengths, and are left out.

        Draws that something is fitted on have a third of them, measurements the others.
        """
        fitted = _purpose(seed) in _FITTED
        harmful = [pair.harmful for pair in self.pairs if (unit_draw(pair.harmful.id, 0, PAIR) < _THIRD) == fitted]
        return sorted(harmful, key=lambda query: unit_draw(query.id, seed, "order"))

    @cached_property
    def pairs(self) -> list[Pair]:
        """The plan's pairs.

        Raises:
            InputError: it has a section of pairs, and no two prompts go together.
        """
        section = self.plan.pairs
        if section is None:
            return []
        harmful, benign = self._set(section.harmful, "harmful"), self._set(section.benign, "benign")
        if not section.key:
            return [Pair(*both) for both in zip(harmful, benign, strict=False)]
        others = {query.meta[section.key]: query for query in benign if query.meta.get(section.key)}
        pairs = [
            Pair(query, others[query.meta[section.key]]) for query in harmful if query.meta.get(section.key) in others
        ]
        if not pairs:
            raise InputError(f"plan {self.name}: pairs: no two prompts share a value of {section.key!r}")
        return pairs

    def complying(self, query: Query) -> Query:
        """See `StudyData`; one of the plan's prefills, drawn by the id, where the set gives none."""
        if query.meta.get("compliance"):
            return query
        number = int(unit_draw(query.id, 0, PHRASING) * len(self.plan.prefills))
        return self.in_phrasing(query, number)

    def in_phrasing(self, query: Query, number: int) -> Query:
        """See `StudyData`."""
        text = self.plan.prefills[number].format(request=query.meta.get("request") or query.text)
        return query.model_copy(update={"meta": {**query.meta, "compliance": text, PHRASING: str(number)}})

    def training_examples(self, n: int, seed: int, answers: Answers) -> list[Example]:
        """See `StudyData`. Prompts that have no reply under the plan's policies are left out."""
        rng = np.random.default_rng([seed, 2])
        harmful = self._refused(sample(self.training_prompts("harmful"), n // 2, seed), rng, answers)
        benign = self._answered(sample(self.training_prompts("benign"), n // 2, seed), answers)
        size = min(len(harmful), len(benign))
        if size < 2:
            raise InputError(
                f"plan {self.name}: {len(harmful)} harmful and {len(benign)} benign training prompts have a reply; "
                "give other sets, or another policy of refusals and answers"
            )
        order = rng.permutation(size)
        return [side[place] for place in order for side in (harmful, benign)]

    def texts(self, n: int, seed: int) -> list[Query]:
        """See `StudyData`."""
        sides = [sample(self.training_prompts(label), -(-n // 2), seed) for label in ("harmful", "benign")]
        return [query for both in zip(*sides, strict=False) for query in both][:n]

    def judge(self) -> Judge:
        """The plan's."""
        judge = self.plan.judge
        return load_judge(judge.name, judge.backend, judge.model, **judge.options)

    def removed(self) -> dict[Label, Decontaminated]:
        """What was taken out of the training sets, by label."""
        return {label: account for label, (_, account) in self._decontaminated.items()}

    def counts(self) -> list[dict[str, Any]]:
        """Every set of the plan with the number of its prompts: `part, set, label, n`."""
        return [
            {"part": part, "set": section.title, "label": label, "n": len(self._set(section, label))}
            for part, section, label in self._sections()
        ]

    def check(self) -> None:
        """Read everything, so that what is wrong with a set is said before a model is loaded.

        Raises:
            InputError: a set that cannot be read; pairs that do not pair; training prompts that evaluation sets all
                hold.
        """
        _ = self._digest, self.pairs
        for label in ("harmful", "benign"):
            self.training_prompts(label)

    @cached_property
    def _digest(self) -> str:
        # What a query holds beside its prompt (a reply, a pair's name, a complying answer) is used, too.
        queries = [queries_digest(self._set(section, label)) for _, section, label in self._sections()]
        return json_digest([self.plan.model_dump(mode="json", exclude={"sizes", "data"}), queries])

    def _sections(self) -> list[tuple[str, QuerySection, Label]]:
        plan = self.plan
        parts: list[tuple[str, QuerySection, Label]] = []
        parts += [(TRAINING, section, "harmful") for section in plan.training.harmful]
        parts += [(TRAINING, section, "benign") for section in plan.training.benign]
        for entry in plan.evaluation:
            parts += [(entry.name, entry.harmful, "harmful"), (entry.name, entry.benign, "benign")]
        parts.append(("probing", plan.probing.harmful, "harmful"))
        parts += [(f"probing, {name}", section, "benign") for name, section in plan.probing.benign.items()]
        if plan.pairs is not None:
            parts += [("pairs", plan.pairs.harmful, "harmful"), ("pairs", plan.pairs.benign, "benign")]
        return parts

    def _set(self, section: QuerySection, label: Label) -> list[Query]:
        name = f"{label} {section.model_dump_json()}"
        if name not in self._read:
            self._read[name] = [_plain(query) for query in read_section(section, label, self.plan.data, 0, self._note)]
        return self._read[name]

    def _probing(self, label: Label) -> list[Query]:
        probing = self.plan.probing
        return self._set(probing.harmful if label == "harmful" else next(iter(probing.benign.values())), label)

    def training_prompts(self, label: Label) -> list[Query]:
        """The training prompts of a label, less what is evaluated, probed or paired."""
        return self._decontaminated[label][0]

    def evaluation_sets(self) -> dict[str, list[Query]]:
        """What is evaluated, probed or paired, by the part of the plan."""
        sets: dict[str, list[Query]] = {}
        for part, section, label in self._sections():
            if part != TRAINING:
                sets.setdefault(part, []).extend(self._set(section, label))
        return sets

    @cached_property
    def _decontaminated(self) -> dict[Label, tuple[list[Query], Decontaminated]]:
        evaluations = self.evaluation_sets()
        sides: dict[Label, tuple[QuerySection, ...]] = {
            "harmful": self.plan.training.harmful,
            "benign": self.plan.training.benign,
        }
        kept: dict[Label, tuple[list[Query], Decontaminated]] = {}
        for label, sections in sides.items():
            prompts = _mixed([self._set(section, label) for section in sections])
            clean, account = decontaminate(prompts, evaluations)
            if not clean:
                raise InputError(
                    f"plan {self.name}: every {label} training prompt is in an evaluation set; give others"
                )
            kept[label] = clean, account
        return kept

    def _under(
        self,
        options: AttackSection,
        column: str,
        attack: str,
        queries: Sequence[Query],
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> list[Query]:
        if attack.startswith("prefill"):
            queries = [self.complying(query) for query in queries]
        try:
            return under_attack(options, column, attack, queries, seed, tokenizer, self._note)
        except InputError as error:
            raise InputError(f"plan {self.name}: {column}: {error}") from None

    def _refused(self, prompts: list[Query], rng: np.random.Generator, answers: Answers) -> list[Example]:
        policy, texts = self.plan.training.refusals, self.plan.training.refusal_texts
        if policy == "templates":
            return [Example(query=query, reply=texts[int(rng.integers(len(texts)))]) for query in prompts]
        if policy == "column":
            return _from_column(prompts)
        return _judged(prompts, answers(prompts), refused=True)

    def _answered(self, prompts: list[Query], answers: Answers) -> list[Example]:
        if self.plan.training.answers == "column":
            return _from_column(prompts)
        return _judged(prompts, answers(prompts), refused=False)


def _purpose(seed: int) -> int:
    return seed // 1000 * 1000


def _plain(query: Query) -> Query:
    """The query as a draw of its own: what the reader calls a topic is a kind of harm, and many prompts share it."""
    meta = {name: value for name, value in query.meta.items() if name not in ("topic", "split")}
    if "topic" in query.meta:
        meta.setdefault("category", query.meta["topic"])
    request = normalised(query.meta.get("request") or query.text) or query.id
    half = HALVES[unit_draw(request, 0, "half") >= 1 / 2]
    return query.model_copy(update={"meta": {"surface": query.surface, **meta, "topic": request, "split": half}})


def _mixed(sets: Sequence[Sequence[Query]]) -> list[Query]:
    """All sets as one, no set more than four times the smallest (or 1,000), so that no style drowns the others."""
    smallest = min(len(queries) for queries in sets)
    return [query for queries in sets for query in sample(queries, max(4 * smallest, 1000), 0)]


def _from_column(prompts: Sequence[Query]) -> list[Example]:
    examples = []
    for query in prompts:
        reply = next((query.meta[name] for name in _ANSWER_COLUMNS if query.meta.get(name)), "")
        if reply:
            examples.append(Example(query=query, reply=reply))
    return examples


def _judged(prompts: Sequence[Query], replies: Sequence[str], refused: bool) -> list[Example]:
    """The prompts with the model's own replies, of those that refuse, or of those that do not and say something."""
    judge, examples = KeywordJudge(), []
    for query, reply in zip(prompts, replies, strict=True):
        if judge.judge(query, reply).outcome == ("refused" if refused else "complied"):
            examples.append(Example(query=query, reply=reply.strip()))
    return examples
