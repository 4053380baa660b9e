"""What every `Interaction` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipn_core.features import VisualFeatures
from ipn_core.stages import Request, VisualMessage
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.module import TIGHT, StageContract
from ipn_core.testing.contracts.pictures import SAMPLES, disturbed, ragged

__all__ = ["InteractionContract"]


class InteractionContract(StageContract):
    """Subclass it in a test module and name the interaction: `class TestFiLM(InteractionContract)`.

    Attributes:
        name: as it is registered.
        options: of its config, to make it small.
        R, K: request and dynamic tokens.
    """

    kind = "interaction"

    # -- what the clauses use --------------------------------------------------------------------

    def features(self, samples: Any = SAMPLES) -> VisualFeatures:
        """Pictures of different grids, the same one wherever its number is the same."""
        return ragged(self.dims().Dv, samples)

    def request(self, batch: int = len(SAMPLES)) -> Request:
        """Random requests (B, R, D_request)."""
        generator = torch.Generator().manual_seed(99)
        return Request(torch.randn(batch, self.R, self.dims().D_request, generator=generator))

    def result(self, module: nn.Module) -> Tensor:
        """The message (B, K, Dm) of a ragged batch."""
        values: Tensor = module(self.request(), self.features()).values
        return values

    def row(self, request: Request, index: int) -> Request:
        """The request of one sample."""
        return replace(request, values=request.values[index : index + 1])

    # -- clauses ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_shape_and_dtype(self, dtype: torch.dtype) -> None:
        """The message is (B, K, Dm) in the dtype of the weights, and finite."""
        with clause(
            "shape and dtype",
            "return VisualMessage(values) with values (B, K, Dm), Dm being the property `width`; "
            "make new tensors in the dtype of what comes in (x.new_zeros, not torch.zeros).",
        ):
            module = self.build().to(dtype)
            asked = replace(self.request(), values=self.request().values.to(dtype))
            message = module(asked, self.features().to(dtype=dtype))
            assert isinstance(message, VisualMessage), f"it returned {type(message).__name__}"
            expected = (len(SAMPLES), module.length, module.width)
            got = tuple(message.values.shape)
            assert got == expected, f"values are {got}, expected (B, K, Dm) = {expected}"
            assert message.values.dtype == dtype, f"values are {message.values.dtype}, not {dtype}"
            assert bool(message.values.isfinite().all()), "values are not finite"

    def test_padding_cannot_leak(self) -> None:
        """A sample gets the same alone, in a ragged batch, and whatever the padding holds."""
        with clause(
            "padding cannot leak",
            "honour `features.mask`: fill scores of padded patches with -inf (or a very small "
            "number) before a softmax, and leave them out of sums, means and maxima; take patches "
            "from `padded()` or by the spans in `images`, for `values` may hold other samples'.",
        ):
            module, asked, seen = self.build(), self.request(), self.features()
            together = module(asked, seen).values
            same(module(asked, disturbed(seen)).values, together, TIGHT)
            for index, pictures in enumerate(SAMPLES):
                expected, own = together[index : index + 1], self.row(asked, index)
                same(module(own, self.features((pictures,))).values, expected, TIGHT)
                same(module(own, seen.select([index])).values, expected, TIGHT)

    def test_order_of_the_batch(self) -> None:
        """Samples in another order get their messages in that order."""
        with clause("order of the batch", "let no sample's message depend on another sample."):
            module, asked = self.build(), self.request()
            order = [2, 0, 3, 1]
            turned = replace(asked, values=asked.values[order])
            expected = module(asked, self.features()).values[order]
            same(module(turned, self.features([SAMPLES[i] for i in order])).values, expected, TIGHT)

    def test_the_request_decides(self) -> None:
        """Another request about the same picture gets another message."""
        with clause(
            "the request decides",
            "let the message depend on `request.values`; a module that needs no request is a "
            "Connector, not an Interaction.",
        ):
            asked = self.request(2)
            values = self.build()(asked, self.features((SAMPLES[1], SAMPLES[1]))).values
            assert not torch.allclose(values[0], values[1], rtol=1e-4), "both messages are equal"

    def test_its_map(self) -> None:
        """With `has_map`, rows of the map sum to 1 over real patches; else there is none."""
        with clause(
            "its map",
            "return attention (B, K, P), rows summing to 1 and 0 on padding, if the request's "
            "`return_map` asks for it and `has_map` promises it; None otherwise.",
        ):
            module, seen = self.build(), self.features()
            asked = self.request()
            assert module(asked, seen).attention is None, "a map came that nobody asked for"
            attention = module(replace(asked, return_map=True), seen).attention
            if not module.has_map:
                assert attention is None, "a map came although `has_map` is False"
                return
            assert attention is not None, "`has_map` promises a map, and none came"
            expected = (len(SAMPLES), module.length, seen.mask.shape[1])
            got = tuple(attention.shape)
            assert got == expected, f"the map is {got}, expected (B, K, P) = {expected}"
            assert not attention.masked_select(~seen.mask.unsqueeze(1)).any(), "it looks at padding"
            same(attention.sum(-1), torch.ones(expected[:2]), 1e-3)
