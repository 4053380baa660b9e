"""The encoder `qformer-tokens`: what the frozen Q-Former of a BLIP-2 makes of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from ipn_vision.digest import Digest
from ipn_vision.loading import fetch
from ipn_vision.tower import VisionTower, VisionTowerConfig
from torch import nn

from ipn_core.config import Config
from ipn_core.errors import CheckpointError
from ipn_core.pretrained import TensorFiles, load_whole, quiet, read_config
from ipn_core.stages import EncodedImage, VisionEncoder

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["QFormerTokens", "QFormerTokensConfig"]

_QUERIES = "query_tokens"


class QFormerTokensConfig(Config):
    """Whose tokens.

    Attributes:
        weights: a BLIP-2 checkpoint: a folder or a hub id, such as `Salesforce/blip2-opt-2.7b`.
        dtype: to hold tower and Q-Former in.
    """

    weights: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class QFormerTokens(VisionEncoder):
    """The outputs of the queries, in one row: 32 features, 768 wide, of the published checkpoints.

    BLIP-2's vision tower and Q-Former (arXiv 2301.12597, section 3.1) before the linear map into
    its own LLM. They are the visual features of the released LMEye (arXiv 2305.03701).
    """

    Config = QFormerTokensConfig
    placed = looks = False

    def __init__(self, config: QFormerTokensConfig) -> None:
        super().__init__(config)
        from transformers import Blip2QFormerModel

        what, folder = f"the weights '{config.weights}'", fetch(config.weights)
        whole = read_config(folder, what)
        if whole.model_type != "blip-2":
            raise CheckpointError(
                f"{what} are of type '{whole.model_type}', and no BLIP-2, whose Q-Former this "
                "encoder reads. Give such a checkpoint, as Salesforce/blip2-opt-2.7b is."
            )
        self.tower = VisionTower(VisionTowerConfig(weights=str(folder), dtype=config.dtype))
        with quiet():
            self.qformer = load_whole(
                Blip2QFormerModel,
                folder,
                what,
                config=whole.qformer_config,
                dtype=getattr(torch, config.dtype),
                key_mapping={r"^(?:model\.)?qformer\.": ""},
            )
        tensors = TensorFiles(folder)
        if _QUERIES not in tensors:
            raise CheckpointError(f"{what} have no tensor '{_QUERIES}'. Fetch them again.")
        self.queries = nn.Parameter(tensors[_QUERIES][0].to(self.qformer.dtype))
        self.requires_grad_(False)
        self._digest = Digest(self)

    @property
    def width(self) -> int:
        """Width Dv of the features: the Q-Former's."""
        return int(self.qformer.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """A digest of all weights, and what decides the tower's features."""
        return f"qformer-tokens-{self._digest()}-{self.tower.fingerprint}"

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Let the queries look at the class token and the patches of each picture."""
        seen = self.tower.encode(images)
        whole = torch.stack([_with_class_token(one) for one in seen])  # (images, 1 + P, its width)
        queries = self.queries.expand(len(seen), -1, -1)
        out = self.qformer(query_embeds=queries, encoder_hidden_states=whole).last_hidden_state
        return [EncodedImage(tokens, (1, len(tokens))) for tokens in out]


def _with_class_token(one: EncodedImage) -> torch.Tensor:
    token = one.global_token
    return one.values if token is None else torch.cat([token.unsqueeze(0), one.values])
