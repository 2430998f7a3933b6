"""Supervised safety fine-tuning (SSFT) on CASA's data: alone, and with the safety tokens but no safety attention.

Everything but the token and the gate is CASA's: data, LoRA, balance, steps, seeds. So the rows of a comparison part
what fine-tuning does from what the token does and from what safety attention does (docs/method.md §5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from casa_mech.casa.adapter import Adapter
from casa_mech.casa.config import CasaConfig, LoraSettings, TrainSettings
from casa_mech.casa.objective import reply_losses
from casa_mech.casa.supervised import Supervised, class_sums, is_harmful
from casa_mech.casa.trainer import Row
from casa_mech.defenses.base import Description
from casa_mech.defenses.safety_token import SafetyTokenDefense
from casa_mech.defenses.trained import Tuned
from casa_mech.omni import Omni
from casa_mech.queries import Example
from casa_mech.trace.targets import plain_targets


class SsftSettings(LoraSettings):
    """Supervised safety fine-tuning: LoRA and balance, as in `CasaConfig`."""

    beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of harmful sequences in the loss; benign ones get 1 - beta (docs/method.md §1.4)."""


class SsftTokenSettings(SsftSettings):
    """Fine-tuning with safety tokens: fields of `CasaConfig`, without those of safety attention."""

    class_words: tuple[str, str] = ("safe", "unsafe")
    """Words whose pieces' rows initialise the safety tokens, safe first."""
    safe_token: str = "<|safe|>"
    """The safe token's string, added to the tokenizer as a special token."""
    unsafe_token: str = "<|unsafe|>"
    """The unsafe token's string, added to the tokenizer as a special token."""
    lambda_tok: float = Field(default=1.0, gt=0)
    """Weight of the safety token's loss beside the mean loss of the reply's tokens."""
    ce_support: Literal["full", "two_way"] = "full"
    """Softmax of the safety token's loss: over the whole vocabulary, or over the two tokens."""
    counterfactual: float = Field(default=0.0, ge=0, le=1)
    """Share of the benign examples that are given a second time with the unsafe token before a refusal."""

    def casa_config(self) -> CasaConfig:
        """CASA with a neutral gate."""
        return CasaConfig(form="none", **self.model_dump())


@dataclass(frozen=True)
class FineTuning:
    """The `Trainable` of fine-tuning: a LoRA on one model."""

    omni: Omni
    """The model."""
    config: SsftSettings
    """LoRA and balance."""
    adapter: Adapter
    """The LoRA."""

    @property
    def beta(self) -> float:
        """Weight of the harmful sequences."""
        return self.config.beta

    @property
    def counterfactual(self) -> float:
        """None: a counterfactual is one of a token, and here is none."""
        return 0.0

    @property
    def key(self) -> str:
        """The configuration."""
        return f"ssft {self.config.model_dump_json()}"

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """LoRA's parameters by name, and nothing."""
        return self.adapter.parameters(), {}

    def objective(self, examples: Sequence[Example], weights: Tensor, max_reply_tokens: int) -> tuple[Tensor, Row]:
        """L = Σ_i w_i reply_i with `weights` [batch]; sums of the replies' losses."""
        harmful = is_harmful(examples).to(self.omni.device)
        targets = [self.omni.reply_ids(example.reply)[:max_reply_tokens] for example in examples]
        batch = self.omni.encode([example.query for example in examples], targets, prefill=False)
        losses = reply_losses(plain_targets(self.omni, batch), batch.size)
        loss = (weights.to(losses.device) * losses).sum()
        return loss, {"loss": loss.item(), **class_sums({"reply": losses}, harmful)}


class Ssft(Tuned):
    """Refusals to harmful requests and answers to benign ones, learned without any token."""

    name = "ssft"
    config_type = SsftSettings
    about = "Supervised safety fine-tuning: refusals to harmful requests, answers to benign ones, on text alone."
    config: SsftSettings

    def __init__(
        self,
        omni: Omni,
        config: SsftSettings = SsftSettings(),
        training: TrainSettings = TrainSettings(),
        seed: int = 0,
    ) -> None:
        super().__init__(omni, config, seed)
        self._training_settings = training

    def describe(self) -> Description:
        """A LoRA, merged for decoding."""
        return Description(
            name=self.name,
            changes=("weights",),
            trained_parameters=self.trained_parameters,
            source="the SSFT baseline of CASA, arXiv 2604.00310",
            safety_prompt=self.safety_prompt,
        )

    def _learner(self, examples: Sequence[Example]) -> Supervised:
        return Supervised(FineTuning(self.omni, self.config, self._attached), examples, self._training_settings)

    def _loop(self) -> TrainSettings:
        return self._training_settings


class SsftToken(SafetyTokenDefense):
    """CASA without safety attention: the safety token is predicted and conditioned on, by the model's own logits."""

    name = "ssft-token"
    source = "the ablation without attention of CASA, arXiv 2604.00310"
