"""What every `AttentionBackend` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.eager import Eager
from ipn_core.attention.inputs import AttentionInputs
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.component import ComponentContract

__all__ = ["AttentionContract"]

SHAPES = ((2, 1, 31, 2, 8), (1, 5, 33, 4, 16), (3, 4, 7, 1, 8))
"""B, M, N, H and K: odd numbers, and more than one tile of a kernel."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Relative to the largest number of the reference."""


class AttentionContract(ComponentContract):
    """Subclass it and name the backend: `class TestMine(AttentionContract): name = "mine"`.

    Attributes:
        device: where its inputs lie; one that it does not run on leaves nothing to compare.
    """

    kind = "attention"
    device = "cpu"

    def config_class(self) -> Any:
        """A backend has no config."""
        return None

    def backend(self) -> AttentionBackend:
        """A new instance."""
        made: AttentionBackend = self.target()()
        return made

    def inputs(self) -> Iterator[AttentionInputs]:
        """Calls of several shapes and dtypes: plain, masked, biased, ragged, packed, grouped."""
        for B, M, N, H, K in SHAPES:
            generator = torch.Generator().manual_seed(B * N)
            for dtype in TOLERANCE:
                q, k, v = (
                    torch.randn(B, n, H, K, generator=generator).to(self.device, dtype)
                    for n in (M, N, N)
                )
                mask = torch.rand(B, N, generator=generator) > 0.3
                bias = torch.randn(B, H, M, N, generator=generator)
                options: list[dict[str, Any]] = [
                    {},
                    {"mask": mask.to(self.device)},
                    {"bias": bias.to(self.device, dtype)},
                    {"lengths": [N - i for i in range(B)]},
                    {"return_map": True},
                ]
                for more in options:
                    yield AttentionInputs.make(q, k, v, **more)
                yield AttentionInputs.make(q, k[:, :, :1], v[:, :, :1])
                q, k, v = (t.flatten(0, 1)[None] for t in (q, k, v))
                yield AttentionInputs.make(
                    q,
                    k,
                    v,
                    query_lengths=[M] * B,
                    lengths=[N - 1, *[N] * (B - 2), N + 1] if B > 1 else [N],
                )

    # -- clauses ---------------------------------------------------------------------------------

    def test_it_states_what_it_is(self) -> None:
        """It is a backend whose name is the one that it is registered under."""
        with clause(
            "it states what it is",
            "derive it from ipn_core.attention.AttentionBackend, and set `name` as registered.",
        ):
            found = self.backend()
            assert isinstance(found, AttentionBackend), f"it is a {type(found).__name__}"
            assert found.name == self.name, f"`name` is '{found.name}', registered '{self.name}'"

    def test_refusals_are_lists_of_reasons(self) -> None:
        """What it cannot serve it refuses with texts."""
        with clause(
            "refusals are lists of reasons",
            "return a list of texts from `more_reasons`, the empty one for yes.",
        ):
            for call in self.inputs():
                reasons = self.backend().not_supported_reasons(call)
                assert isinstance(reasons, list), f"reasons are a {type(reasons).__name__}"
                assert all(isinstance(r, str) and r for r in reasons), f"no texts: {reasons}"

    def test_it_gives_what_eager_gives(self) -> None:
        """Whatever it takes, it computes as the reference does."""
        with clause(
            "it gives what eager gives",
            "compute softmax(scale · q·kᵀ + bias) · v over the keys that mask and lengths leave, "
            "or refuse the inputs by a constant or `more_reasons`.",
        ):
            for call in self._served():
                found, expected = self.backend().forward(call), Eager().forward(call)
                if call.return_map:
                    same(found[1], expected[1], TOLERANCE[call.q.dtype])
                    found, expected = found[0], expected[0]
                assert isinstance(found, torch.Tensor)
                assert isinstance(expected, torch.Tensor)
                assert found.dtype == call.q.dtype, f"the result is {found.dtype}"
                same(found, expected, TOLERANCE[call.q.dtype])

    def test_its_gradients_are_those_of_eager(self) -> None:
        """The backward pass agrees, too."""
        with clause(
            "its gradients are those of eager",
            "set `supports_grad = False` if there is no backward pass, or mend it.",
        ):
            for call in self._served():
                if call.return_map or call.q.dtype != torch.float32:
                    continue
                q, k, v = (t.detach().requires_grad_(True) for t in (call.q, call.k, call.v))
                again = replace(call, q=q, k=k, v=v)
                if self.backend().not_supported_reasons(again):
                    continue
                found, expected = (_gradients(b, again) for b in (self.backend(), Eager()))
                for mine, wanted in zip(found, expected, strict=True):
                    same(mine, wanted, 10 * TOLERANCE[torch.float32])

    def _served(self) -> list[AttentionInputs]:
        return [c for c in self.inputs() if not self.backend().not_supported_reasons(c)]


def _gradients(backend: AttentionBackend, call: AttentionInputs) -> tuple[torch.Tensor, ...]:
    out = backend.forward(call)
    assert isinstance(out, torch.Tensor)
    return torch.autograd.grad(out.square().sum(), (call.q, call.k, call.v))
