"""LoRA on the language model's blocks through peft, put in and taken out in place; towers and head stay frozen."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from casa_mech.casa.config import LoraSettings
from casa_mech.errors import InputError, ModelError
from casa_mech.omni import Omni
from casa_mech.omni.precision import CheapDropout
from casa_mech.trace.sites import remirror

NAME = "casa"
"""peft's name of the adapter, which is part of its parameters' names."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""peft names weights from its own wrapper, which we do without; files carry the prefix, so plain peft reads them."""


class Adapter:
    """The LoRA layers inside one model. Not wrapping the model keeps every path in it, and so every trace, the same.

    Args:
        omni: the model.
        config: rank, alpha, dropout and which linear layers.
        layers: the blocks that get them; all by default.
    """

    def __init__(self, omni: Omni, config: LoraSettings, layers: Sequence[int] | None = None) -> None:
        if hasattr(omni.model, "peft_config"):
            raise ModelError("the model has an adapter in it already; detach it first, or load the model again")
        self._omni = omni
        self._frozen = {name: parameter.requires_grad for name, parameter in omni.model.named_parameters()}
        linears = omni.architecture.lora_targets
        targets = [name for name in config.lora_targets or linears if name in linears]
        if not targets:
            asked = ", ".join(config.lora_targets)
            raise InputError(f"lora_targets {asked}: {omni.source} has none of them, but {', '.join(linears)}")
        blocks, layer = re.escape(omni.architecture.blocks), r"\d+"
        if layers is not None:
            layer = f"(?:{'|'.join(map(str, layers))})"
        self.config = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=rf"{blocks}\.{layer}\.\w+\.({'|'.join(targets)})",
            base_model_name_or_path=omni.source,
        )
        self._lora = LoraModel(omni.model, {NAME: self.config}, NAME)
        for parameter in self.parameters().values():
            parameter.data = parameter.data.to(torch.float32)
        for module in omni.text_model.modules():
            if isinstance(module, LoraLayer) and config.lora_dropout:
                module.lora_dropout[NAME] = CheapDropout(config.lora_dropout)
        # New modules start in training mode, with LoRA's dropout on.
        omni.model.eval()
        remirror(omni)

    def parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's parameters by their name in the model."""
        return {name: value for name, value in self._omni.model.named_parameters() if f".{NAME}." in name}

    def enable(self, on: bool) -> None:
        """Let the LoRA layers act, or leave the base model alone."""
        if on:
            self._lora.enable_adapter_layers()
        else:
            self._lora.disable_adapter_layers()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """LoRA added into copies of the weights for the length of a block, so that decoding costs what the base costs.

        peft's layers step aside for the linear layers they wrap. Afterwards the weights are the very tensors they were:
        subtracting LoRA again would leave rounding behind.
        """
        layers = [
            (parent, name, layer, layer.base_layer.weight.data)
            for parent in self._omni.text_model.modules()
            for name, layer in parent.named_children()
            if isinstance(layer, LoraLayer)
        ]
        try:
            for parent, name, layer, weight in layers:
                linear = layer.base_layer
                linear.weight.data = weight + layer.get_delta_weight(NAME).to(weight.dtype)
                setattr(parent, name, linear)
            yield
        finally:
            for parent, name, layer, weight in layers:
                layer.base_layer.weight.data = weight
                setattr(parent, name, layer)

    def remove(self) -> None:
        """Take the layers out; the model is the base again."""
        self._lora.unload()
        if hasattr(self._omni.model, "peft_config"):
            del self._omni.model.peft_config
        for name, parameter in self._omni.model.named_parameters():
            parameter.requires_grad_(self._frozen[name])
        remirror(self._omni)

    def save(self, directory: Path) -> None:
        """Write a standard peft adapter into `directory`."""
        state = get_peft_model_state_dict(self._omni.model, adapter_name=NAME, save_embedding_layers=False)
        tensors = {PEFT_PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        self.config.save_pretrained(str(directory))

    def load(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Fill the layers with `tensors` read from `path`.

        Raises:
            ModelError: names or shapes do not fit this model.
        """
        state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = set_peft_model_state_dict(self._omni.model, state, adapter_name=NAME)
        except RuntimeError as error:
            raise ModelError(f"{path} does not fit this model: {_shape_line(error)}") from None
        missing = [name for name in result.missing_keys if f".{NAME}." in name]
        unmatched = missing or list(result.unexpected_keys)
        if unmatched:
            raise ModelError(
                f"{path} does not fit this model: {unmatched[0]} has no counterpart; load it on its own base"
            )


def _shape_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return lines[0] if lines else str(error).splitlines()[0]
