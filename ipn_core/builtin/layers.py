"""The injector `layers`: gated cross-attention to the messages, between the layers of the LLM."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ipn_core.attention import attend
from ipn_core.config import Config
from ipn_core.stages import Dims, LayerContext, LayerInjector

__all__ = ["CrossLayers", "CrossLayersConfig"]


class CrossLayersConfig(Config):
    """Where the blocks stand, and their size.

    Attributes:
        every: a block stands before the first layer and every n-th after it.
        heads: of the cross-attention.
        head_width: of each of them.
        mlp_ratio: width of the MLP over that of the hidden states.
        backend: of `ipn_core.attention`.
    """

    every: int = Field(default=4, ge=1, le=1024)
    heads: int = Field(default=8, ge=1, le=1024)
    head_width: int = Field(default=64, ge=1, le=1024)
    mlp_ratio: float = Field(default=4.0, gt=0, le=64)
    backend: str = "auto"


class CrossLayers(LayerInjector):
    """`h + tanh(α)·attend(h, messages)`, then `h + tanh(β)·mlp(h)`, for tokens after a look.

    The gated cross-attention of Flamingo (arXiv 2204.14198, section 2.2): the gates α and β start
    at zero, so that the LLM is unchanged at first. Flamingo's keys and values are a picture's, here
    they are the message tokens of all looks so far; and here a token before its first look is left
    as it is, by the MLP too, so that a request depends on the question alone.
    """

    Config = CrossLayersConfig
    needs_message = True

    def __init__(self, config: CrossLayersConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.blocks = nn.ModuleDict(
            {str(layer): _Block(config, dims.D_hidden[layer], dims.Dm) for layer in self.layers}
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Every n-th, from the first."""
        return tuple(range(0, self.dims.layers, self.config.every))

    def before_layer(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """Let tokens (B, T, D) after a look attend to the messages that were there before them."""
        _, looks, tokens, _ = context.messages.shape
        order = torch.arange(looks, device=hidden.device).repeat_interleave(tokens)
        seen = order < context.looks.unsqueeze(-1)  # (B, T, looks × M)
        block: _Block = self.blocks[str(context.layer)]  # type: ignore[assignment]
        changed = block(hidden, context.messages.flatten(1, 2), seen)
        return torch.where((context.looks > 0).unsqueeze(-1), changed, hidden)


class _Block(nn.Module):
    def __init__(self, config: CrossLayersConfig, width: int, message: int) -> None:
        super().__init__()
        inner, wide = config.heads * config.head_width, int(config.mlp_ratio * width)
        self.heads, self.backend = config.heads, config.backend
        self.norm = nn.LayerNorm(width)
        self.message_norm = nn.LayerNorm(message)
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(message, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width)
        )
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, messages: Tensor, seen: Tensor) -> Tensor:
        """Attend from (B, T, D) to (B, N, Dm) where `seen` (B, T, N) allows it."""
        q = self.q(self.norm(hidden)).unflatten(-1, (self.heads, -1))
        kv = self.kv(self.message_norm(messages)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.unbind(-3)
        looked = attend(q, k, v, mask=seen.unsqueeze(1), backend=self.backend)
        hidden = hidden + self.gate.tanh() * self.out(looked.flatten(-2))
        changed: Tensor = hidden + self.mlp_gate.tanh() * self.mlp(hidden)
        return changed
