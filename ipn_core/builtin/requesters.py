"""Requesters: the paper's, and two that cannot ask, for ablations."""

from __future__ import annotations

import torch
from torch import nn

from ipn_core.config import Config
from ipn_core.stages import Dims, Request, RequestContext, Requester
from ipn_core.transfer import send

__all__ = ["Constant", "HiddenState", "HiddenStateConfig", "Shuffled"]

_SAME = 1e-4
"""Requests that differ by less, relative to their length, come from the same question."""


class HiddenStateConfig(Config):
    """Which layer's hidden state at `<img-q>` is the request.

    Attributes:
        layer: counted as transformers does: 0 before the first layer, -1 after the final norm.
    """

    layer: int = -1


class HiddenState(Requester):
    """The LLM's hidden state at `<img-q>` (LMEye, arXiv 2305.03701, section 3.2)."""

    Config = HiddenStateConfig

    def __init__(self, config: HiddenStateConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        count = len(dims.D_hidden)
        if not -count <= config.layer < count:
            from ipn_core.errors import ConfigError

            raise ConfigError(
                f"'request.layer' must be between {-count} and {count - 1} for this LLM, "
                f"got {config.layer}."
            )

    @property
    def layer(self) -> int:
        """The hidden layer to read."""
        layer: int = self.config.layer
        return layer

    @property
    def width(self) -> int:
        """Width of that layer."""
        return self.dims.D_hidden[self.layer]

    def forward(self, context: RequestContext) -> Request:
        """Pass the hidden states (B, R, D) on."""
        return Request(context.hidden, context.round, context.layer)


class Constant(HiddenState):
    """A learned request that ignores the question: equal parameters, but it cannot ask."""

    def __init__(self, config: HiddenStateConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.value = nn.Parameter(torch.randn(dims.R, self.width) * 0.02)

    @property
    def asks(self) -> bool:
        """It cannot."""
        return False

    def forward(self, context: RequestContext) -> Request:
        """Return the same (R, D) for every sample."""
        batch = context.hidden.shape[0]
        return Request(self.value.expand(batch, -1, -1), context.round, context.layer)


class Shuffled(HiddenState):
    """Each sample gets another's request: the next one in the batch that asks something else.

    Where the whole batch asks the same there is nothing to borrow, and the request stays. To
    measure a trained model without its request use `ipn eval --shuffled`, whose partners come from
    the whole split and not from the batch.
    """

    def forward(self, context: RequestContext) -> Request:
        """Give each sample the first different request (R, D) that follows it."""
        hidden = context.hidden
        batch = len(hidden)
        flat = hidden.detach().float().flatten(1)
        apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        other = apart > _SAME * flat.norm(dim=-1, keepdim=True)
        steps = (torch.arange(batch) + torch.arange(batch)[:, None]) % batch
        rolled = other.gather(1, send(steps, other.device))
        first = rolled.float().argmax(1).cpu()
        chosen = (torch.arange(batch) + first) % batch
        return Request(hidden[send(chosen, hidden.device)], context.round, context.layer)
