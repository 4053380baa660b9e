"""What every stage that is an `nn.Module` must do."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ipn_core.errors import AttentionUnavailableError, PluginError
from ipn_core.plugins import get_registry
from ipn_core.stages import Dims, Label
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.component import ComponentContract
from ipn_core.vocabulary import Vocabulary

__all__ = ["TIGHT", "ModuleContract", "StageContract"]

TIGHT = 1e-4
"""Of the largest number, in float32."""


class ModuleContract(ComponentContract):
    """Base of the contracts of what has weights.

    Attributes:
        options: of the config, to make it small.
    """

    options: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def new(self, **more: Any) -> nn.Module:
        """A new one, as a model builds it, with more options."""

    @abstractmethod
    def build(self, **more: Any) -> Any:
        """A new one whose every parameter is random, in eval mode."""

    @abstractmethod
    def result(self, module: nn.Module) -> Tensor:
        """Call a module on fixed inputs; what comes out."""

    # -- clauses ---------------------------------------------------------------------------------

    def test_eval_mode_is_deterministic(self) -> None:
        """In eval mode the same inputs give the same result."""
        with clause(
            "deterministic in eval mode",
            "draw noise only `if self.training`; use nn.Dropout, not F.dropout without it.",
        ):
            module = self.build()
            alike = torch.equal(self.result(module), self.result(module))
            assert alike, "two calls in eval mode differ"

    def test_state_dict_round_trip(self) -> None:
        """All that a result depends on is in the state dict."""
        with clause(
            "state dict round trip",
            "keep every tensor that a result depends on as an nn.Parameter or a registered buffer.",
        ):
            module = self.build()
            torch.manual_seed(1)
            other = self.new().eval()
            other.load_state_dict(copy.deepcopy(module.state_dict()))
            same(self.result(other), self.result(module), 1e-6)


class StageContract(ModuleContract):
    """Base of the contracts of stages that train.

    Attributes:
        R, K: request and dynamic tokens.
    """

    R: ClassVar[int] = 2
    K: ClassVar[int] = 3

    def dims(self) -> Dims:
        """Sizes that all differ, so that no two can be taken for each other."""
        return Dims(
            Dv=20,
            D_in=28,
            D_hidden=(24, 24),
            D_out=26,
            R=self.R,
            K=self.K,
            D_request=24,
            M=self.K,
            Dm=22,
            H_kv=2,
            D_head=6,
            labels=tuple(Label(f"it {i}", ("odd",) * (i % 2)) for i in range(20)),
        )

    def met(self, module: Any) -> Any:
        """Let a stage meet made-up words, one token a character."""
        words = torch.randn(256, self.dims().D_in, generator=torch.Generator().manual_seed(3))
        module.meet(
            Vocabulary(lambda text: [*text.encode()], lambda ids: words[list(ids)], words.shape[1])
        )
        return module

    def new(self, **more: Any) -> nn.Module:
        """A new one, as a model builds it."""
        module: nn.Module = self.met(self.make({**self.options, **more}, self.dims()))
        return module

    def build(self, **more: Any) -> Any:
        """A new one whose every parameter is random, in eval mode."""
        torch.manual_seed(0)
        built = self.new(**more).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return built

    # -- clauses ---------------------------------------------------------------------------------

    def test_every_parameter_learns(self) -> None:
        """Each parameter gets a finite gradient."""
        with clause(
            "every parameter learns",
            "remove parameters that the result does not depend on, and detach nothing on the way.",
        ):
            module = self.build()
            module.train()
            learning = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
            if learning:
                self.result(module).square().sum().backward()
            for name, parameter in learning:
                gradient = parameter.grad
                assert gradient is not None, f"'{name}' gets no gradient"
                assert bool(gradient.isfinite().all()), f"'{name}' gets no finite gradient"

    def test_it_compiles(self) -> None:
        """`torch.compile` gives the same result."""
        with clause(
            "it compiles",
            "keep data-dependent Python (item(), numpy, lists built from tensors) out of forward.",
        ):
            module = self.build()
            expected = self.result(module)
            torch.compiler.reset()
            compiled: Any = torch.compile(module, backend="eager")
            same(self.result(compiled), expected, TIGHT)

    def test_attention_backends_agree(self) -> None:
        """Every attention backend that takes it gives what `eager` gives."""
        if "backend" not in self.config_fields():
            pytest.skip("it has no option 'backend' of ipn_core.attention")
        with clause(
            "attention backends agree",
            "pass the option `backend` on to ipn_core.attention.attend, and masks with it.",
        ):
            expected = self.result(self.build(backend="eager"))
            for name in get_registry().entries("attention"):
                try:
                    found = self.result(self.build(backend=name))
                except (AttentionUnavailableError, PluginError):
                    continue  # it does not take it, or it is faulty itself
                same(found, expected, TIGHT)
