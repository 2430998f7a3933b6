"""The words and the shape of the tests' tiny random model."""

from casa_mech.organism.architecture import OrganismShape

WORDS = (
    "how do i make build a the cake bomb tea please explain sure , here is to sorry can not help with that ? . : ! "
    "word in image hear you safe unsafe request harmful b o m c k e t first then done thing what spell name it"
).split()
SHAPE = OrganismShape(d_model=64, layers=2, heads=2, kv_heads=1, d_mlp=64, vision_width=32, vision_layers=1, audio_width=32, audio_layers=1)  # fmt: skip  # noqa: E501
