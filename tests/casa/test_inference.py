"""What is done at inference beyond the paper: the base's own replies after a safe verdict, and decisions mid-reply."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.casa import stir

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa import generation as generation_module
from casa_mech.casa.generation import prefill_ids
from casa_mech.casa.recheck import _at_last_header, _header_ids, at_header
from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply, TextPart, Turn
from casa_mech.trace.gate import gated_prompt

SETTINGS = GenerationSettings(max_new_tokens=9, batch_size=3)
DECIDED = generation_module.decided


@pytest.fixture
def casa(tiny_omni: Omni) -> Casa:
    return stir(Casa.attach(tiny_omni))


def decide_in_turn(monkeypatch: pytest.MonkeyPatch, casa: Casa, verdicts: dict[str, Sequence[str]]) -> list[list[str]]:
    """Let the gate say `verdicts` of each query id, one after the other (the last again and again); returns the ids of
    the queries of each decision."""
    asked: list[list[str]] = []
    counts: dict[str, int] = dict.fromkeys(verdicts, 0)

    def scripted(omni, gate, group, *arguments, **named):
        prompt, _ = DECIDED(omni, gate, group, *arguments, **named)
        asked.append([query.id for query in group])
        classes = []
        for query in group:
            of_query = verdicts[query.id]
            classes.append(int(of_query[min(counts[query.id], len(of_query) - 1)] == "unsafe"))
            counts[query.id] += 1
        return prompt, classes

    monkeypatch.setattr(generation_module, "decided", scripted)
    monkeypatch.setattr("casa_mech.casa.recheck.decided", scripted)
    return asked


def written(omni: Omni, query: Query, after_header: list[int], n: int) -> list[int]:
    """Ids that the model writes after the header and `after_header`, by plain generation."""
    batch = omni.encode([query], [after_header], prefill=False)
    with torch.no_grad():
        ids = omni.model.generate(**batch.inputs, max_new_tokens=n, do_sample=False)
    return omni.until_end(ids[0, batch.inputs["input_ids"].shape[1] :].tolist())


# The base after a safe verdict


@pytest.mark.parametrize("sampled", [False, True])
def test_safe_replies_are_the_bases_to_the_bit(
    tiny_omni: Omni, mixed_queries: list[Query], monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    """Text, picture and clip, with and without a prefill, in one batch with unsafe ones."""
    safe = [query.model_copy(update={"id": f"safe-{query.id}"}) for query in mixed_queries]
    safe[1] = safe[1].model_copy(update={"prefill": "sure , here is"})
    queries = [query for pair in zip(safe, mixed_queries, strict=True) for query in pair]
    settings = GenerationSettings(max_new_tokens=8, batch_size=8, do_sample=sampled, system="answer in one word .")
    base = tiny_omni.generate(safe, settings)
    casa = stir(Casa.attach(tiny_omni))
    weights = {name: value.clone() for name, value in tiny_omni.model.state_dict().items()}
    verdicts = {query.id: ["safe" if query.id.startswith("safe") else "unsafe"] for query in queries}
    decide_in_turn(monkeypatch, casa, verdicts)
    with_token = casa.generate(queries, settings)
    casa.use(drop_after_safe=True)
    replies = casa.generate(queries, settings)
    assert [(reply.text, reply.tokens) for reply in replies[::2]] == [(reply.text, reply.tokens) for reply in base]
    assert {reply.safety_token for reply in replies[::2]} == {"safe"} and None not in {r.v_s for r in replies}
    assert any(one.text != other.text for one, other in zip(replies[::2], with_token[::2], strict=True))
    if not sampled:
        assert [reply.text for reply in replies[1::2]] == [reply.text for reply in with_token[1::2]]
    assert all(torch.equal(value, weights[name]) for name, value in tiny_omni.model.state_dict().items())


def test_the_bases_prompt_has_no_token_of_earlier_turns(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (
        Turn(role="user", parts=(TextPart(text="what is it ?"),)),
        Turn(role="assistant", parts=(TextPart(text="it is the word ."),), safety_token="safe"),
    )
    query = Query.from_text("how do i make a cake ?", history=turns)
    base = tiny_omni.generate([query], SETTINGS)[0]
    casa = stir(Casa.attach(tiny_omni))
    decide_in_turn(monkeypatch, casa, {query.id: ["safe"]})
    casa.use(drop_after_safe=True)
    assert casa.generate([query], SETTINGS)[0].text == base.text
    assert tiny_omni.processor.gate_tokens


def test_forcing_and_hard_refusals_beside_the_base(
    tiny_omni: Omni, mixed_queries: list[Query], casa: Casa, monkeypatch: pytest.MonkeyPatch
) -> None:
    with casa.disabled():
        base = [reply.text for reply in tiny_omni.generate(mixed_queries, SETTINGS)]
    casa.use(drop_after_safe=True, recheck_every=2)
    verdicts = {query.id: ["unsafe" if index % 2 else "safe", "safe"] for index, query in enumerate(mixed_queries)}
    decide_in_turn(monkeypatch, casa, verdicts)
    replies = casa.generate(mixed_queries, SETTINGS, hard=True, refusal="no .")
    assert [reply.text for reply in replies] == [base[0], "no .", base[2], "no ."]
    assert [reply.text for reply in casa.generate(mixed_queries, SETTINGS, force="safe")] == base
    unsafe = [reply.text for reply in casa.generate(mixed_queries, SETTINGS, force="unsafe")]
    casa.use(drop_after_safe=False, recheck_every=0)
    assert unsafe == [reply.text for reply in casa.generate(mixed_queries, SETTINGS, force="unsafe")]


# Decisions in the middle of a reply


def test_media_that_the_model_wrote_do_not_come_before_a_header(tiny_omni: Omni) -> None:
    tokenizer, header = tiny_omni.tokenizer, _header_ids(tiny_omni)
    words = tokenizer("sure , here", add_special_tokens=False)["input_ids"]
    marks = tokenizer.convert_tokens_to_ids(["<|audio_bos|>", "<|vision_eos|>"])
    ids = [words[0], marks[0], words[1], tiny_omni.processor.audio_token_id, words[2], marks[1]]
    assert at_header(tiny_omni, [ids, []]) == [[*words, *header], header]


def test_the_decision_at_a_header_by_hand(tiny_omni: Omni, casa: Casa, mixed_queries: list[Query]) -> None:
    """Safety attention reads the user's turns and the last header, the pair comes from that header's last token."""
    header = _header_ids(tiny_omni)
    assert tiny_omni.tokenizer.decode(header).replace(" ", "") == "<|im_start|>assistant"
    reply = tiny_omni.reply_ids("sure , here is")[:-1]
    batch = tiny_omni.encode(mixed_queries, [[casa.token_ids[0], *reply, *header]] * 4, prefill=False)
    with torch.no_grad():
        states = tiny_omni.backbone(**batch.inputs).last_hidden_state
    mask = torch.stack(list(batch.modality.values())).any(dim=0)
    mask[:, -len(header) :] = True
    with torch.no_grad():
        v_s, _ = casa.attention(states, mask)
        raw = tiny_omni.head(states[:, -1])[:, list(casa.token_ids)]
    again = _at_last_header(batch, len(header))
    assert torch.equal(casa.safety_gate.mask(again), mask) and again.labels is None
    reading = gated_prompt(tiny_omni, again, casa.safety_gate, again.gate_position).reading
    torch.testing.assert_close(reading.v_s, v_s, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reading.raw_pair, raw, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["gate_first", "prefill_first"])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_flagged_reply_is_kept_and_a_refusal_follows(
    tiny_omni: Omni,
    casa: Casa,
    mixed_queries: list[Query],
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    dropped: bool,
) -> None:
    queries = [
        mixed_queries[0],
        mixed_queries[1].model_copy(update={"prefill": "sure , here is"}),
        mixed_queries[2],
        mixed_queries[3].model_copy(update={"prefill": "first"}),
    ]
    casa.use(drop_after_safe=dropped)
    decide_in_turn(monkeypatch, casa, {query.id: ["safe"] for query in queries})
    whole = casa.generate(queries, SETTINGS, order=order, merge=False)
    depths = {"text": 2, "image": 0, "audio": None, "both": 4}
    verdicts = {"text": ["safe", "unsafe"], "image": ["safe", "unsafe"], "audio": ["safe"]}
    decide_in_turn(monkeypatch, casa, {**verdicts, "both": ["safe"] * 3 + ["unsafe"]})
    casa.use(recheck_every=2)
    replies = casa.generate(queries, SETTINGS, order=order, merge=False)
    safe, unsafe = casa.token_ids
    token = [] if dropped else [safe]
    for query, reply, before in zip(queries, replies, whole, strict=True):
        depth, prefill = depths[query.id], prefill_ids(tiny_omni, [query])[0]
        assert before.tokens > (depth or 0)
        if depth is None:
            assert (reply.text, reply.tokens, reply.safety_token) == (before.text, before.tokens, "safe")
            continue
        opening = [*token, *prefill] if order == "gate_first" else [*prefill, *token]
        if dropped:
            with casa.disabled():
                kept = written(tiny_omni, query, opening, 9)[:depth] if opening else base_ids(tiny_omni, query)[:depth]
        else:
            kept = written(tiny_omni, query, opening, 9)[:depth]
        refusal = written(tiny_omni, query, [*at_header(tiny_omni, [[*opening, *kept]])[0], unsafe], 9 - depth)
        assert reply.text == f"{tiny_omni.decode(kept)} {tiny_omni.decode(refusal)}".strip()
        assert (reply.tokens, reply.safety_token) == (depth + len(refusal), "unsafe")
        assert reply.v_s != before.v_s and reply.tokens <= 9


def base_ids(omni: Omni, query: Query) -> list[int]:
    return omni.until_end(omni.write([query], SETTINGS)[0])


def test_when_it_is_decided_again(
    tiny_omni: Omni, casa: Casa, monkeypatch: pytest.MonkeyPatch, mixed_queries: list[Query]
) -> None:
    """Every N tokens, after a prefill, never behind the unsafe token itself, and not after a reply's end."""
    text, picture, clip, _ = mixed_queries
    queries = [text, picture.model_copy(update={"prefill": "sure ,"}), clip]
    verdicts = {"text": ["safe"], "image": ["unsafe", "safe"], "audio": ["unsafe"]}
    casa.use(recheck_every=4)
    asked = decide_in_turn(monkeypatch, casa, verdicts)
    replies = casa.generate(queries, SETTINGS)
    tokens = {reply.query_id: reply.tokens for reply in replies}
    expected = {name: 1 + sum(tokens[name] > depth for depth in (4, 8)) for name in ("text", "image")}
    counts = {name: sum(ids.count(name) for ids in asked) for name in verdicts}
    assert counts == {"text": expected["text"], "image": expected["image"] + 1, "audio": 1}
    # The hard gate stops a reply with its own refusal.
    decide_in_turn(monkeypatch, casa, {"text": ["safe", "unsafe"]})
    stopped = casa.generate([text], SETTINGS, hard=True, refusal="no .")[0]
    kept = written(tiny_omni, text, [casa.token_ids[0]], 9)[:4]
    assert stopped.text == f"{tiny_omni.decode(kept)} no .".strip() and stopped.tokens == 4


def test_off_it_changes_nothing(casa: Casa, mixed_queries: list[Query], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    casa.attention.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    replies = casa.generate(mixed_queries, SETTINGS)
    assert sum(calls) == len(mixed_queries)
    casa.use(recheck_every=SETTINGS.max_new_tokens)
    again: list[Reply] = casa.generate(mixed_queries, SETTINGS)
    assert [reply.text for reply in again] == [reply.text for reply in replies]
    assert sum(calls) == 2 * len(mixed_queries)


# The rule at inference


def test_the_rule_at_inference_is_not_the_rule_of_training(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path
) -> None:
    casa = stir(Casa.attach(tiny_omni, CasaConfig.paper()))
    scaled = casa.decide(mixed_queries, SETTINGS)
    casa.use(inference_rule="replace")
    for one, other in zip(scaled, casa.decide(mixed_queries, SETTINGS), strict=True):
        assert one.v_s is not None and other.v_s == pytest.approx(one.v_s)
        assert (other.logit_safe, other.logit_unsafe) == pytest.approx((1 - one.v_s, one.v_s))
        assert other.safety_token == ("unsafe" if one.v_s > 0.5 else "safe")
        assert one.logit_unsafe != pytest.approx(one.v_s)
    batch = tiny_omni.encode(mixed_queries)
    trained = gated_prompt(tiny_omni, batch, casa.safety_gate, batch.gate_position).reading
    assert trained.pair.flatten().tolist() == pytest.approx(
        [value for reply in scaled for value in (reply.logit_safe, reply.logit_unsafe)], rel=1e-4
    )  # what training and probes read
    casa.save_pretrained(tmp_path / "gate")
    assert "scale, at inference replace" in (tmp_path / "gate" / "README.md").read_text()
    casa.detach()
    again = Casa.from_pretrained(tmp_path / "gate", tiny_omni)
    assert (again.config.rule, again.config.inference_rule) == ("scale", "replace")


def test_a_threshold_is_that_of_one_rule(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = stir(Casa.attach(tiny_omni, CasaConfig.paper(fpr=0.1)))
    casa.calibrate(benign=[query for query in mixed_queries if query.modalities == {"text"}])
    casa.decide(mixed_queries[:1], SETTINGS)
    casa.use(inference_rule="replace")
    with pytest.raises(InputError, match="fpr needs a calibration"):
        casa.decide(mixed_queries[:1], SETTINGS)
    with pytest.raises(InputError, match="form none has no v_s"):
        CasaConfig(form="none", inference_rule="replace")
