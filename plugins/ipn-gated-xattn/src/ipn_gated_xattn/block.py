"""One gated cross-attention block: tokens of the text look at a picture.

Letters: B batch, T text tokens, P features of the pictures, N of them packed, D width of the
hidden states, Dv of the features, H heads, K width of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ipn_core.attention import attend
from ipn_core.config import Config

__all__ = ["GatedBlock", "GatedXattnConfig"]

_ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


class GatedXattnConfig(Config):
    """Where the blocks stand, and their size.

    Attributes:
        every: there is a block before each layer whose index it divides.
        heads: attention heads.
        head_width: width of each; 0 divides the LLM's width among them.
        hidden: hidden width of the MLPs; 0 for four times the LLM's width.
        activation: of the MLPs.
        qk_norm: whether queries and keys are normalised head by head.
        gate: one number for a block's attention and one for its MLP, or one for each channel.
        epsilon: of the norms.
        backend: of `ipn_core.attention`.
    """

    every: int = Field(default=4, ge=1, le=1024)
    heads: int = Field(default=8, ge=1, le=256)
    head_width: int = Field(default=0, ge=0, le=1024)
    hidden: int = Field(default=0, ge=0, le=1048576)
    activation: Literal["silu", "gelu", "relu"] = "silu"
    qk_norm: bool = False
    gate: Literal["scalar", "vector"] = "scalar"
    epsilon: float = Field(default=1e-6, gt=0, le=1)
    backend: str = "auto"


class GatedBlock(nn.Module):
    """`x += tanh(a) · attention(norm(x), picture)`, then `x += tanh(b) · mlp(norm(x))`.

    The block of Flamingo (arXiv 2204.14198, section 2.2), as Idefics has it: RMS norms, the gated
    MLP of LLaMA. Both gates start at zero, so that a new block changes nothing.
    """

    def __init__(self, config: GatedXattnConfig, D: int, Dv: int) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.backend
        width = config.head_width or D // config.heads
        inner = config.heads * width
        self.norm = nn.RMSNorm(D, config.epsilon)
        self.q = nn.Linear(D, inner, bias=False)
        self.k = nn.Linear(Dv, inner, bias=False)
        self.v = nn.Linear(Dv, inner, bias=False)
        self.q_norm = nn.RMSNorm(width, config.epsilon) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width, config.epsilon) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(inner, D, bias=False)
        self.mlp_norm = nn.RMSNorm(D, config.epsilon)
        self.mlp = _MLP(D, config.hidden or 4 * D, config.activation)
        gates = D if config.gate == "vector" else 1
        self.attention_gate = nn.Parameter(torch.zeros(gates))
        self.mlp_gate = nn.Parameter(torch.zeros(gates))

    def keys_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Map packed features (N, Dv) to their keys and values, (N, H, K) each."""
        keys = self.k(values).unflatten(-1, (self.heads, -1))
        return self.k_norm(keys), self.v(values).unflatten(-1, (self.heads, -1))

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """Look, then think.

        Args:
            hidden: (B, T, D).
            keys: (B, P, H, K) of the features.
            values: (B, P, H, K).
            seen: (B, T, P) True where a token sees a feature; one that sees none gets zeros.
        """
        queries = self.q_norm(self.q(self.norm(hidden)).unflatten(-1, (self.heads, -1)))
        looked = attend(queries, keys, values, mask=seen.unsqueeze(1), backend=self.backend)
        hidden = hidden + self.attention_gate.tanh() * self.out(looked.flatten(-2))
        thought: Tensor = hidden + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(hidden))
        return thought


class _MLP(nn.Module):
    """`down(act(gate(x)) · up(x))`."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return mapped
