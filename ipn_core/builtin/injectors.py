"""The injector `tokens`: a message becomes inputs of the LLM."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ipn_core.config import Config
from ipn_core.stages import Dims, InjectContext, Injection, Injector, VisualMessage

__all__ = ["TokenInjector", "TokenInjectorConfig"]

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
    """

    hidden: int = 0
    norm: bool = True
    start: Literal["random", "words"] = "random"


class TokenInjector(Injector):
    """Fill the K `<img-d>` slots: `slots + W·norm(message) [+ MLP(norm(message))]`.

    LMEye (arXiv 2305.03701) adds a linear projection to the learned `<img-d>` embeddings; the
    layer norm before it and the MLP beside it are ours.
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

    @classmethod
    def not_supported_reasons(cls, config: TokenInjectorConfig, dims: Dims) -> list[str]:
        """It needs a message with a token for each slot."""
        reasons = super().not_supported_reasons(config, dims)
        if not reasons and dims.M != dims.K:
            reasons.append(
                f"the interaction's message has {dims.M} tokens and the layout {dims.K} slots for "
                f"them: set layout.dynamic to {dims.M}"
            )
        if config.start == "words" and dims.Dm != dims.D_in:
            reasons.append(
                f"with start 'words' a message is a direction among the LLM's embeddings, and its "
                f"width is {dims.Dm}, not {dims.D_in}: set the width of the interaction's messages "
                "to that, or start to random"
            )
        return reasons

    @torch.no_grad()
    def begin(self, embeddings: Tensor) -> None:
        """With `start: words`, begin as the identity among the LLM's embeddings."""
        if self.config.start == "random":
            return
        words = embeddings.float().cpu()
        mean = words.mean(0)
        length = (words - mean).norm(dim=1).mean()
        if self.config.norm:  # of a vector that it has normed
            length = length / self.dims.Dm**0.5
        self.linear.weight.copy_(torch.eye(self.dims.D_in) * length)
        self.linear.bias.copy_(mean)
        if self.mlp is not None:
            for parameter in self.mlp[-1].parameters():
                parameter.mul_(_SMALL)

    def forward(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Project (B, K, Dm) to (B, K, D_in)."""
        return Injection(self.project(message.values) + context.slots)

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
