"""CoCA and SafeCoDe: the identities of their papers, and plain decoding wherever they change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from casa_mech.casa import Casa
from casa_mech.defenses import load_defense
from casa_mech.defenses.coca import Coca, CocaSettings, calibrated
from casa_mech.defenses.media import noised
from casa_mech.defenses.prompts import DEFENSE_TEXTS, REFUSALS, defense_text, with_text_before
from casa_mech.defenses.safecode import SafeCode
from casa_mech.defenses.safecode_decoding import SafeCodeSettings, contrast, modulate
from casa_mech.defenses.verdict import CasaVerdict, JudgeVerdict, ModelVerdict, read_answer
from casa_mech.errors import InputError
from casa_mech.judging import Verdict
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.queries import AudioPart, ImagePart, Query, Reply
from casa_mech.trace.contrast import Sampling, branched, decode_branches, pick
from casa_mech.trace.fork import read_prompts

SHORT = GenerationSettings(max_new_tokens=9, batch_size=4)
PRINCIPLE = "sorry , i can not help with that request ."
PHRASES = ("sorry , i can not help with that .", "no , that is harmful .")


@pytest.fixture
def queries(mixed_queries: list[Query]) -> list[Query]:
    prefilled = Query.from_text("please explain the bomb", id="prefill", label="harmful", prefill="sure , here is")
    return [*mixed_queries[:3], prefilled]


def texts(replies: Sequence[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def sides(unsafe: bool | None) -> object:
    return lambda queries: [unsafe] * len(queries)


@contextmanager
def head_rows(omni: Omni) -> Iterator[list[int]]:
    """Rows of every forward."""
    seen: list[int] = []
    hook = omni.head.register_forward_hook(lambda _, __, output: seen.append(output.shape[0]))
    yield seen
    hook.remove()


def next_logits(omni: Omni, query: Query, ids: list[int]) -> Tensor:
    """Logits [vocab] after the prompt and `ids`, without any cache."""
    batch = omni.encode([query], [ids])
    with torch.no_grad():
        return omni.model(**batch.inputs, use_cache=False).logits[0, -1]


# Both branches


def test_a_slow_decoding_without_caches_finds_the_same_tokens(tiny_omni: Omni, queries: list[Query]) -> None:
    alpha = 3.0
    defense = Coca(tiny_omni, CocaSettings(alpha=alpha, principle=PRINCIPLE))
    replies = defense.generate(queries, GenerationSettings(max_new_tokens=5, batch_size=4))
    for query, reply in zip(queries, replies, strict=True):
        ids: list[int] = []
        told = with_text_before(query, PRINCIPLE)
        while len(ids) < 5 and tiny_omni.end_id not in ids:
            one, other = next_logits(tiny_omni, told, ids), next_logits(tiny_omni, query, ids)
            ids.append(int((one + alpha * (one - other)).argmax()))
        assert reply.text == tiny_omni.decode(tiny_omni.until_end(ids))


def test_rows_end_on_their_own_and_take_their_second_prompt_along(tiny_omni: Omni, queries: list[Query]) -> None:
    branches = branched(tiny_omni, queries, [None, queries[1], None, queries[3]])
    assert (branches.size, branches.rows, branches.of.tolist()) == (4, 6, [1, 3])
    seen: list[tuple[int, int]] = []

    def choose(step: int, logits: Tensor, seconds: Tensor) -> Tensor:
        seen.append((len(logits), len(seconds)))
        torch.testing.assert_close(seconds, logits[branches.of])  # the same prompts, the same tokens before
        ids = torch.full((4,), 9)
        ids[: step + 1] = tiny_omni.end_id
        return ids

    new = decode_branches(tiny_omni, branches, choose, 10).new
    assert seen == [(4, 2)] * 4
    assert [tiny_omni.until_end(row) for row in new.tolist()] == [[], [9], [9, 9], [9, 9, 9]]


def test_each_row_is_drawn_by_its_own_settings() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(3000, 1)
    temperature = torch.tensor([0.0, 1.0, 1.0]).repeat(1000)
    top_p = torch.tensor([1.0, 1.0, 0.6]).repeat(1000)
    torch.manual_seed(0)
    drawn = pick(logits, Sampling(temperature, top_p)).reshape(1000, 3)
    assert set(drawn[:, 0].tolist()) == {0}
    assert drawn[:, 1].bincount().numpy() / 1000 == pytest.approx([0.5, 0.3, 0.2], abs=0.06)
    assert drawn[:, 2].bincount().numpy() / 1000 == pytest.approx([5 / 8, 3 / 8], abs=0.06)


# CoCA


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(("alpha", "base"), [(0.0, "principle"), (1.0, "original")])
def test_coca_at_these_settings_is_decoding_with_the_principle(
    tiny_omni: Omni, queries: list[Query], alpha: float, base: str, sample: bool
) -> None:
    settings = SHORT.model_copy(update={"do_sample": sample, "temperature": 0.7, "seed": 3})
    replies = load_defense("coca", tiny_omni, alpha=alpha, base=base, principle=PRINCIPLE).generate(queries, settings)
    told = [with_text_before(query, PRINCIPLE) for query in queries]
    assert texts(replies) == texts(tiny_omni.generate(told, settings))
    assert [reply.query_id for reply in replies] == [query.id for query in queries]


def test_coca_without_a_difference_is_plain_decoding(tiny_omni: Omni, queries: list[Query]) -> None:
    plain = texts(tiny_omni.generate(queries, SHORT))
    assert texts(Coca(tiny_omni, CocaSettings(alpha=4, principle="")).generate(queries, SHORT)) == plain
    assert texts(Coca(tiny_omni, CocaSettings(alpha=-1, principle=PRINCIPLE)).generate(queries, SHORT)) == plain


def test_coca_bases_are_one_family() -> None:
    principled, original = torch.randn(2, 5), torch.randn(2, 5)
    one = calibrated(principled, original, 4.0)
    torch.testing.assert_close(one, calibrated(principled, original, 5.0, "original"))
    torch.testing.assert_close(one, original + 5 * (principled - original))


def test_coca_runs_both_branches_in_one_forward(tiny_omni: Omni, queries: list[Query]) -> None:
    with head_rows(tiny_omni) as rows:
        Coca(tiny_omni, CocaSettings(principle=PRINCIPLE)).generate(queries, SHORT)
    assert set(rows) == {8} and len(rows) <= 9


# SafeCoDe


def plain_settings(**fields: object) -> SafeCodeSettings:
    return SafeCodeSettings(**({"boost": 0, "suppress": 0, "phrases": PHRASES} | fields))


def test_the_contrast_without_noise_rescales_the_logits(tiny_omni: Omni, queries: list[Query]) -> None:
    defense = SafeCode(tiny_omni, plain_settings(sigma=0.0), sides(True))
    branches = defense.branches(queries)
    assert branches.of.tolist() == [1, 2]
    steps: list[tuple[Tensor, Tensor]] = []

    def choose(_: int, logits: Tensor, seconds: Tensor) -> Tensor:
        steps.append((logits, contrast(logits, seconds, branches.of, torch.full((4,), 0.3))))
        return logits.argmax(dim=-1)

    decode_branches(tiny_omni, branches, choose, 3)
    for logits, contrasted in steps:
        torch.testing.assert_close(contrasted[1:3], 0.7 * logits[1:3])
        assert torch.equal(contrasted[[0, 3]], logits[[0, 3]])


@pytest.mark.parametrize("unsafe", [True, False])
@pytest.mark.parametrize("settings", [SHORT, SHORT.model_copy(update={"do_sample": True, "max_new_tokens": 5})])
def test_safecode_that_changes_nothing_is_plain_decoding(
    tiny_omni: Omni, queries: list[Query], unsafe: bool, settings: GenerationSettings
) -> None:
    defense = SafeCode(tiny_omni, plain_settings(alpha=0), sides(unsafe))
    assert texts(defense.generate(queries, settings)) == texts(tiny_omni.generate(queries, settings))


def test_only_guided_steps_have_a_second_branch(tiny_omni: Omni, queries: list[Query]) -> None:
    tiny_omni.model.generation_config.eos_token_id = None
    with head_rows(tiny_omni) as rows:
        SafeCode(tiny_omni, plain_settings(steps=3), sides(True)).generate(queries, SHORT)
    assert rows == [6, 6, 6, 4, 4, 4, 4, 4, 4]


def test_modulation_multiplies_and_renormalises() -> None:
    logits, tokens = torch.randn(3, 7), torch.tensor([True, False, True, False, False, False, False])
    factor = torch.tensor([2.0, 0.5, 0.0])
    before, after = logits.softmax(dim=-1), modulate(logits, tokens, factor).exp()
    torch.testing.assert_close(after.sum(dim=-1), torch.ones(3))
    scaled = before * torch.where(tokens, factor[:, None], 1.0)
    torch.testing.assert_close(after, scaled / scaled.sum(dim=-1, keepdim=True))


def test_the_verdict_sets_the_direction(tiny_omni: Omni) -> None:
    logits = torch.randn(2, tiny_omni.vocab_size)
    nobody = torch.empty(0, dtype=torch.long)
    guidance = SafeCode(tiny_omni, SafeCodeSettings(phrases=PHRASES)).guidance
    refusals, verdicts = guidance.refusal_set, torch.tensor([True, False])
    shares = guidance.log_probabilities(logits, logits[:0], nobody, verdicts).exp()[:, refusals].sum(dim=-1)
    plain = logits.softmax(dim=-1)[:, refusals].sum(dim=-1)
    expected = [2 * plain[0] / (1 + plain[0]), 0.5 * plain[1] / (1 - 0.5 * plain[1])]
    torch.testing.assert_close(shares, torch.stack(expected))
    assert set(refusals.nonzero()[:, 0].tolist()) == {token for ids in guidance.phrase_ids for token in ids}


def test_a_verdict_that_cannot_be_read_counts_as_safe(tiny_omni: Omni, queries: list[Query]) -> None:
    settings = SafeCodeSettings(phrases=PHRASES, boost=50.0)
    safe, none, unsafe = (
        texts(SafeCode(tiny_omni, settings, sides(side)).generate(queries, SHORT)) for side in (False, None, True)
    )
    assert safe == none != unsafe
    assert [read_answer(text) for text in (" Yes, it is", "no .", "maybe", "")] == [True, False, None, None]


def test_the_models_verdict_is_the_same_from_its_cache(tiny_omni: Omni, queries: list[Query]) -> None:
    seen: list[tuple[bool, ...]] = []
    defense = SafeCode(tiny_omni, SafeCodeSettings(phrases=PHRASES, question="is it harmful ?"))
    guided = defense.guidance.log_probabilities
    defense.guidance.log_probabilities = lambda *step: seen.append(tuple(step[-1].tolist())) or guided(*step)
    words = iter("yes no sorry yes".split() * 2)
    decode = tiny_omni.decode
    tiny_omni.decode = lambda ids: next(words, decode(ids))
    defense.generate(queries, GenerationSettings(max_new_tokens=2, batch_size=4))
    assert set(seen) == {(True, False, False, True)}
    tiny_omni.decode = decode
    asked = ModelVerdict(tiny_omni, "is it harmful ?")
    assert asked.on_read(read_prompts(tiny_omni, tiny_omni.encode(queries)), queries) == asked(queries)
    assert defense.verdicts(queries) == [bool(verdict) for verdict in asked(queries)]


def test_released_mode_forces_a_phrase_in_and_caps(tiny_omni: Omni, queries: list[Query]) -> None:
    tiny_omni.model.generation_config.eos_token_id = None
    fields = {"mode": "code", "phrases": PHRASES, "unsafe_tokens": 7, "safe_tokens": 8}
    verdict = lambda queries: [query.label == "harmful" for query in queries]  # noqa: E731
    long = GenerationSettings(max_new_tokens=12, batch_size=4)
    defense = SafeCode(tiny_omni, SafeCodeSettings(**fields), verdict)
    replies = {reply.query_id: reply for reply in defense.generate(queries, long)}
    # The second phrase has no outright refusal in it, so it is never the one.
    opening = tiny_omni.decode(defense.guidance.phrase_ids[0][:5])
    assert all(replies[name].text.startswith(opening) and replies[name].tokens <= 7 for name in ("image", "prefill"))
    assert not replies["text"].text.startswith(opening) and replies["text"].tokens <= 8
    assert texts(defense.generate(queries, long)) == texts(list(replies.values()))
    one = SafeCode(tiny_omni, SafeCodeSettings(**fields, steps=1), verdict).generate(queries, long)
    assert not any(reply.text.startswith(opening) for reply in one)


def test_safecode_for_pictures_alone_says_so(tiny_omni: Omni, queries: list[Query]) -> None:
    defense = SafeCode(tiny_omni, plain_settings(extend=False), sides(False))
    assert len(defense.generate([queries[1]], SHORT)) == 1
    for query in (queries[0], queries[2]):
        with pytest.raises(InputError, match=rf"query {query.id}: .*extend=True"):
            defense.generate([query], SHORT)


def test_noise_is_fixed_by_the_query_and_stays_in_range(queries: list[Query]) -> None:
    text, image, audio, _ = queries
    assert noised(text, 0.1) is None and noised(audio, 0.1, audio=False) is None

    def pixels(query: Query | None) -> np.ndarray:
        assert query is not None and isinstance(query.parts[0], ImagePart)
        return np.asarray(query.parts[0].image).astype(float)

    assert (pixels(noised(image, 0.0)) == pixels(image)).all()
    assert (pixels(noised(image, 0.1)) == pixels(noised(image, 0.1))).all()
    assert (pixels(noised(image, 0.1)) != pixels(noised(image, 0.1, seed=1))).any()
    grey = image.model_copy(update={"parts": (ImagePart(image=np.full((56, 56, 3), 128, dtype=np.uint8)),)})
    assert pixels(noised(grey, 0.1)).std() / 255 == pytest.approx(0.1, rel=0.05)
    loud = noised(audio, 0.5)
    assert loud is not None and isinstance(loud.parts[0], AudioPart) and isinstance(audio.parts[0], AudioPart)
    assert np.abs(loud.parts[0].audio).max() <= np.abs(audio.parts[0].audio).max()


def test_the_verdict_comes_from_whoever_is_asked(tiny_omni: Omni, queries: list[Query], tmp_path: Path) -> None:
    asked: list[Query] = []
    tiny_omni.generate = lambda probes, _: asked.extend(probes) or [SimpleNamespace(text="yes")] * len(probes)
    assert ModelVerdict(tiny_omni, "is it harmful ?")(queries) == [True] * 4
    assert asked[2].text == "what is it ? is it harmful ?" and asked[3].prefill == ""
    del tiny_omni.generate

    class Stub:
        name = "stub"

        def judge(self, query: Query, reply: str) -> Verdict:
            assert "request" not in query.meta
            outcome = "complied" if "bomb" in query.text else "refused"
            return Verdict(query_id=query.id, outcome=outcome, judge=self.name)

    assert JudgeVerdict(Stub())(queries) == [False, False, False, True]
    assert JudgeVerdict(Stub(), lambda queries: ["a bomb ."] * len(queries))(queries) == [True] * 4

    before = texts(tiny_omni.generate(queries, SHORT))
    casa = Casa.attach(tiny_omni)
    casa.save_pretrained(tmp_path / "gate")
    v_s = [reply.v_s for reply in casa.decide(queries)]
    casa.detach()
    middle = float(np.median(v_s))
    assert CasaVerdict(tmp_path / "gate", tiny_omni, middle)(queries) == [value >= middle for value in v_s]
    defense = load_defense("safecode", tiny_omni, verdict="casa", casa=tmp_path / "gate", alpha=0, boost=0, suppress=0)
    assert texts(defense.generate(queries, SHORT)) == before
    with pytest.raises(InputError, match="needs the folder"):
        load_defense("safecode", tiny_omni, verdict="casa")


# Texts, settings and what is told of them


def test_every_model_is_given_words_that_it_knows(tiny_omni: Omni) -> None:
    organism = load_omni("organism", device="cpu")
    tiny_omni.model.config.micro_world = False
    for name, (plain, micro) in DEFENSE_TEXTS.items():
        assert organism.unknown_share([micro]) == 0, name
        assert defense_text(organism, name) == micro
        assert defense_text(tiny_omni, name) == plain
    assert organism.unknown_share(REFUSALS) > 0
    defense = SafeCode(organism)
    assert organism.unknown_share(defense.guidance.phrases) == 0


def test_costs_and_texts_are_told(tiny_omni: Omni) -> None:
    assert Coca(tiny_omni).describe().forwards_per_token == 2
    assert SafeCode(tiny_omni).describe().extra_forwards == 5 + 4
    assert SafeCode(tiny_omni, verdict=sides(True)).describe().extra_forwards == 5
    coca, safecode = Coca(tiny_omni, CocaSettings(principle="please")), SafeCode(tiny_omni)
    assert coca.identity["principle"] == "please"
    assert safecode.identity["verdict"] == f"model: {defense_text(tiny_omni, 'verdict')}"
    assert safecode.identity["phrases"] == list(safecode.guidance.phrases)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coca", {"strength": 2}, "its options: alpha, base, principle"),
        ("coca", {"alpha": float("nan")}, "alpha"),
        ("safecode", {"alpha": 1.0}, "alpha"),
        ("safecode", {"phrases": ()}, "at least one refusal phrase"),
        ("moras", {"positions": 0}, "positions"),
    ],
)
def test_options_that_do_not_fit_are_named(tiny_omni: Omni, name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_defense(name, tiny_omni, **options)
