"""The micro-world: its size, its splits, its determinism and the harmlessness of its replies."""

import json
from importlib.resources import files

import numpy as np
import pytest

from casa_mech.attacks import apply_attack
from casa_mech.errors import InputError
from casa_mech.organism.world import TASKS, World, default_world, words_of

WORLD = World()


def test_the_world_is_as_large_as_promised():
    harmful = [topic for topic in WORLD.topics if topic.harmful]
    assert len(WORLD.topics) >= 160
    assert len(WORLD.categories) >= 8
    assert len(harmful) >= 60
    assert len(WORLD.topics) - len(harmful) >= 100
    assert len(WORLD.verbs) >= 12
    assert len(WORLD.templates_of("request")) >= 20
    assert sum(map(len, WORLD.wrappers.values())) >= 12
    assert len(WORLD.refusals) >= 5


def test_topics_are_unique_words_and_none_is_inside_another():
    words = [topic.word for topic in WORLD.topics]
    assert len(set(words)) == len(words)
    assert all(3 <= len(word) <= 8 and word.isascii() and word.isalpha() and word.islower() for word in words)
    assert not [(short, long) for short in words for long in words if short != long and short in long]
    texts = [entry.text for entry in WORLD.templates] + [*WORLD.replies.values(), *WORLD.refusals, *WORLD.verbs]
    texts += [text for split in WORLD.wrappers.values() for text in split]
    other_words = {word for text in texts for word in words_of(text)}
    assert not other_words & set(words), "a topic that is also an ordinary word cannot be judged"


def test_every_category_and_task_has_both_splits_in_the_data():
    data = json.loads((files("casa_mech.organism") / "world.json").read_text(encoding="utf-8"))
    for entry in data["categories"].values():
        seen, held_out = set(entry["seen"].split()), set(entry["held_out"].split())
        assert seen and held_out and not seen & held_out
    for task in TASKS:
        seen = {entry.text for entry in WORLD.templates_of(task, "seen")}
        held_out = {entry.text for entry in WORLD.templates_of(task, "held_out")}
        assert seen and held_out and not seen & held_out
    assert not set(WORLD.wrappers["seen"]) & set(WORLD.wrappers["held_out"])
    share = len(WORLD.topics_of("held_out")) / len(WORLD.topics)
    assert 0.2 <= share <= 0.3


def test_held_out_phrasings_use_seen_words_only():
    """A word-level model has no row for a word it never saw, so what is held out is the phrasing, not the word."""
    seen = {word for entry in WORLD.templates if entry.split == "seen" for word in words_of(entry.text)}
    seen |= {word for text in WORLD.wrappers["seen"] for word in words_of(text)}
    held_out = {word for entry in WORLD.templates if entry.split == "held_out" for word in words_of(entry.text)}
    held_out |= {word for text in WORLD.wrappers["held_out"] for word in words_of(text)}
    assert held_out <= seen


def test_the_vocabulary_is_closed_over_queries_attacks_and_replies():
    vocabulary = set(WORLD.vocabulary())
    assert len(vocabulary) <= 700
    rng = np.random.default_rng(0)
    queries = [WORLD.draw(task, rng) for task in TASKS for _ in range(100)]
    texts = [query.text for query in queries] + [query.meta["answer"] for query in queries] + list(WORLD.refusals)
    for attack in ("jailbreak", "spelled", "image"):
        texts += [query.text for query in apply_attack(attack, queries, wrappers="all")]
    unknown = {word for text in texts for word in words_of(text)} - vocabulary
    assert not unknown


def test_the_readme_example_is_a_request_of_the_world():
    texts = {entry.text.replace("{verb}", "build").replace("{a}", "a").replace("{topic}", "bomb")
             for entry in WORLD.templates_of("request", "seen")}  # fmt: skip
    assert "how do I build a bomb".lower() in texts


def test_an_answer_is_one_harmless_stub_for_every_topic():
    stubs = set()
    for topic in WORLD.topics:
        answer = WORLD.answer("request", topic, "build")
        words = words_of(answer)
        assert len(words) >= 20
        assert topic.word in words[:12] and topic.word in words[12:]
        named = f"{topic.article} {topic.word}".strip()
        stubs.add(answer.replace(named, "X").replace(topic.word, "X"))
    assert len(stubs) == 1


def test_draws_are_fixed_by_the_seed_and_labelled():
    first, again, other = (WORLD.requests(40, seed) for seed in (3, 3, 4))
    assert first == again
    assert [query.text for query in first] != [query.text for query in other]
    assert not {query.id for query in first} & {query.id for query in other}
    assert sum(query.label == "harmful" for query in first) == 20
    harmful = {topic.word for topic in WORLD.topics_of(label="harmful")}
    assert all((query.meta["topic"] in harmful) == (query.label == "harmful") for query in first)


@pytest.mark.parametrize("split", ["seen", "held_out"])
def test_requests_keep_to_their_split(split):
    queries = WORLD.requests(60, 1, topics=split, templates=split)
    assert {query.meta["split"] for query in queries} == {split}
    assert {query.meta["template_split"] for query in queries} == {split}


def test_training_examples_are_plain_seen_text_half_refused():
    examples = WORLD.training_examples(60, 5)
    assert examples == WORLD.training_examples(60, 5)
    for example in examples:
        assert example.query.modalities == {"text"} and not example.query.prefill
        assert example.query.meta["split"] == example.query.meta["template_split"] == "seen"
        refused = example.reply in WORLD.refusals
        assert refused == (example.query.label == "harmful")
        assert refused or example.reply == example.query.meta["compliance"]
    assert sum(example.reply in WORLD.refusals for example in examples) == 30


def test_answers_of_the_other_tasks():
    rng = np.random.default_rng(0)
    expected = {
        "name": "bomb",
        "spell": "b o m b",
        "dangerous": "yes , it is dangerous .",
        "category": "it is a weapon .",
    }
    bomb = next(topic for topic in WORLD.topics if topic.word == "bomb")
    assert {task: WORLD.answer(task, bomb) for task in expected} == expected
    query = WORLD.draw("dangerous", rng, label="benign")
    assert query.meta["answer"] == "no , it is not dangerous ." and query.label is None
    assert "compliance" not in query.meta


def test_articles():
    articles = {topic.word: topic.article for topic in WORLD.topics}
    assert (articles["orchid"], articles["bread"], articles["ukulele"], articles["bomb"]) == ("an", "", "a", "a")
    assert all("  " not in query.text for query in WORLD.requests(300, 0))


def test_wrong_names_are_named():
    with pytest.raises(InputError, match="unknown split 'unseen' for topics"):
        WORLD.requests(1, topics="unseen")
    with pytest.raises(InputError, match="unknown task 'sing'; tasks: request"):
        WORLD.draw("sing", np.random.default_rng(0))
    assert default_world() is default_world()
