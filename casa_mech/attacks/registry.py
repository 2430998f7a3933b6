"""Attacks by name: what the study's tables and the organism's card mean by "audio" or "prefill-4"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from casa_mech.attacks.audio import spoken_letters, spoken_word
from casa_mech.attacks.image import image_word
from casa_mech.attacks.jailbreak import jailbreak, wrappers_of
from casa_mech.attacks.prefill import PREFILL_LENGTHS, prefill
from casa_mech.attacks.seeding import query_rng
from casa_mech.attacks.text import marked, spell
from casa_mech.attacks.voice import Voice
from casa_mech.errors import InputError
from casa_mech.queries import Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AttackContext:
    """What an attack may draw on: the seed, the tokenizer (prefills need one), the wrappers to choose from, the voice.

    `wrappers` is a split of our own ("seen", "held_out", "all") or a list of texts that hold `{request}`.
    """

    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    wrappers: str | tuple[str, ...] = "held_out"
    voice: Voice | None = None


Attack = Callable[[Query, AttackContext], Query]


def _plain(query: Query, context: AttackContext) -> Query:
    return query.model_copy(update={"meta": {"surface": "text", **marked(query, attack="plain")}})


def _jailbreak(query: Query, context: AttackContext) -> Query:
    options = wrappers_of(context.wrappers) if isinstance(context.wrappers, str) else context.wrappers
    if not options:
        raise InputError("there is no jailbreak wrapper to choose from: give at least one")
    return jailbreak(query, options[int(query_rng(query, context.seed, "jailbreak").integers(len(options)))])


def _prefill(k: int) -> Attack:
    def attack(query: Query, context: AttackContext) -> Query:
        if context.tokenizer is None:
            raise InputError(f"the attack prefill-{k} counts tokens: pass the model's tokenizer")
        return prefill(query, k, context.tokenizer)

    return attack


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "plain": _plain,
        "jailbreak": _jailbreak,
        "spelled": lambda query, context: spell(query),
        "image": lambda query, context: image_word(query, context.seed),
        "audio": lambda query, context: spoken_letters(query, context.seed, voice=context.voice),
        "spoken": lambda query, context: spoken_word(query, context.seed, voice=context.voice),
        **{f"prefill-{k}": _prefill(k) for k in PREFILL_LENGTHS},
    }
)


def apply_attack(
    name: str,
    queries: Sequence[Query],
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    wrappers: str | Sequence[str] = "held_out",
    voice: Voice | None = None,
) -> list[Query]:
    """`queries` under the attack `name`, in their order; the rest of each query's meta is kept.

    Draws depend on `seed` and each query's id alone, never on what else is in the list. InputError for an unknown
    name and for a query that the attack cannot be used on (no key word, no compliance text, ...), naming its id.
    """
    if name not in ATTACKS:
        raise InputError(f"unknown attack {name!r}; attacks: {', '.join(ATTACKS)}")
    choice = wrappers if isinstance(wrappers, str) else tuple(wrappers)
    context = AttackContext(seed=seed, tokenizer=tokenizer, wrappers=choice, voice=voice)
    return [ATTACKS[name](query, context) for query in queries]
