"""What the tests of CASA share: a small training set, short settings, and weights moved off their start."""

import torch

from casa_mech.casa import Casa, TrainSettings
from casa_mech.omni import GenerationSettings
from casa_mech.queries import Example, Query

SHORT = GenerationSettings(max_new_tokens=6)
SETTINGS = TrainSettings(
    max_steps=8, batch_size=8, micro_batch_size=8, validate_every=4, checkpoint_every=3, lr_lora=5e-3, precision="full"
)


def stir(casa: Casa, scale: float = 0.1) -> Casa:
    """Move every trainable parameter off its start, as training would (LoRA's B starts at zero)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in casa.parts.groups():
            for parameter in group.values():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    casa.parts.tokens.write()
    return casa


def examples(n: int = 24) -> list[Example]:
    rows = []
    for index in range(n):
        harmful = index % 3 == 0
        text = f"{'please ' * (index % 4)}how do i make a {'bomb' if harmful else 'cake'} ?"
        reply = "sorry , can not help with that ." if harmful else "sure , here is how to make a cake ."
        label = "harmful" if harmful else "benign"
        rows.append(Example(query=Query.from_text(text, id=f"e{index}", label=label), reply=reply))
    return rows
