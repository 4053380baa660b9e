"""The connector `names`: the likeliest names of a picture stand before the question, as words."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ipn_core import Config, Connector, Dims, VisionEncoder, VisualFeatures
from ipn_core.stages import PerceiveContext
from ipn_core.transfer import send
from ipn_core.vocabulary import Vocabulary
from ipn_names.evidence import Evidence
from ipn_names.sayings import Sayings
from ipn_names.windows import pooling, tiles

__all__ = ["NamesConnector", "NamesConnectorConfig"]


class NamesConnectorConfig(Config):
    """How much is said.

    Attributes:
        names: how many of the whole picture's likeliest names.
        parts: rows and columns of parts whose likeliest names follow, one each, row by row; 0 for
            none. With as many as the encoder has patches a side it is one for each patch: with 7
            where `encoder.parts` is 224, ImageNet's usual size.
        slots: tokens for each name, shorter ones followed by empty slots and longer ones cut; the
            longest of ImageNet's names in SmolLM2's tokens has 9.
    """

    names: int = Field(default=3, ge=1, le=64)
    parts: int = Field(default=0, ge=0, le=32, strict=True)
    slots: int = Field(default=9, ge=1, le=32)


class NamesConnector(Connector):
    """One slot for each token of a name: what a classifier says, the same whatever is asked.

    The tokens are input embeddings of the LLM, so that it reads them as words; nothing of it is
    trained. What is said of a part is the likeliest by the mean of its patches' logits.
    """

    Config = NamesConnectorConfig

    def __init__(self, config: NamesConnectorConfig, dims: Dims, encoder: VisionEncoder) -> None:
        super().__init__(config, dims, encoder)
        self.sayings = Sayings(dims.labels, 0, config.slots, dims.D_in)
        self.parts = tiles(config.parts)

    @classmethod
    def not_supported_reasons(cls, config: NamesConnectorConfig, dims: Dims) -> list[str]:
        """It needs labels."""
        if dims.labels:
            return []
        return [
            "the encoder's features are no evidence of labels: use one whose features are, such as "
            "imagenet-names"
        ]

    @property
    def static_tokens(self) -> int:
        """Static tokens S a picture."""
        return int((self.config.names + self.config.parts**2) * self.config.slots)

    def meet(self, vocabulary: Vocabulary) -> None:
        """Take the names' tokens."""
        self.sayings.meet(vocabulary)

    def connect(self, features: VisualFeatures, context: PerceiveContext) -> list[Tensor]:
        """Return (S, D_in) for each picture; samples that share one get the same tensor."""
        windows = Evidence(features).windows
        seen = [0] * features.batch
        made: dict[tuple[int, tuple[int, int]], Tensor] = {}
        for span in features.images:
            of = windows[span.sample, seen[span.sample]]
            seen[span.sample] += 1
            if (span.offset, span.grid) not in made:
                names = of[0].topk(min(self.config.names, of.shape[1])).indices
                if self.parts:
                    own = features.values[span.offset : span.offset + span.length].float()
                    within = send(pooling(span.grid, self.parts), own.device, own.dtype)
                    names = torch.cat([names, (within @ own).argmax(-1)])
                made[span.offset, span.grid] = self.sayings.said(names).flatten(0, 1)
        return [made[span.offset, span.grid] for span in features.images]
