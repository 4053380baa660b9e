"""The perceiver `latents`: its contract, and what its features are."""

from __future__ import annotations

import torch

from ipn_core.stages import PerceiveContext
from ipn_core.testing.contracts import ConnectorContract
from ipn_core.testing.contracts.pictures import SAMPLES, ragged


class TestLatents(ConnectorContract):
    name = "latents"
    options = {"latents": 5, "depth": 1, "heads": 2, "head_width": 4}  # noqa: RUF012 the contract declares it

    def test_a_picture_has_a_row_of_latents_and_no_static_token(self) -> None:
        module = self.build()
        seen = ragged(self.dims().Dv)
        percept = module(PerceiveContext([[]] * len(SAMPLES), ["What?"] * len(SAMPLES), seen))
        assert percept.tokens is None
        assert module.static_tokens == 0
        assert [span.grid for span in percept.features.images] == [(1, 5)] * len(seen.images)
        assert [(s.sample, s.place) for s in percept.features.images] == [
            (s.sample, s.place) for s in seen.images
        ]
        latents, whose = module.resampler(seen)
        for index, span in zip(whose, percept.features.images, strict=True):
            own = percept.features.values[span.offset : span.offset + span.length]
            assert torch.equal(own, latents[index])
