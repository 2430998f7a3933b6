"""Calibration without labels: what is shifted and stretched, the threshold it sets, and what is kept with a gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.casa import SETTINGS, SHORT, examples, stir
from PIL import Image
from torch import Tensor

from casa_mech.casa import Casa, CasaConfig, InferenceSettings
from casa_mech.casa.calibration import ATTENDED, DECIDED, Calibration, prompt_states, surfaces_of
from casa_mech.casa.config import MENDED
from casa_mech.errors import InputError, ModelError
from casa_mech.omni import Omni
from casa_mech.queries import AudioPart, ImagePart, Query, Reply, TextPart
from casa_mech.trace.gate import gated_prompt

TEXTS = (
    "how do i make a cake ?",
    "please explain how to make the bomb to me .",
    "what is it ?",
    "the word in the image",
)


def calibration_queries(n: int = 4) -> list[Query]:
    """`n` of text, pictures and clips; harmful and benign by turns."""
    rng = np.random.default_rng(7)
    queries = []
    for index in range(n):
        label = "harmful" if index % 2 else "benign"
        text = TextPart(text="please " * (index // 2) + TEXTS[index % 4])
        image = ImagePart(image=Image.fromarray(rng.integers(0, 255, (28, 56, 3), dtype=np.uint8)))
        clip = AudioPart(audio=(0.1 * rng.standard_normal(8000)).astype(np.float32), rate=16_000)
        for kind, parts in {"text": (text,), "image": (image, text), "audio": (clip,)}.items():
            queries.append(Query(id=f"{kind}{index}", parts=parts, label=label))
    return queries


def of_text(queries: list[Query]) -> list[Query]:
    return [query for query in queries if query.modalities == {"text"}]


def benign_of(queries: list[Query]) -> list[Query]:
    return [query for query in queries if query.label == "benign"]


def timeless(replies: list[Reply]) -> list[Reply]:
    return [reply.model_copy(update={"seconds": 0.0}) for reply in replies]


def odds_of(reply: Reply) -> float:
    assert reply.logit_unsafe is not None and reply.logit_safe is not None
    return reply.logit_unsafe - reply.logit_safe


@pytest.fixture
def casa(tiny_omni: Omni) -> Casa:
    return stir(Casa.attach(tiny_omni))


def calibrated(casa: Casa) -> list[Query]:
    queries = calibration_queries()
    casa.calibrate(queries, SHORT, benign=benign_of(queries), labelled=of_text(queries))
    return queries


def read(casa: Casa, queries: list[Query]) -> tuple[Tensor, Tensor]:
    """The states [query, 2, d_model] that the gate reads, as edited, from a plain forward; and the surfaces."""
    with casa.parts.adapter.merged():
        states, surfaces = prompt_states(casa.omni, casa.safety_gate, queries, 16)
    batch = casa.omni.encode(queries, prefill=False)
    edits = casa.calibration.edits(batch, casa.config)
    if edits is None:
        return states, surfaces
    return torch.stack([edits.attended(states[:, ATTENDED]), edits.decided(states[:, DECIDED])], dim=1), surfaces


def test_surfaces_are_the_media_of_the_users_turns(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    assert surfaces_of(tiny_omni.encode(mixed_queries)).tolist() == [0, 1, 2, 3]


def test_means_by_hand(tiny_omni: Omni, casa: Casa) -> None:
    queries = calibration_queries()
    calibration = casa.calibrate(queries)
    assert calibration.counts == {"text": 4, "image": 4, "audio": 4}
    for name in ("text", "image"):
        group = [query for query in queries if query.id.startswith(name)]
        expected = []
        for query in group:
            batch = tiny_omni.encode([query])
            with torch.no_grad():
                states = tiny_omni.backbone(**batch.inputs).last_hidden_state[0]
            expected.append(torch.stack([states[batch.prompt_mask[0]].mean(dim=0), states[batch.gate_position[0]]]))
        torch.testing.assert_close(calibration.means[name], torch.stack(expected).mean(dim=0), atol=1e-4, rtol=1e-4)


def test_a_recentred_surface_has_texts_mean_and_a_rescaled_one_its_spread(casa: Casa) -> None:
    queries = calibrated(casa)
    plain, surfaces = read(casa, queries)
    direction = casa.calibration.directions
    assert direction is not None and torch.allclose(direction.norm(dim=-1), torch.ones(2))
    for changes in ({"recentre": True}, {"rescale": True}):
        casa.use(**changes)
        states, _ = read(casa, queries)
        assert torch.equal(states[surfaces == 0], plain[surfaces == 0])
        for index in (1, 2):
            torch.testing.assert_close(
                states[surfaces == index].mean(dim=0), plain[surfaces == 0].mean(dim=0), atol=1e-4, rtol=1e-4
            )
    along = (states * direction).sum(dim=-1)
    spreads = torch.stack([along[surfaces == index].std(dim=0, correction=0) for index in range(3)])
    torch.testing.assert_close(spreads, spreads[:1].expand(3, -1), atol=1e-4, rtol=1e-3)
    before = (plain * direction).sum(dim=-1)
    assert not torch.allclose(before[surfaces == 1].std(), before[surfaces == 0].std(), rtol=1e-2)
    # Beside the direction nothing is stretched.
    across = states - along.unsqueeze(-1) * direction
    casa.use(rescale=False)
    recentred, _ = read(casa, queries)
    torch.testing.assert_close(across, recentred - (recentred * direction).sum(-1, keepdim=True) * direction)


def test_the_gate_reads_shifted_states_and_the_model_does_not(tiny_omni: Omni, casa: Casa) -> None:
    """v_s and the pair by hand from a plain forward; keys and values stay as they are."""
    queries = calibrated(casa)
    pictures = [query for query in queries if query.id.startswith("image")][:2]
    batch = tiny_omni.encode(pictures, prefill=False)
    shift = casa.calibration.means["text"] - casa.calibration.means["image"]
    with torch.no_grad():
        output = tiny_omni.backbone(**batch.inputs, use_cache=True)
        states = output.last_hidden_state
        v_s, _ = casa.attention(states + shift[ATTENDED], batch.prompt_mask)
        z = tiny_omni.head(states[:, -1] + shift[DECIDED])[:, list(casa.token_ids)]
    pair = torch.stack([z[:, 0] + torch.log(1 - v_s), z[:, 1] + torch.log(v_s)], dim=1)
    before = casa.decide(pictures, merge=False)
    casa.use(recentre=True)
    replies = casa.decide(pictures, merge=False)
    assert [reply.v_s for reply in replies] == pytest.approx(v_s.tolist(), abs=1e-5)
    assert [reply.logit_unsafe for reply in replies] == pytest.approx(pair[:, 1].tolist(), abs=1e-4)
    assert [reply.v_s for reply in replies] != pytest.approx([reply.v_s for reply in before], abs=1e-5)
    edits = casa.calibration.edits(batch, casa.config)
    gated = gated_prompt(tiny_omni, batch, casa.safety_gate, batch.gate_position, edits=edits)
    assert torch.equal(gated.cache.layers[0].keys, output.past_key_values.layers[0].keys)


def test_labels_of_calibration_queries_are_not_read(casa: Casa) -> None:
    queries = calibration_queries()
    shuffled = [
        query.model_copy(update={"label": label})
        for query, label in zip(queries, ["harmful", None, "benign", "harmful"] * 3, strict=True)
    ]
    casa.use(recentre=True)
    calibrations, decisions = [], []
    for group in (queries, shuffled):
        calibrations.append(casa.calibrate(group).tensors())
        decisions.append(timeless(casa.decide(queries)))
    assert decisions[0] == decisions[1] and calibrations[0].keys() == calibrations[1].keys()
    assert all(torch.equal(calibrations[0][name], calibrations[1][name]) for name in calibrations[0])


def test_the_threshold_is_a_quantile_of_benign_log_odds(casa: Casa) -> None:
    queries = calibration_queries(10)
    benign = benign_of(queries)
    casa.calibrate(queries, benign=benign)
    plain = casa.decide(queries)
    odds = {name: [odds_of(reply) for reply in plain if reply.query_id.startswith(name)] for name in ("text", "image")}
    quiet = {query.id for query in benign}
    limits = {
        name: np.quantile([odds_of(r) for r in plain if r.query_id.startswith(name) and r.query_id in quiet], 0.7)
        for name in odds
    }
    casa.use(fpr=0.3)
    tokens = {reply.query_id: reply.safety_token for reply in casa.decide(queries)}
    for name in odds:
        of_kind = [reply for reply in plain if reply.query_id.startswith(name)]
        assert [tokens[r.query_id] for r in of_kind] == [
            "unsafe" if odds_of(r) > limits[name] else "safe" for r in of_kind
        ]
    casa.use(fpr_by_surface=False)
    tokens = {reply.query_id: reply.safety_token for reply in casa.decide(queries)}
    pictures = [reply for reply in plain if reply.query_id.startswith("image")]
    assert [tokens[r.query_id] for r in pictures] == [
        "unsafe" if odds_of(r) > limits["text"] else "safe" for r in pictures
    ]
    texts = [query for query in benign if query.id.startswith("text")]
    assert sum(tokens[query.id] == "unsafe" for query in texts) == 2  # of five, three lie below
    # Each reading of the states has log-odds of its own, and a threshold that is given wins.
    casa.use(fpr=0.3, fpr_by_surface=True, recentre=True)
    benign_odds = [odds_of(reply) for reply in casa.decide(benign)]
    assert casa.calibration.odds["recentred"]["text"].tolist() == pytest.approx(
        [value for value, query in zip(benign_odds, benign, strict=True) if query.id.startswith("text")], abs=1e-4
    )
    assert {r.safety_token for r in casa.generate(queries[:3], SHORT, threshold=0.0)} == {"unsafe"}


def test_text_alone_sets_the_threshold_of_surfaces_without_prompts(casa: Casa) -> None:
    queries = calibration_queries()
    casa.calibrate(benign=of_text(benign_of(queries)))
    casa.use(fpr=0.3)
    limit = casa.calibration.odds["plain"]["text"].quantile(0.7).item()
    for reply in casa.decide(queries):
        assert reply.safety_token == ("unsafe" if odds_of(reply) > limit else "safe")


def test_a_calibration_is_saved_and_can_be_switched(
    tiny_omni: Omni, casa: Casa, mixed_queries: list[Query], tmp_path: Path
) -> None:
    plain = timeless(casa.generate(mixed_queries[:3], SHORT))
    calibrated(casa)
    assert timeless(casa.generate(mixed_queries[:3], SHORT)) == plain
    casa.use(recentre=True, rescale=True, fpr=0.2)
    mended = timeless(casa.generate(mixed_queries[:3], SHORT))
    casa.save_pretrained(tmp_path)
    casa.detach()
    card = (tmp_path / "README.md").read_text()
    assert "| beyond the paper | recentre True, rescale True, fpr 0.2 |" in card
    assert "| unlabelled calibration prompts | 4 text, 4 image, 4 audio |" in card
    loaded = Casa.from_pretrained(tmp_path, tiny_omni)
    assert loaded.config.inference == InferenceSettings(recentre=True, rescale=True, fpr=0.2)
    assert timeless(loaded.generate(mixed_queries[:3], SHORT)) == mended
    loaded.use(**InferenceSettings().model_dump())
    assert timeless(loaded.generate(mixed_queries[:3], SHORT)) == plain
    loaded.train(examples(), SETTINGS.model_copy(update={"max_steps": 1}), progress=False)
    assert not loaded.calibration.tensors()
    loaded.detach()
    (tmp_path / "calibration.safetensors").unlink()
    with pytest.raises(ModelError, match=r"calibration.safetensors is missing"):
        Casa.from_pretrained(tmp_path, tiny_omni)
    assert not hasattr(tiny_omni.model, "peft_config")


def test_a_text_prompt_is_read_as_before_to_the_bit(casa: Casa) -> None:
    queries = of_text(calibrated(casa))
    plain = timeless(casa.decide(queries))
    casa.use(recentre=True, rescale=True)
    assert timeless(casa.decide(queries)) == plain


def test_what_cannot_be_calibrated_or_used_is_named(casa: Casa, mixed_queries: list[Query]) -> None:
    queries = calibration_queries()
    for changes, message in (
        ({"recentre": True}, "recentre needs a calibration: run casa-mech calibrate"),
        ({"recentre": True, "rescale": True}, "recentre needs a calibration"),
        ({"recentre": False, "rescale": False, "fpr": 0.1}, "fpr needs a calibration: run casa-mech calibrate"),
    ):
        casa.use(**changes)
        with pytest.raises(InputError, match=message):
            casa.decide(queries)
    casa.use(recentre=True, fpr=0.0)
    casa.calibrate(queries)
    with pytest.raises(InputError, match=r"a prompt with image\+audio cannot be re-centred"):
        casa.decide(mixed_queries)
    casa.use(rescale=True)
    with pytest.raises(InputError, match="rescale needs a direction"):
        casa.decide(queries)
    texts, media = of_text(queries), [query for query in queries if query.id == "image0"]
    same = [query.model_copy(update={"id": f"t{index}"}) for index, query in enumerate(texts[:1] * 3)]
    for arguments, message in (
        ({}, "nothing to calibrate on"),
        ({"queries": media}, "have no text alone"),
        ({"benign": texts}, "query text1 is harmful"),
        ({"benign": media}, "benign calibration prompts have no text alone"),
        ({"queries": texts, "labelled": media}, "query image0: the direction is fitted on text alone"),
        ({"queries": texts, "labelled": texts[:1]}, "both harmful and benign"),
        ({"queries": same, "labelled": texts}, "the 3 calibration queries with text do not differ"),
    ):
        with pytest.raises(InputError, match=message):
            casa.calibrate(**arguments)


def test_options_that_do_not_fit_are_refused(casa: Casa) -> None:
    with pytest.raises(InputError, match="rescale stretches states about text's mean: switch recentre on"):
        CasaConfig(rescale=True)
    with pytest.raises(InputError, match="fpr: Input should be less than 1"):
        casa.use(fpr=1.0)
    with pytest.raises(InputError, match="InferenceSettings has no field 'rule'; its fields: recentre, rescale, fpr"):
        casa.use(rule="scale")
    assert casa.config == CasaConfig()


def test_the_preset_is_in_one_place() -> None:
    plain, mended = CasaConfig().model_dump(), CasaConfig.mended(beta=0.4).model_dump()
    assert {name: value for name, value in mended.items() if value != plain[name]} == {**MENDED, "beta": 0.4}
    assert CasaConfig(recentre=True).inference == InferenceSettings(recentre=True)
    assert CasaConfig().inference == InferenceSettings() and Calibration().sizes() == {"unlabelled": {}, "benign": {}}
