"""Products in bfloat16: what is halved and what is not, close to float32, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from helpers.casa import SETTINGS, examples, stir

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.objective import class_weights
from casa_mech.casa.supervised import is_harmful
from casa_mech.casa.trainer import settled
from casa_mech.omni import Omni
from casa_mech.omni.precision import CheapDropout, bfloat16_products


def _gradient(casa: Casa, halved: bool) -> tuple[float, torch.Tensor]:
    """Loss and the whole gradient of one batch, without dropout."""
    rows = examples(12)
    with bfloat16_products(casa.omni) if halved else nullcontext():
        loss, _ = casa.parts.objective(rows, class_weights(is_harmful(rows), 0.5), 64)
        loss.backward()
    weights = [weight for group in casa.parts.groups() for weight in group.values()]
    gradient = torch.cat([weight.grad.flatten() for weight in weights])
    for weight in weights:
        weight.grad = None
    assert gradient.dtype == loss.dtype == torch.float32
    return loss.item(), gradient


def test_gradients_are_close_to_float32_s(tiny_omni: Omni) -> None:
    casa = stir(Casa.attach(tiny_omni, CasaConfig(lora_dropout=0.0)))
    loss, gradient = _gradient(casa, halved=False)
    halved_loss, halved_gradient = _gradient(casa, halved=True)
    assert halved_loss != loss and halved_loss == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradient, halved_gradient, dim=0) > 0.995
    assert halved_gradient.norm() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_blocks_are_halved_head_and_losses_are_not(tiny_omni: Omni) -> None:
    types: dict[str, torch.dtype] = {}

    def note(name: str, module: torch.nn.Module) -> Iterator[object]:
        yield module.register_forward_hook(lambda *passed: types.update({name: passed[2].dtype}))

    linear = tiny_omni.blocks[0].mlp.down_proj
    hooks = [*note("product", linear), *note("norm", tiny_omni.norm), *note("head", tiny_omni.head)]
    batch = tiny_omni.encode([example.query for example in examples(3)])
    usual = tiny_omni.model.config._attn_implementation
    with bfloat16_products(tiny_omni):
        tiny_omni.model(**batch.inputs)
        assert not torch.is_autocast_enabled("cpu")
    assert types == {"product": torch.bfloat16, "norm": torch.float32, "head": torch.float32}
    tiny_omni.model(**batch.inputs)
    assert types["product"] == torch.float32
    assert tiny_omni.model.config._attn_implementation == usual
    for hook in hooks:
        hook.remove()


def test_an_error_in_the_forward_leaves_full_precision(tiny_omni: Omni) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = tiny_omni.blocks[1].register_forward_pre_hook(fail)
    batch = tiny_omni.encode([example.query for example in examples(3)])
    with pytest.raises(ZeroDivisionError), bfloat16_products(tiny_omni):
        tiny_omni.model(**batch.inputs)
    hook.remove()
    assert not torch.is_autocast_enabled("cpu")
    assert not tiny_omni.backbone._forward_pre_hooks and not tiny_omni.backbone._forward_hooks


def test_cheap_dropout_is_torch_s_in_full_precision() -> None:
    x = torch.randn(64, 33)
    torch.manual_seed(3)
    expected = torch.nn.Dropout(0.2)(x)
    torch.manual_seed(3)
    assert torch.equal(CheapDropout(0.2)(x), expected)
    assert torch.equal(CheapDropout(0.2).eval()(x), x)


def test_cheap_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = torch.ones(1001, 333)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        kept = CheapDropout(0.2)(x)
        torch.manual_seed(3)
        assert torch.equal(CheapDropout(0.2)(x), kept)
        assert torch.equal(CheapDropout(0.2).eval()(x), x)
    assert kept.dtype == torch.bfloat16 and set(kept.unique().tolist()) == {0.0, 1.25}
    share = (kept == 0).float()
    assert share.mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / x.numel()) ** 0.5)
    # Four numbers share one draw of 64 bits: each of the four places has the share, and neighbours know nothing.
    flat = share.flatten()[: 4 * 80_000].view(-1, 4)
    assert flat.mean(0).tolist() == pytest.approx([0.2] * 4, abs=0.006)
    assert torch.corrcoef(flat.T).sub(torch.eye(4)).abs().max() < 0.02


def test_auto_is_bfloat16_where_that_is_faster(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = SETTINGS.model_copy(update={"precision": "auto"})
    for fast, precision in ((True, "bfloat16"), (False, "full")):
        monkeypatch.setattr("casa_mech.casa.trainer.fast_bfloat16", lambda device, fast=fast: fast)
        assert settled(auto, tiny_omni).precision == precision
        assert settled(SETTINGS, tiny_omni).precision == "full"
    monkeypatch.setattr("casa_mech.casa.trainer.fast_bfloat16", lambda device: True)
    tiny_omni.model.to(torch.bfloat16)
    assert settled(auto, tiny_omni).precision == "full"


def test_a_gate_trained_in_bfloat16_decides_as_one_in_float32(tiny_omni: Omni) -> None:
    queries = [example.query for example in examples(60)]
    decisions, readings = [], []
    for precision in ("full", "bfloat16"):
        casa = Casa.attach(tiny_omni, CasaConfig())
        changed = {"max_steps": 60, "lr_attention": 1e-2, "validation": 0.0, "precision": precision}
        casa.train(examples(), SETTINGS.model_copy(update=changed), progress=False)
        assert casa.training is not None and casa.training.settings.precision == precision
        replies = casa.decide(queries)
        decisions.append([reply.safety_token for reply in replies])
        readings.append(torch.tensor([reply.v_s for reply in replies]))
        casa.detach()
    assert set(decisions[0]) == {"safe", "unsafe"}
    assert sum(one == other for one, other in zip(*decisions, strict=True)) >= 57
    assert (readings[0] - readings[1]).abs().max() < 0.2
