"""The mathematics of the gate: docs/method.md §9, items 1 to 4."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

import casa_mech.defenses
import casa_mech.whitebox  # noqa: F401  (whose options are subclasses of `Settings` as well)
from casa_mech.casa import CasaConfig, SafetyAttention, TrainSettings
from casa_mech.casa.config import Settings
from casa_mech.casa.objective import class_weights
from casa_mech.casa.rules import add_log, replace, rewrite, scale, scale_above
from casa_mech.casa.trainer import learning_rate_factor
from casa_mech.errors import InputError

FORMS = ("mean", "top_k", "pooled", "compete")
BATCH, POSITION, D_MODEL = 5, 9, 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(form: str, **fields: object) -> SafetyAttention:
    return SafetyAttention(CasaConfig.model_validate({"form": form, **fields}), torch.randn(2, D_MODEL))


def states_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(BATCH, POSITION, dtype=torch.bool)
    mask[1, :4] = False
    mask[2, 1:] = False
    return 3 * torch.randn(BATCH, POSITION, D_MODEL), mask


@pytest.mark.parametrize("form", FORMS)
def test_v_s_is_a_share_and_attention_stays_on_the_prompt(form: str) -> None:
    states, mask = states_and_mask()
    v_s, weights = attention(form)(states * 10, mask)
    assert v_s.shape == (BATCH,) and weights.shape == (BATCH, POSITION)
    assert ((v_s >= 0) & (v_s <= 1)).all()
    assert (weights[~mask] == 0).all() and (weights >= 0).all()
    if form in ("pooled", "compete"):
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(BATCH))


@pytest.mark.parametrize("form", FORMS)
def test_padded_positions_never_count(form: str) -> None:
    states, mask = states_and_mask()
    module = attention(form)
    expected, _ = module(states, mask)
    for filler in (torch.randn_like(states) * 100, torch.full_like(states, torch.nan)):
        changed = torch.where(mask.unsqueeze(-1), states, filler)
        assert torch.equal(module(changed, mask)[0], expected)
    longer = torch.cat([torch.randn(BATCH, 3, D_MODEL), states], dim=1)
    padded = torch.cat([torch.zeros(BATCH, 3, dtype=torch.bool), mask], dim=1)
    torch.testing.assert_close(module(longer, padded)[0], expected)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_prompt_raises(form: str) -> None:
    states, mask = states_and_mask()
    mask[3] = False
    with pytest.raises(InputError, match="row 3"):
        attention(form)(states, mask)


def test_softmax_weights_alone_say_nothing() -> None:
    """Why the form pooled has values: the mean over T of weights that sum to one is 1/T for every prompt."""
    scores = torch.randn(BATCH, POSITION) * 7
    torch.testing.assert_close(torch.softmax(scores, dim=1).mean(dim=1), torch.full((BATCH,), 1 / POSITION))


def test_top_k_of_everything_is_the_mean_and_of_less_is_more() -> None:
    states, mask = states_and_mask()
    mean = attention("mean")
    v_s_of = {}
    for k in (1, 3, POSITION + 5):
        module = attention("top_k", k=k)
        module.load_state_dict(mean.state_dict())
        v_s_of[k] = module(states, mask)[0]
    torch.testing.assert_close(v_s_of[POSITION + 5], mean(states, mask)[0])
    assert (v_s_of[1] >= v_s_of[3]).all() and (v_s_of[3] >= v_s_of[POSITION + 5]).all()


@pytest.mark.parametrize("form", FORMS)
def test_prompt_states_get_no_gradient_and_queries_do(form: str) -> None:
    states, mask = states_and_mask()
    states.requires_grad_()
    module = attention(form, query_source="learned_free")
    module(states, mask)[0].sum().backward()
    assert states.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    assert isinstance(attention(form).class_embeddings, torch.Tensor)
    assert "class_embeddings" not in dict(attention(form).named_parameters())


def test_queries_start_alike_whatever_their_source() -> None:
    states, mask = states_and_mask()
    embeddings = torch.randn(2, D_MODEL)
    config = CasaConfig()
    torch.manual_seed(1)
    small = SafetyAttention(config, embeddings * 0.02)
    torch.manual_seed(1)
    large = SafetyAttention(config, embeddings * 50)
    torch.testing.assert_close(small(states, mask)[0], large(states, mask)[0], atol=1e-2, rtol=0)
    assert small.width == D_MODEL


GRID = [torch.tensor([pair]) for pair in itertools.product((-9.0, -0.5, 0.0, 4.0), repeat=2)]
V_S = torch.linspace(0, 1, 11)


def test_scaling_is_sign_fragile() -> None:
    """S1 on a negative unsafe logit: surer means lower, and a closed gate gives 0, above a negative safe logit."""
    pair = torch.tensor([[-2.0, -3.0]])
    assert scale(pair, torch.tensor([0.9]))[0, 1] < scale(pair, torch.tensor([0.1]))[0, 1]
    closed = scale(pair, torch.tensor([0.0]))
    assert closed[0, 1] > closed[0, 0]


def test_log_shift_is_monotone_whatever_the_signs() -> None:
    for pair in GRID:
        lead = [float((lambda z: z[0, 1] - z[0, 0])(add_log(pair, v_s.reshape(1)))) for v_s in V_S]
        assert all(low < high for low, high in itertools.pairwise(lead))
        half = add_log(pair, torch.tensor([0.5]))
        torch.testing.assert_close(half.softmax(dim=-1), pair.softmax(dim=-1))


def test_log_shift_multiplies_probabilities_and_survives_the_ends() -> None:
    pair, v_s = torch.tensor([[0.3, -1.2]]), torch.tensor([0.8])
    odds = pair.softmax(-1)[0, 1] / pair.softmax(-1)[0, 0] * 0.8 / 0.2
    shares = add_log(pair, v_s).softmax(-1)[0]
    torch.testing.assert_close(shares[1] / shares[0], odds)
    assert torch.isfinite(add_log(pair.repeat(2, 1), torch.tensor([0.0, 1.0]))).all()


def test_replacing_ignores_the_language_model() -> None:
    for pair in GRID:
        for v_s in V_S[V_S != 0.5]:
            rewritten = replace(pair, v_s.reshape(1))[0]
            assert (rewritten[1] > rewritten[0]) == (v_s > 0.5)


def test_scaling_above_the_floor_is_monotone_whatever_the_signs() -> None:
    for pair in GRID:
        floor = torch.tensor([-10.0])
        lead = [float((lambda z: z[0, 1] - z[0, 0])(scale_above(pair, v_s.reshape(1), floor))) for v_s in V_S]
        assert all(low < high for low, high in itertools.pairwise(lead))


def test_gradient_of_scaling_has_the_size_of_the_logits() -> None:
    pair, v_s = torch.tensor([[11.0, 14.0]]), torch.tensor([0.4], requires_grad=True)
    rewritten = scale(pair, v_s)
    torch.nn.functional.cross_entropy(rewritten, torch.tensor([1])).backward()
    p_unsafe = rewritten.detach().softmax(-1)[0, 1]
    torch.testing.assert_close(v_s.grad, ((p_unsafe - 1) * 25).reshape(1))


@pytest.mark.parametrize("rule", ["scale", "replace", "add_log", "scale_above"])
def test_rewrite_touches_two_columns_only(rule: str) -> None:
    logits, ids, v_s = torch.randn(3, 12), torch.tensor([4, 7]), torch.tensor([0.1, 0.5, 0.9])
    new, raw, pair = rewrite(rule, logits, ids, v_s)
    others = [column for column in range(12) if column not in (4, 7)]
    assert torch.equal(new[:, others], logits[:, others])
    assert torch.equal(new[:, ids], pair) and torch.equal(raw, logits[:, ids])
    half = rewrite(rule, logits.to(torch.bfloat16), ids, v_s)[2]
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"form": "pooled", "k": 4}, "top_k"),
        ({"rule": "replace"}, "two_way"),
        ({"safe_token": "x", "unsafe_token": "x"}, "different"),
        ({"layer": -1}, "counted from 0"),
        ({"beta": 2}, "beta: Input should be less"),
        ({"bata": 0.5}, "CasaConfig has no field 'bata'; its fields: lora_r, .*beta, lambda_tok, ce_support, .*"),
        ({"lora_targets": ("q_proj", "conv")}, "conv"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CasaConfig(**fields)


def test_paper_reading_and_size_dependent_rates() -> None:
    paper = CasaConfig.paper()
    assert (paper.form, paper.rule) == ("pooled", "scale")
    assert CasaConfig.paper(beta=0.2).beta == 0.2
    assert TrainSettings().learning_rates(2048) == (1e-4, 5e-4)
    assert TrainSettings(lr_lora=1.0).learning_rates(64)[0] == 1.0
    with pytest.raises(InputError, match="even"):
        TrainSettings(batch_size=7)


def _settings_types(base: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _settings_types(kind)


def test_an_unknown_field_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"^TrainSettings has no field 'steps'; its fields: epochs, max_steps, .*"):
        TrainSettings(steps=3)


def test_every_option_is_documented() -> None:
    kinds = list(_settings_types())
    assert {"CasaConfig", "TrainSettings", "CircuitBreakerSettings", "PgdSettings"} <= {kind.__name__ for kind in kinds}
    bare = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, field in kind.model_fields.items()
        if not field.description
    ]
    assert not bare


def test_classes_weigh_beta_and_one_minus_beta() -> None:
    harmful = torch.tensor([True, True, True, False])
    weights = class_weights(harmful, 0.2)
    torch.testing.assert_close(weights[harmful].sum(), torch.tensor(0.2))
    torch.testing.assert_close(weights[~harmful].sum(), torch.tensor(0.8))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[100] < 1e-9
    assert all(low >= high for low, high in itertools.pairwise(factors[10:]))
