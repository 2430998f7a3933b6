"""`StudyData`: what a study asks its plan for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from casa_mech.queries import Example, Label, Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from casa_mech.judging.verdict import Judge

Answers = Callable[[Sequence[Query]], list[str]]
"""The model's own replies to plain prompts, one for each."""


class Pair(NamedTuple):
    """A harmful prompt and a benign one that ask for different things in like words."""

    harmful: Query
    benign: Query


class StudyData(Protocol):
    """The prompts of a study. What is drawn depends on the seed and the plan alone, never on who asks first."""

    @property
    def name(self) -> str:
        """The plan's."""
        ...

    @property
    def micro_world(self) -> bool:
        """True where the prompts are the organisms' own, and the exact judge can judge replies to them."""
        ...

    @property
    def attacks(self) -> tuple[str, ...]:
        """Columns of the attack table: attacks by name, or evaluation sets, each under an attack."""
        ...

    @property
    def benign_attacks(self) -> tuple[str, ...]:
        """Those of `attacks` that benign counterparts are put under, too."""
        ...

    @property
    def surfaces(self) -> Mapping[str, str]:
        """Surfaces that hidden states are read on, each with the attack that puts a plain prompt there."""
        ...

    @property
    def benign_sets(self) -> tuple[str, ...]:
        """Names of several benign sets that the harmful one is held against; empty where there is but one."""
        ...

    @property
    def refusals(self) -> tuple[str, ...]:
        """Refusals in the words of the training data."""
        ...

    @property
    def phrasings(self) -> tuple[str, ...]:
        """Wordings of compliance that prefills are cut from, with slots; `in_phrasing` fills them."""
        ...

    def lacks(self, part: str) -> str:
        """Why the plan gives no `part`, in a sentence; empty if it does.

        Parts: "pairs", "exact judge", "kinds" of harm, "benign sets".
        """
        ...

    def key(self) -> dict[str, Any]:
        """All that the prompts depend on beside the seed, as JSON values."""
        ...

    def media(self, attack: str) -> frozenset[str]:
        """The media, of "image" and "audio", that prompts under `attack` hold."""
        ...

    def queries(
        self, attack: str, label: Label, n: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[Query]:
        """At most `n` prompts of a label under `attack`; `seed` is a `Draw` plus the study's seed.

        A larger `n` gives the same prompts and more. A finite set gives what it has.
        """
        ...

    def attacked(
        self, attack: str, queries: Sequence[Query], seed: int, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[Query]:
        """Plain prompts of these data under an attack."""
        ...

    def benign_set(self, name: str, n: int, seed: int) -> list[Query]:
        """Plain prompts of one of `benign_sets`."""
        ...

    def counterparts(self, query: Query, attempt: int) -> Query | None:
        """A benign prompt to pair with a harmful one, another at each attempt; None where there are no more."""
        ...

    def paired_prompts(self, n: int, seed: int) -> list[Query]:
        """At most `n` plain harmful prompts that `counterparts` knows a benign one for."""
        ...

    def complying(self, query: Query) -> Query:
        """`query` with a complying answer in `meta["compliance"]`; its own, if it has one."""
        ...

    def in_phrasing(self, query: Query, number: int) -> Query:
        """`query` with its complying answer in wording `number`, which `meta["phrasing"]` keeps."""
        ...

    def training_examples(self, n: int, seed: int, answers: Answers) -> list[Example]:
        """At most `n` plain-text examples, half harmful with a refusal, half benign with an answer."""
        ...

    def texts(self, n: int, seed: int) -> list[Query]:
        """`n` plain prompts of both labels, of the training data, to fit something on that is no gate."""
        ...

    def judge(self) -> Judge:
        """Who judges the replies."""
        ...
