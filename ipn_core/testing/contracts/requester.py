"""What every `Requester` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from ipn_core.stages import Request, RequestContext
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.module import TIGHT, StageContract

__all__ = ["RequesterContract"]

BATCH = 4


class RequesterContract(StageContract):
    """Subclass it and name the requester: `class TestMine(RequesterContract): name = "mine"`.

    Attributes:
        borrows: whether it gives samples the requests of others on purpose, as an ablation does.
    """

    kind = "requester"
    borrows: ClassVar[bool] = False

    def context(self, dtype: torch.dtype = torch.float32) -> RequestContext:
        """Random hidden states (B, R, D) at `<img-q>`."""
        generator = torch.Generator().manual_seed(5)
        hidden = torch.randn(BATCH, self.R, self.dims().D_hidden[-1], generator=generator)
        return RequestContext(hidden.to(dtype), range(BATCH))

    def result(self, module: nn.Module) -> Tensor:
        """The requests (B, R, D) of a batch."""
        values: Tensor = module(self.context()).values
        return values

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_shape_and_dtype(self, dtype: torch.dtype) -> None:
        """The request is (B, R, D) with D its `width`, in the dtype of the weights."""
        with clause(
            "shape and dtype",
            "return Request(values) with values (B, R, D), D being the property `width`, in the "
            "dtype of `context.hidden`.",
        ):
            module = self.build().to(dtype)
            request = module(self.context(dtype))
            assert isinstance(request, Request), f"it returned {type(request).__name__}"
            expected, got = (BATCH, self.R, module.width), tuple(request.values.shape)
            assert got == expected, f"values are {got}, expected (B, R, D) = {expected}"
            assert request.values.dtype == dtype, f"values are {request.values.dtype}, not {dtype}"
            assert bool(request.values.isfinite().all()), "values are not finite"

    def test_order_of_the_batch(self) -> None:
        """Samples in another order, or alone, get their requests."""
        with clause(
            "order of the batch",
            "let no sample's request depend on another sample; where it is meant to, say "
            "`borrows = True` in the contract.",
        ):
            if self.borrows:
                return
            module, context, order = self.build(), self.context(), [2, 0, 3, 1]
            expected = self.result(module)
            turned = replace(context, hidden=context.hidden[order], samples=order)
            same(module(turned).values, expected[order], TIGHT)
            alone = replace(context, hidden=context.hidden[:1], samples=[0])
            same(module(alone).values, expected[:1], TIGHT)

    def test_its_layer_exists(self) -> None:
        """It reads a layer that the language model has."""
        with clause(
            "its layer exists",
            "check the config's layer against len(dims.D_hidden) in __init__; raise ConfigError.",
        ):
            layer, count = self.build().layer, len(self.dims().D_hidden)
            assert -count <= layer < count, f"layer {layer} of {count} hidden states"
