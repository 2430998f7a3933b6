"""Direct and indirect paths of heads, slopes of attribution patching, and states moved between surfaces: each against
forwards by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.casa import stir
from helpers.patching import request

from casa_mech.casa import Casa, CasaConfig
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from probes.gate.pairs import MatchedPair
from probes.gate.patching import INSERT, Target, _slopes, measured, patch_effects, plus, read_edited
from probes.gate.paths import DIRECT, INDIRECT, path_effects
from probes.gate.positions import KEY
from probes.gate.surfaces import HEADER, WORD, surface_effects


@pytest.fixture
def casa(tiny_omni: Omni) -> Casa:
    return stir(Casa.attach(tiny_omni), 0.3)


@pytest.fixture
def pairs() -> list[MatchedPair]:
    words = [("bomb", "cake"), ("bomb", "tea")]
    return [
        MatchedPair(request(one, "harmful", f"q{i}"), request(two, "benign", f"t{i}"))
        for i, (one, two) in enumerate(words)
    ]


def test_without_later_blocks_a_heads_effect_is_direct(casa: Casa, pairs: list[MatchedPair]) -> None:
    """With every MLP and the last attention silenced nothing but the residual stream takes a head of block 0 on."""
    omni = casa.omni
    with torch.no_grad():
        for layer in range(omni.n_layers):
            for module in omni.writers(layer)[1].modules():
                if hasattr(module, "weight"):
                    module.weight.zero_()
        for module in omni.writers(1)[0].modules():
            if hasattr(module, "weight"):
                module.weight.zero_()
    paths = path_effects(casa, pairs)
    first = paths[paths["site"] == "z.0"].set_index(["pair", "head"])
    direct, indirect = first[first["path"] == DIRECT], first[first["path"] == INDIRECT]
    targets = [Target("z.0", "whole prompt", head) for head in range(omni.n_heads)]
    effects = patch_effects(casa, pairs, targets)
    table = effects.deltas()
    total = table[table["direction"] == INSERT].set_index(["pair", "head"])
    for measure in ("log_odds", "logit"):
        assert total[f"delta_{measure}"].abs().max() > 1e-3
        np.testing.assert_allclose(indirect[f"delta_{measure}"], 0, atol=1e-4)
        np.testing.assert_allclose(direct[f"delta_{measure}"], total.loc[direct.index, f"delta_{measure}"], atol=1e-4)


def test_direct_effects_are_those_of_the_norm_and_the_gate_alone(casa: Casa, pairs: list[MatchedPair]) -> None:
    omni, gate = casa.omni, casa.safety_gate
    paths = path_effects(casa, pairs[:1])
    found = paths[paths["path"] == DIRECT].set_index(["site", "head"])
    one, other = (omni.encode([getattr(pairs[0], side)]) for side in ("harmful", "benign"))
    size, last = omni.d_head, omni.n_layers - 1
    for layer in range(omni.n_layers):
        donor, own = (capture(omni, batch, [f"z.{layer}"], "all")[f"z.{layer}"] for batch in (one, other))
        states = capture(omni, other, [last], "all")[last]
        for head in range(omni.n_heads):
            change = torch.zeros_like(own)
            change[:, :, head] = (donor - own)[:, :, head] * one.prompt_mask[:, :, None]
            with torch.no_grad():
                before, after = (
                    omni.norm(states + write)
                    for write in (torch.zeros_like(states), omni.writers(layer)[0](change.flatten(2)))
                )
                mask = gate.mask(other)
                odds = [float(casa.attention.log_odds(read, mask)) for read in (before, after)]
                pairs_of = [omni.head(read[:, -1])[0, list(casa.token_ids)] for read in (before, after)]
            row = found.loc[(f"z.{layer}", head)]
            assert change.shape[-1] == size
            assert row["delta_log_odds"] == pytest.approx(odds[1] - odds[0], abs=1e-4)
            margins = [float(pair[1] - pair[0]) for pair in pairs_of]
            assert row["delta_logit"] == pytest.approx(margins[1] - margins[0], abs=1e-3)


def test_the_last_blocks_heads_have_no_way_but_its_own_mlp(casa: Casa, pairs: list[MatchedPair]) -> None:
    with torch.no_grad():
        for module in casa.omni.writers(1)[1].modules():
            if hasattr(module, "weight"):
                module.weight.zero_()
    paths = path_effects(casa, pairs)
    last = paths[(paths["site"] == "z.1") & (paths["path"] == INDIRECT)]
    np.testing.assert_allclose(last[["delta_log_odds", "delta_logit"]], 0, atol=1e-4)
    assert paths[(paths["site"] == "z.0") & (paths["path"] == INDIRECT)]["delta_log_odds"].abs().max() > 1e-4


def test_a_gate_in_the_middle_is_read_there(tiny_omni: Omni, pairs: list[MatchedPair]) -> None:
    """Safety attention after block 0: block 1's heads do not reach it, and block 0's MLP is the only way round."""
    casa = stir(Casa.attach(tiny_omni, CasaConfig(layer=0)), 0.3)
    paths = path_effects(casa, pairs)
    later = paths[paths["site"] == "z.1"]
    np.testing.assert_allclose(later["delta_log_odds"], 0, atol=1e-6)
    assert later["delta_logit"].abs().max() > 1e-4


def test_slopes_are_those_of_finite_differences(casa: Casa, pairs: list[MatchedPair]) -> None:
    omni = casa.omni
    batch = omni.encode([pair.benign for pair in pairs])
    states = capture(omni, batch, ["embeddings", "z.0", 0, "mlp.1", 1], "all")
    slopes = _slopes(casa, batch, states)
    generator = torch.Generator().manual_seed(0)
    for site, value in states.items():
        step = torch.randn(value.flatten(2).shape, generator=generator) * batch.prompt_mask.unsqueeze(-1)
        ahead, behind = (
            measured(read_edited(casa, batch, {site: plus(sign * 1e-3 * step)}, states["embeddings"]))
            for sign in (1, -1)
        )
        for measure in ("log_odds", "logit"):
            numeric = (ahead[measure] - behind[measure]) / 2e-3
            exact = (slopes[measure][site] * step).sum(dim=(1, 2)).numpy()
            np.testing.assert_allclose(exact, numeric, rtol=0.05, atol=0.05)


def test_attribution_is_right_for_small_exchanges_only(casa: Casa, pairs: list[MatchedPair]) -> None:
    targets = [Target("z.1", "whole prompt", head) for head in (0, 1)] + [Target("embeddings", KEY)]
    table = patch_effects(casa, pairs, targets).deltas()
    same = [MatchedPair(pair.benign, pair.benign.model_copy(update={"id": f"{pair.benign.id}+"})) for pair in pairs]
    nothing = patch_effects(casa, same, [Target("embeddings", "whole prompt")]).deltas()
    np.testing.assert_allclose(nothing[["log_odds_estimated", "logit_estimated"]], 0, atol=1e-6)
    assert np.isfinite(table[["log_odds_estimated", "logit_estimated"]]).all(axis=None)
    assert table["log_odds_estimated"].abs().max() > 1e-4


def test_states_of_a_text_enter_the_run_of_a_medium(casa: Casa, mixed_queries: list[Query]) -> None:
    media = [query.model_copy(update={"label": "harmful"}) for query in mixed_queries[1:3]]
    texts = [request("bomb", "harmful", "a"), request("cake", "harmful", "b")]
    table = surface_effects(casa, media, texts)
    assert set(table["span"]) == {HEADER, WORD} and set(table["site"]) == {"embeddings", "0", "1"}
    assert (table.groupby(["span", "site"])["query_id"].nunique() == 2).all()
    # The header's words are the same, so nothing changes before a block has read them.
    entering = table[(table["span"] == HEADER) & (table["site"] == "embeddings")]
    np.testing.assert_allclose(entering["log_odds_patched"], entering["log_odds"], atol=1e-5)
    # What is read after the last block at the header's last token is the text run's own.
    last = table[(table["span"] == HEADER) & (table["site"] == "1")]
    np.testing.assert_allclose(last["logit_patched"], last["logit_donor"], atol=1e-4)
    assert (last["log_odds_patched"] - last["log_odds"]).abs().min() > 1e-5
    word = table[(table["span"] == WORD) & (table["site"] == "embeddings")]
    assert (word["logit_patched"] - word["logit"]).abs().min() > 1e-6
    without = surface_effects(casa, media, [Query.from_text("how do i make it ?", id="c")] * 2)
    assert set(without["span"]) == {HEADER}
    with pytest.raises(InputError, match="one text a request"):
        surface_effects(casa, media, texts[:1])


def test_the_word_goes_to_the_mediums_last_position(casa: Casa, mixed_queries: list[Query]) -> None:
    """By hand: the embedding of the text's word in place of the picture's last one."""
    omni, picture, text = casa.omni, mixed_queries[1], request("bomb", "harmful", "a")
    batch, donor = omni.encode([picture]), omni.encode([text])
    embeddings = capture(omni, batch, ["embeddings"], "all")["embeddings"].clone()
    (word,) = omni.tokenizer("bomb", add_special_tokens=False)["input_ids"]
    place = int(batch.modality["image"][0].nonzero()[-1])
    embeddings[0, place] = omni.embedding.weight[word].detach()
    assert (donor.inputs["input_ids"] == word).sum() == 1
    by_hand = measured(read_edited(casa, batch, {}, embeddings))
    table = surface_effects(casa, [picture], [text]).set_index(["span", "site"])
    assert table.loc[(WORD, "embeddings"), "logit_patched"] == pytest.approx(float(by_hand["logit"][0]), abs=1e-5)
