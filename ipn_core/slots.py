"""The learned embeddings of `<img>`, `<img-q>`, `<img-d>`: slots, not words of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Slots"]


class Slots(nn.Module):
    """Learned embeddings of the slots.

    Attributes:
        image: (D_in,) added to every static token.
        request: (R, D_in) stands at `<img-q>`; what the LLM makes of it there is the request.
        dynamic: (K, D_in) offsets of the `<img-d>` slots, for the injector.
    """

    def __init__(
        self, request: int, dynamic: int, embeddings: Tensor, words: Tensor | None = None
    ) -> None:
        """Start `<img-q>` at given words, or else at the mean word, which every LLM reads somehow.

        Args:
            request: R.
            dynamic: K.
            embeddings: (vocabulary, D_in) the LLM's input embeddings.
            words: (R, D_in) where the request slots start; None for the mean word.
        """
        super().__init__()
        width = embeddings.shape[1]
        if words is None:
            words = embeddings.detach().float().mean(0).expand(request, width)
        self.image = nn.Parameter(torch.zeros(width))
        self.request = nn.Parameter(words.detach().float().cpu().clone())
        self.dynamic = nn.Parameter(torch.zeros(dynamic, width))
