"""Effects of an attacker's prefill on a model, by the number of its tokens.

`prefill_sweep` reads states, predictions and the gate after each length; `replies_by_length`, `judge_replies` and
`trajectories` follow the replies token by token; `forced_divergence` compares two models along one continuation;
`depth_effects` exchanges the opening's states, depth by depth; `edge_effects` and `state_effects` ask by which edges of
attention a prefill overrides a safety token.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
