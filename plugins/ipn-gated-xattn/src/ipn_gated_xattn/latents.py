"""The perceiver `latents`: the features of a picture are what a resampler makes of its patches."""

from __future__ import annotations

from dataclasses import replace

from ipn_resampler.resampler import PerceiverResampler, ResamplerConfig

from ipn_core.features import VisualFeatures
from ipn_core.stages import Connector, Dims, PerceiveContext, Percept, VisionEncoder

__all__ = ["Latents"]


class Latents(Connector):
    """As many features a picture as the resampler has latents, in one row, and no static token."""

    Config = ResamplerConfig
    placed = looks = False

    def __init__(self, config: ResamplerConfig, dims: Dims, encoder: VisionEncoder) -> None:
        super().__init__(config, dims, encoder)
        self.resampler = PerceiverResampler(config, dims.Dv)

    def forward(self, context: PerceiveContext) -> Percept:
        """Encode, then resample."""
        percept: Percept = self.encoder(context)
        features = percept.features.to(dtype=self.resampler.latents.dtype)
        latents, whose = self.resampler(features)
        length = self.config.latents
        spans = (
            replace(span, grid=(1, length), offset=index * length)
            for span, index in zip(features.images, whose, strict=True)
        )
        return Percept(VisualFeatures(latents.flatten(0, 1), tuple(spans), features.batch))
