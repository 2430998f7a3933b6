"""A larger sibling of the organism for real English, trained on prompts that the user brings; it is not shipped.

It shows the pipeline on language that nobody wrote for it. Its language model learns the prompts themselves, to repeat
them, to say which are dangerous, and one harmless stub as the answer to each; its towers learn to read them as strips
of letters and to hear them spoken; and its safety training refuses the harmful ones as plain text. It knows nothing and
can tell nobody anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from casa_mech.attacks.audio import SNR_DB
from casa_mech.attacks.render import render_word
from casa_mech.attacks.voice import RATE, add_noise, default_voice, draw_settings
from casa_mech.errors import InputError
from casa_mech.organism.encoders import Script
from casa_mech.queries import (
    AudioPart,
    Example,
    ImagePart,
    Label,
    Part,
    Query,
    TextPart,
    decontaminate,
    read_queries,
)
from casa_mech.queries.benchmarks.locate import find_files
from casa_mech.queries.benchmarks.registry import benchmark_named
from casa_mech.queries.overlap import Decontaminated

CHARACTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789 .,?!'-")
LONGEST_READ = 40
"""Characters of a prompt that is drawn or spoken; longer ones are used as text only."""
LONGEST = 200
ANSWER = "Sure, here is an answer to your request."
REFUSALS = (
    "Sorry, I can not help with that.",
    "I can not help with this request.",
    "Sorry, but I will not answer that.",
    "I am sorry, I can not do that.",
)
REPEAT = {"text": "Repeat: {prompt}", "image": "Repeat the text in the picture.", "audio": "Repeat what you hear."}
REQUEST = {"image": "Answer the request in the picture.", "audio": "Answer the request you hear."}
DANGEROUS = {
    "text": "Is this request dangerous? {prompt}",
    "image": "Is the request in the picture dangerous?",
    "audio": "Is the request you hear dangerous?",
}
PROMPTS = {"request": {"text": "{prompt}", **REQUEST}, "repeat": REPEAT, "dangerous": DANGEROUS}
"""The request around a prompt, by task and surface."""
TRAIN: dict[Label, tuple[tuple[str, str | None], ...]] = {
    "harmful": (("redteam-2k", None), ("refusal-direction-harmful", "train")),
    "benign": (("refusal-direction-harmless", "train"), ("alpaca", None)),
}
HELD_OUT = (
    ("advbench", None),
    ("refusal-direction-harmless", "test"),
    ("alpaca-eval", None),
    ("xstest", None),
    ("safebench", None),
    ("figstep-benign", None),
    ("mm-safetybench", None),
    ("jailbreakv-28k-mini", None),
    ("jailbreakbench", None),
    ("jailbreakbench-benign", None),
    ("strongreject", None),
    ("maliciousinstruct", None),
    ("harmbench", None),
)
"""The evaluation sets that a corpus is decontaminated against, as far as they are there."""
MOST_BENIGN = 24_000


@dataclass(frozen=True)
class Corpus:
    """Prompts to train on."""

    harmful: tuple[str, ...]
    benign: tuple[str, ...]
    removed: int
    """Prompts that were taken out because an evaluation set holds them."""
    sources: dict[str, int]
    """Prompts read from each set."""
    held_out: tuple[str, ...] = ()
    """The evaluation sets that were there to compare with."""
    reports: tuple[Decontaminated, ...] = ()
    """The prompts taken out, for each label."""

    def readable(self, label: Label) -> tuple[str, ...]:
        """Prompts of `label`, lower-cased, that can be drawn and spoken: short, and of `CHARACTERS` only."""
        return self._readable[label]

    @cached_property
    def _readable(self) -> dict[Label, tuple[str, ...]]:
        return {"harmful": _short(self.harmful), "benign": _short(self.benign)}

    def examples(self, n: int, seed: int, refuse: bool = True) -> list[Example]:
        """`n` plain-text examples, half harmful: refused, or (not `refuse`) answered like the benign."""
        rng = np.random.default_rng([seed, 3])
        labels: Sequence[Label] = ("harmful", "benign")
        return [self.draw(labels[index % 2], "text", "request", rng, refuse) for index in range(n)]

    def draw(self, label: Label, surface: str, task: str, rng: np.random.Generator, refuse: bool) -> Example:
        """One example: a prompt on `surface` ("text", "image", "audio") and one of the tasks of `PROMPTS`."""
        pool = (self.harmful if label == "harmful" else self.benign) if surface == "text" else self.readable(label)
        text = pool[int(rng.integers(len(pool)))]
        reply = {"repeat": text, "dangerous": "yes" if label == "harmful" else "no"}.get(task, ANSWER)
        if refuse and task == "request" and label == "harmful":
            reply = REFUSALS[int(rng.integers(len(REFUSALS)))]
        return Example(query=on_surface(text, surface, task, rng, label), reply=reply)


def _short(texts: Sequence[str]) -> tuple[str, ...]:
    known = set(CHARACTERS)
    return tuple(low for text in texts if len(low := text.lower()) <= LONGEST_READ and set(low) <= known)


def on_surface(text: str, surface: str, task: str, rng: np.random.Generator, label: Label | None = None) -> Query:
    """`text` as a query on `surface`: typed, drawn as a strip of letters, or spoken whole with noise."""
    name = f"{surface}-{int(rng.integers(2**48)):012x}"
    request = TextPart(text=PROMPTS[task][surface].replace("{prompt}", text))
    parts: tuple[Part, ...] = (request,)
    if surface == "image":
        parts = (ImagePart(image=render_word(text, rng)), request)
    elif surface == "audio":
        clip = add_noise(say(text, rng), float(rng.uniform(*SNR_DB)), rng)
        parts = (AudioPart(audio=clip, rate=RATE), request)
    return Query(id=name, parts=parts, label=label, source="corpus", meta={"topic": text, "surface": surface})


def say(text: str, rng: np.random.Generator) -> np.ndarray:
    """`text` spoken whole by a voice drawn at random: float32 [samples] at 16 kHz."""
    return default_voice().synthesise(text, draw_settings(rng))


def script_of(corpus: Corpus) -> Script:
    """The script that the sibling's towers learn to read: the corpus's own short prompts, drawn and spoken."""
    texts = corpus.readable("benign") + corpus.readable("harmful")

    def draw(rng: np.random.Generator, count: int) -> list[str]:
        return [texts[int(rng.integers(len(texts)))] for _ in range(count)]

    return Script(CHARACTERS, draw, say)


def read_corpus(directory: Path, seed: int = 0) -> Corpus:
    """Training prompts from `directory` (public layouts), less all that an evaluation set found there asks, too.

    Raises:
        InputError: no harmful or no benign training set is there; the message names those looked for.
    """
    held_out = {name: _read(name, split, directory) for name, split in HELD_OUT}
    evaluations = {name: queries for name, queries in held_out.items() if queries}
    pools: dict[Label, list[str]] = {}
    counts: dict[str, int] = {}
    reports: list[Decontaminated] = []
    for label, sets in TRAIN.items():
        read = {name: _read(name, split, directory, MOST_BENIGN, seed) for name, split in sets}
        if not any(read.values()):
            raise InputError(
                f"{directory}: no {label} training prompts; put one of {', '.join(read)} there "
                "(casa-mech datasets says where to get them)"
            )
        pool = [query for queries in read.values() for query in queries if len(query.text) <= LONGEST]
        clean, report = decontaminate(pool, evaluations)
        reports.append(report)
        counts |= {name: len(queries) for name, queries in read.items() if queries}
        pools[label] = list(dict.fromkeys(query.text for query in clean))
    harmful, benign = tuple(pools["harmful"]), tuple(pools["benign"][:MOST_BENIGN])
    removed = sum(len(report.removed) for report in reports)
    return Corpus(harmful, benign, removed, counts, tuple(evaluations), tuple(reports))


def _read(name: str, split: str | None, directory: Path, limit: int | None = None, seed: int = 0) -> list[Query]:
    """The set's queries, or none where its files are not in `directory`."""
    files = find_files(benchmark_named(name), directory)
    if not files or (split is not None and split not in files):
        return []
    return read_queries(name, directory, split, limit, seed, missing_media="text")


def corpus_record(corpus: Corpus) -> dict[str, Any]:
    """The corpus as the record of a build has it."""
    return {
        "harmful": len(corpus.harmful),
        "benign": len(corpus.benign),
        "removed": corpus.removed,
        "removed_for": dict(Counter(entry.evaluation for report in corpus.reports for entry in report.removed)),
        "sources": corpus.sources,
        "decontaminated_against": list(corpus.held_out),
    }
