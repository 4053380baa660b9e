"""The injector `prefix-kv`: a message becomes keys and values in the cache of every layer."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from ipn_core.config import Config
from ipn_core.stages import Dims, InjectContext, Injection, Injector, VisualMessage

__all__ = ["PrefixKV", "PrefixKVConfig"]


class PrefixKVConfig(Config):
    """How the message is projected.

    Attributes:
        hidden: width of the layer between the message and all keys and values; what comes after it
            has `hidden` × 2 × layers × key-value heads × their width weights.
    """

    hidden: int = Field(default=256, ge=1, le=65536)


class PrefixKV(Injector):
    """Each message token is a position that every layer attends to: `W₂·tanh(W₁·norm(message))`.

    Prefix tuning (Li and Liang 2021, arXiv 2101.00190, section 4) puts learned keys and values
    before every layer's own and, while it trains, makes them by an MLP from a smaller matrix
    (section 4.3); here the MLP makes them from the message of a look. They stand where its
    `<img-d>` slots would, right after `<img-q>`, and count as positions there, so that what an LLM
    with rotary positions sees depends on how far back the look was and on nothing else. The LLM
    processes no token for them.
    """

    Config = PrefixKVConfig

    def __init__(self, config: PrefixKVConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.norm = nn.LayerNorm(dims.Dm)
        self.down = nn.Linear(dims.Dm, config.hidden)
        self.up = nn.Linear(config.hidden, 2 * dims.layers * dims.H_kv * dims.D_head)

    @classmethod
    def not_supported_reasons(cls, config: PrefixKVConfig, dims: Dims) -> list[str]:
        """It needs a message, and a backbone that takes keys from outside."""
        reasons = super().not_supported_reasons(config, dims)
        if not dims.H_kv:
            reasons.append(
                "the backbone does not say how its keys carry their positions (Backbone.place_keys)"
            )
        return reasons

    @property
    def fills(self) -> int:
        """No slot: the LLM processes none of its positions."""
        return 0

    @property
    def caches(self) -> int:
        """A position for each token of the message."""
        return self.dims.M

    def forward(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Project (B, M, Dm) to keys and values (B, layers, M, H_kv, D_head)."""
        dims = self.dims
        both: Tensor = self.up(self.down(self.norm(message.values)).tanh())
        both = both.unflatten(-1, (2, dims.layers, dims.H_kv, dims.D_head))
        keys, values = both.transpose(1, 3).unbind(2)
        return Injection(keys=keys, values=values)
