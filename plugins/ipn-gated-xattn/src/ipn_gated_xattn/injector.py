"""The injector `gated-xattn`: cross-attention blocks between the layers of the LLM."""

from __future__ import annotations

from typing import Any

import torch
from ipn_resampler.resampler import with_global_tokens
from torch import Tensor, nn

from ipn_core.features import VisualFeatures
from ipn_core.stages import Dims, LayerContext, LayerInjector
from ipn_gated_xattn.block import GatedBlock, GatedXattnConfig

__all__ = ["GatedCrossAttention"]


class GatedCrossAttention(LayerInjector):
    """Before every n-th layer each hidden state looks at the picture last shown before it.

    A token before the first picture sees none: its block is the gated MLP alone (Flamingo, arXiv
    2204.14198, section 2.3). A picture is its features and, where it has one, its global token.
    """

    Config = GatedXattnConfig

    def __init__(self, config: GatedXattnConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.blocks = nn.ModuleList(
            GatedBlock(config, dims.D_hidden[layer], dims.Dv)
            for layer in range(0, dims.layers, config.every)
        )

    @classmethod
    def not_supported_reasons(cls, config: GatedXattnConfig, dims: Dims) -> list[str]:
        """The heads share the LLM's width, unless theirs is given."""
        width = dims.D_hidden[0]
        if config.head_width or width % config.heads == 0:
            return []
        return [f"inject.heads {config.heads} does not divide the LLM's width {width}"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Every n-th, the first one included."""
        return tuple(range(0, self.dims.layers, self.config.every))

    def before_layer(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return the hidden states (B, T, D) after the layer's block."""
        number = context.layer // self.config.every
        keys, values, places = self._keys_values(context.features, number)
        seen = (context.pictures - 1).unsqueeze(-1) == places.unsqueeze(1)
        changed: Tensor = self.blocks[number](hidden, keys, values, seen)
        return changed

    def _keys_values(self, features: VisualFeatures, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a block's keys and values (B, P, H, K), and which picture each is of (B, P).

        While decoding, each token meets the same features, which are many more than one.
        """
        block: Any = self.blocks[number]
        weights = [p for part in (block.k, block.v, block.k_norm) for p in part.parameters()]
        whole, own = features.picked
        if torch.is_grad_enabled():
            whole, own = features, range(len(features.images))

        def laid_out() -> tuple[Tensor, Tensor, Tensor]:
            every = whole
            if whole.global_tokens is not None:
                every = whole.keep("with tokens", self, (), lambda: with_global_tokens(whole))
            keys, values = every.keep(
                "keys and values of patches",
                block,
                weights,
                lambda: block.keys_values(every.values),
            )
            rows = [span.sample for span in features.images]
            mine = every.pick(list(zip(rows, own, strict=True)), features.batch)
            # No token has seen minus one pictures: padding is never looked at.
            places = mine.places().masked_fill(~mine.mask, -2)
            return mine.spread(keys), mine.spread(values), places

        return features.keep("keys and values", block, weights, laid_out)
