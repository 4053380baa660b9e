"""The connector `qformer`: learned queries through a BERT that looks at the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ipn_core.attention import attend
from ipn_core.backbone import load_tokenizer
from ipn_core.config import Config
from ipn_core.features import VisualFeatures
from ipn_core.locate import locate_weights
from ipn_core.stages import Connector, Dims, PerceiveContext, VisionEncoder
from ipn_core.transfer import tensor_on

__all__ = ["NORM_EPS", "InstructionConfig", "QFormer", "QFormerConfig"]

NORM_EPS = 1e-12
"""BERT's, in every layer norm."""

INIT_STD = 0.02
"""BERT's, of new weights."""


class InstructionConfig(Config):
    """How the question is read.

    Attributes:
        tokenizer: a folder or a hub id, such as `google-bert/bert-base-uncased`; checkpoints name
            it.
        subfolder: of it, where the tokenizer's files lie.
        vocabulary: embeddings of words, 0 for as many as the tokenizer has tokens.
        positions: the longest question in tokens; the tokenizer cuts what is longer.
    """

    tokenizer: str
    subfolder: str = ""
    vocabulary: int = Field(default=0, ge=0, le=10_000_000)
    positions: int = Field(default=512, ge=8, le=65536)


class QFormerConfig(Config):
    """The size of the transformer, and whether it reads the question. The defaults are published.

    Attributes:
        queries: learned queries, and so static tokens S a picture.
        width: of its tokens.
        depth: layers.
        heads: attention heads; they divide the width.
        hidden: width inside of the MLPs.
        every: the first layer and every n-th from there look at the picture.
        dropout: after each attention and MLP, while training; published 0.1, on attention too.
        instruction: how the question, which joins the queries, is read (InstructBLIP); None for
            queries alone (BLIP-2).
        backend: of `ipn_core.attention`.
    """

    queries: int = Field(default=32, ge=1, le=4096)
    width: int = Field(default=768, ge=1, le=65536)
    depth: int = Field(default=12, ge=1, le=256)
    heads: int = Field(default=12, ge=1, le=256)
    hidden: int = Field(default=3072, ge=1, le=262144)
    every: int = Field(default=2, ge=1, le=256)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    instruction: InstructionConfig | None = None
    backend: str = "auto"

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got {self.width} and {self.heads}"
            )
        return self


class QFormer(Connector):
    """S queries attend to each other and, in every n-th layer, to the picture.

    Li et al. 2023, BLIP-2 (arXiv 2301.12597, section 3.1). With an instruction, the question's
    words attend together with the queries, so that these look for what it needs (Dai et al. 2023,
    InstructBLIP, arXiv 2305.06500, section 2.3). In plain torch, for one picture:

        words = word[ids] + position[: len(ids)]            # (T, W), or (0, W)
        x = norm(cat([queries, words]))                     # (S + T, W)
        for layer in layers:
            x = layer_norm(x + self_attention(x))
            q, t = x[:S], x[S:]
            if layer looks:
                q = layer_norm(q + cross_attention(q, cat([class_token, patches])))
            x = cat([layer_norm(q + mlp(q)), layer_norm(t + text_mlp(t))])
        tokens = out(x[:S])                                 # (S, D_in)

    The encoder's class token, if it keeps one, is looked at like a patch. Words go no further than
    to the last layer's keys, which is why that layer has no `text_mlp`.
    """

    Config = QFormerConfig

    def __init__(self, config: QFormerConfig, dims: Dims, encoder: VisionEncoder) -> None:
        super().__init__(config, dims, encoder)
        width, read = config.width, config.instruction
        self.queries = nn.Parameter(INIT_STD * torch.randn(config.queries, width))
        self.tokenizer = None
        if read is not None:
            source, what = locate_weights(read.tokenizer), f"the Q-Former ('{read.tokenizer}')"
            self.tokenizer = load_tokenizer(source, what, read.subfolder)
        self.words = self.positions = None
        if read is not None:
            self.words = nn.Embedding(read.vocabulary or len(self.tokenizer or ()), width)
            self.positions = nn.Embedding(read.positions, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            _Layer(
                config,
                looks_at=None if index % config.every else dims.Dv,
                has_words=read is not None and index < config.depth - 1,
            )
            for index in range(config.depth)
        )
        self.out = nn.Linear(width, dims.D_in)
        for part in (self.words, self.positions, self.layers, self.out):
            if part is not None:
                part.apply(_initialise)

    @property
    def static_tokens(self) -> int:
        """Static tokens S a picture: one a query."""
        queries: int = self.config.queries
        return queries

    def connect(self, features: VisualFeatures, context: PerceiveContext) -> list[Tensor]:
        """Return (S, D_in) for each picture; the same picture and question are run once."""
        if not features.images:
            return []
        pictures, shown = _pictures(features)
        questions = self._read(context.questions, features.batch)
        keys = [
            (picture, questions[span.sample])
            for picture, span in zip(shown, features.images, strict=True)
        ]
        rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        seen = VisualFeatures.share(
            pictures,
            [(1, len(p)) for p in pictures],
            [[picture] for picture, _ in rows],
            self.width,
        )
        tokens = self._look(seen, [ids for _, ids in rows]).unbind()
        return [tokens[rows[key]] for key in keys]

    def _read(self, questions: Sequence[str], batch: int) -> list[tuple[int, ...]]:
        """Return the ids of each sample's question, none without an instruction."""
        if self.tokenizer is None:
            return [()] * batch
        read = self.tokenizer(
            list(questions),
            # What a user typed stays text, also if it looks like a special token.
            split_special_tokens=True,
            truncation=True,
            max_length=self.config.instruction.positions,
        )
        return [tuple(ids) for ids in read["input_ids"]]

    def _look(self, seen: VisualFeatures, ids: Sequence[tuple[int, ...]]) -> Tensor:
        """Return (n, S, D_in) for n pictures with a question of (T,) ids each."""
        count = len(self.queries)
        tokens = self.queries.expand(seen.batch, -1, -1)
        if self.words is not None and self.positions is not None:
            longest = max(len(question) for question in ids)
            padded = [[*question, *[0] * (longest - len(question))] for question in ids]
            placed = tensor_on(padded, tokens.device).long().reshape(len(ids), longest)
            tokens = torch.cat([tokens, self.words(placed) + self.positions.weight[:longest]], 1)
        lengths = [count + len(question) for question in ids]
        tokens = self.dropout(self.norm(tokens))  # (n, S + T, W)
        for layer in self.layers:
            tokens = layer(tokens, count, lengths, seen)
        mapped: Tensor = self.out(tokens)
        return mapped


class _Layer(nn.Module):
    """Self-attention, cross-attention of the queries, and an MLP each for queries and words."""

    def __init__(self, config: QFormerConfig, looks_at: int | None, has_words: bool) -> None:
        super().__init__()
        self.self_attention = _Attention(config, config.width)
        self.cross_attention = None if looks_at is None else _Attention(config, looks_at)
        self.mlp = _MLP(config)
        self.text_mlp = _MLP(config) if has_words else None

    def forward(
        self, tokens: Tensor, count: int, lengths: Sequence[int], seen: VisualFeatures
    ) -> Tensor:
        """Run (n, S + T, W) tokens, of which `lengths` are real; without words (n, S, W) remain."""
        asking = tokens[:, :count] if self.text_mlp is None else tokens
        tokens = self.self_attention(asking, self.self_attention.kv(tokens), lengths)
        queries = tokens[:, :count]
        if self.cross_attention is not None:
            # Each picture is mapped once, then laid out for all the questions about it.
            both = seen.spread(self.cross_attention.kv(seen.values))
            queries = self.cross_attention(queries, both, seen.lengths)
        kept = [self.mlp(queries)]
        if self.text_mlp is not None:
            kept.append(self.text_mlp(tokens[:, count:]))
        return torch.cat(kept, dim=1)


class _Attention(nn.Module):
    """`norm(x + out(attention(x)))` with keys and values that are mapped by `kv`."""

    def __init__(self, config: QFormerConfig, looks_at: int) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.backend
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(looks_at, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, tokens: Tensor, both: Tensor, lengths: Sequence[int]) -> Tensor:
        """Let (n, M, W) look at (n, N, 2W), of which `lengths` are real."""
        queries = self.q(tokens).unflatten(-1, (self.heads, -1))
        keys, values = both.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        looked = attend(queries, keys, values, lengths=lengths, backend=self.backend)
        normed: Tensor = self.norm(tokens + self.dropout(self.out(looked.flatten(-2))))
        return normed


class _MLP(nn.Module):
    """`norm(x + out(gelu(hidden(x))))`."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.width, config.hidden)
        self.out = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (…, W)."""
        mapped = self.dropout(self.out(F.gelu(self.hidden(tokens))))
        normed: Tensor = self.norm(tokens + mapped)
        return normed


def _pictures(features: VisualFeatures) -> tuple[list[Tensor], list[int]]:
    """Return the distinct pictures, (patches, Dv) with the class token first, and which is shown.

    Samples share a picture's patches where their spans name the same ones.
    """
    distinct: dict[tuple[int, int], int] = {}
    pictures: list[Tensor] = []
    shown: list[int] = []
    for index, span in enumerate(features.images):
        place = (span.offset, span.length)
        if place not in distinct:
            distinct[place] = len(pictures)
            patches = features.values[span.offset : span.offset + span.length]
            if features.global_tokens is not None:
                patches = torch.cat([features.global_tokens[index, None], patches])
            pictures.append(patches)
        shown.append(distinct[place])
    return pictures, shown


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.weight.normal_(std=INIT_STD)
    if isinstance(module, nn.Linear):
        module.bias.zero_()
