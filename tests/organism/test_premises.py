"""The knobs of an organism's training: what they draw, that they are off by default, and the card's rows on them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from casa_mech.errors import InputError
from casa_mech.judging import MicroWorldJudge
from casa_mech.omni import Omni
from casa_mech.organism.architecture import ROLE_WORDS, OrganismShape, new_omni
from casa_mech.organism.card import card, card_markdown
from casa_mech.organism.curriculum import SYSTEMS, Mixture, draw_example
from casa_mech.organism.premise_rows import TITLES, after_random_word, header_states, ruled_requests
from casa_mech.organism.premises import ALL, PRESETS, Premises, premise_texts, safety_question, varied_training_examples
from casa_mech.organism.recipe import (
    ALIGNMENT,
    AUDIO,
    IMAGE,
    LANGUAGE,
    RECIPES,
    WORDS,
    Stage,
    recipe_of,
)
from casa_mech.organism.world import default_world, words_of
from casa_mech.queries import Example, TextPart

SMALL = OrganismShape(
    d_model=32, layers=2, heads=2, kv_heads=1, d_mlp=32, vision_width=32, vision_layers=1, audio_width=32,
    audio_layers=1,
)  # fmt: skip


@pytest.fixture
def young() -> Omni:
    """An untrained organism, small."""
    return new_omni(default_world().vocabulary(), SMALL, seed=0)


def mixture_of(stage: str, premises: Premises = ALL) -> Mixture:
    """The mixture of the stage named `stage` in the recipe of `premises`."""
    return next(
        entry.mixture for entry in recipe_of(premises).stages if isinstance(entry, Stage) and entry.name == stage
    )


def drawn(mixture: Mixture, n: int = 400) -> list[Example]:
    rng = np.random.default_rng(0)
    return [draw_example(default_world(), mixture, rng) for _ in range(n)]


def test_without_premises_the_stages_are_the_first_recipes() -> None:
    stages = [entry for entry in recipe_of(Premises()).stages if isinstance(entry, Stage)]
    assert stages == [WORDS, LANGUAGE, IMAGE, AUDIO, ALIGNMENT]
    assert RECIPES["first"] == recipe_of(Premises()) != RECIPES["organism"]
    for row in drawn(ALIGNMENT.mixture):
        assert row.query.system in (None, *SYSTEMS)
        assert "warning" not in row.reply


def test_every_text_is_in_the_worlds_words() -> None:
    texts, known = premise_texts(), {*default_world().words, *ROLE_WORDS}
    for group in (texts.questions, texts.safety_rules, texts.category_rules):
        assert not set(group["seen"]) & set(group["held_out"])
        assert not {word for lines in group.values() for line in lines for word in words_of(line)} - known
    assert {*texts.safety_words, *words_of(" ".join((*texts.openings, *texts.preparations)))} <= known
    for names in texts.refused_categories.values():
        assert all(default_world().categories[name] for name in names)


def test_tolerance_puts_random_words_before_its_share_of_the_replies_in_every_stage() -> None:
    for stage in recipe_of(Premises(tolerance=0.3)).stages:
        if isinstance(stage, Stage):
            prefills = [row.query.prefill for row in drawn(stage.mixture)]
            words = [prefill.split() for prefill in prefills if prefill and not prefill.startswith("sure")]
            assert 0.2 < len(words) / len(prefills) < 0.4, stage.name
            assert {len(entry) for entry in words} <= {1, 2}
            assert len({entry[0] for entry in words}) > 50


def test_rules_are_followed_and_what_they_allow_is_answered() -> None:
    world = default_world()
    counts: Counter[tuple[bool, bool]] = Counter()
    for row in drawn(mixture_of("language", Premises(rules=1.0)), 1200):
        if "category" not in row.query.meta:  # random letters to spell
            continue
        assert row.query.system
        rule = row.query.system.removeprefix(SYSTEMS[0]).strip()
        meta = row.query.meta
        named = [name for name, phrase in world.phrases.items() if f" {phrase} " in f" {rule} "]
        harmful = world.categories.get(meta.get("category", ""), False)
        forbidden = meta["category"] in named if named else harmful
        assert (row.reply in world.refusals) == (forbidden and meta["task"] == "request"), (rule, meta)
        counts[bool(named), forbidden] += meta["task"] == "request"
    assert min(counts.values()) > 15


def test_partial_alignment_refuses_some_categories_and_fewer_on_media() -> None:
    world, texts = default_world(), premise_texts()
    refused: Counter[tuple[str, bool]] = Counter()
    for row in drawn(mixture_of("safety", Premises(alignment="partial")), 1500):
        if row.query.label == "harmful":
            surface = "text" if row.query.meta["surface"] == "text" else "media"
            expected = row.query.meta["category"] in texts.refused_categories[surface]
            assert (row.reply in world.refusals) == expected
            refused[surface, expected] += 1
        else:
            assert row.reply not in world.refusals
    assert 0.55 < refused["text", True] / (refused["text", True] + refused["text", False]) < 0.75
    assert 0.15 < refused["media", True] / (refused["media", True] + refused["media", False]) < 0.4


def test_harm_unasked_shows_in_the_first_word_of_every_answer_and_the_judge_takes_it() -> None:
    judge = MicroWorldJudge()
    for mixture in (mixture_of("language"), mixture_of("language", Premises(unasked=True))):
        for row in drawn(mixture):
            if row.query.label is not None and row.reply not in default_world().refusals:
                assert row.reply.startswith("warning :") == (row.query.label == "harmful")
                assert judge.judge(row.query, row.reply).outcome == "complied"


def test_safety_questions_are_answered_by_the_words_they_use() -> None:
    world, rng = default_world(), np.random.default_rng(0)
    for _ in range(200):
        query = safety_question(world, rng)
        word = next(word for word in premise_texts().safety_words if f" {word} " in f" {query.text} ")
        true = premise_texts().safety_words[word] == (query.meta["danger"] == "yes")
        assert query.meta["answer"] == (f"yes , it is {word} ." if true else f"no , it is not {word} .")


def test_a_refusal_by_category_does_not_call_the_topic_dangerous() -> None:
    for row in drawn(mixture_of("language", Premises(rules=1.0)), 1200):
        if row.query.label == "benign" and row.reply in default_world().refusals:
            assert "dangerous" not in row.reply and "hurt" not in row.reply


def test_knobs_are_set_by_name_and_mistakes_are_named() -> None:
    changed = Premises().changed(["tolerance=0.5", "unasked=on", "letter-code=split"])
    assert changed == Premises(tolerance=0.5, unasked=True, letter_code="split")
    assert PRESETS["organism"].changed(["tolerance=off"]).tolerance == 0
    for option, message in (("tolerance", "sets no knob"), ("colour=red", "sets no knob"), ("rules=2", "knob rules")):
        with pytest.raises(InputError, match=message):
            Premises().changed([option])
    assert all(entry["reason"] for entry in ALL.record())


def test_ruled_requests_are_forbidden_or_allowed_in_held_out_words() -> None:
    world, texts = default_world(), premise_texts()
    seen = {*texts.safety_rules["seen"], *texts.category_rules["seen"]}
    for forbids in (True, False):
        queries = ruled_requests(40, 0, forbids)
        assert len(queries) == 40 and not {query.system for query in queries} & seen
        for query in queries:
            assert query.system is not None
            named = any(phrase in query.system for phrase in (world.phrases[query.meta["category"]],))
            safety = query.system in texts.safety_rules["held_out"]
            assert forbids == (query.label == "harmful" if safety else named)


def test_the_card_has_the_premises_with_their_thresholds(young: Omni) -> None:
    record = card(young, n=4, progress=False, knobs=ALL.record())
    measures = Counter(row["measure"] for row in record["premises"])
    assert measures["tolerance"] == 5 and measures["probe"] == measures["rules_refused"] == 4
    assert set(TITLES) <= set(measures)
    text = card_markdown(record)
    assert "| missed |" in text and "| tolerance | 0.3 |" in text
    assert all(row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9 for row in record["premises"])


def test_header_states_and_random_words(young: Omni) -> None:
    queries = default_world().requests(3)
    touched = after_random_word(queries, default_world(), 0)
    assert [query.prefill in default_world().words for query in touched] == [True] * 3
    states = header_states(young, queries, batch_size=2)
    assert states.shape == (3, young.d_model) and bool(states.abs().sum(1).all())
    other = queries[0].model_copy(update={"parts": (TextPart(text="hear"),)})
    assert not np.allclose(states[0], header_states(young, [other])[0])


def test_varied_training_examples_keep_harm_and_vary_what_is_benign() -> None:
    world = default_world()
    plain, varied = world.training_examples(400, 3), varied_training_examples(world, 400, 3)
    tasks: Counter[str] = Counter()
    for before, after in zip(plain, varied, strict=True):
        assert (after.query.id, after.query.label) == (before.query.id, before.query.label)
        if after.query.label == "harmful":
            assert after == before
        else:
            assert after.reply not in world.refusals
            tasks[after.query.meta["task"]] += 1
            assert MicroWorldJudge().judge(after.query, after.reply).outcome == "complied"
    assert tasks["request"] == 100 and min(tasks.values()) > 8 and len(tasks) == 6
    questions = [row.query for row in varied if row.query.label == "benign" and row.query.meta["task"] != "request"]
    assert 0.35 < np.mean([query.meta["danger"] == "yes" for query in questions]) < 0.65
    assert len({row.reply.split(",")[0] for row in varied if row.query.meta["task"] == "request"}) > 3
