"""`look`: one prompt through the gate, to be looked at: the decision, v_s, and what safety attention reads."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from casa_mech.casa import Casa
from casa_mech.display import Html, html, tokens_html
from casa_mech.errors import InputError, missing_extra
from casa_mech.omni.chat import media_parts
from casa_mech.queries import AudioPart, ImagePart, Prompt, Query, Reply, SafetyToken
from casa_mech.queries.html import MEDIA, medium_html
from probes.gate.safety_attention import AttentionMap, MediumMap, prompt_maps, word_shares

LEAST = 0.01
"""Share of safety attention below which a token is not named and a medium not tinted."""


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

    def most_read(self, n: int = 3) -> str:
        """The up to `n` tokens or media with the greatest shares of safety attention, in words; none below 1 %."""
        names, shares = word_shares(self.attention)
        order = np.argsort(-shares, kind="stable")[:n]
        return ", ".join(f"{names[place]} {_percent(shares[place])}" for place in order if shares[place] >= LEAST)

    def plot(self, title: str = "", caption: str = "") -> Any:
        """A matplotlib figure of each token's share and, of the first picture or clip, of where its share lies.

        Raises:
            InputError: matplotlib is not installed; the message names the extra that brings it.
        """
        try:
            from probes.gate.plots import plot_attention_maps
        except ImportError as error:
            raise InputError(missing_extra(error) or str(error)) from None

        most = f"; {self.most_read(1)} of the attention" if self.most_read(1) else ""
        return plot_attention_maps([self.attention], title or f"this gate: {self._decision}{most}", caption)

    def __repr__(self) -> str:
        text = textwrap.shorten(self.query.text, 80, placeholder=" …")
        media = "".join(f"[{medium.kind}] " for medium in self.attention.media)
        most = f"; most attention on {self.most_read(3)}" if self.most_read(3) else ""
        return f"Look at {f'{media}{text}'.strip()!r}: {self._decision}{most}"

    def _repr_html_(self) -> Html:
        names, shares = word_shares(self.attention)
        parts = list(zip(media_parts(self.query), self.attention.media, strict=True))
        media = [self._medium_html(part, medium) for part, medium in parts[:MEDIA]]
        left = f" · {len(parts) - MEDIA} more media" if len(parts) > MEDIA else ""
        facts = f"{self.query.id} · tinted: shares of safety attention, scaled to the highest{left}"
        return html("look", reply=self.reply, tokens=tokens_html(names, list(shares)), media=media, facts=facts)

    def _medium_html(self, part: ImagePart | AudioPart, medium: MediumMap) -> Html:
        share = float(medium.weights.sum() / max(self.attention.weights.sum(), 1e-12))
        where = f"query {self.query.id}"
        if share < LEAST:  # scaled to its highest, next to nothing would look like much
            return medium_html(part, where, caption=f"less than {_percent(LEAST)} of the attention, not tinted")
        return medium_html(part, where, medium.weights, f"{_percent(share)} of the attention, where tinted")

    @property
    def _decision(self) -> str:
        return f"{self.safety_token}, v_s {self.v_s:.2f}"


def look(casa: Casa, prompt: Prompt) -> Look:
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
    (query,) = casa.omni.queries([prompt])
    (reply,) = casa.decide([query], attention=True)
    assert reply.v_s is not None and reply.attention is not None
    batch = casa.omni.encode([query], prefill=False)
    (attention,) = prompt_maps(casa.omni, batch, [query], [reply.v_s], torch.tensor([reply.attention]))
    return Look(query, reply, attention)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
