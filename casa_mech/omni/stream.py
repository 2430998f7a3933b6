"""A reply while the model writes it, a token at a time; the same tokens as `Omni.generate` gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from casa_mech.omni.finite import finite_logits
from casa_mech.queries import Query, Reply

if TYPE_CHECKING:
    from casa_mech.omni.model import GenerationSettings, Omni

_INCOMPLETE = "\ufffd"
"""What a tokenizer of bytes shows for the beginning of a letter of several."""


class ReplyStream:
    """The pieces of text of one reply, each a token's, as the model writes them; an iterator, read once.

    A token that is only the beginning of a letter gives an empty piece, and the letter comes with the token that ends
    it. Between two pieces the model may be used for anything else.
    """

    def __init__(self, omni: Omni, query: Query, settings: GenerationSettings) -> None:
        """For `Omni.stream`.

        Raises:
            InputError: an empty prompt or unreadable media.
        """
        self.omni, self.query, self.settings = omni, query, settings
        self.batch = omni.encode([query])
        """The prompt, prefill and all, as it is given to the model."""
        self.ids: list[int] = []
        """Ids of the tokens written so far, without the end of the turn."""
        self._inputs: dict[str, Any] = dict(self.batch.inputs)
        self._offset: Tensor | None = None
        self._random: tuple[Tensor, Tensor | None] | None = None
        self._shown, self._ended, self._seconds = "", False, 0.0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        began = time.perf_counter()
        token = self._step()
        self._seconds += time.perf_counter() - began
        written = token != self.omni.end_id
        if written:
            self.ids.append(token)
        self._ended = not written or len(self.ids) == self.settings.max_new_tokens
        piece = self._new_text()
        if not written and not piece:
            raise StopIteration
        return piece

    @property
    def reply(self) -> Reply:
        """What is written so far, as `Omni.generate` would give it."""
        text = self.omni.decode(self.ids)
        return Reply(query_id=self.query.id, text=text, tokens=len(self.ids), seconds=self._seconds)

    @torch.inference_mode()
    def _step(self) -> int:
        """The next token; its forward goes on from the keys and values of those before."""
        omni = self.omni
        # What counts the positions of text after a picture is the model's, and others may have used the model since.
        if self._offset is not None:
            omni.set_text_offset(self._offset)
        options = {**self.settings.kwargs(), "max_new_tokens": 1}
        with self._seeded():
            result = omni.model.generate(
                **self._inputs, **options, logits_processor=finite_logits([self.query]), return_dict_in_generate=True
            )
        ids, mask = result.sequences, self._inputs["attention_mask"]
        self._offset = omni.text_offset(1)
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        self._inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": result.past_key_values}
        return int(ids[0, -1])

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """The stream's own random numbers, as the settings' seed begins them; everyone else's stay as they are."""
        cuda = self.omni.device.type == "cuda"
        with torch.random.fork_rng():
            if self._random is None:
                torch.manual_seed(self.settings.seed)
            else:
                torch.set_rng_state(self._random[0])
                if self._random[1] is not None:
                    torch.cuda.set_rng_state(self._random[1], self.omni.device)
            yield
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state(self.omni.device) if cuda else None

    def _new_text(self) -> str:
        """What the reply's text has more than was shown."""
        text = self.omni.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith(_INCOMPLETE) and not self._ended:
            return ""
        same = next((at for at, (one, other) in enumerate(zip(text, self._shown, strict=False)) if one != other), None)
        piece = text[min(len(text), len(self._shown)) if same is None else same :]
        self._shown = text
        return piece
