"""The learned embeddings of `<img>`, `<img-q>`, `<img-d>`: slots, not words of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ipn_core.errors import ConfigError

if TYPE_CHECKING:
    from ipn_core.config import Layout
    from ipn_core.vocabulary import Vocabulary

__all__ = ["Slots", "request_words"]


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


def request_words(vocabulary: Vocabulary, layout: Layout) -> Tensor | None:
    """Return the embeddings (R, D_in) that the slots of `<img-q>` start as, if words are given.

    Raises:
        ConfigError: they are not as many tokens as there are slots.
    """
    if not layout.request_init:
        return None
    ids = [id_ for text in layout.request_init for id_ in vocabulary.ids(text)]
    if len(ids) != layout.request:
        raise ConfigError(
            f"'layout.request_init' is {len(ids)} tokens of this LLM and 'layout.request' is "
            f"{layout.request}: make them equal."
        )
    return vocabulary.embed(ids)
