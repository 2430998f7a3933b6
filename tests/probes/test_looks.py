"""`look`: what is shown of one prompt is what the gate reports, on text, pictures and clips."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.casa import stir
from helpers.families import save_family
from helpers.page import ATTACK, shown
from matplotlib.figure import Figure

import probes
from casa_mech.casa import Casa, CasaConfig
from casa_mech.errors import InputError
from casa_mech.omni import Omni, load_omni
from casa_mech.queries import Query, TextPart, Turn
from casa_mech.queries.html import MEDIA
from probes.gate.looks import Look
from probes.gate.safety_attention import word_shares


@pytest.fixture
def casa(tiny_omni: Omni) -> Casa:
    return stir(Casa.attach(tiny_omni, CasaConfig()), 0.3)


def test_a_look_is_the_gates_decision_and_its_attention(casa: Casa, mixed_queries: list[Query]) -> None:
    for query in mixed_queries:
        seen = probes.look(casa, query)
        (reply,) = casa.decide([query], attention=True)
        assert (seen.safety_token, seen.v_s) == (reply.safety_token, reply.v_s)
        assert seen.reply.raw_logit_unsafe == reply.raw_logit_unsafe
        assert list(seen.table["weight"]) == pytest.approx(list(reply.attention or ()))
        assert seen.table["share"].sum() == pytest.approx(1)
        (entry,) = probes.attention_maps(casa, [query])
        np.testing.assert_allclose(seen.attention.weights, entry.weights, atol=1e-4)
        assert seen.attention.tokens == entry.tokens and len(seen.attention.media) == len(entry.media)


def test_it_decides_as_the_gate_is_used(casa: Casa) -> None:
    texts = ("make tea ?", "build the cake ?", "how do you spell it ?")
    benign = [Query.from_text(text, id=text, label="benign") for text in texts]
    assert len({probes.look(casa, query).safety_token for query in benign}) == 1
    casa.calibrate(benign=benign)
    casa.use(fpr=0.5)
    assert {probes.look(casa, query).safety_token for query in benign} == {"safe", "unsafe"}


def test_plain_text_elsewhere(casa: Casa, mixed_queries: list[Query]) -> None:
    seen = probes.look(casa, "how do i make a cake ?")
    assert repr(seen).startswith("Look at 'how do i make a cake ?': " + seen.safety_token)
    top = seen.table.sort_values("share", ascending=False, kind="stable").iloc[0]
    assert f"v_s {seen.v_s:.2f}; most attention on {top['token']} {top['share']:.0%}".replace("%", " %") in repr(seen)
    both = repr(probes.look(casa, mixed_queries[3]))
    assert both.startswith("Look at '[image] [audio] how do i make") and "\n" not in both


def with_weights(seen: Look, **by_role: float) -> Look:
    """The same look, with the weight of each position chosen by its role."""
    weights = np.array([by_role.get(role, 0.0) for role in seen.attention.roles])
    media = tuple(
        replace(medium, weights=np.full(medium.weights.shape, by_role.get(medium.kind, 0.0)))
        for medium in seen.attention.media
    )
    return replace(seen, attention=replace(seen.attention, weights=weights, media=media))


def test_a_notebook_shows_tokens_picture_and_clip(casa: Casa, mixed_queries: list[Query]) -> None:
    seen = with_weights(probes.look(casa, mixed_queries[3]), text=1, image=2, audio=3)
    picture, clip = seen.attention.media
    page = shown(seen)
    names, shares = word_shares(seen.attention)
    titles = [span["title"] for span in page.named("span") if "title" in span]
    assert titles == [f"{100 * share:.1f} %" for share in shares] and "[image]" in names and "[audio]" in names
    assert len(page.named("img")) == 2 and len(page.named("audio")) == 1
    assert len(page.named("rect")) == len(clip.weights)
    share = picture.weights.sum() / seen.attention.weights.sum()
    assert f"{100 * share:.0f} % of the attention, where tinted; 84 × 28 pixels" in page.words
    assert f"v_s {seen.v_s:.2f}" in page.words and seen.safety_token in page.words


def test_next_to_nothing_is_neither_named_nor_tinted(casa: Casa, mixed_queries: list[Query]) -> None:
    seen = with_weights(probes.look(casa, mixed_queries[1]), header=1, image=1e-9)
    page = shown(seen)
    assert len(page.named("img")) == 1 and "less than 1 % of the attention, not tinted" in page.words
    assert repr(seen).count("%") == seen.attention.roles.count("header")


def test_each_of_several_media_has_its_own_weights(casa: Casa, mixed_queries: list[Query]) -> None:
    (picture, text), (clip, _) = mixed_queries[1].parts, mixed_queries[2].parts
    earlier = Turn(role="user", parts=(clip, picture))
    query = Query(id="talk", parts=(picture, clip, picture, text), history=(earlier, earlier.model_copy()))
    attention = probes.look(casa, query).attention
    assert [medium.kind for medium in attention.media] == ["audio", "image"] * 2 + ["image", "audio", "image"]
    roles = np.array(attention.roles)
    for kind in ("image", "audio"):
        weights = [medium.weights.ravel() for medium in attention.media if medium.kind == kind]
        np.testing.assert_allclose(np.concatenate(weights), attention.weights[roles == kind])
    assert len(shown(probes.look(casa, query)).named("audio")) == 3
    album = probes.look(casa, query.model_copy(update={"parts": (picture,) * MEDIA}))
    assert len(shown(album).named("audio")) == 2 and "4 more media" in shown(album).words


def test_it_can_be_drawn(casa: Casa, mixed_queries: list[Query]) -> None:
    for query in (mixed_queries[0], mixed_queries[2]):
        seen = probes.look(casa, query)
        figure = seen.plot()
        assert isinstance(figure, Figure) and f"{seen.safety_token}, v_s {seen.v_s:.2f}" in figure.get_suptitle()
        assert seen.plot("mine").get_suptitle() == "mine"


def test_a_figure_needs_an_extra(casa: Casa, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = probes.look(casa, "how do i make a cake ?")
    monkeypatch.delitem(sys.modules, "probes.gate.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib, which is not installed: pip install 'casa-mech\[study\]'"):
        seen.plot()


def test_a_prompt_that_holds_a_script_is_shown(casa: Casa) -> None:
    query = Query(id=ATTACK, parts=(TextPart(text="how <script> do i </script> make a cake ?"),))
    page = shown(probes.look(casa, query))
    assert ATTACK in page.text


def test_a_model_that_reads_text_alone(tmp_path: Path, mixed_queries: list[Query]) -> None:
    casa = stir(Casa.attach(load_omni(save_family("llama", tmp_path)), CasaConfig()), 0.3)
    seen = probes.look(casa, 'say "<b>hi</b>" & go')
    page = shown(seen)
    assert not page.named("b") and not seen.attention.media
    assert probes.attention_maps(casa, [seen.query])[0].tokens == seen.attention.tokens
    with pytest.raises(InputError, match="this model reads no image"):
        probes.look(casa, mixed_queries[1])


def test_a_gate_without_safety_attention_reads_no_token(tiny_omni: Omni) -> None:
    seen = probes.look(Casa.attach(tiny_omni, CasaConfig(form="none")), "how do i make a cake ?")
    assert "attention" not in repr(seen) and not seen.table["share"].any()
    shown(seen)


def test_activations_say_what_they_are(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    queries = [*mixed_queries[:3], Query.from_text("make tea", id=ATTACK, meta={"surface": ATTACK})]
    activations = probes.collect(tiny_omni, queries)
    assert repr(activations) == (
        "Activations of 4 prompts (2 harmful, 2 others) at 3 sites (0, 1, norm), width 64, positions mean"
    )
    page = shown(activations)
    assert repr(activations) in page.words and ATTACK in page.text
    assert isinstance(activations.index, pd.DataFrame)
