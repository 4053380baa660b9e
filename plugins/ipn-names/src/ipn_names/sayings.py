"""Everything that a look can say, as tokens of the language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipn_core.stages import Label
from ipn_core.vocabulary import Vocabulary
from ipn_names.classes import article
from ipn_names.wordings import CELLS

__all__ = ["NO", "NOWHERE", "UNSURE", "YES", "Sayings"]

YES, NO, NOWHERE = "yes", "no", "I do not see it"
UNSURE = "not sure, perhaps {}"
_FILLER = "\n"


class Sayings(nn.Module):
    """Texts as rows of tokens, and their input embeddings; nothing of it is trained or saved.

    The names of the labels come first, then the same as guesses, "yes" and "no", the nine cells,
    and that the thing is nowhere.

    Attributes:
        texts: n of them.
        ids: (n, M) rows of `embeddings` that a text is made of, cut where it is longer than M;
            0 before and after it.
        embeddings: (tokens, D_in) of all their tokens; the first fills rows up: a new line.
    """

    ids: Tensor
    embeddings: Tensor

    def __init__(self, labels: Sequence[Label], lead: int, length: int, width: int) -> None:
        super().__init__()
        self.lead, self.length = lead, length
        names = [label.name for label in labels]
        guesses = [UNSURE.format(article(name)) for name in names]
        self.texts = (*names, *guesses, YES, NO, *CELLS, NOWHERE)
        ids = torch.zeros(len(self.texts), length, dtype=torch.long)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("embeddings", torch.zeros(1, width), persistent=False)

    def meet(self, vocabulary: Vocabulary) -> None:
        """Take the tokens and their embeddings from a language model."""
        rows = [vocabulary.ids(text) for text in self.texts]
        known = {id_: i + 1 for i, id_ in enumerate(sorted({i for row in rows for i in row}))}
        self.ids = torch.stack([self._placed([known[i] for i in row]) for row in rows])
        words = vocabulary.embed(list(known))
        filler = vocabulary.embed(vocabulary.ids(_FILLER)[:1])
        self.embeddings = torch.cat([filler, words])

    def _placed(self, row: Sequence[int]) -> Tensor:
        found = torch.zeros(self.length, dtype=torch.long)
        room = self.length - self.lead
        found[self.lead : self.lead + len(row)] = torch.tensor(row[:room])
        return found

    def said(self, index: Tensor) -> Tensor:
        """Return the embeddings (B, M, D_in) of texts (B,)."""
        return self.embeddings[self.ids[index]]

    def mixed(self, shares: Tensor) -> Tensor:
        """Return the mean embeddings (B, M, D_in) of texts by their shares (B, n)."""
        batch = len(shares)
        where = self.ids.T.expand(batch, -1, -1)
        tokens = shares.new_zeros(batch, self.length, len(self.embeddings))
        tokens = tokens.scatter_add(2, where, shares.unsqueeze(1).expand(-1, self.length, -1))
        return tokens @ self.embeddings

    def find(self, texts: Sequence[str]) -> Tensor:
        """Return the indices (B,) of texts."""
        places = {text: i for i, text in reversed([*enumerate(self.texts)])}
        return torch.tensor([places[text] for text in texts], device=self.ids.device)
