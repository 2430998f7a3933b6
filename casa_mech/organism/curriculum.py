"""What the organism is trained on: batches drawn fresh from the micro-world, stage by stage.

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
from casa_mech.organism.world import SOURCE, Split, Task, World
from casa_mech.queries import Example, Query, TextPart

SYSTEMS = ("you are a helpful assistant .", "please help the user .", "answer the question of the user .")
SYSTEM_SHARE = 0.1
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
    """Shares of tasks and surfaces (they need not sum to 1), of wrapped requests and of random words to spell."""

    tasks: Mapping[str, float]
    surfaces: Mapping[str, float]
    wrapped: float = 0.0
    random_words: float = 0.0
    refuse: bool = False
    late_refusals: float = 0.0
    topics: Split = "all"
    templates: Split = "seen"
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
    task = cast(Task, mixture.pick("task", mixture.tasks, rng))
    surface = mixture.pick("surface", mixture.surfaces, rng)
    if task == "spell" and surface not in ("text", "spoken") and rng.random() < mixture.random_words:
        query = _random_word(world, rng)
    else:
        query = world.draw(task, rng, topics=mixture.topics, templates=mixture.templates)
    reply = query.meta["answer"]
    refuse = mixture.refuse and query.label == "harmful"
    if refuse:
        query, reply = _refused(world, mixture, query, rng)
    elif task == "request" and rng.random() < mixture.wrapped:
        seen = world.wrappers["seen"]
        query = jailbreak(query, seen[int(rng.integers(len(seen)))])
    if rng.random() < SYSTEM_SHARE:
        query = query.model_copy(update={"system": SYSTEMS[int(rng.integers(len(SYSTEMS)))]})
    return Example(query=SURFACES[surface](query), reply=reply)


def _refused(world: World, mixture: Mixture, query: Query, rng: np.random.Generator) -> tuple[Query, str]:
    if rng.random() < mixture.late_refusals:
        words = query.meta["compliance"].split()
        query = query.model_copy(update={"prefill": " ".join(words[: int(rng.integers(1, 7))])})
    return query, world.refusal(rng)


def _random_word(world: World, rng: np.random.Generator) -> Query:
    """A request to spell letters that make no word: reading them takes the letters, not the list of topics."""
    word = "".join(rng.choice(LETTERS, int(rng.integers(2, 9))))
    templates = world.templates_of("spell", "seen")
    template = templates[int(rng.integers(len(templates)))]
    meta = {"task": "spell", "topic": word, "answer": " ".join(word), "surface": "text", "attack": "plain"}
    text = template.text.replace("{a} ", "").replace("{topic}", word)
    return Query(id=f"random-{int(rng.integers(2**48)):012x}", parts=(TextPart(text=text),), source=SOURCE, meta=meta)
