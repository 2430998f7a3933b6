"""The model in TransformerLens.

`bridge` puts a loaded model into TransformerLens, `register` lets `TransformerBridge.boot_transformers` load one; both
change TransformerLens's tables when called, an import changes nothing. `logit_lens` and `fit_translators` (the tuned
lens) read the safety tokens off every depth; `ablate_heads` and `attention_patterns` look at attention heads.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
