"""A loaded Omni as a TransformerBridge of TransformerLens, and its caches by the names of our sites.

The bridge is a second tree of modules over the same weights, so the model itself, its traces and its adapters stay as
they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedConfig

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.trace.sites import ENCODERS, Site, check_sites
from probes.lens.adapter import register

_HOOKS = {"embeddings": "blocks.0.hook_in", "norm": "ln_final.hook_out"}
_ENCODER_HOOKS = {"audio": "audio_encoder.hook_out", "vision": "vision_encoder.hook_merged"}
_NORMED_HOOKS = {"attention": "ln1_post.hook_out", "mlp": "ln2_post.hook_out"}
_BLOCK_HOOKS = {"pre": "hook_in", "z": "attn.o.hook_in", "attention": "attn.hook_out", "mlp": "mlp.hook_out"}


def bridge(omni: Omni) -> TransformerBridge:
    """A TransformerBridge over `omni`'s weights; no weight is copied, and `omni` itself is left alone.

    Attention is eager in the bridge, the only kind that gives patterns, so its numbers are those of the Hugging Face
    model with eager attention, bit for bit, and differ from other kinds by rounding. The bridge has the layers that the
    model has now: make it after attaching a gate, and anew after detaching it. Inputs are what `omni.encode` gives:
    `model(batch.inputs["input_ids"], **rest)`, or `run_with_cache` likewise; positions are left to the model (M-RoPE).
    As in all of TransformerLens's bridges with native attention, `hook_attn_scores` holds the pattern. Other families
    than Qwen2.5-Omni have TransformerLens's own adapters.
    """
    register()
    model = _shared_copy(omni.model)
    # The bridge gives its tokenizer a token to begin with; ours has none and must stay so.
    tokenizer = copy.deepcopy(omni.tokenizer)
    bridged = build_bridge_from_module(
        model, omni.architecture.model_class, hf_config=model.config, tokenizer=tokenizer, model_name=omni.source
    )
    bridged.processor = omni.processor
    return bridged


def _shared_copy(model: nn.Module) -> Any:
    """A second tree of modules with the very same parameters and buffers, and configs and hooks of its own."""
    blank, seen = vars(nn.Module()), dict[int, Any]()

    def build(module: nn.Module) -> nn.Module:
        if id(module) in seen:
            return seen[id(module)]
        new = seen[id(module)] = object.__new__(type(module))
        for name, value in vars(module).items():
            if name == "_modules":
                value = {key: None if child is None else build(child) for key, child in value.items()}
            elif name in blank and "hook" in name:
                value = copy.copy(blank[name])
            elif name in ("forward", "__nnsight__"):
                continue  # nnsight's own, bound to the module that it traces
            elif isinstance(value, PreTrainedConfig):
                value = copy.deepcopy(value, seen)
            elif isinstance(value, dict | list | set):
                value = copy.copy(value)
            vars(new)[name] = value
        return new

    return build(model)


def hook_name(site: Site, normed: bool = False) -> str:
    """TransformerLens's name for one of our sites (`casa_mech.trace.sites`).

    `normed`: the model's blocks have a norm behind attention and MLP (Gemma), and what is added is what that gives.
    """
    name, _, layer = str(site).partition(".")
    if normed and name in _NORMED_HOOKS:
        return f"blocks.{layer}.{_NORMED_HOOKS[name]}"
    if isinstance(site, int):
        return f"blocks.{site}.hook_out"
    return f"blocks.{layer}.{_BLOCK_HOOKS[name]}" if layer else (_HOOKS | _ENCODER_HOOKS)[name]


def run_with_cache(model: TransformerBridge, batch: OmniBatch, names: Sequence[str]) -> tuple[Tensor, Any]:
    """Logits [batch, position, vocab] of the bridge over `batch`, and the cache of the hooks `names`."""
    inputs = dict(batch.inputs)
    with torch.no_grad():
        return model.run_with_cache(inputs.pop("input_ids"), names_filter=list(names), use_cache=False, **inputs)


def cached_states(model: TransformerBridge, batch: OmniBatch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Hidden states at `sites` from TransformerLens's cache, as `casa_mech.trace.capture(..., "all")` gives them.

    Returns:
        For each site [batch, position, d_model], heads [batch, position, head, d_head]; an encoder's output stands at
        the positions that it fills, with zeros elsewhere.

    Raises:
        InputError: a site that the model does not have.
    """
    order = check_sites(sites, model.cfg.n_layers)
    idle = [site for site in order if site in ENCODERS and not batch.modality[ENCODERS[str(site)]].any()]
    normed = "ln1_post" in dict(model.blocks[0].named_children())
    names = {site: hook_name(site, normed) for site in order if site not in idle}
    _, cache = run_with_cache(model, batch, list(names.values()))
    states = {}
    for site in order:
        if site not in ENCODERS:
            states[site] = cache[names[site]]
            continue
        valid = batch.modality[ENCODERS[str(site)]]
        states[site] = torch.zeros(*valid.shape, model.cfg.d_model, dtype=model.cfg.dtype, device=valid.device)
        if site not in idle:
            states[site][valid] = cache[names[site]]
    return states


def check_bridge(model: TransformerBridge, omni: Omni) -> None:
    """Refuse a bridge that does not hold `omni`'s weights, LoRA included.

    Raises:
        InputError: it does not.
    """
    ours = {id(parameter) for parameter in omni.model.parameters()}
    theirs = {id(parameter) for parameter in model.original_model.parameters()}
    if ours != theirs:
        raise InputError("the bridge was made of another model, or before the gate was attached: call bridge(omni) now")
