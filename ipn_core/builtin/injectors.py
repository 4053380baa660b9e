"""The injector `tokens`: a message becomes inputs of the LLM."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ipn_core.config import Config
from ipn_core.stages import Dims, InjectContext, Injection, Injector, VisualMessage

__all__ = ["TokenInjector", "TokenInjectorConfig", "WordLookup"]

_SMALL = 0.01
"""What an MLP beside the identity begins with: not nothing, so that all of it learns at once."""


class TokenInjectorConfig(Config):
    """How the message is projected.

    Attributes:
        hidden: width of the small MLP beside the linear map, 0 for none.
        norm: whether a layer norm comes first.
        start: of the weights. `words` begins with messages as what `answer-embedding` makes them
            point at: the mean word, and from there so far in the message's direction as words lie
            apart. Messages must be as wide as the LLM's embeddings.
        lookup: how sharply messages are looked up among the LLM's words before anything else: what
            their cosines are multiplied with in a softmax over the whole vocabulary. None to take
            messages as they are. Messages must be as wide as the LLM's embeddings.
    """

    hidden: int = Field(default=0, ge=0, le=65536)
    norm: bool = True
    start: Literal["random", "words"] = "random"
    lookup: float | None = Field(default=None, gt=0)


class TokenInjector(Injector):
    """Fill the K `<img-d>` slots: `slots + W·norm(message) [+ MLP(norm(message))]`.

    LMEye (arXiv 2305.03701) adds a linear projection to the learned `<img-d>` embeddings; the
    layer norm before it, the MLP beside it and the lookup of messages among words are ours. A
    frozen LLM reads a word that it knows at once, and a direction between words only after much
    training.
    """

    Config = TokenInjectorConfig

    def __init__(self, config: TokenInjectorConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.norm = nn.LayerNorm(dims.Dm) if config.norm else nn.Identity()
        self.linear = nn.Linear(dims.Dm, dims.D_in)
        self.mlp = (
            nn.Sequential(
                nn.Linear(dims.Dm, config.hidden),
                nn.GELU(),
                nn.Linear(config.hidden, dims.D_in),
            )
            if config.hidden
            else None
        )
        self.lookup = None if config.lookup is None else WordLookup(dims.D_in, config.lookup)

    @classmethod
    def not_supported_reasons(cls, config: TokenInjectorConfig, dims: Dims) -> list[str]:
        """It needs a message with a token for each slot."""
        reasons = super().not_supported_reasons(config, dims)
        if not reasons and dims.M != dims.K:
            reasons.append(
                f"the interaction's message has {dims.M} tokens and the layout {dims.K} slots for "
                f"them: set layout.dynamic to {dims.M}"
            )
        among_words = config.start == "words" or config.lookup is not None
        if among_words and dims.Dm != dims.D_in:
            reasons.append(
                "with start 'words' or a lookup a message is a direction among the LLM's "
                f"embeddings, and its width is {dims.Dm}, not {dims.D_in}: set the width of the "
                "interaction's messages to that, or start to random and lookup to null"
            )
        return reasons

    @torch.no_grad()
    def begin(self, embeddings: Tensor) -> None:
        """With `start: words`, begin as the identity among the LLM's embeddings (words, D_in)."""
        if self.config.start == "random" and self.lookup is None:
            return
        mean, lengths = _measured(embeddings)
        if self.lookup is not None:
            self.lookup.begin(mean, lengths)
        if self.config.start == "random":
            return
        length = lengths.mean()
        if self.config.norm:  # of a vector that it has normed
            length = length / self.dims.Dm**0.5
        self.linear.weight.copy_(torch.eye(self.dims.D_in) * length)
        self.linear.bias.copy_(mean)
        if self.mlp is not None:
            for parameter in self.mlp[-1].parameters():
                parameter.mul_(_SMALL)

    def forward(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Project (B, K, Dm) to (B, K, D_in)."""
        values = message.values
        if self.lookup is not None:
            if context.words is None:
                raise ValueError("InjectContext.words is needed to look messages up among them")
            values = self.lookup(values, context.words)
        return Injection(self.project(values) + context.slots)

    def project(self, values: Tensor) -> Tensor:
        """Project (…, Dm) to (…, D_in) without the slots' own embeddings."""
        values = self.norm(values)
        projected: Tensor = self.linear(values)
        if self.mlp is not None:
            projected = projected + self.mlp(values)
        return projected

    def extra_repr(self) -> str:
        """Return the widths."""
        return f"Dm={self.dims.Dm}, D_in={self.dims.D_in}"


def _measured(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D_in,) of words (vocabulary, D_in), and how far each lies from it."""
    words = embeddings.float().cpu()
    mean = words.mean(0)
    return mean, (words - mean).norm(dim=1)


class WordLookup(nn.Module):
    """Messages become mixtures of the LLM's words: attention over its input embeddings.

    Attributes:
        mean: (D_in,) the mean word.
        lengths: (vocabulary,) how far each word lies from it.
    """

    mean: Tensor
    lengths: Tensor

    def __init__(self, width: int, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.register_buffer("mean", torch.zeros(width), persistent=False)
        self.register_buffer("lengths", torch.ones(1), persistent=False)

    def begin(self, mean: Tensor, lengths: Tensor) -> None:
        """Take the mean word (D_in,), and how far each lies from it (words,)."""
        self.mean = mean
        # Rows that were never trained may all be alike: they are no direction, and stay away.
        self.lengths = lengths.clamp(min=1e-6)

    def forward(self, values: Tensor, words: Tensor) -> Tensor:
        """Return the direction from the mean word (B, M, D_in) of what values (B, M, D_in) are."""
        directions = F.normalize(values.float(), dim=-1)
        mean, lengths = self.mean.float(), self.lengths.float()
        cosines = (directions.to(words.dtype) @ words.T).float()
        cosines = (cosines - directions @ mean.unsqueeze(1)) / lengths
        weights = (self.sharpness * cosines).softmax(-1)
        found = (weights.to(words.dtype) @ words).float() - mean
        return F.normalize(found, dim=-1).to(values.dtype)

    def extra_repr(self) -> str:
        """Return the sharpness."""
        return f"sharpness={self.sharpness:g}"
