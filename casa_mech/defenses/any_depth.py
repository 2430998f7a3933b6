"""Any-depth alignment: ask the model anew, in the middle of its reply (arXiv 2510.18081; docs/method.md §5.5)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from casa_mech.casa.generation import prefill_ids
from casa_mech.casa.recheck import at_header
from casa_mech.defenses.base import Defense, DefenseSettings, Description
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.omni.finite import finite_logits
from casa_mech.queries import Query, Reply
from casa_mech.queries.refusals import find_refusal, refusals_digest


class AnyDepthSettings(DefenseSettings):
    """Options of any-depth alignment."""

    every: int = Field(8, ge=1)
    """Tokens of a reply between one insertion of the header and the next."""
    lookahead: int = Field(8, ge=1)
    """Tokens that the model writes at the header, in which a refusal is looked for."""


@dataclass
class _Draft:
    """A reply in the making."""

    reply: Reply
    """As far as it is written."""
    opening: list[int]
    """Ids of the attacker's prefill."""
    ids: list[int]
    """Its own ids, up to the end of the turn."""
    final: bool = False
    """It refuses, and is not looked at again."""


class AnyDepth(Defense):
    """The assistant's header inserted behind a prefill and after every few tokens, by which the model decides anew.

    What the model writes at the header, greedily, is thrown away unless it refuses: then the reply so far is kept and
    the refusal follows it, within the same number of new tokens. This is the paper's variant without a probe, on the
    model as it is, so it can do no more than the model's own refusals; `recheck_every` is the same for a CASA gate.
    """

    name = "any-depth"

    def __init__(self, omni: Omni, settings: AnyDepthSettings = AnyDepthSettings()) -> None:
        super().__init__(omni)
        self.settings = settings

    def describe(self) -> Description:
        """What the model is given; `lookahead` forwards come with every `every` tokens."""
        return Description(
            name=self.name,
            changes=("prompt",),
            forwards_per_token=1 + self.settings.lookahead / self.settings.every,
            source="arXiv 2510.18081, without its probe",
            safety_prompt=self.safety_prompt,
        )

    @property
    def identity(self) -> dict[str, object]:
        """As of every defence, with the list that refusals are recognised by."""
        return super().identity | {"refusals": refusals_digest()}

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        drafts = self._undefended(queries, settings, progress)
        for depth in range(0, settings.max_new_tokens, self.settings.every):
            rows = [
                row
                for row, draft in enumerate(drafts)
                if not draft.final and (len(draft.ids) > depth if depth else draft.opening)
            ]

            def look(group: list[int], rows: list[int] = rows, depth: int = depth) -> list[Reply]:
                members, replies = [queries[rows[index]] for index in group], [drafts[rows[index]] for index in group]
                self._look(members, replies, depth, settings)
                return [draft.reply for draft in replies]

            if rows:
                self.omni.in_batches([queries[row] for row in rows], settings, look, "any-depth", progress)
        return [draft.reply for draft in drafts]

    def _undefended(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[_Draft]:
        """The model's own replies, with their ids."""
        ids_of: dict[int, list[int]] = {}

        def decode(group: list[int]) -> list[list[int]]:
            written = self.omni.write([queries[index] for index in group], settings)
            ids_of.update(zip(group, written, strict=True))
            return written

        replies = self.omni.decoded(queries, settings, decode, progress=progress)
        openings = prefill_ids(self.omni, queries)
        return [_Draft(reply, openings[row], self.omni.until_end(ids_of[row])) for row, reply in enumerate(replies)]

    def _look(self, queries: list[Query], drafts: list[_Draft], depth: int, settings: GenerationSettings) -> None:
        """Ask anew, `depth` tokens in, and rewrite the replies of those that would now be refused."""
        began = time.perf_counter()
        left = settings.max_new_tokens - depth
        so_far = [[*draft.opening, *draft.ids[:depth]] for draft in drafts]
        # What has refused by now needs no second refusal behind the first.
        open_rows = []
        for row, draft in enumerate(drafts):
            draft.final = find_refusal(self.omni.decode(draft.ids[:depth])) is not None
            open_rows += [] if draft.final else [row]
        ahead = self._written(queries, so_far, open_rows, min(self.settings.lookahead, left))
        refusing = {row: ids for row, ids in ahead.items() if find_refusal(self.omni.decode(ids))}
        unfinished = [row for row, ids in refusing.items() if len(ids) == self.settings.lookahead < left]
        begun = {row: refusing[row] for row in unfinished}
        for row, ids in self._written(queries, so_far, unfinished, left - self.settings.lookahead, begun).items():
            refusing[row] = [*refusing[row], *ids]
        for row, ids in refusing.items():
            draft, kept = drafts[row], drafts[row].ids[:depth]
            draft.ids, draft.final = [*kept, *ids], True
            text = f"{self.omni.decode(kept)} {self.omni.decode(ids)}".strip()
            draft.reply = draft.reply.model_copy(update={"text": text, "tokens": len(draft.ids)})
        seconds = (time.perf_counter() - began) / len(drafts)
        for draft in drafts:
            draft.reply = draft.reply.model_copy(update={"seconds": draft.reply.seconds + seconds})

    def _written(
        self,
        queries: list[Query],
        so_far: list[list[int]],
        rows: list[int],
        tokens: int,
        begun: dict[int, list[int]] | None = None,
    ) -> dict[int, list[int]]:
        """For each of `rows` the ids, greedy and at most `tokens`, that follow a header behind what is written `so_far`
        and what was `begun` after that header."""
        if not rows:
            return {}
        members = [queries[row] for row in rows]
        targets = at_header(self.omni, [so_far[row] for row in rows])
        targets = [[*ids, *(begun or {}).get(row, [])] for row, ids in zip(rows, targets, strict=True)]
        batch = self.omni.encode(members, targets, prefill=False)
        finite = finite_logits(members)
        with torch.no_grad():
            ids = self.omni.model.generate(
                **batch.inputs, max_new_tokens=tokens, do_sample=False, logits_processor=finite
            )
        new = ids[:, batch.inputs["input_ids"].shape[1] :].tolist()
        return {row: self.omni.until_end(written) for row, written in zip(rows, new, strict=True)}
