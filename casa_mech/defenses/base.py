"""`Defense`: what every defence does, so that one table can hold them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from casa_mech.casa.config import Settings
from casa_mech.defenses.prompts import defense_text, with_safety_prompt
from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, Omni, with_system
from casa_mech.queries import Prompt, Query, Reply

Change = Literal["weights", "prompt", "logits", "states"]
"""What a defence changes in the model or in what the model is given."""


class DefenseSettings(Settings):
    """Options of one defence: a frozen record with a doc sentence under each field."""


class Description(BaseModel):
    """What a defence changes in the model, and what that costs."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Its name on the command line."""
    changes: tuple[Change, ...]
    """What it changes; empty for no defence."""
    forwards_per_token: float = 1.0
    """Language-model forwards for each generated token (1 is plain decoding; two branches are 2)."""
    extra_forwards: float = 0.0
    """Forwards for each query beside those, a prompt or a probe counted as one for each token it decodes."""
    trained_parameters: int = 0
    """How many numbers its training sets; 0 for a defence without training."""
    source: str
    """Where the method is from."""
    safety_prompt: bool = False
    """The safety prompt is switched on."""
    failed: str = ""
    """In what its training missed its own criterion; empty where it met it or has none."""


class Defense(ABC):
    """A defence on one model. Make one with `load_defense`; `close` (or leaving a `with` block) gives the model back.

    Subclasses implement `_replies`, `describe` and, where they change the model, `close`. The safety prompt is a switch
    on all of them: `generate` puts it into the system turn before anything else sees the queries.
    """

    name: str
    """Its name on the command line."""

    def __init__(self, omni: Omni, safety_prompt: bool = False) -> None:
        self.omni = omni
        self.safety_prompt = safety_prompt

    def generate(
        self, queries: Sequence[Prompt], settings: GenerationSettings = GenerationSettings(), progress: bool = False
    ) -> list[Reply]:
        """Replies in the order of the queries, batched; as `Omni.generate` where the defence does nothing."""
        return self._replies(self._prepared(self.omni.queries(queries), settings), settings, progress)

    def scores(self, queries: Sequence[Query], settings: GenerationSettings = GenerationSettings()) -> list[float]:
        """How malicious the defence finds each query, higher for worse: v_s, a token's probability, a risk.

        Raises:
            InputError: the defence makes no such judgement (see `has_scores`).
        """
        raise InputError(f"the defence {self.name!r} does not score queries")

    @property
    def label(self) -> str:
        """Its name in tables, which says so where the safety prompt is switched on."""
        return f"{self.name} + safety prompt" if self.safety_prompt and self.name != "safety-prompt" else self.name

    @property
    def identity(self) -> dict[str, Any]:
        """All that its replies depend on beside the queries and the model's present weights, as JSON values."""
        settings = getattr(self, "settings", None)
        own = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else None
        prompt = defense_text(self.omni, "safety") if self.safety_prompt else None
        return {"description": self.describe().model_dump(mode="json"), "settings": own, "safety_prompt": prompt}

    @property
    def has_scores(self) -> bool:
        """True for a defence that scores queries."""
        return type(self).scores is not Defense.scores

    @abstractmethod
    def describe(self) -> Description:
        """The record of what it changes and costs."""

    @abstractmethod
    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]: ...

    def _prepared(self, queries: Sequence[Query], settings: GenerationSettings = GenerationSettings()) -> list[Query]:
        # The settings' system prompt first: a query that has one already would not get it any more.
        queries = with_system(queries, settings.system)
        if not self.safety_prompt:
            return queries
        prompt = defense_text(self.omni, "safety")
        return [with_safety_prompt(query, prompt) for query in queries]

    def close(self) -> None:  # noqa: B027  (most defences change nothing that would have to be given back)
        """Give the model back as it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
