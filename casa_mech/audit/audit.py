"""`audit`: what the safety token of a gated model causes, by intervention on the token alone.

A gate is trained to write a safety token before the reply. That attack success falls does not yet say that the token
did it: the adapter may refuse whatever token stands there, or replies may fall apart because a token stands there at
all. So every query is answered several times with nothing but the token changed (do(safe), do(unsafe), do(random
word)), and by the base model with and without a random word before its reply; benign counterparts say how often a
reply fails for reasons that have nothing to do with harm.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from casa_mech.audit.names import BASE, BASE_WORD, COLUMNS, GROUPS, INTERVENTIONS, OWN, SAFE, UNSAFE, WORD
from casa_mech.audit.result import AuditResult
from casa_mech.casa import Casa
from casa_mech.defenses.base import Defense
from casa_mech.defenses.refusal_token import RefusalTokenSettings
from casa_mech.defenses.safety_token import SafetyTokenDefense
from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import CASA, judge_for, reply_table
from casa_mech.evaluation.sources import check_labels
from casa_mech.judging import Judge, judge_all
from casa_mech.judging.verdict import UNDECIDED
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply, SafetyToken
from casa_mech.queries.media import check_media


def audit(
    system: Casa | Defense,
    queries: Sequence[Query],
    judge: Judge | None = None,
    *,
    settings: GenerationSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AuditResult:
    """Answer every query under each of `INTERVENTIONS` and judge the replies.

    Args:
        system: a `Casa`, or one of the defences casa, ssft-token and refusal-token, whose threshold is the gate's own
            decision; the refusal token's pair is ssft-token's, so that do(safe) means the same.
        queries: labelled, with `meta["attack"]`; harmful ones and benign counterparts. A prefill follows the token.
        judge: default the exact judge where every query is of the micro-world, else keywords.
        settings: of the replies; greedy, for then the reply under the gate's own token is one of the forced ones.
        seed: of the random words and the bootstrap.
        progress: show bars.

    Raises:
        InputError: no queries, labels missing, sampling, or a system without a safety token of its own.
    """
    casa, threshold = _casa_of(system)
    settings = settings or GenerationSettings(max_new_tokens=32)
    if settings.do_sample:
        raise InputError("an audit needs greedy replies: leave do_sample out of the settings")
    check_labels(queries)
    ids = [(query.meta.get("attack"), query.surface, query.label, query.id) for query in queries]
    twice = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
    if twice is not None:
        raise InputError(f"the query {twice[-1]!r} is there twice: give each query an id of its own")
    check_media(queries)
    judge = judge or judge_for(queries)
    omni, words = casa.omni, random_words(casa.omni, len(queries), seed)
    inserted = {name: [""] * len(queries) for name in (BASE, OWN)}
    inserted |= {name: [omni.tokenizer.decode(ids) for ids in words] for name in (BASE_WORD, WORD)}
    inserted |= {SAFE: [casa.config.safe_token] * len(queries), UNSAFE: [casa.config.unsafe_token] * len(queries)}
    answers: dict[str, list[Reply]] = {}
    with casa.disabled() as base:
        answers[BASE] = base.generate(queries, settings, progress)
        answers[BASE_WORD] = base.generate(_prefilled(queries, inserted[BASE_WORD]), settings, progress)
    forced: dict[str, SafetyToken | list[list[int]]] = {SAFE: "safe", UNSAFE: "unsafe", WORD: words}
    for name, force in forced.items():
        answers[name] = casa.generate(queries, settings, force=force, threshold=threshold, progress=progress)
    # Greedy decoding: the reply behind the gate is the one under the token that it chooses.
    answers[OWN] = [
        answers[UNSAFE if reply.safety_token == "unsafe" else SAFE][row] for row, reply in enumerate(answers[SAFE])
    ]
    decisions = answers[SAFE]
    tables = []
    for name in INTERVENTIONS:
        replies = [
            decision.model_copy(update={"text": reply.text, "tokens": reply.tokens})
            for decision, reply in zip(decisions, answers[name], strict=True)
        ]
        verdicts = judge_all(judge, queries, replies, progress=progress)
        table = reply_table(omni.source, name, queries, replies, verdicts)
        tables.append(table.assign(intervention=name, inserted=inserted[name]))
    replies_table = _decided(pd.concat(tables, ignore_index=True)[list(COLUMNS)])
    return AuditResult(replies_table, omni.source, system_name(system), seed)


def system_name(system: Casa | Defense) -> str:
    """What titles call a gate: CASA, or its relatives without safety attention, ssft-token and refusal-token."""
    if isinstance(system, Casa):
        return "ssft-token" if system.config.form == "none" else CASA
    if isinstance(system, SafetyTokenDefense) and system.name == "casa":
        return system_name(system.casa)
    threshold = getattr(getattr(system, "settings", None), "threshold", None)
    return system.label if threshold is None else f"{system.label} (threshold {threshold:g})"


def random_words(omni: Omni, n: int, seed: int = 0) -> list[list[int]]:
    """A token of one whole word for each of `n` queries, drawn from the tokenizer's vocabulary: ids [n][1].

    Words are lower-case and of at least three letters; special tokens are left out.
    """
    tokenizer = omni.tokenizer
    special = set(tokenizer.all_special_ids)
    texts = ((index, tokenizer.decode([index])) for index in sorted(set(tokenizer.get_vocab().values()) - special))
    ids = [index for index, text in texts if _is_word(text)]
    if not ids:
        raise InputError(f"{omni.source}: its tokenizer has no token that is a whole lower-case word")
    return [[ids[choice]] for choice in np.random.default_rng([seed, n]).integers(len(ids), size=n)]


def _decided(replies: pd.DataFrame) -> pd.DataFrame:
    """`replies` without the queries that the judge left undecided under some intervention: they are no failures."""
    keys = pd.MultiIndex.from_frame(replies[[*GROUPS, "query_id"]])
    left_out = keys[replies["outcome"] == UNDECIDED].unique()
    if len(left_out) == len(keys.unique()):
        raise InputError("the judge decided no query under all interventions: there is nothing to audit")
    if len(left_out):
        warnings.warn(f"{len(left_out)} queries are left out: the judge is undecided on a reply", stacklevel=3)
    return replies[~keys.isin(left_out)].reset_index(drop=True)


def _is_word(text: str) -> bool:
    bare = text.strip()
    return len(bare) >= 3 and bare.isascii() and bare.isalpha() and bare.islower()


def _casa_of(system: Casa | Defense) -> tuple[Casa, float | None]:
    """The gate, and the threshold above which it takes the unsafe token (None: it takes the likelier one)."""
    if isinstance(system, Casa):
        return system, None
    label = getattr(system, "label", type(system).__name__)
    if not isinstance(system, SafetyTokenDefense):
        raise InputError(
            f"{label} does not choose a safety token as a gate does: an audit takes casa, ssft-token and refusal-token"
        )
    if system.safety_prompt or system.settings.hard or system.settings.order != "gate_first":
        raise InputError(f"{label}: an audit takes it with order=gate_first, without a safety prompt or a hard gate")
    settings = system.settings
    return system.casa, settings.threshold if isinstance(settings, RefusalTokenSettings) else None


def _prefilled(queries: Sequence[Query], words: Sequence[str]) -> list[Query]:
    return [
        query.model_copy(update={"prefill": f"{word.strip()} {query.prefill}".strip()})
        for query, word in zip(queries, words, strict=True)
    ]
