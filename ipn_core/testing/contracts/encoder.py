"""What every `VisionEncoder` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ipn_core.stages import EncodedImage, VisionEncoder
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.module import TIGHT, ModuleContract
from ipn_core.testing.tiny import tiny_picture

__all__ = ["EncoderContract"]

SIZES = ((64, 64), (96, 48), (40, 80))


NOISE = 0.01
"""Of each weight: so little that features of a trained encoder stay finite."""


class EncoderContract(ModuleContract):
    """Subclass it and name the encoder: `class TestMine(EncoderContract): name = "mine"`.

    An encoder is frozen and takes pictures: it has no clause about gradients or compilation.
    """

    kind = "perceiver"

    def new(self, **more: Any) -> VisionEncoder:
        """A new one, as a model builds it."""
        made: VisionEncoder = self.make({**self.options, **more})
        return made

    def build(self, **more: Any) -> VisionEncoder:
        """A new one whose weights are not quite those that it comes with, in eval mode."""
        torch.manual_seed(0)
        built = self.new(**more).eval()
        with torch.no_grad():
            for weight in built.parameters():
                weight.mul_(1 + NOISE * torch.randn_like(weight))
        return built

    def pictures(self) -> list[Image.Image]:
        """Pictures of noise, of several proportions."""
        return [tiny_picture(number, size) for number, size in enumerate(SIZES)]

    @torch.no_grad()
    def encode(self, encoder: VisionEncoder, pictures: Sequence[Any]) -> list[EncodedImage]:
        """Encode without gradients."""
        return encoder.encode(pictures)

    def result(self, module: Any) -> Tensor:
        """The patches of all pictures, one after the other."""
        return torch.cat([one.values for one in self.encode(module, self.pictures())])

    # -- clauses ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_shape_and_dtype(self, dtype: torch.dtype) -> None:
        """Each picture gets h·w patches of width Dv in the weights' dtype, and perhaps a token."""
        with clause(
            "shape and dtype",
            "return one EncodedImage a picture: values (h·w, Dv) row by row with its grid (h, w), "
            "Dv being the property `width`; bring pixels to the dtype of the weights.",
        ):
            encoder, pictures = self.build().to(dtype), self.pictures()
            encoded = self.encode(encoder, pictures)
            assert len(encoded) == len(pictures), f"{len(encoded)} for {len(pictures)} pictures"
            for one in encoded:
                h, w = one.grid
                expected, got = (h * w, encoder.width), tuple(one.values.shape)
                assert got == expected, f"values are {got}, expected (h·w, Dv) = {expected}"
                assert one.values.dtype == dtype, f"values are {one.values.dtype}, not {dtype}"
                assert bool(one.values.isfinite().all()), "values are not finite"
                if one.global_token is not None:
                    got = tuple(one.global_token.shape)
                    assert got == (encoder.width,), f"the global token is {got}, not (Dv,)"

    def test_pictures_do_not_mix(self) -> None:
        """Alone and in a batch a picture gets the same features, every time."""
        with clause(
            "pictures do not mix",
            "keep batch statistics frozen (eval mode) and pad nothing that a patch can see.",
        ):
            encoder, pictures = self.build(), self.pictures()
            together = self.encode(encoder, pictures)
            for picture, found in zip(pictures, together, strict=True):
                (alone,) = self.encode(encoder, [picture])
                same(found.values, alone.values, TIGHT)

    def test_the_picture_decides(self) -> None:
        """Another picture has other features."""
        with clause("the picture decides", "let the features depend on the pixels."):
            first = self.pictures()[0]
            other = Image.eval(first, lambda value: 255 - value)
            one, two = self.encode(self.build(), [first, other])
            assert not torch.allclose(one.values, two.values, rtol=1e-4), "both are equal"

    def test_its_fingerprint(self) -> None:
        """The fingerprint is a text, the same for the same weights: it keys caches on disk."""
        with clause(
            "its fingerprint",
            "make it of what decides the features: a digest of the weights and the config.",
        ):
            first, again = self.build().fingerprint, self.build().fingerprint
            assert isinstance(first, str), f"it is a {type(first).__name__}"
            assert first.strip(), "it is empty"
            assert first == again, f"it is '{first}', then '{again}'"
