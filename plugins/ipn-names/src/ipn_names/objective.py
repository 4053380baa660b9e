"""The objective `understand`: what a question wants, where, and what it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core import IPN, Example, Request
from ipn_core.training.data import Batch, DataSource
from ipn_core.training.objectives import Objective
from ipn_names.interaction import KINDS, WHOLE, Names
from ipn_names.wordings import CELLS

__all__ = ["Asked", "Understand"]


@dataclass(frozen=True, slots=True)
class Asked(Example):
    """A question of which it is known what it asks.

    Its type is one of `KINDS`, and `names` holds the word for the thing that it asks for.

    Attributes:
        place: the cell that it asks about; empty for all of the picture.
    """

    place: str = ""


class Understand(Objective):
    """Cross-entropy of what is wanted, of the place, and of the word where one is named.

    No picture is looked at: what requests say is learned from questions alone.
    """

    name = "understand"

    def __init__(self, model: IPN, data: Sequence[DataSource]) -> None:
        super().__init__(model, data)
        if not isinstance(model.interaction, Names):
            raise self.refuse("needs the interaction 'names'.")
        if not all(isinstance(e, Asked) for d in data for e in d.examples):
            raise self.refuse("needs the task 'photo-words', which says what its questions ask.")
        self._names = model.interaction
        self._word = {word: i for i, word in enumerate(model.interaction.words)}

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Compare what is understood with what was asked."""
        assert request is not None
        found = self._names.understand(request)
        kinds, places, words = self._wanted(batch, request.values.device)
        loss = F.cross_entropy(found.kinds.float(), kinds)
        # A place is asked about only where a name is wanted.
        named = kinds == KINDS.index("name")
        if named.any():
            loss = loss + F.cross_entropy(found.places.float()[named], places[named])
        if (words >= 0).any():
            loss = loss + F.cross_entropy(found.words.float(), words, ignore_index=-1)
        return loss

    def correct(self, batch: Batch, request: Request | None) -> list[bool]:
        """Say which questions are understood in everything that they say."""
        assert request is not None
        found = self._names.understand(request)
        kinds, places, words = self._wanted(batch, request.values.device)
        named = kinds == KINDS.index("name")
        right = found.kinds.argmax(-1) == kinds
        right &= (found.places.argmax(-1) == places) | ~named
        right &= (found.words.argmax(-1) == words) | (words < 0)
        return [bool(one) for one in right.tolist()]

    def _wanted(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the indices (B,) of kinds, places and words; a word is -1 where none is named."""
        rows = []
        for e in batch.examples:
            assert isinstance(e, Asked)
            place = CELLS.index(e.place) if e.place else WHOLE
            rows.append((KINDS.index(e.type), place, self._word[e.names[0]] if e.names else -1))
        kinds, places, words = torch.tensor(rows, device=device).unbind(1)
        return kinds, places, words
