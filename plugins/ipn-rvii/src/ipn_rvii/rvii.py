"""RVII: a small transformer whose queries carry the request and look at the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ipn_core import Config, Dims, Interaction, Request, VisualFeatures, VisualMessage
from ipn_core.attention import attend
from ipn_core.errors import ConfigError
from ipn_core.positions import cosines
from ipn_core.transfer import tensor_on
from ipn_core.whitening import Whitening, whiten
from ipn_rvii.guide import Guide, GuideConfig, Guided

__all__ = ["RVII", "RVIIConfig"]


class RVIIConfig(Config):
    """The size of the transformer, and what helps it to look.

    Attributes:
        width: of its tokens.
        depth: blocks L of self-attention, cross-attention and MLP.
        heads: attention heads; they divide the width.
        mlp_ratio: hidden width of the MLPs, in widths.
        dropout: after each attention and MLP, while training.
        frequencies: cosines a side in the position code of the patches, 0 for none.
        max_images: pictures of one prompt that are told apart by a learned code.
        message: width of the message, 0 for the width of the LLM's input embeddings.
        noise: standard deviation of the noise on whitened requests while training, against
            learning the training wordings by heart.
        guide: heads of the cross-attention that follow the request's own map; None for none.
        backend: of `ipn_core.attention`.
    """

    width: int = Field(default=256, ge=8, le=8192)
    depth: int = Field(default=3, ge=1, le=64)
    heads: int = Field(default=8, ge=1, le=128)
    mlp_ratio: float = Field(default=4.0, gt=0, le=16)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    frequencies: int = Field(default=8, ge=0, le=64)
    max_images: int = Field(default=16, ge=1, le=1024)
    message: int = Field(default=0, ge=0, le=65536)
    noise: float = Field(default=0.0, ge=0, le=10)
    guide: GuideConfig | None = None
    backend: str = "auto"


class RVII(Interaction):
    """K learned queries and the request through L blocks that look at the patches.

    The blocks are the published ones (LMEye, arXiv 2305.03701, section 3.2): self-attention over
    queries and request, cross-attention to the visual features, MLP. Ours are the position code of
    the patches, that several request tokens are first joined into one, that it is also added to
    every query, and the optional guide.

    Its map (B, K, P) is an average of softmax weights of the cross-attention from the K queries to
    the patches; rows sum to 1. Without a guide it is over all the heads of the last block. With a
    guide of G maps it is, each counted alike, over those heads of all blocks that begin by
    following one of them (h mod (G + 1) < G), however much they follow it after training. The other
    heads, free to look elsewhere, are left out.
    """

    Config = RVIIConfig

    def __init__(self, config: RVIIConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        width = config.width
        if width % config.heads:
            raise ConfigError(
                f"'interact.width' must be a multiple of 'interact.heads', got {width} and "
                f"{config.heads}."
            )
        self.queries = nn.Parameter(torch.randn(dims.K, width) * 0.02)
        self.request_scale = Whitening(dims.R * dims.D_request, width)
        self.request_in = nn.Linear(width, width)
        nn.init.eye_(self.request_in.weight)
        nn.init.zeros_(self.request_in.bias)
        self.request_mlp = _mlp(width, config.mlp_ratio)
        self.patch_in = nn.Linear(dims.Dv, width)
        self.place = nn.Embedding(config.max_images, width)
        nn.init.zeros_(self.place.weight)
        sides = 2 * config.frequencies
        self.position_in = nn.Linear(sides, width, bias=False) if sides else None
        self.patch_norm = nn.LayerNorm(width)
        self.guide = Guide(config.guide, width, dims.Dv) if config.guide else None
        maps = self.guide.maps if self.guide else 0
        self.blocks = nn.ModuleList(_Block(config, maps) for _ in range(config.depth))
        self.out_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, self.width)

    @property
    def width(self) -> int:
        """Width Dm of the message."""
        return int(self.config.message or self.dims.D_in)

    @property
    def has_map(self) -> bool:
        """Where its heads looked, as the class says."""
        return True

    def forward(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Look at the patches with the request; see `Interaction.forward`."""
        asked = self.asked(request)
        guided = None if self.guide is None else self.guide(asked[:, 0], features)
        return self.read(asked, features, guided, request.return_map)

    def read(
        self,
        asked: Tensor,
        features: VisualFeatures,
        guided: Guided | None = None,
        return_map: bool = False,
    ) -> VisualMessage:
        """Look at the patches with a mapped request, and with maps of them if there is a guide.

        Args:
            asked: (B, 1, W) what `asked` makes of a request.
            features: of the same B samples.
            guided: what the guide says; its maps are over the patches of `features`.
            return_map: whether to return where it looked, as the class says.
        """
        shown = self._keys_values(features)
        bias, told = None, asked
        if guided is not None:
            bias, told = guided.log_maps, torch.cat([asked, guided.findings], dim=1)
        queries = self.queries + asked
        tokens = torch.cat([queries, told], dim=1)
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            wanted = return_map and (last or guided is not None)
            tokens, seen = block(tokens, shown[index], features.lengths, bias, wanted, last)
            maps += [] if seen is None else [seen]
        count = self.queries.shape[0]
        values = self.out(self.out_norm(tokens[:, :count]))
        return VisualMessage(values, torch.stack(maps).mean(0)[:, :count] if maps else None)

    @property
    def objectives(self) -> frozenset[str]:
        """Its message may stand for an answer; with a guide it also has a shared space."""
        shared = {"request-image"} if self.guide is not None else set()
        return frozenset({"answer-embedding", "verbalise"} | shared)

    def shared_space(self, request: Request, features: VisualFeatures) -> tuple[Tensor, Tensor]:
        """Map requests and patches as the guide compares them."""
        assert self.guide is not None
        asked = self.asked(request)[:, 0]
        return self.guide.text(asked), self.guide.image(self.guide.patch_in(features.values))

    @torch.no_grad()
    def fit(self, requests: Tensor, patches: Tensor) -> None:
        """Scale what comes in by a sample of it.

        Args:
            requests: (n, R, D_request) a sample.
            patches: (m, Dv) a sample.
        """
        self.request_scale.fit(requests.flatten(1))
        whiten(self.patch_in.weight, self.patch_in.bias, patches)
        if self.guide is not None:
            whiten(self.guide.patch_in.weight, self.guide.patch_in.bias, patches)

    def asked(self, request: Request) -> Tensor:
        """Map requests (B, R, D_request) to one token (B, 1, W): each says another part of it."""
        asked: Tensor = self.request_scale(request.values.flatten(1))
        if self.training and self.config.noise:
            asked = asked + self.config.noise * torch.randn_like(asked)
        asked = self.request_in(asked)
        asked = asked + self.request_mlp(asked)
        return asked.unsqueeze(1)

    def _keys_values(self, features: VisualFeatures) -> list[tuple[Tensor, Tensor]]:
        """Return what each block's heads look at, two of (B, P, H, W / H).

        Each patch is mapped once, then laid out for all the questions about its picture. Where
        nothing is learned both are kept with the features, for further looks and questions.
        """
        parts = (self.patch_in, self.position_in, self.place, self.patch_norm)
        weights = [p for part in parts if part is not None for p in part.parameters()]
        weights += [p for block in self.blocks for p in block.cross_attention.kv.parameters()]
        whole = features if torch.is_grad_enabled() else features.picked[0]

        def mapped() -> list[Tensor]:
            patches = self._patches(whole)
            return [block.cross_attention.kv(patches) for block in self.blocks]

        def laid_out() -> list[tuple[Tensor, Tensor]]:
            every = whole.keep("keys and values of patches", self, weights, mapped)
            pairs = zip(self.blocks, every, strict=True)
            return [block.cross_attention.by_head(features.spread(both)) for block, both in pairs]

        return features.keep("keys and values", self, weights, laid_out)

    def _patches(self, features: VisualFeatures) -> Tensor:
        """Return the packed patches (N, W), each once, with the codes of their positions."""
        patches: Tensor = self.patch_in(features.values)
        positions, places = features.packed_positions()
        if self.position_in is not None:
            code = cosines(positions, self.config.frequencies).to(patches.dtype)
            patches = patches + self.position_in(code)
        places = places.clamp(max=self.config.max_images - 1)
        normed: Tensor = self.patch_norm(patches + self.place(places))
        return normed


class _Block(nn.Module):
    def __init__(self, config: RVIIConfig, maps: int) -> None:
        super().__init__()
        width = config.width
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = _Attention(config)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = _Attention(config, maps)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = _mlp(width, config.mlp_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Tensor,
        shown: tuple[Tensor, Tensor],
        lengths: Sequence[int],
        log_maps: Tensor | None,
        return_map: bool,
        last: bool,
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.self_norm(tokens)
        keys, values = self.self_attention.keys_values(normed)
        looked, _ = self.self_attention(normed, keys, values)
        tokens = tokens + self.dropout(looked)
        keys, values = shown
        normed = self.cross_norm(tokens)
        looked, seen = self.cross_attention(
            normed, keys, values, lengths, log_maps, return_map and last
        )
        if return_map and not last:
            # Beside the look, whose own backend may give no map.
            seen = self.cross_attention.map(normed, keys, lengths, log_maps)
        tokens = tokens + self.dropout(looked)
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens))), seen


class _Attention(nn.Module):
    """Multi-head attention through `ipn_core.attention`; heads may follow given maps."""

    def __init__(self, config: RVIIConfig, maps: int = 0) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.backend
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        # How much each head follows each map: at first, some heads follow one each.
        follow = torch.zeros(self.heads, maps)
        for index in range(maps):
            follow[index :: maps + 1, index] = 1
        self.follow = nn.Parameter(follow) if maps else None
        self.guided = [head for head in range(self.heads) if head % (maps + 1) < maps]

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project (B, N, W) to two of (B, N, H, W / H)."""
        return self.by_head(self.kv(tokens))

    def by_head(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Part keys and values (B, N, 2 W) into two of (B, N, H, W / H)."""
        keys, values = both.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return keys, values

    def forward(
        self,
        tokens: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Sequence[int] | None = None,
        log_maps: Tensor | None = None,
        return_map: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; returns the output (B, M, W) and, if asked for, the map (B, M, P)."""
        queries, options = self._queries(tokens, lengths, log_maps)
        if not return_map:
            looked = attend(queries, keys, values, backend=self.backend, **options)
            return self.out(looked.flatten(-2)), None
        looked, seen = attend(queries, keys, values, return_map=True, **options)
        return self.out(looked.flatten(-2)), self._shown(seen, log_maps)

    def map(
        self, tokens: Tensor, keys: Tensor, lengths: Sequence[int], log_maps: Tensor | None
    ) -> Tensor:
        """Return the map (B, M, P) alone."""
        queries, options = self._queries(tokens, lengths, log_maps)
        _, seen = attend(queries, keys, keys, return_map=True, **options)
        return self._shown(seen, log_maps)

    def _queries(
        self, tokens: Tensor, lengths: Sequence[int] | None, log_maps: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        queries = self.q(tokens).unflatten(-1, (self.heads, -1))
        bias = None
        if log_maps is not None and self.follow is not None:
            bias = torch.einsum("hg,bgp->bhp", self.follow, log_maps).unsqueeze(2)
        return queries, {"lengths": lengths, "bias": bias}

    def _shown(self, seen: Tensor, log_maps: Tensor | None) -> Tensor:
        """Average the heads of (B, H, M, P): the guided ones where there are maps to follow."""
        if log_maps is not None:
            seen = seen.index_select(1, tensor_on(self.guided, seen.device))
        return seen.mean(1)


def _mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
