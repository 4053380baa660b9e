"""What xformers is given, and what becomes of it where the package is another one than expected."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_calls import SHAPES, call, on_cpu

from ipn_core.attention import AttentionInputs
from ipn_core.attention import xformers as module
from ipn_core.attention.eager import Eager
from ipn_core.attention.xformers import XFormers, XFormersFlash3

pytest.importorskip("xformers", reason="the extra 'cuda' is not installed")


@pytest.mark.parametrize(
    ("kind", "bias"),
    [
        ("packed", "BlockDiagonalMask"),
        ("packed-dead", "BlockDiagonalMask"),
        ("packed-mask", "Tensor"),
    ],
)
def test_xformers_gets_blocks_where_nothing_else_masks(kind: str, bias: str) -> None:
    backend = on_cpu("xformers")
    from ipn_core.testing.xformers_cpu import FwOp

    FwOp.calls.clear()
    backend.forward(call(kind, SHAPES[1], torch.float32))
    assert FwOp.calls == {bias: 1}


def test_split_k_gets_the_blocks_that_it_takes() -> None:
    backend = on_cpu("xformers-splitk")
    from ipn_core.testing.xformers_cpu import FwOp

    FwOp.calls.clear()
    backend.forward(call("packed", SHAPES[1], torch.float32, grad=False))
    assert FwOp.calls == {"BlockDiagonalGappyKeysMask": 1}


def test_grouped_heads_are_copied_only_for_a_backward_pass() -> None:
    for grad, dims in ((True, 4), (False, 5)):
        inputs = call("bias", SHAPES[1], torch.float32, grad=grad)
        q, k, v, bias = module._heads(inputs, inputs.bias)
        assert {q.ndim, k.ndim, v.ndim} == {dims}
        assert q.shape[2:-1] == k.shape[2:-1] == bias.shape[1:-2]
        assert (k.stride(-2) == 0) is not grad


def test_leaves_that_nobody_differentiates_are_no_reason_to_prepare_for_it() -> None:
    inputs = call("packed", SHAPES[1], torch.float32)
    with torch.no_grad():
        for name in ("xformers", "xformers-splitk"):
            assert not on_cpu(name).not_supported_reasons(inputs)
            found = on_cpu(name).forward(inputs)
            torch.testing.assert_close(found, Eager().forward(inputs))


def test_the_operator_for_blackwell_takes_no_more_queries_than_keys() -> None:
    from ipn_core.testing.xformers_cpu import PAIR

    backend = module.XFormersBlackwell(op=PAIR)
    q, k = torch.zeros(2, 4, 1, 8), torch.zeros(2, 5, 1, 8)
    for options, reasons in (
        ({}, []),
        ({"lengths": [4, 4]}, []),
        ({"lengths": [4, 3]}, ["takes no more queries than keys, got 8 and 7"]),
    ):
        assert backend.not_supported_reasons(AttentionInputs.make(q, k, k, **options)) == reasons
    assert backend.not_supported_reasons(AttentionInputs.make(k, q, q)) == [
        "takes no more queries than keys, got 5 and 4"
    ]


def test_a_scale_is_among_what_the_operators_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipn_core.testing.xformers_cpu import FwOp

    monkeypatch.setattr(FwOp, "SUPPORTS_CUSTOM_SCALE", False)
    q = torch.zeros(1, 3, 1, 8)
    backend = on_cpu("xformers")
    assert backend.not_supported_reasons(AttentionInputs.make(q, q, q)) == []
    assert backend.not_supported_reasons(AttentionInputs.make(q, q, q, scale=0.3)) == [
        "cpuF: has custom scale"
    ]


# -- a package that is a shell over another one ----------------------------------------------------


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The later xformers: `xformers.ops.fmha` imports, and has nothing of what it had."""
    names = ("xformers", "xformers.ops", "xformers.ops.fmha")
    xformers, ops, fmha = (ModuleType(name) for name in names)
    xformers.__version__ = "9.9"  # type: ignore[attr-defined]
    xformers.ops, ops.fmha = ops, fmha  # type: ignore[attr-defined]
    for one in (xformers, ops, fmha):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    module._found.cache_clear()
    yield fmha
    module._found.cache_clear()


def inputs_for(backend: Any) -> AttentionInputs:
    """Inputs that the constants of a backend let through on the CPU."""
    backend.devices = ("cpu",)
    return call("none", SHAPES[0], torch.float32, grad=False)


def test_without_the_function_it_is_missing(shell: ModuleType) -> None:
    backend = XFormers()
    (reason,) = backend.not_supported_reasons(inputs_for(backend))
    assert reason.startswith(
        "xformers 9.9 has no memory_efficient_attention, and mslk cannot be imported (ModuleNotFou"
    )
    assert reason.endswith(": install mslk, which has it now, or xformers 0.0.35")


@pytest.mark.parametrize("kind", [XFormers, XFormersFlash3])
def test_with_the_function_but_other_insides_it_is_refused(
    shell: ModuleType, kind: type[XFormers]
) -> None:
    shell.memory_efficient_attention = lambda *args, **more: None  # type: ignore[attr-defined]
    backend = kind()
    (reason,) = backend.not_supported_reasons(inputs_for(backend))
    assert reason.startswith("xformers 9.9 is not as expected (AttributeError: ")


@pytest.mark.parametrize("gone", [False, True])
def test_the_successor_is_taken_where_xformers_is_a_shell_or_not_there(
    gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipn_core.testing.xformers_cpu import FwOp

    backend = on_cpu("xformers")
    real = importlib.import_module("xformers.ops.fmha")
    monkeypatch.setitem(sys.modules, "mslk", ModuleType("mslk"))
    monkeypatch.setitem(sys.modules, "mslk.attention", ModuleType("mslk.attention"))
    monkeypatch.setitem(sys.modules, "mslk.attention.fmha", real)
    shell = None if gone else ModuleType("xformers.ops.fmha")
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", shell)
    module._found.cache_clear()
    try:
        FwOp.calls.clear()
        inputs = call("packed", SHAPES[1], torch.float32)
        assert backend.not_supported_reasons(inputs) == []
        torch.testing.assert_close(backend.forward(inputs), Eager().forward(inputs))
        assert FwOp.calls == {"BlockDiagonalMask": 1}
        mine = XFormersFlash3()
        assert "fa3F" in " ".join(mine.not_supported_reasons(inputs_for(mine)))
    finally:
        module._found.cache_clear()
