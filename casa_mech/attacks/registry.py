"""Attacks by name: what the study's tables and the organism's card mean by "audio" or "prefill-4"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from casa_mech.attacks.aiah import CONTROLS, Control, aiah
from casa_mech.attacks.audio import (
    DISTRACTORS,
    Distractor,
    Speech,
    distractor,
    spoken_letters,
    spoken_question,
    spoken_word,
)
from casa_mech.attacks.dialogue import multi_turn, split
from casa_mech.attacks.image import figstep, figstep_as_text, image_word, rendered, sd_typo, typo
from casa_mech.attacks.jailbreak import jailbreak, wrappers_of
from casa_mech.attacks.prefill import PREFILL_LENGTHS, prefill
from casa_mech.attacks.seeding import paired, query_rng
from casa_mech.attacks.text import letter_spaced, marked, spell
from casa_mech.attacks.wording import ENGLISH, Wording
from casa_mech.errors import InputError
from casa_mech.queries import Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AttackContext:
    """The options that attacks draw on."""

    seed: int = 0
    """Of every draw."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The model's; prefills need one."""
    wrappers: str | tuple[str, ...] = "held_out"
    """A split of our own ("seen", "held_out", "all") or texts that hold `{request}`."""
    speech: Speech = field(default_factory=Speech)
    """Voice, speed, pitch and noise of clips."""
    picture: Path | None = None
    """The picture that `sd-typo` puts above its text: a file, or a folder of pictures named after the queries' ids."""
    wording: Wording = ENGLISH
    """The sentences that stand for what has moved into a picture, a clip or another turn."""
    prompt: str | None = None
    """The text of FigStep's and AIAH's attacks in the place of our own (see `prompt_file.read_prompt`)."""


Attack = Callable[[Query, AttackContext], Query]


def _plain(query: Query, context: AttackContext) -> Query:
    return query.model_copy(update={"meta": {"surface": query.surface, **marked(query, attack="plain")}})


def _jailbreak(query: Query, context: AttackContext) -> Query:
    options = wrappers_of(context.wrappers) if isinstance(context.wrappers, str) else context.wrappers
    if not options:
        raise InputError("there is no jailbreak wrapper to choose from: give at least one")
    return jailbreak(query, options[int(query_rng(query, context.seed, "jailbreak").integers(len(options)))])


def _prefill(query: Query, context: AttackContext, k: int) -> Query:
    if context.tokenizer is None:
        raise InputError(f"the attack prefill-{k} counts tokens: pass the model's tokenizer")
    return prefill(query, k, context.tokenizer)


def _sd_typo(query: Query, context: AttackContext) -> Query:
    named = query.meta.get("picture_file", "")
    source = Path(named) if named else context.picture
    if source is None:
        raise InputError(
            f"query {query.id!r} has no picture for sd-typo: set meta['picture_file'], or pass one (--picture)"
        )
    if source.is_dir():
        stem = re.sub(r"[^\w.-]", "_", query.id)
        named_alike = [
            path for suffix in (".png", ".jpg", ".jpeg", ".webp") if (path := source / f"{stem}{suffix}").is_file()
        ]
        if not named_alike:
            raise InputError(f"query {query.id!r}: no picture {stem}.png or .jpg in {source}; name them after the ids")
        source = named_alike[0]
    return sd_typo(query, source, context.wording)


def _distractor(query: Query, context: AttackContext, kind: Distractor) -> Query:
    return distractor(query, kind, context.seed, context.speech, context.wording)


def _aiah(query: Query, context: AttackContext, control: Control) -> Query:
    return aiah(query, control, context.seed, context.speech, context.prompt)


STUDY_ATTACKS = (
    "plain",
    "jailbreak",
    "spelled",
    "image",
    "audio",
    "spoken",
    *(f"prefill-{k}" for k in PREFILL_LENGTHS),
)
"""The rows of the default study's table."""
ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "plain": _plain,
        "jailbreak": _jailbreak,
        "spelled": lambda query, context: spell(query),
        "letter-spaced": lambda query, context: letter_spaced(query),
        "image": lambda query, context: image_word(query, context.seed),
        "rendered": lambda query, context: rendered(query, context.seed, context.wording),
        "figstep": lambda query, context: figstep(query, context.wording, context.prompt),
        "figstep-text": lambda query, context: figstep_as_text(query, context.wording, context.prompt),
        "typo": lambda query, context: typo(query, context.wording),
        "sd-typo": _sd_typo,
        "audio": lambda query, context: spoken_letters(query, context.seed, context.speech),
        "spoken": lambda query, context: spoken_word(query, context.seed, context.speech),
        "spoken-question": lambda query, context: spoken_question(query, context.seed, context.speech, context.wording),
        **{f"distractor-{kind}": partial(_distractor, kind=kind) for kind in DISTRACTORS},
        **{f"aiah-{control}": partial(_aiah, control=control) for control in CONTROLS},
        "multi-turn": lambda query, context: multi_turn(query, context.wording),
        "split": lambda query, context: split(query, context.seed, context.speech, context.wording),
        **{f"prefill-{k}": partial(_prefill, k=k) for k in PREFILL_LENGTHS},
    }
)


_DRAWN = {"image", "rendered", "figstep", "typo", "sd-typo", "split"}
_SPOKEN = {"audio", "spoken", "spoken-question", "split", "aiah-word", "aiah-speech"}


def media_of(name: str) -> frozenset[str]:
    """The media, of "image" and "audio", that the attack of that name puts into a text query."""
    spoken = name in _SPOKEN or name.startswith("distractor-")
    return frozenset({"image"} if name in _DRAWN else ()) | frozenset({"audio"} if spoken else ())


SUMMARIES: Mapping[str, str] = MappingProxyType(
    {
        "plain": "the request as it is",
        "jailbreak": "a wrapper around the text (--wrappers)",
        "spelled": "the key word letter by letter, in the text",
        "letter-spaced": "the whole text letter by letter",
        "image": "the key word in a strip of 28-pixel cells; the text points to it",
        "rendered": "the whole text in a picture",
        "figstep": "FigStep: a list with three empty points, in a picture",
        "figstep-text": "FigStep's control: the same list in the text",
        "typo": "MM-SafetyBench TYPO: the key phrase in a picture; the text points to it",
        "sd-typo": "MM-SafetyBench SD+TYPO: a given picture above the TYPO picture (--picture)",
        "audio": "the key word spelled aloud; the text points to it",
        "spoken": "the key word said whole; the text points to it",
        "spoken-question": "the whole text said aloud (AIAH, setting 1)",
        "distractor-silence": "the request as text beside a silent clip (AIAH, setting 2)",
        "distractor-noise": "beside Gaussian noise of the spoken question's mean and variance",
        "distractor-speech": "beside a harmless spoken sentence",
        "aiah-text": "AIAH's control: the plain question (setting 3)",
        "aiah-letters": "AIAH's control: the key word's letters in the text, in its template",
        "aiah-word": "AIAH's control: the key word said whole, in its template",
        "aiah-speech": "AIAH: the key word spelled aloud, in its template",
        "multi-turn": "the key word in an earlier turn; the request says it",
        "split": "the key word in a picture, the verb in a clip",
        **{f"prefill-{k}": f"{k} tokens of a complying answer as the reply's opening" for k in PREFILL_LENGTHS},
    }
)
"""Each attack in one line. A key word is `meta["key_phrase"]` or `meta["topic"]`, a verb `meta["verb"]`, a
complying answer `meta["compliance"]`."""


def attack_named(name: str) -> Attack:
    """The attack of that name; `prefill-K` for any K from 1 on, listed or not. InputError for an unknown one."""
    if name in ATTACKS:
        return ATTACKS[name]
    length = re.fullmatch(r"prefill-([1-9]\d{0,5})", name, re.ASCII)
    if not length:
        raise InputError(f"unknown attack {name!r}; attacks: {', '.join(ATTACKS)}, or prefill-K from K = 1")
    return partial(_prefill, k=int(length[1]))


def apply_attack(
    name: str,
    queries: Sequence[Query],
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    wrappers: str | Sequence[str] = "held_out",
    speech: Speech = Speech(),
    picture: Path | None = None,
    wording: Wording = ENGLISH,
    prompt: str | None = None,
) -> list[Query]:
    """`queries` under the attack `name`, in their order; the rest of each query's meta is kept.

    Draws depend on `seed` and each query's id alone, never on what else is in the list. `speech` says how clips are
    spoken. `wording` has the attacks' sentences in words that the model knows
    (for an organism `casa_mech.organism.wording.MICRO_WORLD`); `prompt` takes the place of our own wording of FigStep's
    and AIAH's text, which `meta["prompt_wording"]` tells apart. InputError for an unknown name and for a query that the
    attack cannot be used on (no key word, no compliance text, ...), naming its id.
    """
    attack = attack_named(name)
    choice = wrappers if isinstance(wrappers, str) else tuple(wrappers)
    context = AttackContext(seed, tokenizer, choice, speech, picture, wording, prompt)
    return [attack(query, context) for query in queries]


def apply_to_pairs(
    name: str, queries: Sequence[Query], counterparts: Sequence[Query], seed: int = 0, **options: object
) -> tuple[list[Query], list[Query]]:
    """`queries` and their benign `counterparts` under one attack, pairwise with the same draws (see `seeding.paired`).

    Args:
        name: the attack.
        queries: the queries to attack.
        counterparts: as many benign queries.
        seed: of every draw.
        options: the others of `apply_attack`.

    Raises:
        InputError: as `apply_attack`; also when there are not as many counterparts as queries.
    """
    first, second = paired(queries, counterparts)
    return apply_attack(name, first, seed, **options), apply_attack(name, second, seed, **options)  # type: ignore[arg-type]
