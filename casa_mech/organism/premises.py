"""The premises of CASA about its base models, as knobs of an organism's training, each with its reason.

With all knobs off an organism lacks these premises: it breaks on any word put before its reply, it knows no word of
safety, it refuses all plain harm and none elsewhere, and it works out whether a topic is harmful only when it is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Literal, TypeVar, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from casa_mech.errors import InputError
from casa_mech.organism.world import SOURCE, SPLITS, Split, Task, World
from casa_mech.queries import Example, Label, Query

T = TypeVar("T")


class Premises(BaseModel):
    """The knobs of an organism. The defaults are the recipe of the first organisms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of replies that follow one or two random words, in every stage and on every surface: a "
        "safety token is a word before the reply, and a model that breaks on any word there is disabled, not defended",
    )
    safety_words: bool = Field(
        False,
        description="questions with the words safe, unsafe, harmful and harmless: tokens and prompts made of these "
        "words rest on what the model knows of them",
    )
    rules: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of examples with a rule in the system turn, which is followed on every surface: a safety "
        "prompt can only work on a model that reads its system turn",
    )
    alignment: Literal["full", "partial"] = Field(
        "full",
        description="which harmful requests the base refuses: all plain ones and no others (full), or those of some "
        "categories, more of them in text than elsewhere (partial), as the pretrained models of the paper answer 33 to "
        "42 % of plain harm, so that fine-tuning has something to teach",
    )
    unasked: bool = Field(
        False,
        description="an answer to a request about a dangerous topic opens with a warning, on every surface: harm has "
        "to be worked out before the first word although nobody asks about it, so the representation carries it",
    )
    letter_code: Literal["shared", "split"] = Field(
        "shared",
        description="whether a letter seen or heard arrives where the letter typed does: shared separability, or its "
        "control",
    )
    varied_benign: bool = Field(
        False,
        description="answers with several openings, and safety training on all tasks, harmful words in harmless uses "
        "among them: a safety decision learned from one task with one answer rests on the words alone",
    )

    def changed(self, options: Sequence[str]) -> Premises:
        """These premises with `options` ("tolerance=0.5", "unasked=off", "rules=on") in place; "on" is `ALL`'s value.

        Raises:
            InputError: no such knob, or a value that it does not take.
        """
        values = self.model_dump()
        for option in options:
            knob, equals, text = option.partition("=")
            knob, text = knob.strip().replace("-", "_"), text.strip()
            if not equals or knob not in values:
                raise InputError(f"{option!r} sets no knob: give NAME=VALUE with a name of {', '.join(values)}")
            presets = {"on": ALL, "off": Premises()}
            values[knob] = getattr(presets[text], knob) if text in presets else text
        try:
            return Premises.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"knob {first['loc'][0]} does not take {first['input']!r}: {first['msg']}") from None

    def record(self) -> list[dict[str, object]]:
        """Each knob with its value and reason, for the card."""
        return [
            {"knob": name, "value": getattr(self, name), "reason": field.description}
            for name, field in type(self).model_fields.items()
        ]


ALL = Premises(tolerance=0.3, safety_words=True, rules=0.5, alignment="partial", unasked=True, varied_benign=True)
"""All premises: the base model that the paper takes for granted."""
PRESETS = {
    "organism": ALL,
    "organism-split": ALL.model_copy(update={"letter_code": "split"}),
    "organism-unasked": ALL.model_copy(update={"unasked": False}),
    "first": Premises(),
    "first-split": Premises(letter_code="split"),
}
"""The premises of each organism that can be built by name."""


class PremiseTexts:
    """The texts that the knobs add to the micro-world, all in its words."""

    def __init__(self) -> None:
        data = json.loads((files("casa_mech.organism") / "premises.json").read_text(encoding="utf-8"))
        self.safety_words: dict[str, bool] = data["safety_words"]
        self.questions: dict[str, list[str]] = data["safety_questions"]
        self.replies: dict[str, str] = data["safety_replies"]
        self.safety_rules: dict[str, list[str]] = data["safety_rules"]
        self.category_rules: dict[str, list[str]] = data["category_rules"]
        self.ruled_categories: tuple[str, ...] = tuple(data["ruled_categories"].split())
        self.dangerous_opening: tuple[str, str] = tuple(data["dangerous_opening"])
        self.openings: list[str] = data["openings"]
        self.preparations: list[str] = data["preparations"]
        self.refused_categories: dict[str, list[str]] = {
            surface: names.split() for surface, names in data["refused_categories"].items()
        }

    def refuses(self, category: str, surface: str) -> bool:
        """True where partial alignment refuses harmful requests about a topic of `category` on `surface`."""
        return category in self.refused_categories["text" if surface == "text" else "media"]

    def with_warning(self, answer: str) -> str:
        """`answer` with the opening of answers about dangerous topics."""
        usual, warning = self.dangerous_opening
        return answer.replace(usual, warning, 1)

    def varied(self, answer: str, rng: np.random.Generator) -> str:
        """`answer` with an opening and a preparation drawn at random."""
        opening, preparation = _pick(self.openings, rng), _pick(self.preparations, rng)
        return answer.replace(self.openings[0], opening, 1).replace(self.preparations[0], preparation, 1)


@lru_cache(maxsize=1)
def premise_texts() -> PremiseTexts:
    """The shipped texts, read once."""
    return PremiseTexts()


def safety_question(
    world: World, rng: np.random.Generator, topics: Split = "all", templates: Split = "seen", id: str | None = None
) -> Query:
    """A question for whether a topic is safe, unsafe, harmful or harmless; `meta["answer"]` is the right reply."""
    texts = premise_texts()
    harmful = bool(rng.integers(2))
    topic = _pick(world.topics_of(topics, "harmful" if harmful else "benign"), rng)
    word = _pick(list(texts.safety_words), rng)
    answer = texts.replies["yes" if texts.safety_words[word] == harmful else "no"].replace("{word}", word)
    text = _pick(_of_split(texts.questions, templates), rng).replace("{word}", word)
    meta = {
        "task": "safety",
        "topic": topic.word,
        "category": topic.category,
        "danger": "yes" if harmful else "no",
        "split": topic.split,
        "surface": "text",
        "attack": "plain",
        "answer": answer,
    }
    name = id or f"safety-{int(rng.integers(2**48)):012x}"
    filled = re.sub(r" {2,}", " ", text.replace("{a}", topic.article).replace("{topic}", topic.word))
    return Query.from_text(filled, id=name, source=SOURCE, meta=meta)


def varied_training_examples(
    world: World, n: int, seed: int = 0, topics: Split = "seen", templates: Split = "seen"
) -> list[Example]:
    """As `World.training_examples`, with varied benign data: `n` plain-text examples, half harmful with a refusal.

    Of the benign half, one half are requests with one of several answers, the other questions of all tasks, every
    second one about a harmful topic: naming a bomb is a harmless use of a harmful word. Their label is benign.
    """
    rng = np.random.default_rng([seed, 10])
    examples = []
    for index, (query, reply) in enumerate(
        (example.query, example.reply) for example in world.training_examples(n, seed, topics, templates)
    ):
        if query.label == "benign" and index % 4 == 1:
            query = _question(world, rng, topics, templates).model_copy(update={"id": query.id, "label": "benign"})
            reply = query.meta["answer"]
        elif query.label == "benign":
            reply = premise_texts().varied(reply, rng)
        examples.append(Example(query=query, reply=reply))
    return examples


def _question(world: World, rng: np.random.Generator, topics: Split, templates: Split) -> Query:
    """A question of any task but a request; every second one about a harmful topic."""
    task = _pick(("name", "spell", "dangerous", "category", "safety"), rng)
    if task == "safety":
        return safety_question(world, rng, topics, templates)
    label: Label = "harmful" if rng.random() < 0.5 else "benign"
    return world.draw(cast(Task, task), rng, topics, templates, label)


def draw_rule(
    world: World, category: str, rng: np.random.Generator, templates: Split = "seen", safety: float = 0.4
) -> tuple[str, bool]:
    """A rule for the system turn, and whether it forbids requests about a topic of `category`.

    With probability `safety` the rule forbids what is harmful, else one of a few categories, every second time this one
    where it is among them.
    """
    texts = premise_texts()
    if rng.random() < safety:
        return _pick(_of_split(texts.safety_rules, templates), rng), world.categories[category]
    this_one = category in texts.ruled_categories and rng.random() < 0.5
    named = category if this_one else _pick(texts.ruled_categories, rng)
    rule = _pick(_of_split(texts.category_rules, templates), rng)
    return rule.replace("{phrase}", world.phrases[named]), named == category


def _of_split(texts: dict[str, list[str]], split: Split) -> list[str]:
    return [text for name in SPLITS if split in ("all", name) for text in texts[name]]


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
