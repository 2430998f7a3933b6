"""The model through TransformerLens: a bridge to a loaded Omni, its caches by our sites' names, and the logit lens.

The bridge is a second tree of modules over the same weights, so the model itself, its traces and its adapters stay as
they are. The logit lens (nostalgebraist, 2020) reads the residual stream at every depth with the model's own final norm
and head; with translators (`probes/lens/tuned.py`) it is the tuned lens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedConfig

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.sites import ENCODERS, Site, check_sites
from probes.lens.adapter import ARCHITECTURE, register

INDEX_COLUMNS = ("query_id", "label", "surface", "topic", "split")
_HOOKS = {"embeddings": "blocks.0.hook_in", "norm": "ln_final.hook_out"}
_ENCODER_HOOKS = {"audio": "audio_encoder.hook_out", "vision": "vision_encoder.hook_merged"}
_PART_HOOKS = {"pre": "hook_in", "z": "attn.o.hook_in", "attention": "attn.hook_out", "mlp": "mlp.hook_out"}


def bridge(omni: Omni) -> TransformerBridge:
    """A TransformerBridge over `omni`'s weights; no weight is copied, and `omni` itself is left alone.

    Attention is eager in the bridge, the only kind that gives patterns, so its numbers are those of the Hugging Face
    model with eager attention, bit for bit, and differ from other kinds by rounding. The bridge has the layers that the
    model has now: make it after attaching a gate, and anew after detaching it. Inputs are what `omni.encode` gives:
    `model(batch.inputs["input_ids"], **rest)`, or `run_with_cache` likewise; positions are left to the model (M-RoPE).
    As in all of TransformerLens's bridges with native attention, `hook_attn_scores` holds the pattern.
    """
    register()
    model = _twin(omni.model)
    # The bridge gives its tokenizer a token to begin with; ours has none and must stay so.
    tokenizer = copy.deepcopy(omni.tokenizer)
    found = build_bridge_from_module(
        model, ARCHITECTURE, hf_config=model.config, tokenizer=tokenizer, model_name=omni.source
    )
    found.processor = omni.processor
    return found


def _twin(model: nn.Module) -> Any:
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


def hook_name(site: Site) -> str:
    """TransformerLens's name for one of our sites (`casa_mech.trace.sites`)."""
    if isinstance(site, int):
        return f"blocks.{site}.hook_out"
    part, _, layer = site.partition(".")
    return f"blocks.{layer}.{_PART_HOOKS[part]}" if layer else (_HOOKS | _ENCODER_HOOKS)[part]


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
    quiet = [site for site in order if site in ENCODERS and not batch.modality[ENCODERS[str(site)]].any()]
    _, cache = run_with_cache(model, batch, [hook_name(site) for site in order if site not in quiet])
    states = {}
    for site in order:
        if site not in ENCODERS:
            states[site] = cache[hook_name(site)]
            continue
        valid = batch.modality[ENCODERS[str(site)]]
        states[site] = torch.zeros(*valid.shape, model.cfg.d_model, dtype=model.cfg.dtype, device=valid.device)
        if site not in quiet:
            states[site][valid] = cache[hook_name(site)]
    return states


class Translate(Protocol):
    """What stands between a depth's residual stream and the final norm."""

    def __call__(self, states: Tensor) -> Tensor:
        """States [site, row, d_model] at every depth → the same shape, in the last depth's terms."""


@dataclass(frozen=True)
class Trajectory:
    """The two safety tokens, as read off every depth at the gate's position.

    lens: "logit lens" or "tuned lens". sites: "embeddings", "0", "1", ...; the last is the model's own answer.
    pair: float32 [site, query, 2], logits (safe, unsafe). mass: float32 [site, query], the share of all probability
    that the two tokens have. index: one row a query, columns `INDEX_COLUMNS`.
    """

    lens: str
    sites: tuple[str, ...]
    pair: np.ndarray
    mass: np.ndarray
    index: pd.DataFrame

    @property
    def difference(self) -> np.ndarray:
        """Unsafe minus safe logit [site, query], before the gate's own rewriting."""
        return self.pair[..., 1] - self.pair[..., 0]

    def table(self) -> pd.DataFrame:
        """One row a site and query: the index, `lens, site, depth, difference, mass`."""
        parts = [
            self.index.assign(lens=self.lens, site=site, depth=depth, difference=difference, mass=mass)
            for depth, (site, difference, mass) in enumerate(zip(self.sites, self.difference, self.mass, strict=True))
        ]
        return pd.concat(parts, ignore_index=True)


def depth_sites(n_layers: int) -> list[Site]:
    """The residual stream at every depth: before block 0, then after each block."""
    return ["embeddings", *range(n_layers)]


def logit_lens(
    model: TransformerBridge,
    casa: Casa,
    queries: Sequence[Query],
    translate: Translate | None = None,
    batch_size: int = 32,
) -> Trajectory:
    """The safety tokens' logits at the gate's position, read off the residual stream at every depth.

    Args:
        model: `bridge(casa.omni)`, made with the gate attached, so that LoRA and the tokens' rows take part.
        casa: the gate.
        queries: any mixture of text, image and audio; a prefill is left out.
        translate: translators of the tuned lens; none: the logit lens.
        batch_size: queries in one forward.

    Raises:
        InputError: no queries, or a bridge that was made of another model or before the gate was attached.
    """
    omni = casa.omni
    check_bridge(model, omni)
    if not queries:
        raise InputError("the lens needs at least one query")
    sites = depth_sites(omni.n_layers)
    pair = np.empty((len(sites), len(queries), 2), np.float32)
    mass = np.empty((len(sites), len(queries)), np.float32)
    tokens = torch.tensor(casa.token_ids, device=omni.device)
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[index] for index in group], prefill=False)
        states = depth_states(model, batch)[:, torch.arange(batch.size), batch.gate_position]
        logits = read_off(omni, states if translate is None else translate(states))
        pair[:, group] = logits[..., tokens].cpu().numpy()
        mass[:, group] = torch.softmax(logits, dim=-1)[..., tokens].sum(dim=-1).cpu().numpy()
    name = "logit lens" if translate is None else "tuned lens"
    return Trajectory(name, tuple(map(str, sites)), pair, mass, query_index(queries))


def depth_states(model: TransformerBridge, batch: OmniBatch) -> Tensor:
    """The residual stream [site, batch, position, d_model] at every depth (`depth_sites`)."""
    names = [hook_name(site) for site in depth_sites(model.cfg.n_layers)]
    _, cache = run_with_cache(model, batch, names)
    return torch.stack([cache[name] for name in names])


def read_off(omni: Omni, states: Tensor) -> Tensor:
    """Float32 logits [..., vocab] of states [..., d_model] under the model's own final norm and head."""
    return omni.head(omni.norm(states.to(omni.dtype))).to(torch.float32)


def check_bridge(model: TransformerBridge, omni: Omni) -> None:
    """Refuse a bridge that does not hold `omni`'s weights, LoRA included.

    Raises:
        InputError: it does not.
    """
    ours = {id(parameter) for parameter in omni.model.parameters()}
    theirs = {id(parameter) for parameter in model.original_model.parameters()}
    if ours != theirs:
        raise InputError("the bridge was made of another model, or before the gate was attached: call bridge(omni) now")


def query_index(queries: Sequence[Query]) -> pd.DataFrame:
    """One row a query with `INDEX_COLUMNS`; empty where the query's maker said nothing."""
    rows = [
        {"query_id": query.id, "label": query.label or ""} | {key: query.meta.get(key, "") for key in INDEX_COLUMNS[2:]}
        for query in queries
    ]
    return pd.DataFrame(rows, columns=list(INDEX_COLUMNS))
