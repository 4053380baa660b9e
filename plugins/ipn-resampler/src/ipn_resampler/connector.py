"""The connector `resampler`: as many static tokens a picture as there are learned queries."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from ipn_core.features import VisualFeatures
from ipn_core.stages import Connector, Dims, PerceiveContext, VisionEncoder
from ipn_resampler.resampler import PerceiverResampler, ResamplerConfig, with_global_tokens

__all__ = ["ResamplerConnector", "ResamplerConnectorConfig"]


class ResamplerConnectorConfig(ResamplerConfig):
    """The size of the resampler.

    Attributes:
        width: of its tokens, to which a linear layer maps the features; 0 for the features' own.
    """

    width: int = Field(default=0, ge=0, le=8192)


class ResamplerConnector(Connector):
    """`map(resampler(inner(patches)))`; the maps are linear, and there where widths differ."""

    Config = ResamplerConnectorConfig

    def __init__(
        self, config: ResamplerConnectorConfig, dims: Dims, encoder: VisionEncoder
    ) -> None:
        super().__init__(config, dims, encoder)
        width = config.width or dims.Dv
        self.inner = nn.Linear(dims.Dv, width) if config.width else nn.Identity()
        self.resampler = PerceiverResampler(config, width)
        self.map = nn.Identity() if width == dims.D_in else nn.Linear(width, dims.D_in)

    @property
    def static_tokens(self) -> int:
        """Static tokens S a picture."""
        return int(self.config.latents)

    def connect(self, features: VisualFeatures, context: PerceiveContext) -> list[Tensor]:
        """Return (S, D_in) for each picture; one that samples share is read once."""
        merged = with_global_tokens(features)
        inner = replace(merged, values=self.inner(merged.values), global_tokens=None)
        latents, whose = self.resampler(inner)
        tokens = self.map(latents).unbind()
        return [tokens[index] for index in whose]
