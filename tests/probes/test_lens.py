"""What TransformerLens sees is what Hugging Face and nnsight see, and the lenses measure what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from transformer_lens.model_bridge import TransformerBridge

from casa_mech import vocabulary
from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.omni import Omni, load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.trace import capture
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.sites import all_sites
from probes.gate.positions import position_roles
from probes.lens import logit as logit_module
from probes.lens import tuned as tuned_module
from probes.lens.heads import ablate_heads, attention_patterns, read_gate, summarise_heads
from probes.lens.logit import LOGIT_LENS, depth_states, logit_lens, read_off
from probes.lens.transformer_bridge import bridge, cached_states, hook_name, run_with_cache
from probes.lens.tuned import _RidgeSums, fit_translators, lens_quality

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def eager(tiny_omni: Omni) -> Omni:
    """The tiny model with eager attention, the kind that TransformerLens needs for patterns."""
    tiny_omni.model.set_attn_implementation("eager")
    return tiny_omni


@pytest.fixture(scope="module")
def organism() -> Omni:
    omni = load_omni("organism", device="cpu")
    omni.model.set_attn_implementation("eager")
    return omni


@pytest.fixture(scope="module")
def requests() -> list[Query]:
    return default_world().requests(12, seed=3)


def bridged(model: TransformerBridge, omni: Omni, queries: list[Query]) -> torch.Tensor:
    inputs = dict(omni.encode(queries).inputs)
    with torch.no_grad():
        return model(inputs.pop("input_ids"), **inputs)


def hugging_face(omni: Omni, queries: list[Query]) -> torch.Tensor:
    with torch.no_grad():
        return omni.model(**omni.encode(queries).inputs).logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [[0], [1], [2], [3], [0, 1, 2, 3]], ids=["text", "image", "audio", "both", "mixed"])
@pytest.mark.parametrize("name", ["eager", "organism"])
def test_logits_and_caches_are_hugging_faces_and_nnsights(
    request: pytest.FixtureRequest, name: str, which: list[int], mixed_queries: list[Query]
) -> None:
    omni: Omni = request.getfixturevalue(name)
    queries = [mixed_queries[index] for index in which]
    wanted = hugging_face(omni, queries)
    batch, sites = omni.encode(queries), all_sites(omni.n_layers)
    states = capture(omni, batch, sites, "all")  # leaves nnsight's wrappers on the modules, which must not be copied
    model = bridge(omni)
    close(bridged(model, omni, queries), wanted)
    found = cached_states(model, batch, sites)
    assert list(found) == list(states)
    for site in sites:
        close(found[site], states[site])
    with torch.no_grad():
        output = omni.model(**batch.inputs, output_hidden_states=True, output_attentions=True)
    close(depth_states(model, batch)[:-1], torch.stack(output.hidden_states[:-1]))
    close(found["norm"], output.hidden_states[-1])
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(omni.n_layers)]
    _, cache = run_with_cache(model, batch, names)
    for name, attention in zip(names, output.attentions, strict=True):
        close(cache[name], attention)


def test_the_bridge_shares_weights_and_leaves_the_model_alone(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    wanted, fingerprint = hugging_face(tiny_omni, mixed_queries), tiny_omni.model.state_dict().keys()
    bos = tiny_omni.tokenizer.bos_token
    model = bridge(tiny_omni)
    ours = {id(parameter) for parameter in tiny_omni.model.parameters()}
    assert {id(parameter) for parameter in model.original_model.parameters()} == ours
    assert torch.equal(hugging_face(tiny_omni, mixed_queries), wanted)
    assert tiny_omni.model.state_dict().keys() == fingerprint
    assert tiny_omni.tokenizer.bos_token == bos
    assert tiny_omni.model.config.text_config._attn_implementation != "eager"
    real = tiny_omni.encode(mixed_queries).inputs["attention_mask"].bool()
    torch.testing.assert_close(bridged(model, tiny_omni, mixed_queries)[real], wanted[real], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        tiny_omni.head.weight.mul_(2)
    torch.testing.assert_close(bridged(model, tiny_omni, mixed_queries)[real], 2 * wanted[real], rtol=1e-3, atol=1e-3)


def test_keys_are_grouped_and_biases_are_there(eager: Omni, mixed_queries: list[Query]) -> None:
    model, batch = bridge(eager), eager.encode(mixed_queries)
    _, cache = run_with_cache(model, batch, ["blocks.0.attn.hook_k", "blocks.0.attn.hook_q", "blocks.0.mlp.hook_post"])
    text = eager.model.config.text_config
    assert cache["blocks.0.attn.hook_q"].shape[2] == text.num_attention_heads == 2
    assert cache["blocks.0.attn.hook_k"].shape[2] == text.num_key_value_heads == 1
    assert cache["blocks.0.mlp.hook_post"].shape[2] == text.intermediate_size
    assert model.blocks[0].attn.k.bias is eager.blocks[0].self_attn.k_proj.bias


@pytest.fixture(scope="module")
def checkpoints(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in both of the hub's layouts: the thinker alone, and a full Omni with a talker beside it."""
    full = tmp_path_factory.mktemp("full")
    for name in FILES:
        (full / name).write_bytes((random_organism / name).read_bytes())
    parts = json.loads((random_organism / "processor_config.json").read_text())
    merged = {**parts["image_processor"], **parts["feature_extractor"], "processor_class": "Qwen2_5OmniProcessor"}
    (full / "preprocessor_config.json").write_text(json.dumps(merged))
    thinker = json.loads((random_organism / "config.json").read_text())
    config = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": thinker}
    (full / "config.json").write_text(json.dumps({**config, "talker_config": {}, "token2wav_config": {}}))
    weights = {f"thinker.{key}": value for key, value in load_file(random_organism / "model.safetensors").items()}
    weights["talker.model.embed_tokens.weight"] = torch.zeros(3, 3)
    index = {}
    for number, keys in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        shard = f"model-{number}.safetensors"
        save_file({key: weights[key] for key in keys}, full / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, shard)
    (full / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return {"thinker": random_organism, "full": full}


@pytest.mark.parametrize("layout", ["thinker", "full"])
def test_transformer_lens_boots_both_layouts(
    checkpoints: dict[str, Path], layout: str, mixed_queries: list[Query]
) -> None:
    omni = load_omni(checkpoints[layout], device="cpu")
    omni.model.set_attn_implementation("eager")
    model = TransformerBridge.boot_transformers(str(checkpoints[layout]), device="cpu")
    close(bridged(model, omni, mixed_queries), hugging_face(omni, mixed_queries))
    close(bridged(bridge(omni), omni, mixed_queries), hugging_face(omni, mixed_queries))


def test_a_fresh_interpreter_boots_both_layouts_after_register(checkpoints: dict[str, Path]) -> None:
    code = (
        "import sys\n"
        "from transformer_lens.model_bridge import TransformerBridge\n"
        "assert not any(name.startswith(('casa_mech', 'probes')) for name in sys.modules)\n"
        "from probes.lens import register\n"
        "register()\n"
        "models = [TransformerBridge.boot_transformers(path, device='cpu') for path in sys.argv[1:]]\n"
        "print([type(model.adapter).__name__ for model in models])\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    paths = list(map(str, checkpoints.values()))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:transformer_lens", "-c", code, *paths],
        capture_output=True, text=True, timeout=240, cwd=checkpoints["full"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["['ThinkerArchitectureAdapter',", "'ThinkerArchitectureAdapter']"]


def perturbed(omni: Omni) -> Casa:
    casa = Casa.attach(omni)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in casa.parts.adapter.parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return casa


def test_the_lens_ends_where_the_model_does(eager: Omni, mixed_queries: list[Query]) -> None:
    casa = perturbed(eager)
    model = bridge(eager)
    close(bridged(model, eager, mixed_queries), hugging_face(eager, mixed_queries))
    found = logit_lens(model, casa, mixed_queries, batch_size=3)
    batch = eager.encode(mixed_queries)
    own = edited_prompt(eager, batch, batch.gate_position, {}, casa.safety_gate).reading
    assert found.sites == ("embeddings", "0", "1")
    close(torch.tensor(found.pair[-1]), own.raw_pair)
    inner = capture(eager, batch, [0], "last")[0]
    close(torch.tensor(found.pair[1]), read_off(eager, inner)[:, list(casa.token_ids)].detach())
    table = found.table()
    assert len(table) == 3 * len(mixed_queries) and set(table["lens"]) == {"logit lens"}
    assert table["mass"].between(0, 1).all() and list(table["query_id"][:4]) == [query.id for query in mixed_queries]
    casa.detach()
    with pytest.raises(InputError, match="call bridge"):
        logit_lens(model, casa, mixed_queries)


def test_translators_are_ridge_regression_and_read_better(organism: Omni, requests: list[Query]) -> None:
    rng = np.random.default_rng(0)
    states = torch.tensor(rng.standard_normal((2, 300, 5)))
    states[1] = states[0] @ torch.tensor(rng.standard_normal((5, 5))) + 1 + 0.1 * states[1]
    sums = _RidgeSums(2, 5)
    for part in states.split(100, dim=1):
        sums.update(part)
    weight, bias = sums.solve(0.1)
    penalty = 0.1 * np.cov(states[0].numpy().T, bias=True).trace() / 5 * 300
    judge = Ridge(alpha=penalty).fit(states[0].numpy(), (states[1] - states[0]).numpy())
    np.testing.assert_allclose(weight[0].numpy(), judge.coef_, atol=1e-8)
    np.testing.assert_allclose(bias[0].numpy(), judge.intercept_, atol=1e-8)

    model = bridge(organism)
    text = default_world().requests(40, seed=4)
    plain, further = (fit_translators(model, organism, text, kl_epochs=epochs) for epochs in (0, 4))
    means = [lens_quality(model, organism, requests, {"tuned lens": found}).groupby(["lens", "depth"])["kl"].mean() for found in (plain, further)]  # fmt: skip  # noqa: E501
    last = organism.n_layers
    for found in means:
        assert found["logit lens"][last] == found["tuned lens"][last] == 0
        assert (found["tuned lens"][:last] < 0.5 * found["logit lens"][:last]).all()
    assert means[1]["tuned lens"].sum() < means[0]["tuned lens"].sum()
    with pytest.raises(InputError, match="ridge"):
        fit_translators(model, organism, text, ridge=0)


def test_head_ablation_is_nnsights(eager: Omni, mixed_queries: list[Query]) -> None:
    """Means are of one role on one surface, the gate's position apart: taken here from nnsight's states."""
    casa = perturbed(eager)
    model = bridge(eager)
    surfaces = ["text", "image", "image", "both"]
    queries = [
        query.model_copy(update={"meta": {"surface": name}})
        for query, name in zip(mixed_queries, surfaces, strict=True)
    ]
    effects = ablate_heads(model, casa, queries, heads=[(1, 1)], batch_size=3)
    assert np.isnan(effects.logit[0]).all() and np.isnan(effects.v_s[1, 0]).all()
    batch = eager.encode(queries)
    own = capture(eager, batch, ["z.1"], "all")["z.1"][:, :, 1]
    roles = position_roles(batch)
    at_gate = torch.arange(roles.shape[1])[None] == batch.gate_position[:, None]
    values = own.clone()
    for surface in set(surfaces):
        rows = torch.tensor([name == surface for name in surfaces])[:, None]
        for here in (rows & at_gate, *(rows & ~at_gate & (roles == role) for role in roles.unique())):
            if here.any():
                values[here] = own[here].mean(dim=0)

    def edit(flat: torch.Tensor) -> torch.Tensor:
        flat = flat.unflatten(-1, (2, -1)).clone()
        flat[:, :, 1] = values
        return flat.flatten(-2)

    for edits, logit, v_s in (
        ({}, effects.intact["logit"], effects.intact["v_s"]),
        ({"z.1": edit}, effects.logit[1, 1], effects.v_s[1, 1]),
    ):
        own = edited_prompt(eager, batch, batch.gate_position, edits, casa.safety_gate).reading
        close(torch.tensor(np.asarray(logit)), own.raw_pair[:, 1] - own.raw_pair[:, 0])
        close(torch.tensor(np.asarray(v_s)), own.v_s)
    assert not np.allclose(effects.logit[1, 1], effects.intact["logit"], atol=1e-4)
    signs = np.where(effects.intact["label"] == "harmful", 1, -1)
    np.testing.assert_allclose(effects.support("logit")[1, 1], signs * (effects.intact["logit"] - effects.logit[1, 1]))
    with pytest.raises(InputError, match=r"no head \(2, 0\) in 2 x 2"):
        ablate_heads(model, casa, mixed_queries, heads=[(2, 0)])


def test_what_a_head_writes_by_surface_alone_is_no_effect(eager: Omni, mixed_queries: list[Query]) -> None:
    """Two copies of each prompt: on its own surface the gate's position has nothing to lose at any head."""
    casa = perturbed(eager)
    model = bridge(eager)
    queries = [
        query.model_copy(update={"id": f"{query.id}-{copy}", "meta": {"surface": surface}, "label": "harmful"})
        for surface, query in zip(("text", "image"), mixed_queries[:2], strict=True)
        for copy in range(2)
    ]
    last = [(1, 0), (1, 1)]  # behind the last block's heads only the gate's own position reaches its logits
    effects = ablate_heads(model, casa, queries, heads=last)
    np.testing.assert_allclose(effects.support("logit")[1], 0, atol=1e-4)
    mixed = [query.model_copy(update={"meta": {}}) for query in queries]
    assert np.abs(ablate_heads(model, casa, mixed, heads=last).support("logit")[1]).max() > 1e-3


def test_head_summary_finds_the_head_that_matters() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"layer": 0, "head": head, "topic": f"t{item % 20}", "support_logit": shift + 0.3 * rng.standard_normal()}
        for head, shift in enumerate((0.0, 1.0))
        for item in range(60)
    ]
    found = summarise_heads(pd.DataFrame(rows), "logit").set_index("head")
    assert found["low"][0] < 0 < found["high"][0] and found["p_holm"][0] > 0.05
    assert found["low"][1] > 0.8 and found["p_holm"][1] < 0.01 and found["n"][1] == 60
    with pytest.raises(InputError, match="logit or v_s"):
        summarise_heads(pd.DataFrame(rows), "loss")


def test_patterns_are_attention_from_the_gate(eager: Omni, mixed_queries: list[Query]) -> None:
    model = bridge(eager)
    found = attention_patterns(model, eager, mixed_queries, [(0, 1), (1, 0)], batch_size=3)
    assert [(pattern.query_id, pattern.layer, pattern.head) for pattern in found[:3]] == [
        ("text", 0, 1), ("text", 1, 0), ("image", 0, 1),
    ]  # fmt: skip
    for pattern in found:
        assert len(pattern.tokens) == len(pattern.roles) == len(pattern.weight)
        assert pattern.weight.sum() == pytest.approx(1, abs=1e-5)
        assert sum(pattern.shares().values()) == pytest.approx(1, abs=1e-5)
        assert pattern.roles[-1] == "header"
    assert set(found[-1].shares()) == {"text", "image", "audio", "header", "template"}
    (own,) = attention_patterns(model, eager, mixed_queries[:1], [(0, 1)])
    np.testing.assert_allclose(own.weight, found[0].weight, atol=1e-5)


def test_hooks_edit_what_runs(eager: Omni, mixed_queries: list[Query]) -> None:
    casa, batch = perturbed(eager), eager.encode(mixed_queries)
    model = bridge(eager)
    for site in ("embeddings", "z.0", "attention.1", "mlp.0", 1):
        own = edited_prompt(eager, batch, batch.gate_position, {site: lambda states: 0.5 * states}, casa.safety_gate)
        found = read_gate(model, casa, batch, [(hook_name(site), lambda states, hook: 0.5 * states)])
        close(found.raw_pair, own.reading.raw_pair)
        close(found.v_s, own.reading.v_s)
    with pytest.raises(InputError, match=r"no site 'z\.7'"):
        cached_states(model, batch, ["z.7"])


def test_the_vocabulary_comes_in_chunks(
    eager: Omni, mixed_queries: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readings, distances and fits of a chunk of one row at a time are those of all rows at once."""
    casa = Casa.attach(eager)
    model, tokens = bridge(eager), eager.vocab_size
    largest: list[int] = []
    whole_read_off = logit_module.read_off

    def noted(omni: Omni, states: torch.Tensor) -> torch.Tensor:
        logits = whole_read_off(omni, states)
        largest.append(logits.numel())
        return logits

    def numbers() -> list[np.ndarray]:
        ridge, fitted = (fit_translators(model, eager, mixed_queries[:1], kl_epochs=epochs) for epochs in (0, 1))
        trajectory = logit_lens(model, casa, mixed_queries, ridge)
        lenses = {"ridge": ridge, "fitted": fitted}
        quality = lens_quality(model, eager, mixed_queries, lenses).set_index("lens")["kl"]
        # Not the fitted weights: where a gradient is about 0, rounding turns its sign, which is Adam's first step.
        means = quality.groupby(level=0).mean()
        assert means["ridge"] - means["fitted"] > 5e-5
        return [trajectory.pair, trajectory.mass, quality[["ridge", LOGIT_LENS]].to_numpy(), means.to_numpy()]

    whole = numbers()
    monkeypatch.setattr(vocabulary, "CHUNK", tokens)
    monkeypatch.setattr(logit_module, "read_off", noted)
    monkeypatch.setattr(tuned_module, "read_off", noted)
    for one, other in zip(numbers(), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert max(largest) == 3 * tokens, "one row at the three depths"
