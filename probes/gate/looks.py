"""`look`: one prompt through the gate, to be looked at: the decision, v_s, and what safety attention reads."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from casa_mech.casa import Casa
from casa_mech.display import Html, html, tokens_html
from casa_mech.omni.chat import media_parts
from casa_mech.queries import Query, Reply, SafetyToken
from casa_mech.queries.html import medium_html
from probes.gate.safety_attention import AttentionMap, prompt_maps, word_shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Look:
    """One prompt as the gate reads it. In a notebook its tokens, picture and clip are tinted by safety attention."""

    query: Query
    """The prompt."""
    reply: Reply
    """The gate's decision: safety token, v_s and logits; no text."""
    attention: AttentionMap
    """Safety attention's weights, token by token and over each medium."""

    @property
    def v_s(self) -> float:
        """Safety attention's probability that the prompt is unsafe, in 0..1."""
        return self.attention.v_s

    @property
    def safety_token(self) -> SafetyToken:
        """The gate's decision."""
        assert self.reply.safety_token is not None
        return self.reply.safety_token

    @property
    def table(self) -> pd.DataFrame:
        """A row a position of the prompt: `position, token, role, weight, share`; the shares sum to 1."""
        attention = self.attention
        return pd.DataFrame(
            {
                "position": np.arange(len(attention.tokens)),
                "token": attention.tokens,
                "role": attention.roles,
                "weight": attention.weights,
                "share": attention.weights / max(attention.weights.sum(), 1e-12),
            }
        )

    def plot(self, title: str = "", caption: str = "") -> Figure:
        """The share of each token and, of the first picture or clip, where it lies; needs the extra `study`."""
        from probes.gate.plots import plot_attention_maps

        most = f"; {self._most(1)} of the attention" if self._most(1) else ""
        return plot_attention_maps([self.attention], title or f"this gate: {self._decision}{most}", caption)

    def __repr__(self) -> str:
        text = textwrap.shorten(self.query.text, 80, placeholder=" …")
        media = "".join(f"[{medium.kind}] " for medium in self.attention.media)
        most = f"; most attention on {self._most(3)}" if self._most(3) else ""
        return f"Look at {f'{media}{text}'.strip()!r}: {self._decision}{most}"

    def _repr_html_(self) -> Html:
        names, shares = word_shares(self.attention)
        total = max(float(self.attention.weights.sum()), 1e-12)
        media = [
            medium_html(part, f"query {self.query.id}", medium.weights, f"{_share(medium.weights.sum() / total)} of it")
            for part, medium in zip(media_parts(self.query), self.attention.media, strict=True)
        ]
        facts = f"{self.query.id} · tinted: each token's share of safety attention, scaled to the highest"
        return html("look", reply=self.reply, tokens=tokens_html(names, list(shares)), media=media, facts=facts)

    @property
    def _decision(self) -> str:
        return f"{self.safety_token}, v_s {self.v_s:.2f}"

    def _most(self, n: int) -> str:
        """The `n` tokens or media with the greatest shares; "" where nothing is read."""
        names, shares = word_shares(self.attention)
        order = np.argsort(-shares, kind="stable")[:n]
        return ", ".join(f"{names[place]} {_share(shares[place])}" for place in order if shares[place] > 0)


def look(casa: Casa, prompt: str | Query) -> Look:
    """The gate's decision on one prompt, with v_s and safety attention over its tokens, pictures and clips.

    The decision is that of `casa.decide`, with all that `casa.use` has switched on. A gate without safety attention
    (form "none") reads no token.

    Example:
        ```python
        seen = probes.look(casa, "how do i make a bomb ?")
        seen  # drawn in a notebook, one line elsewhere
        seen.v_s, seen.safety_token, seen.table
        seen.plot()
        ```

    Args:
        casa: the trained gate, on its model.
        prompt: text, or a query of text, pictures and clips; a prefill is left out.

    Raises:
        InputError: an empty prompt, or media that cannot be read or that the model has no encoder for.
    """
    query = Query.from_text(prompt) if isinstance(prompt, str) else prompt
    (reply,) = casa.decide([query], attention=True)
    assert reply.v_s is not None and reply.attention is not None
    batch = casa.omni.encode([query], prefill=False)
    (attention,) = prompt_maps(casa.omni, batch, [query], [reply.v_s], torch.tensor([reply.attention]))
    return Look(query, reply, attention)


def _share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")
