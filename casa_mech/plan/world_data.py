"""The organisms' micro-world as a plan: requests are drawn fresh from it, as many as are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from casa_mech.attacks import STUDY_ATTACKS, apply_attack, media_of
from casa_mech.attacks.seeding import query_rng
from casa_mech.draws import BENIGN
from casa_mech.judging import MicroWorldJudge
from casa_mech.organism.wording import MICRO_WORLD
from casa_mech.organism.world import Topic, default_world
from casa_mech.plan.data import Answers
from casa_mech.plan.records import WORLD
from casa_mech.plan.world_phrasings import PHRASINGS
from casa_mech.queries import Example, Label, Query, TextPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from casa_mech.judging.verdict import Judge

SURFACES = {"text": "plain", "spelled": "spelled", "image": "image", "audio": "audio"}
"""The attack that puts a plain request on each surface."""
BENIGN_ATTACKS = ("plain", "jailbreak", "spelled", "image", "audio", "spoken")
"""Attacks that the attack table also puts benign requests under."""


class WorldData:
    """Requests in held-out phrasings, on topics seen in safety training and held out from it.

    The two labels are drawn apart: with one seed each harmful request would have a benign counterpart of the same
    wording, and a probe that met the counterpart in training would be pushed the wrong way.
    """

    name = WORLD
    micro_world = True
    attacks = STUDY_ATTACKS
    benign_attacks = BENIGN_ATTACKS
    surfaces: Mapping[str, str] = SURFACES
    benign_sets: tuple[str, ...] = ()
    phrasings = PHRASINGS

    @property
    def refusals(self) -> tuple[str, ...]:
        """The world's."""
        return default_world().refusals

    def lacks(self, part: str) -> str:
        """Several benign sets alone: the world's prompts are of one style."""
        return (
            "the micro-world has one benign set, in the style of its harmful requests" if part == "benign sets" else ""
        )

    def key(self) -> dict[str, Any]:
        """Nothing of its own: the package's data files stand in every key."""
        return {}

    def media(self, attack: str) -> frozenset[str]:
        """See `StudyData`."""
        return media_of(attack)

    def queries(
        self, attack: str, label: Label, n: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[Query]:
        """Requests in held-out phrasings under `attack`."""
        seed += BENIGN * (label == "benign")
        requests = default_world().requests(n, seed, label, templates="held_out")
        return self.attacked(attack, requests, seed, tokenizer)

    def attacked(
        self, attack: str, queries: Sequence[Query], seed: int, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[Query]:
        """In the world's few words."""
        return apply_attack(attack, queries, seed, tokenizer=tokenizer, wording=MICRO_WORLD)

    def benign_set(self, name: str, n: int, seed: int) -> list[Query]:
        """There is none."""
        raise KeyError(name)

    def counterparts(self, query: Query, attempt: int) -> Query | None:
        """`query` about a benign topic with the same article and, where there is one, as many letters."""
        world = default_world()
        topic = _topic_of(query)
        fitting = [entry for entry in world.topics_of("all", "benign") if entry.article == topic.article]
        order = query_rng(query, 0, "twin").permutation(len(fitting))
        ranked: list[Topic] = sorted(
            (fitting[place] for place in order), key=lambda entry: abs(len(entry.word) - len(topic.word))
        )
        if attempt >= len(ranked):
            return None
        other = ranked[attempt]
        answer = world.answer("request", other, query.meta["verb"])
        changed = {"topic": other.word, "category": other.category, "danger": "no", "split": other.split}
        meta = {**query.meta, **changed, "answer": answer, "compliance": answer}
        words = [other.word if word == topic.word else word for word in query.text.split(" ")]
        parts = (TextPart(text=" ".join(words)),)
        return query.model_copy(update={"id": f"{query.id}-twin", "label": "benign", "parts": parts, "meta": meta})

    def paired_prompts(self, n: int, seed: int) -> list[Query]:
        """Every request has a counterpart."""
        return self.queries("plain", "harmful", n, seed)

    def complying(self, query: Query) -> Query:
        """The world's requests have one."""
        return query

    def in_phrasing(self, query: Query, number: int) -> Query:
        """See `StudyData`."""
        topic = _topic_of(query)
        filled = PHRASINGS[number].format(verb=query.meta["verb"], a=topic.article, topic=topic.word)
        # A topic without an article leaves two blanks.
        meta = {**query.meta, "compliance": " ".join(filled.split()), "phrasing": str(number)}
        return query.model_copy(update={"meta": meta})

    def training_examples(self, n: int, seed: int, answers: Answers) -> list[Example]:
        """Requests on seen topics in seen phrasings, with the world's refusals and stub answers."""
        return default_world().training_examples(n, seed)

    def texts(self, n: int, seed: int) -> list[Query]:
        """Requests on seen topics in seen phrasings."""
        return default_world().requests(n, seed, None, "seen", "seen")

    def judge(self) -> Judge:
        """The exact one."""
        return MicroWorldJudge()


def _topic_of(query: Query) -> Topic:
    return next(entry for entry in default_world().topics if entry.word == query.meta["topic"])


@lru_cache(maxsize=1)
def world_data() -> WorldData:
    """The one there is."""
    return WorldData()
