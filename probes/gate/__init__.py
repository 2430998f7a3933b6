"""The inputs of CASA's gate, and what its decision rests on.

`look` shows one prompt as the gate reads it, `attention_maps` where safety attention looks in many; `minimal_sets`
removes positions until the decision flips; `patch_effects` exchanges states between matched pairs, `path_effects`
splits heads' effects by path, `surface_effects` moves states from a text's run into a picture's or clip's,
`ablate_directions` projects directions out; `attribute_token_difference` splits the safety tokens' logits;
`reliability` judges v_s as a probability.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
