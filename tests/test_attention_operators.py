"""Each of xformers' operators by name: it is the one that is called, and the one that refuses."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from attention_calls import assert_exact, call

from ipn_core.attention import AttentionInputs
from ipn_core.attention.xformers import (
    XFormers,
    XFormersBlackwell,
    XFormersCK,
    XFormersCutlass,
    XFormersFlash,
    XFormersFlash3,
    XFormersSplitK,
)
from ipn_core.errors import AttentionUnavailableError
from ipn_core.plugins import get_registry

pytest.importorskip("xformers", reason="the extra 'cuda' is not installed")

BY_NAME = (
    XFormersBlackwell,
    XFormersCK,
    XFormersCutlass,
    XFormersFlash,
    XFormersFlash3,
    XFormersSplitK,
)
SHAPE = (9, 33, 4, 2)
"""Queries, keys, heads and heads of the keys; fewer queries than keys, as one operator wants it."""
by_name = pytest.mark.parametrize("backend", BY_NAME, ids=lambda cls: cls.name)


def operators(backend: type[XFormers]) -> Any:
    """The module of xformers that holds a backend's operators."""
    return importlib.import_module(f"xformers.ops.fmha.{backend.module}")


def here(backend: type[XFormers]) -> XFormers:
    """A backend whose own constants let the CPU through, so that its operators are asked."""
    made = backend()
    made.devices = ("cpu",)
    return made


def test_every_backend_of_xformers_is_among_them() -> None:
    entries = get_registry().entries("attention")
    named = {name for name in entries if name.startswith("xformers-")}
    assert {cls.name for cls in BY_NAME} == named


# -- what is called --------------------------------------------------------------------------------


@dataclass
class Called:
    """Which operators ran: the backend's own, by direction, and any other one."""

    forward: list[str] = field(default_factory=list)
    backward: int = 0
    strangers: int = 0


@pytest.fixture
def called(backend: type[XFormers], monkeypatch: pytest.MonkeyPatch) -> Called:
    """Put operators for the CPU in the place of xformers' own, and count who is called."""
    from ipn_core.testing.xformers_cpu import BwOp, FwOp

    found = Called()

    class Forward(FwOp):
        NAME = "itsF"

        @classmethod
        def apply(cls, inp: Any, needs_gradient: bool) -> Any:
            found.forward.append(type(inp.attn_bias).__name__)
            return super().apply(inp, needs_gradient)

    class Backward(BwOp):
        NAME = "itsB"

        @classmethod
        def apply(cls, ctx: Any, inp: Any, grad: Any) -> Any:
            found.backward += 1
            return super().apply(ctx, inp, grad)

    def stray(*given: Any) -> Any:
        found.strangers += 1
        raise AssertionError("another backend's operator was called")

    for other in BY_NAME:
        module = operators(other)
        mine = other is backend
        for name, op in (("FwOp", Forward), ("BwOp", Backward)):
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, op if mine else type(name, (op,), {"apply": stray})
                )
    return found


@by_name
@pytest.mark.parametrize(
    ("kind", "bias"),
    [
        ("none", "NoneType"),
        ("bias", "Tensor"),
        ("lengths", "BlockDiagonalMask"),
        ("packed", "BlockDiagonalMask"),
    ],
)
def test_a_backend_calls_its_own_operators_and_is_exact(
    backend: type[XFormers], kind: str, bias: str, called: Called
) -> None:
    grad = backend.supports_grad
    inputs = call(kind, SHAPE, torch.float32, grad=grad)
    assert here(backend).not_supported_reasons(inputs) == []
    assert_exact(here(backend), inputs)
    if backend is XFormersSplitK and bias == "BlockDiagonalMask":
        bias = "BlockDiagonalGappyKeysMask"
    assert called.forward == [bias]
    assert called.backward == int(grad)
    assert called.strangers == 0


@by_name
def test_only_what_has_an_operator_for_it_has_a_backward_pass(backend: type[XFormers]) -> None:
    assert hasattr(operators(backend), "BwOp") is backend.supports_grad
    reasons = here(backend).not_supported_reasons(call("none", SHAPE, torch.float32))
    assert ("has no backward pass" in reasons) is not backend.supports_grad


# -- who refuses -----------------------------------------------------------------------------------


@by_name
def test_a_refusal_names_the_real_operator_with_its_reasons(backend: type[XFormers]) -> None:
    module = operators(backend)
    inputs = call("none", SHAPE, torch.float32, widths=(64, 64), grad=False)
    reasons = here(backend).not_supported_reasons(inputs)
    assert f"{module.FwOp.NAME}: device=cpu (supported: {{'cuda'}})" in reasons
    assert all(reason.startswith(f"{module.FwOp.NAME}: ") for reason in reasons)
    if backend.supports_grad:
        trained = call("none", SHAPE, torch.float32, widths=(64, 64))
        also = here(backend).not_supported_reasons(trained)
        assert set(reasons) < set(also)
        assert f"{module.BwOp.NAME}: device=cpu (supported: {{'cuda'}})" in also


@pytest.mark.parametrize("grad", [False, True])
def test_the_automatic_one_says_that_there_is_none_and_why(grad: bool) -> None:
    inputs = call("none", SHAPE, torch.float32, grad=grad)
    (reason,) = here(XFormers).not_supported_reasons(inputs)
    assert reason.startswith(
        "xformers has no operator for these inputs: No operator found for "
        "`memory_efficient_attention_forward` with inputs: "
    )
    assert "is not supported because: device=cpu (supported: {'cuda'})" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("backend", [XFormers, *BY_NAME], ids=lambda cls: cls.name)
def test_by_its_own_constants_it_wants_another_device(backend: type[XFormers]) -> None:
    from ipn_core.attention import attend

    q = torch.zeros(1, 3, 1, 8)
    wants = "needs a device of cuda, got cpu"
    assert wants in backend().not_supported_reasons(AttentionInputs.make(q, q, q))
    with pytest.raises(
        AttentionUnavailableError, match=f"'{backend.name}' does not take .*{wants}"
    ):
        attend(q, q, q, backend=backend.name)
