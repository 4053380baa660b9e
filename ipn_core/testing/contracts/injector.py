"""What every `Injector` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ipn_core.stages import InjectContext, Injection, VisualMessage
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.module import TIGHT, ModuleContract

__all__ = ["InjectorContract"]

BATCH = 4


class InjectorContract(ModuleContract):
    """Subclass it and name the injector: `class TestMine(InjectorContract): name = "mine"`."""

    kind = "injector"

    def message(self, dtype: torch.dtype = torch.float32) -> VisualMessage:
        """A random message (B, K, Dm)."""
        generator = torch.Generator().manual_seed(6)
        values = torch.randn(BATCH, self.K, self.dims().Dm, generator=generator)
        return VisualMessage(values.to(dtype))

    def context(self, dtype: torch.dtype = torch.float32) -> InjectContext:
        """Random embeddings (K, D_in) of the slots."""
        generator = torch.Generator().manual_seed(7)
        slots = torch.randn(self.K, self.dims().D_in, generator=generator)
        return InjectContext(slots.to(dtype))

    def result(self, module: nn.Module) -> Tensor:
        """The tokens (B, K, D_in) of a batch."""
        tokens: Tensor = module(self.message(), self.context()).tokens
        return tokens

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_shape_and_dtype(self, dtype: torch.dtype) -> None:
        """The tokens are (B, K, D_in) in the dtype of the weights, and finite."""
        with clause(
            "shape and dtype",
            "return Injection(tokens) with tokens (B, K, D_in), in the dtype of the message.",
        ):
            module = self.build().to(dtype)
            injection = module(self.message(dtype), self.context(dtype))
            assert isinstance(injection, Injection), f"it returned {type(injection).__name__}"
            tokens = injection.tokens
            assert tokens is not None, "there are no tokens for the slots"
            expected, got = (BATCH, self.K, self.dims().D_in), tuple(tokens.shape)
            assert got == expected, f"tokens are {got}, expected (B, K, D_in) = {expected}"
            assert tokens.dtype == dtype, f"tokens are {tokens.dtype}, not {dtype}"
            assert bool(tokens.isfinite().all()), "tokens are not finite"

    def test_order_of_the_batch(self) -> None:
        """Messages in another order give their tokens in that order."""
        with clause("order of the batch", "let no sample's tokens depend on another sample."):
            module, order = self.build(), [2, 0, 3, 1]
            turned = VisualMessage(self.message().values[order])
            same(module(turned, self.context()).tokens, self.result(module)[order], TIGHT)

    def test_the_message_decides(self) -> None:
        """Another message gives other tokens."""
        with clause("the message decides", "let the tokens depend on `message.values`."):
            tokens = self.result(self.build())
            assert not torch.allclose(tokens[0], tokens[1], rtol=1e-4), "both tokens are equal"
