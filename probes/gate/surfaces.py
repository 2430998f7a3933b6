"""States of a text run patched into the run of the same request as a picture or clip.

The two prompts have no layout in common, but both end in the same header, and both spell out the key word: states are
put in there. The text of a benign counterpart, put in at the same place, is the control: what it changes is not harm.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from torch import BoolTensor, Tensor

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging.stats import cluster_of
from casa_mech.omni import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.sites import Edit, Site
from probes.gate.patching import measured, read_edited
from probes.gate.positions import ROLES, key_positions, position_roles

HEADER, WORD = "header", "key word at the medium's end"
"""Where states are put: each header position gets that of the text run; the medium's last position that of the text's
last token of the key word."""


def surface_effects(
    casa: Casa, receivers: Sequence[Query], donors: Sequence[Query], batch_size: int = 32
) -> pd.DataFrame:
    """Effects of putting a text run's states into the run of a request with a medium, at every depth.

    Args:
        casa: the trained gate, on its model.
        receivers: requests with a picture or a clip.
        donors: as many texts, the donor of each.
        batch_size: requests in one forward.

    Returns:
        One row a receiver, span and depth: `query_id, topic, span` (`HEADER` or `WORD`), `site`, and each of `MEASURES`
        in the receiving run, in the donor run (`_donor`) and in the patched one (`_patched`). Where a request has no
        such span there is no row.

    Raises:
        InputError: no receiver, or not as many donors.
    """
    if not receivers or len(receivers) != len(donors):
        raise InputError(
            f"{len(receivers)} requests and {len(donors)} texts: give one text a request, and at least one"
        )
    tables = []
    for group in casa.omni.batches(receivers, batch_size):
        tables.append(_patched(casa, [receivers[index] for index in group], [donors[index] for index in group]))
    return pd.concat(tables, ignore_index=True)


def _patched(casa: Casa, receivers: list[Query], donors: list[Query]) -> pd.DataFrame:
    omni = casa.omni
    sites: list[Site] = ["embeddings", *range(omni.n_layers)]
    batch, texts = omni.encode(receivers, prefill=False), omni.encode(donors, prefill=False)
    states = capture(omni, texts, sites, "all")
    embeddings = capture(omni, batch, ["embeddings"], "all")["embeddings"]
    reading = measured(read_edited(casa, batch, {}, embeddings))
    donated = measured(read_edited(casa, texts, {}, states["embeddings"]))
    unpatched = {**reading, **{f"{name}_donor": value for name, value in donated.items()}}
    places = {
        HEADER: (_is_header(batch), _is_header(texts)),
        WORD: (_last_of(_is_medium(batch)), _last_of(key_positions(omni, texts, donors))),
    }
    tables = []
    for span, (to, source) in places.items():
        whole = (to.sum(dim=1) == source.sum(dim=1)) & to.any(dim=1)
        to, source = to & whole[:, None], source & whole[:, None]
        if not bool(whole.any()):
            continue
        for site in sites:
            patched = measured(read_edited(casa, batch, {site: _put(states[site][source], to)}, embeddings))
            table = pd.DataFrame(
                {
                    "query_id": [query.id for query in receivers],
                    "topic": [str(cluster_of(query)) for query in receivers],
                    "span": span,
                    "site": str(site),
                    **unpatched,
                    **{f"{name}_patched": value for name, value in patched.items()},
                }
            )
            tables.append(table[whole.cpu().numpy()])
    return pd.concat(tables, ignore_index=True)


def _put(donated: Tensor, to: BoolTensor) -> Edit:
    """An edit that puts `donated` [position of all rows, d_model] at the positions `to` [batch, position], in order."""

    def edit(states: Tensor) -> Tensor:
        return states.masked_scatter(to.unsqueeze(-1), donated.to(states.dtype))

    return edit


def _is_header(batch: OmniBatch) -> BoolTensor:
    return position_roles(batch) == ROLES.index("header")


def _is_medium(batch: OmniBatch) -> BoolTensor:
    return batch.modality["image"] | batch.modality["audio"]


def _last_of(mask: BoolTensor) -> BoolTensor:
    """The last position of each row that `mask` [batch, position] holds; none where it holds none."""
    after = mask.flip(1).cumsum(dim=1).flip(1)
    return mask & (after == 1)
