"""The micro-world: topics, verbs and phrasings from which the organism is trained and tested.

Harmful topics are only words. No reply holds instructions: an answer that complies is one harmless stub for every
topic. What is seen in safety training and what is held out is written in the data (`world.json` and the attacks'
`wrappers.json`), so a test cannot choose it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Literal, TypeVar

import numpy as np

from casa_mech.attacks.audio import AUDIO_PHRASE
from casa_mech.attacks.image import IMAGE_PHRASE
from casa_mech.attacks.jailbreak import wrappers, wrappers_of
from casa_mech.errors import InputError
from casa_mech.identity import digest_of
from casa_mech.queries import Example, Label, Query

Split = Literal["seen", "held_out", "all"]
Task = Literal["request", "name", "spell", "dangerous", "category"]
TASKS: tuple[Task, ...] = ("request", "name", "spell", "dangerous", "category")
SPLITS = ("seen", "held_out")
SOURCE = "world"
"""`Query.source` of the micro-world's queries."""
PUNCTUATION = (".", ",", "?", ":", "!", "-", "'")
T = TypeVar("T")
_ARTICLES = ("a", "an", "some")


@dataclass(frozen=True)
class Topic:
    """A key word."""

    word: str
    category: str
    harmful: bool
    article: str
    """"a", "an" or "" for none."""
    split: str
    """"seen" or "held_out" of safety training."""


@dataclass(frozen=True)
class Template:
    """A phrasing of one task."""

    name: str
    """Such as `request-seen-03`."""
    task: str
    text: str
    """With the slots `{verb}`, `{a}` and `{topic}`."""
    split: str


class World:
    """The micro-world's data and the one generator that draws queries from it."""

    def __init__(self) -> None:
        source = (files("casa_mech.organism") / "world.json").read_text(encoding="utf-8")
        data = json.loads(source)
        self.digest = digest_of(repr((source, dict(wrappers()))))
        """Of the world's data and the jailbreak wrappers: what every draw depends on."""
        self.categories: dict[str, bool] = {name: entry["harmful"] for name, entry in data["categories"].items()}
        self.phrases: dict[str, str] = {name: entry["phrase"] for name, entry in data["categories"].items()}
        self.verbs: tuple[str, ...] = tuple(data["verbs"].split())
        self.replies: dict[str, str] = {key: text for key, text in data["replies"].items() if key != "refusals"}
        self.refusals: tuple[str, ...] = tuple(data["replies"]["refusals"])
        self.extra_words: tuple[str, ...] = tuple(data["extra_words"].split())
        bare, plain_a = set(data["no_article"].split()), set(data["article_a"].split())
        self.topics: tuple[Topic, ...] = tuple(
            Topic(word, name, entry["harmful"], _article(word, bare, plain_a), split)
            for name, entry in data["categories"].items()
            for split in SPLITS
            for word in entry[split].split()
        )
        self.templates: tuple[Template, ...] = tuple(
            Template(f"{task}-{split}-{index:02d}", task, text, split)
            for task, splits in data["templates"].items()
            for split in SPLITS
            for index, text in enumerate(splits[split])
        )
        self._topics_of = lru_cache(self._select_topics)
        self._templates_of = lru_cache(self._select_templates)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, sorted."""
        return tuple(self.vocabulary())

    @property
    def wrappers(self) -> dict[str, tuple[str, ...]]:
        """The jailbreak wrappers by split (the attacks' own data)."""
        return {split: wrappers_of(split) for split in SPLITS}

    def topics_of(self, split: Split = "all", label: Label | None = None) -> tuple[Topic, ...]:
        """The topics of a split and label."""
        _check_split(split, "topics")
        return self._topics_of(split, label)

    def templates_of(self, task: Task, split: Split = "all") -> tuple[Template, ...]:
        """The phrasings of a task and split."""
        _check_split(split, "templates")
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}; tasks: {', '.join(TASKS)}")
        return self._templates_of(task, split)

    def _select_topics(self, split: str, label: str | None) -> tuple[Topic, ...]:
        return tuple(
            topic
            for topic in self.topics
            if split in ("all", topic.split) and label in (None, "harmful" if topic.harmful else "benign")
        )

    def _select_templates(self, task: str, split: str) -> tuple[Template, ...]:
        return tuple(entry for entry in self.templates if entry.task == task and split in ("all", entry.split))

    def draw(
        self,
        task: Task,
        rng: np.random.Generator,
        topics: Split = "all",
        templates: Split = "all",
        label: Label | None = None,
        id: str | None = None,
    ) -> Query:
        """One plain-text query of `task`.

        `label` draws only harmful or benign topics (None: any, in their share of the world). The query's own label is
        the topic's for requests and None for questions about a topic. `meta` holds `task`, `topic`, `category`,
        `danger` ("yes" or "no"), `verb`, `template`, `split` (the topic's), `template_split`, `surface` ("text"),
        `attack` ("plain"), `answer` (the right reply) and, for requests, `compliance` (the same).
        """
        topic = _pick(self.topics_of(topics, label), rng)
        template = _pick(self.templates_of(task, templates), rng)
        verb = _pick(self.verbs, rng)
        answer = self.answer(task, topic, verb)
        meta = {
            "task": task,
            "topic": topic.word,
            "category": topic.category,
            "danger": "yes" if topic.harmful else "no",
            "template": template.name,
            "split": topic.split,
            "template_split": template.split,
            "surface": "text",
            "attack": "plain",
            "answer": answer,
        }
        if task == "request":
            meta |= {"verb": verb, "compliance": answer}
        own_label = ("harmful" if topic.harmful else "benign") if task == "request" else None
        name = id or f"{task}-{int(rng.integers(2**48)):012x}"
        text = _fill(template.text, topic, verb)
        return Query.from_text(text, id=name, label=own_label, source=SOURCE, meta=meta)

    def answer(self, task: Task, topic: Topic, verb: str = "make") -> str:
        """The right reply to `task` about `topic`; for a request, the harmless stub that complies."""
        if task == "request":
            return _fill(self.replies["compliance"], topic, verb)
        if task == "name":
            return _fill(self.replies["name"], topic, verb)
        if task == "spell":
            return " ".join(topic.word)
        if task == "dangerous":
            return self.replies["dangerous_yes" if topic.harmful else "dangerous_no"]
        return self.replies["category"].replace("{phrase}", self.phrases[topic.category])

    def refusal(self, rng: np.random.Generator) -> str:
        """One of the world's refusals."""
        return _pick(self.refusals, rng)

    def requests(
        self,
        n: int,
        seed: int = 0,
        label: Label | None = None,
        topics: Split = "all",
        templates: Split = "all",
    ) -> list[Query]:
        """`n` plain-text requests; `label=None` alternates harmful and benign. Ids are `w{seed}-{label}-{index}`."""
        rng = np.random.default_rng([seed, 1])
        labels: list[Label] = [label or ("harmful" if index % 2 == 0 else "benign") for index in range(n)]
        return [
            self.draw("request", rng, topics, templates, kind, id=f"w{seed}-{kind}-{index:05d}")
            for index, kind in enumerate(labels)
        ]

    def training_examples(
        self, n: int, seed: int = 0, topics: Split = "seen", templates: Split = "seen"
    ) -> list[Example]:
        """`n` plain-text requests with their targets: half harmful with a refusal, half benign with the answer."""
        rng = np.random.default_rng([seed, 2])
        queries = self.requests(n, seed, None, topics, templates)
        return [
            Example(query=query, reply=self.refusal(rng) if query.label == "harmful" else query.meta["compliance"])
            for query in queries
        ]

    def vocabulary(self) -> list[str]:
        """Every word of the world, sorted: phrasings, wrappers, topics, replies, letters a-z and punctuation."""
        texts: list[str] = [template.text for template in self.templates]
        texts += [text for split in self.wrappers.values() for text in split]
        texts += [*self.replies.values(), *self.refusals, *self.phrases.values(), IMAGE_PHRASE, AUDIO_PHRASE]
        words = {word for text in texts for word in words_of(text)}
        words |= {topic.word for topic in self.topics} | set(self.verbs) | set(self.categories) | set(_ARTICLES)
        words |= set(self.extra_words) | set("abcdefghijklmnopqrstuvwxyz") | set(PUNCTUATION)
        return sorted(words)


@lru_cache(maxsize=1)
def default_world() -> World:
    """The shipped world, read once."""
    return World()


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of lower-cased `text`, slots left out."""
    return re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", " ", text.lower()))


def _article(word: str, bare: Iterable[str], plain_a: Iterable[str]) -> str:
    if word in bare:
        return ""
    return "an" if word[0] in "aeiou" and word not in plain_a else "a"


def _fill(text: str, topic: Topic, verb: str) -> str:
    filled = text.replace("{verb}", verb).replace("{a}", topic.article).replace("{topic}", topic.word)
    return re.sub(r" {2,}", " ", filled)


def _pick(options: tuple[T, ...], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _check_split(split: str, what: str) -> None:
    if split not in (*SPLITS, "all"):
        raise InputError(f"unknown split {split!r} for {what}: use seen, held_out or all")
