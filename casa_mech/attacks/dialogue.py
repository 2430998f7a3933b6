"""Attacks that hand a request over in pieces: over two turns, or over a picture and a clip.

CASA's paper names multi-turn and compositional attacks as untested; these are the plainest of their kinds.
"""

from __future__ import annotations

from casa_mech.attacks.audio import Speech
from casa_mech.attacks.image import image_word, typo
from casa_mech.attacks.seeding import query_rng
from casa_mech.attacks.text import key_as_said, marked, replace_key, replace_word
from casa_mech.attacks.voice import RATE
from casa_mech.attacks.wording import ENGLISH, Wording
from casa_mech.errors import InputError
from casa_mech.queries import AudioPart, Query, TextPart, Turn


def multi_turn(query: Query, wording: Wording = ENGLISH) -> Query:
    """The key word comes up in an earlier turn, which the assistant acknowledges; the request then only says "it".

    The two turns follow the query's own history. No safety token is put into the assistant's turn: nobody decided one.

    Raises:
        InputError: no key word, or one that the text does not say.
    """
    turns = (
        Turn(role="user", parts=(TextPart(text=wording.introduce.format(topic=key_as_said(query))),)),
        Turn(role="assistant", parts=(TextPart(text=wording.acknowledge),)),
    )
    changes = {
        "parts": replace_key(query, wording.refer),
        "history": query.history + turns,
        "meta": marked(query, surface="multi-turn", attack="multi-turn"),
    }
    return query.model_copy(update=changes)


def split(query: Query, seed: int = 0, speech: Speech = Speech(), wording: Wording = ENGLISH) -> Query:
    """The key word in a picture and the verb (`meta["verb"]`) in a clip; the text holds neither.

    The picture has MM-SafetyBench's TYPO layout, or is a strip of letter cells where the wording is drawn so.

    Raises:
        InputError: no key word or no verb, or one that the text does not say.
    """
    verb = query.meta.get("verb", "").strip()
    if not verb:
        raise InputError(f"query {query.id!r} has no verb to speak: set meta['verb'] to the verb of its text")
    # A benchmark's rephrased text names the verb.
    bare = {name: text for name, text in query.meta.items() if name != "rephrased"}
    parts = replace_word(query, verb, wording.verb_phrase, "verb")
    spoken = query.model_copy(update={"parts": parts, "meta": bare})
    shown = image_word(spoken, seed) if wording.letter_cells else typo(spoken, wording)
    rng = query_rng(query, seed, "split")
    clip = speech.say(verb, speech.settings(rng), query)
    audio = AudioPart(audio=speech.noisy(clip, query, seed, "split", rng), rate=RATE)
    meta = {**shown.meta, **marked(query, surface="split", attack="split")}
    return query.model_copy(update={"parts": (shown.parts[0], audio, *shown.parts[1:]), "meta": meta})
