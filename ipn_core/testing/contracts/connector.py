"""What every `Connector` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipn_core.features import VisualFeatures
from ipn_core.stages import Connector, PerceiveContext
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.module import TIGHT, StageContract
from ipn_core.testing.contracts.pictures import SAMPLES, ragged
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig

__all__ = ["ConnectorContract"]


class ConnectorContract(StageContract):
    """Subclass it and name the connector: `class TestMine(ConnectorContract): name = "mine"`."""

    kind = "perceiver"

    def new(self, **more: Any) -> Connector:
        """A new one over a tiny encoder of width Dv."""
        encoder = TinyEncoder(TinyEncoderConfig(width=self.dims().Dv)).requires_grad_(False)
        made: Connector = self.met(self.make({**self.options, **more}, self.dims(), encoder))
        return made

    def tokens(
        self, module: nn.Module, features: VisualFeatures, questions: Sequence[str] = ()
    ) -> Sequence[Tensor]:
        """What each picture gets: static tokens (S, D_in), or features (P, Dv) if it has none.

        Args:
            module: the connector.
            features: of the encoder.
            questions: one a sample; by default all are asked the same.
        """
        asked = list(questions) or ["What is it?"] * features.batch
        percept = module(PerceiveContext([[]] * features.batch, asked, features))
        if percept.tokens is not None:
            found: Sequence[Tensor] = percept.tokens
            return found
        made = percept.features
        return [made.values[s.offset : s.offset + s.length] for s in made.images]

    def result(self, module: nn.Module) -> Tensor:
        """All tokens of a ragged batch, one after the other."""
        return torch.cat(list(self.tokens(module, ragged(self.dims().Dv))))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_shape_and_dtype(self, dtype: torch.dtype) -> None:
        """Each picture gets (S, D_in) tokens in the dtype of the weights, or features (P, Dv)."""
        with clause(
            "shape and dtype",
            "return one (S, D_in) tensor a picture, in the order of `features.images`; S is the "
            "property `static_tokens`, or anything where that is None. Where it is 0, return no "
            "tokens, and features as wide as the property `width`.",
        ):
            module = self.build().to(dtype)
            seen = ragged(self.dims().Dv)
            tokens = self.tokens(module, seen.to(dtype=dtype))
            assert len(tokens) == len(seen.images), f"{len(tokens)} for {len(seen.images)} pictures"
            wanted = module.static_tokens
            expected = module.width if wanted == 0 else self.dims().D_in
            for one in tokens:
                assert one.ndim == 2, f"tokens have {one.ndim} dimensions, expected (S, D_in)"
                count, width = one.shape
                right = wanted in (None, 0, count)
                assert right, f"{count} tokens, `static_tokens` says {wanted}"
                assert width == expected, f"tokens are {width} wide, not {expected}"
                assert one.dtype == dtype, f"tokens are {one.dtype}, not {dtype}"
                assert bool(one.isfinite().all()), "tokens are not finite"

    def test_pictures_do_not_mix(self) -> None:
        """Alone and in a batch a picture gets the same tokens."""
        with clause("pictures do not mix", "let no picture's tokens depend on another picture."):
            module = self.build()
            flat = [one for pictures in SAMPLES for one in pictures]
            together = self.tokens(module, ragged(self.dims().Dv))
            for number, tokens in zip(flat, together, strict=True):
                (alone,) = self.tokens(module, ragged(self.dims().Dv, ((number,),)))
                same(tokens, alone, TIGHT)

    def test_order_of_the_batch(self) -> None:
        """Samples in another order, with questions of their own, get theirs in that order."""
        with clause(
            "order of the batch",
            "let a picture's tokens depend on no other sample, and on no question but its own "
            "sample's, `context.questions[span.sample]`.",
        ):
            module, order, Dv = self.build(), [2, 0, 3, 1], self.dims().Dv
            questions = [f"What is it{' now' * row}?" for row in range(len(SAMPLES))]
            parts = iter(self.tokens(module, ragged(Dv), questions))
            expected = [[next(parts) for _ in pictures] for pictures in SAMPLES]
            turned = ragged(Dv, [SAMPLES[row] for row in order])
            found = self.tokens(module, turned, [questions[row] for row in order])
            wanted = [one for row in order for one in expected[row]]
            for one, other in zip(found, wanted, strict=True):
                same(one, other, TIGHT)

    def test_samples_may_share_a_picture(self) -> None:
        """Samples that share a picture's patches get what copies of them would get."""
        with clause(
            "samples may share a picture",
            "take a picture's patches from values[span.offset : span.offset + span.length]; spans "
            "of several samples may name the same ones.",
        ):
            module = self.build()
            once = ragged(self.dims().Dv, ((0,), (1,)))
            tokens = self.tokens(module, once.select([0, 1, 0]))
            first, second = self.tokens(module, once)
            for found, expected in zip(tokens, (first, second, first), strict=True):
                same(found, expected, TIGHT)

    def test_the_picture_decides(self) -> None:
        """Another picture gives other tokens."""
        with clause("the picture decides", "let the tokens depend on the features."):
            first, second = self.tokens(self.build(), ragged(self.dims().Dv, ((0,), (1,))))
            shapes_differ = first.shape != second.shape
            assert shapes_differ or not torch.allclose(first, second, rtol=1e-4), "they are equal"
