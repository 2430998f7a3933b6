"""Faster training on a processor: matrix products in bfloat16, attention as plain products, cheap dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from casa_mech.omni.model import Omni

_LEVELS = 2**16
"""Steps in which `CheapDropout` counts a share."""


def fast_bfloat16(device: torch.device) -> bool:
    """True where `device` multiplies bfloat16 faster than float32."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


@contextmanager
def plain_attention(omni: Omni) -> Iterator[None]:
    """Attention as plain matrix products: on a CPU the fused kernel's backward pass takes half of a bfloat16 step."""
    usual = omni.model.config._attn_implementation
    omni.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        omni.model.set_attn_implementation(usual)


@contextmanager
def bfloat16_products(omni: Omni) -> Iterator[None]:
    """Matrix products of towers and blocks in bfloat16 for the length of a block, of a model in float32.

    Weights, gradients and the residual stream stay float32, and so does all that comes after the final norm: the head,
    a gate's pair, the losses.
    """
    cast = torch.autocast(omni.device.type, torch.bfloat16)

    def enter(*_: object) -> None:
        cast.__enter__()

    def leave(*_: object) -> None:
        cast.__exit__(None, None, None)

    # Hooks, since the head runs in the same call of the model and is to stay as it is.
    before = omni.backbone.register_forward_pre_hook(enter)
    after = omni.backbone.register_forward_hook(leave, always_call=True)
    try:
        with plain_attention(omni):
            yield
    finally:
        before.remove()
        after.remove()


class CheapDropout(nn.Dropout):
    """Dropout as torch's own, but where `bfloat16_products` is on: there, on a CPU, a mask costs a tenth.

    torch draws a float for each number, a third of a step's time; here 64 random bits serve four of them, so that the
    share left out is `p` to 1/65,536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` with a share `p` of its numbers at 0 and the others scaled up, in training."""
        if not self.training or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        x = x.to(torch.get_autocast_dtype("cpu"))  # the products that follow take nothing else
        dropped = round(self.p * _LEVELS)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
        return torch.where(keep, x * (_LEVELS / (_LEVELS - dropped)), 0)
