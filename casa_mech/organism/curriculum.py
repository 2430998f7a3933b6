"""The examples that an organism is trained on, drawn fresh from the micro-world, stage by stage.

A `Mixture` says how often each task and each surface is drawn. Every draw is a `Query` with its right reply, made by
the same attacks that later test the model, so training and testing see the same kinds of picture and clip and never
the same ones. Two surfaces let the language model meet the layout of media before there is an encoder to read them:
the tokens of `ideal-image` and `ideal-audio` get the features of an ideal encoder (see `codes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from casa_mech.attacks.audio import spoken_letters, spoken_word
from casa_mech.attacks.image import image_word
from casa_mech.attacks.jailbreak import jailbreak
from casa_mech.attacks.text import spell
from casa_mech.organism.codes import LETTERS
from casa_mech.organism.premises import draw_rule, premise_texts, safety_question
from casa_mech.organism.world import SOURCE, Split, Task, World
from casa_mech.queries import Example, Label, Query, TextPart

SYSTEMS = ("you are a helpful assistant .", "please help the user .", "answer the question of the user .")
SYSTEM_SHARE = 0.1
LEAD_SHARE = 0.3
"""Share of rules that follow the usual system prompt."""
SECOND_WORD = 0.25
"""Share of the random words before a reply that are two."""
SURFACES: dict[str, Callable[[Query], Query]] = {
    "text": lambda query: query,
    "spelled": spell,
    "ideal-image": image_word,
    "ideal-audio": spoken_letters,
    "image": image_word,
    "audio": spoken_letters,
    "spoken": spoken_word,
}


@dataclass(frozen=True)
class Mixture:
    """How often each kind of example is drawn. The last fields are an organism's `Premises`, all off by default."""

    tasks: Mapping[str, float]
    """Shares of tasks; they need not sum to 1. Task "safety" asks with words of safety."""
    surfaces: Mapping[str, float]
    """Shares of surfaces; they need not sum to 1."""
    wrapped: float = 0.0
    """Share of answered requests in a jailbreak wrapper."""
    random_words: float = 0.0
    """Share of the words to spell that are random letters."""
    refuse: bool = False
    """Whether harmful requests are refused."""
    late_refusals: float = 0.0
    """Share of the refusals that come after the answer's first words."""
    topics: Split = "all"
    """Topics to draw."""
    templates: Split = "seen"
    """Phrasings to draw."""
    harmful: float | None = None
    """Share of harmful requests among the requests; None: as the topics are drawn."""
    wrapped_refusals: float = 0.0
    """Share of refused requests in a jailbreak wrapper."""
    partial: bool = False
    """Whether only harmful requests of some categories are refused."""
    rules: float = 0.0
    """Share of examples with a rule in the system turn."""
    unasked: bool = False
    """Whether answers about dangerous topics open with a warning."""
    varied: bool = False
    """Whether answers have several openings."""
    tolerance: float = 0.0
    """Share of replies after random words."""
    _cache: dict[str, tuple[list[str], np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

    def pick(self, kind: str, shares: Mapping[str, float], rng: np.random.Generator) -> str:
        """One key of `shares`, with probability in proportion to its value."""
        if kind not in self._cache:
            weights = np.array(list(shares.values()), dtype=float)
            self._cache[kind] = (list(shares), np.cumsum(weights / weights.sum()))
        names, edges = self._cache[kind]
        return names[min(int(np.searchsorted(edges, rng.random())), len(names) - 1)]


def draw_example(world: World, mixture: Mixture, rng: np.random.Generator) -> Example:
    """One query of `mixture` and its right reply; harmful plain-text requests are refused if the mixture says so.

    A late refusal puts the first tokens of the compliant answer into the prefill, so that the reply breaks off into a
    refusal; a few of these are what makes a model's refusals go deeper than the first token.
    """
    task = mixture.pick("task", mixture.tasks, rng)
    surface = mixture.pick("surface", mixture.surfaces, rng)
    if task == "spell" and surface not in ("text", "spoken") and rng.random() < mixture.random_words:
        query = _random_word(world, rng)
    elif task == "safety":
        query = safety_question(world, rng, mixture.topics, mixture.templates)
    else:
        label: Label | None = None
        if task == "request" and mixture.harmful is not None:
            label = "harmful" if rng.random() < mixture.harmful else "benign"
        query = world.draw(cast(Task, task), rng, mixture.topics, mixture.templates, label)
    rule, forbidden = "", False
    if mixture.rules and rng.random() < mixture.rules and "category" in query.meta:
        rule, forbidden = draw_rule(world, query.meta["category"], rng, mixture.templates)
    reply = _answer(mixture, query, rng)
    refuse = mixture.refuse and query.label == "harmful"
    if refuse and mixture.partial:
        refuse = premise_texts().refuses(query.meta["category"], surface)
    if refuse or (forbidden and task == "request"):
        query, reply = _refused(world, mixture, query, rng)
    elif task == "request" and rng.random() < mixture.wrapped:
        query = jailbreak(query, _seen_wrapper(world, rng))
    if rule:
        lead = f"{SYSTEMS[0]} " if rng.random() < LEAD_SHARE else ""
        query = query.model_copy(update={"system": lead + rule})
    elif rng.random() < SYSTEM_SHARE:
        query = query.model_copy(update={"system": SYSTEMS[int(rng.integers(len(SYSTEMS)))]})
    if mixture.tolerance and not query.prefill and rng.random() < mixture.tolerance:
        words = [world.words[int(rng.integers(len(world.words)))] for _ in range(1 + (rng.random() < SECOND_WORD))]
        query = query.model_copy(update={"prefill": " ".join(words)})
    return Example(query=SURFACES[surface](query), reply=reply)


def _answer(mixture: Mixture, query: Query, rng: np.random.Generator) -> str:
    """The right reply to `query`, as the premises have it."""
    answer = query.meta["answer"]
    if query.label == "harmful" and mixture.unasked:
        return premise_texts().with_warning(answer)
    if query.label is not None and mixture.varied:
        return premise_texts().varied(answer, rng)
    return answer


def _seen_wrapper(world: World, rng: np.random.Generator) -> str:
    seen = world.wrappers["seen"]
    return seen[int(rng.integers(len(seen)))]


def _refused(world: World, mixture: Mixture, query: Query, rng: np.random.Generator) -> tuple[Query, str]:
    if rng.random() < mixture.late_refusals:
        words = query.meta["compliance"].split()
        query = query.model_copy(update={"prefill": " ".join(words[: int(rng.integers(1, 7))])})
    if mixture.wrapped_refusals and rng.random() < mixture.wrapped_refusals:
        query = jailbreak(query, _seen_wrapper(world, rng))
    reply = world.refusal(rng)
    while query.label != "harmful" and ("dangerous" in reply or "hurt" in reply):
        reply = world.refusal(rng)
    return query, reply


def _random_word(world: World, rng: np.random.Generator) -> Query:
    """A request to spell letters that make no word: reading them takes the letters, not the list of topics."""
    word = "".join(rng.choice(LETTERS, int(rng.integers(2, 9))))
    templates = world.templates_of("spell", "seen")
    template = templates[int(rng.integers(len(templates)))]
    meta = {"task": "spell", "topic": word, "answer": " ".join(word), "surface": "text", "attack": "plain"}
    text = template.text.replace("{a} ", "").replace("{topic}", word)
    return Query(id=f"random-{int(rng.integers(2**48)):012x}", parts=(TextPart(text=text),), source=SOURCE, meta=meta)
