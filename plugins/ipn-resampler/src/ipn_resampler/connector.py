"""The connector `resampler`: as many static tokens a picture as there are learned queries."""

from __future__ import annotations

from torch import Tensor, nn

from ipn_core.features import VisualFeatures
from ipn_core.stages import Connector, Dims, PerceiveContext, VisionEncoder
from ipn_resampler.resampler import PerceiverResampler, ResamplerConfig

__all__ = ["ResamplerConnector"]


class ResamplerConnector(Connector):
    """`map(resampler(patches))`; the map, one linear layer, is there where the widths differ."""

    Config = ResamplerConfig

    def __init__(self, config: ResamplerConfig, dims: Dims, encoder: VisionEncoder) -> None:
        super().__init__(config, dims, encoder)
        self.resampler = PerceiverResampler(config, dims.Dv)
        self.map = nn.Identity() if dims.Dv == dims.D_in else nn.Linear(dims.Dv, dims.D_in)

    @property
    def static_tokens(self) -> int:
        """Static tokens S a picture."""
        return int(self.config.latents)

    def connect(self, features: VisualFeatures, context: PerceiveContext) -> list[Tensor]:
        """Return (S, D_in) for each picture; one that samples share is read once."""
        latents, whose = self.resampler(features)
        tokens = self.map(latents).unbind()
        return [tokens[index] for index in whose]
