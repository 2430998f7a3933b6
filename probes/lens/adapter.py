"""TransformerLens's architecture adapter for the thinker of Qwen2.5-Omni: text, pictures and audio.

It is the package's entry point in the group `transformer_lens.architectures`. TransformerLens 4.3 asks for plug-ins
only after it has looked the architecture up in its own table and read the model's sizes from the config, and both
refuse Qwen2.5-Omni; `register` adds it to both when it is called.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import Qwen3_5VisionBlockBridge
from transformer_lens.utilities import architectures

from casa_mech.omni.architecture import QWEN2_5_OMNI as PARTS

ARCHITECTURE = PARTS.model_class
FULL_MODEL = PARTS.model_types[0]
"""Model type of the full Omni checkpoints, which hold the thinker beside the talker."""


class VisionBridge(GeneralizedComponent):
    """The picture encoder. `hook_out`: its last block's output; `hook_merged`: what enters the language model.

    Both [patch, width]; the second has a row for each placeholder token, in the order of the prompt.
    """

    def __init__(self, name: str) -> None:
        parts = {part: LinearBridge(name=part) for part in ("q", "k", "v", "proj")}
        mlp = {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}
        block = Qwen3_5VisionBlockBridge(
            name="blocks",
            submodules={
                "attn": GeneralizedComponent(name="attn", submodules=parts),
                "mlp": GeneralizedComponent(
                    name="mlp", submodules={key: LinearBridge(name=value) for key, value in mlp.items()}
                ),
            },
        )
        patches = GeneralizedComponent(name="patch_embed")
        super().__init__(name, submodules={"patch_embed": patches, "blocks": block})
        self.hook_merged = HookPoint()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own output, through the hooks."""
        output = super().forward(*args, **kwargs)
        # The library reorders the merger's rows before it hands them on; only here are they in the prompt's order.
        output.pooler_output = self.hook_merged(output.pooler_output)
        return output


class ThinkerArchitectureAdapter(ArchitectureAdapter):
    """Qwen2.5-Omni's thinker: grouped-query attention with q, k, v biases, M-RoPE, RMSNorm, gated MLP.

    Attention stays the library's own, since M-RoPE's three axes are laid out there; q, k, v, z, pattern and the
    residual stream are hooked. Mirrors TransformerLens's adapter of Qwen2.5-VL.
    """

    cfg: Any
    _testing_lm_attr = PARTS.text_model
    _testing_wire_rotary = False

    def __init__(self, cfg: Any) -> None:
        """Lay the thinker's modules out for the bridge; `cfg` is a `TransformerBridgeConfig`."""
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self._set_rms_rotary_defaults()
        self.cfg.attn_implementation = "eager"  # the only one that gives the pattern
        # Qwen's tokenizers have no token to begin with; the stand-in would be the end of a turn.
        self.cfg.default_prepend_bos = False
        self._extract_vision_dims(cfg)
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=True)}
        self.component_mapping = {
            "vision_encoder": VisionBridge(PARTS.towers["image"].path),
            "audio_encoder": GeneralizedComponent(name=PARTS.towers["audio"].path),
            "embed": EmbeddingBridge(name=PARTS.embedding),
            "blocks": self._block(),
            "ln_final": RMSNormalizationBridge(name=PARTS.norm, config=self.cfg),
            "unembed": UnembeddingBridge(name=PARTS.head, config=self.cfg),
        }

    def _block(self) -> BlockBridge:
        names = {"q": PARTS.query, "k": PARTS.key, "v": PARTS.value, "o": PARTS.attention_output}
        projections = {part: LinearBridge(name=name) for part, name in names.items()}
        attention = AttentionBridge(
            name=PARTS.attention,
            config=self.cfg,
            submodules=projections,
            maintain_native_attention=True,
            requires_attention_mask=True,
        )
        return BlockBridge(
            name=PARTS.blocks,
            submodules={
                "ln1": RMSNormalizationBridge(name="input_layernorm", config=self.cfg),
                "ln2": RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
                "attn": attention,
                "mlp": self._gated_mlp(),
            },
        )

    def prepare_loading(self, model_name: str, model_kwargs: dict[str, Any]) -> None:
        """Let the full checkpoints' `thinker.` weights be found; those of talker and vocoder are passed over."""
        super().prepare_loading(model_name, model_kwargs)
        model_kwargs["key_mapping"] = {rf"^{re.escape(PARTS.weight_prefix)}": ""}

    def get_component_mapping(self) -> Any:
        """The components by their names in TransformerLens."""
        # A bridge asks for them once it holds the config. From then on the loader may not learn from this adapter that
        # the model is multimodal: it would build the library's processor, and pip-install torchvision to do so.
        if self.cfg.is_multimodal:
            self.cfg = copy.copy(self.cfg)
            self.cfg.is_multimodal = False
        return super().get_component_mapping()


def register() -> None:
    """Let `TransformerBridge.boot_transformers` load Qwen2.5-Omni in this process. Calling it again changes nothing.

    Enters the architecture into TransformerLens's table and its list of multimodal ones (both name it only; the adapter
    comes through the entry point), and lets its reader take the thinker's config out of a full Omni checkpoint's.
    """
    from transformer_lens.factories import architecture_adapter_factory
    from transformer_lens.utilities import hf_utils

    architecture_adapter_factory.SUPPORTED_ARCHITECTURES.setdefault(ARCHITECTURE, None)
    architectures.MULTIMODAL_ARCHITECTURES.add(ARCHITECTURE)
    read = hf_utils.autoconfig_with_remote_post_init_compat
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def read_thinker(*args: Any, **kwargs: Any) -> Any:
        config = read(*args, **kwargs)
        if getattr(config, "model_type", None) != FULL_MODEL:
            return config
        thinker = getattr(config, PARTS.config_key)
        thinker.architectures = [ARCHITECTURE]
        return thinker

    hf_utils.autoconfig_with_remote_post_init_compat = read_thinker
