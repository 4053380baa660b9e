"""The words of a language model, for stages whose tokens are words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone

__all__ = ["Vocabulary"]


class Vocabulary:
    """Texts as a language model's own tokens, and the input embeddings of these.

    Attributes:
        ids: turns a text into tokens, with no special ones around it.
        width: D_in, of the embeddings.
    """

    def __init__(
        self,
        ids: Callable[[str], list[int]],
        embed: Callable[[Sequence[int]], Tensor],
        width: int,
    ) -> None:
        """Take both from somewhere.

        Args:
            ids: a text to its tokens.
            embed: tokens to their input embeddings (n, D_in).
            width: D_in.
        """
        self.ids = ids
        self._embed = embed
        self.width = width

    @classmethod
    def of(cls, backbone: Backbone) -> Vocabulary:
        """Return that of a backbone."""

        def ids(text: str) -> list[int]:
            found: list[int] = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
            return found

        def embed(tokens: Sequence[int]) -> Tensor:
            return backbone.embed(torch.tensor([list(tokens)], device=backbone.device))[0]

        return cls(ids, embed, backbone.D_in)

    @torch.no_grad()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Return the input embeddings (n, D_in) of tokens, in float32."""
        return self._embed(tokens).detach().float()

    def directions(self, texts: Sequence[str]) -> Tensor:
        """Return a unit direction (n, D_in) for each of some texts.

        It is the mean input embedding of the text's tokens, centred over all the texts.
        """
        means = torch.stack([self.embed(self.ids(text)).mean(0) for text in texts])
        return torch.nn.functional.normalize(means - means.mean(0), dim=-1)
