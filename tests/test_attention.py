"""Every attention backend gives what the reference gives, or says why it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ipn_core.attention import (
    AttentionBackend,
    AttentionInputs,
    attend,
    available_backends,
    backend_reasons,
    get_backend,
)
from ipn_core.attention.eager import Eager
from ipn_core.attention.xformers import XFormers
from ipn_core.errors import (
    AttentionUnavailableError,
    PluginError,
    ShapeError,
    UnknownNameError,
)
from ipn_core.hooks import hookimpl
from ipn_core.plugins import add_plugin, get_registry
from ipn_core.testing.contracts import AttentionContract

BACKENDS = ("sdpa", "sdpa-math", "sdpa-flash", "xformers")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Relative to the largest value."""


class TestEager(AttentionContract):
    name = "eager"


class TestSDPA(AttentionContract):
    name = "sdpa"


class TestSDPAMath(AttentionContract):
    name = "sdpa-math"


class TestSDPAFlash(AttentionContract):
    name = "sdpa-flash"


class TestFlex(AttentionContract):
    name = "flex"

    def inputs(self) -> Iterator[AttentionInputs]:
        """Those of one shape and type: torch compiles something for each other one."""
        yield from islice(super().inputs(), 7)


def _dead_rows(B: int, M: int, N: int) -> Tensor:
    mask = torch.ones(B, 1, M, N, dtype=torch.bool)
    mask[0, :, M // 2] = False
    mask[-1] = False
    return mask


def _half_closed(B: int, H: int, M: int, N: int) -> Tensor:
    bias = torch.randn(B, H, M, N)
    bias[0, 0, 0] = float("-inf")
    bias[:, :, :, 0] = float("-inf")
    return bias


MASKINGS: dict[str, Callable[[int, int, int, int], dict[str, Any]]] = {
    "none": lambda B, H, M, N: {},
    "keys": lambda B, H, M, N: {"mask": torch.rand(B, N) > 0.4},
    "full": lambda B, H, M, N: {"mask": torch.rand(B, H, M, N) > 0.4},
    "dead": lambda B, H, M, N: {"mask": _dead_rows(B, M, N)},
    "lengths": lambda B, H, M, N: {"lengths": [N - (2 * i) % N for i in range(B)]},
    "none-left": lambda B, H, M, N: {"lengths": [0] + [N] * (B - 1)},
    "all-none": lambda B, H, M, N: {"lengths": [0] * B},
    "bias": lambda B, H, M, N: {"bias": torch.randn(1, H, 1, N)},
    "closed-bias": lambda B, H, M, N: {"bias": _half_closed(B, H, M, N)},
    "everything": lambda B, H, M, N: {
        "mask": torch.rand(B, N) > 0.4,
        "bias": torch.randn(B, H, M, N),
        "lengths": [max(0, N - i) for i in range(B)],
    },
}


@pytest.fixture(scope="module")
def on_cpu() -> XFormers:
    """xformers' own function over a CPU operator."""
    pytest.importorskip("xformers", reason="the extra 'cuda' is not installed")
    from ipn_core.testing.xformers_cpu import PAIR

    return XFormers(op=PAIR)


@pytest.fixture
def backend_of(request: pytest.FixtureRequest) -> Callable[[str], AttentionBackend]:
    """A backend by name; `xformers` is the one over the CPU operator."""

    def find(name: str) -> AttentionBackend:
        if name == "xformers":
            found: AttentionBackend = request.getfixturevalue("on_cpu")
            return found
        return get_backend(name)

    return find


def _draw(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, seed: int = 0) -> Any:
    B, M, N, H, K, Kv = shape
    torch.manual_seed(seed)
    drawn = torch.randn(B, M, H, K), torch.randn(B, N, H, K), torch.randn(B, N, H, Kv)
    return [t.to(dtype).requires_grad_() for t in drawn]


def _run(
    backend: AttentionBackend,
    qkv: list[Tensor],
    extras: dict[str, Any],
    bias_grad: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of q, k, v and a bias."""
    extras = dict(extras)
    leaves = list(qkv)
    if "bias" in extras and bias_grad:
        extras["bias"] = extras["bias"].clone().requires_grad_()
        leaves.append(extras["bias"])
    inputs = AttentionInputs.make(*qkv, **extras)
    reasons = backend.not_supported_reasons(inputs)
    if reasons:
        pytest.skip(f"{backend.name} refuses: {', '.join(reasons)}")
    out = backend.forward(inputs)
    assert isinstance(out, Tensor)
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    grads = torch.autograd.grad((out.float() * weight).sum(), leaves, allow_unused=True)
    return out, [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    found, expected = found.detach(), expected.detach()
    largest = max(float(expected.abs().max()), 1.0)
    assert float((found.float() - expected.float()).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_equal_the_reference(
    backend_of: Any, name: str, masking: str, dtype: torch.dtype
) -> None:
    backend = backend_of(name)
    for shape in ((3, 5, 33, 2, 8, 8), (1, 1, 1, 1, 16, 16), (2, 31, 7, 4, 24, 24)):
        B, M, N, H, _, _ = shape
        qkv = _draw(shape, dtype)
        extras = MASKINGS[masking](B, H, M, N)
        # Torch's flash kernel gives no gradient to a bias.
        bias_grad = name != "sdpa-flash"
        out, grads = _run(backend, qkv, extras, bias_grad)
        expected, wanted = _run(Eager(), qkv, extras, bias_grad)
        _close(out, expected, TOLERANCE[dtype])
        for grad, want in zip(grads, wanted, strict=True):
            _close(grad, want, TOLERANCE[dtype])


@pytest.mark.parametrize("masking", ["none", "keys", "lengths"])
@pytest.mark.parametrize("name", ["sdpa", "sdpa-math", "xformers"])
def test_values_may_be_wider_than_keys(backend_of: Any, name: str, masking: str) -> None:
    qkv = _draw((2, 3, 9, 2, 8, 20), torch.float32)
    extras = MASKINGS[masking](2, 2, 3, 9)
    out, _ = _run(backend_of(name), qkv, extras)
    assert out.shape == (2, 3, 2, 20)
    _close(out, _run(Eager(), qkv, extras)[0], 2e-5)


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_reference_is_attention_written_out(masking: str) -> None:
    B, M, N, H = 3, 4, 6, 2
    q, k, v = (t.detach() for t in _draw((B, M, N, H, 8, 8), torch.float32))
    extras = MASKINGS[masking](B, H, M, N)
    out, seen = attend(q, k, v, scale=0.3, return_map=True, **extras)
    mask = extras.get("mask", torch.ones(1, 1, 1, N, dtype=torch.bool))
    mask = mask[:, None, None] if mask.ndim == 2 else mask
    mask = mask.expand(B, H, M, N)
    bias = extras.get("bias", torch.zeros(1)).expand(B, H, M, N)
    lengths = extras.get("lengths", [N] * B)
    for b in range(B):
        for h in range(H):
            for m in range(M):
                looks = [
                    n
                    for n in range(lengths[b])
                    if mask[b, h, m, n] and bias[b, h, m, n] > float("-inf")
                ]
                row = torch.zeros(N)
                if looks:
                    scores = (k[b, looks, h] @ q[b, m, h]) * 0.3 + bias[b, h, m, looks]
                    row[looks] = scores.softmax(0)
                torch.testing.assert_close(seen[b, h, m], row)
                torch.testing.assert_close(out[b, m, h], row @ v[b, :, h])


@pytest.mark.parametrize("name", ["eager", *BACKENDS])
def test_nowhere_to_look_gives_zeros_and_finite_gradients(backend_of: Any, name: str) -> None:
    for masking in ("dead", "none-left", "all-none"):
        qkv = _draw((2, 4, 6, 2, 8, 8), torch.float32)
        extras = MASKINGS[masking](2, 2, 4, 6)
        out, grads = _run(backend_of(name), qkv, extras)
        dead = out[-1] if masking == "dead" else out[0]
        assert not dead.any()
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_no_keys_at_all_give_zeros(backend: str) -> None:
    q, k, v = _draw((2, 3, 0, 2, 8, 5), torch.float32)
    out = attend(q, k, v, mask=torch.ones(2, 0, dtype=torch.bool), backend=backend)
    assert out.shape == (2, 3, 2, 5)
    assert not out.any()
    out.sum().backward()
    assert not q.grad.any()
    _, seen = attend(q, k, v, return_map=True)
    assert seen.shape == (2, 2, 3, 0)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(4))),
    widths=st.sampled_from([(8, 8), (3, 3), (8, 5)]),
    masking=st.sampled_from(sorted(MASKINGS)),
    name=st.sampled_from(["sdpa", "sdpa-math"]),
    scale=st.sampled_from([None, 0.1, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(
    shape: tuple[int, int, int, int],
    widths: tuple[int, int],
    masking: str,
    name: str,
    scale: float | None,
    seed: int,
) -> None:
    B, M, N, H = shape
    q, k, v = (t.detach() for t in _draw((B, M, N, H, *widths), torch.float32, seed))
    extras = {**MASKINGS[masking](B, H, M, N), "scale": scale}
    _close(
        attend(q, k, v, backend=name, **extras), attend(q, k, v, backend="eager", **extras), 2e-5
    )


def test_padding_never_changes_the_result(on_cpu: XFormers) -> None:
    q, k, v = (t.detach() for t in _draw((2, 3, 8, 2, 8, 8), torch.float32))
    alone = attend(q[1:], k[1:, :5], v[1:, :5], backend="eager")
    k[1, 5:], v[1, 5:] = 1e4, -1e4
    for backend in (Eager(), get_backend("sdpa"), on_cpu):
        out = backend.forward(AttentionInputs.make(q, k, v, lengths=[8, 5]))
        torch.testing.assert_close(out[1:], alone)


def test_xformers_packs_lengths_and_sends_masks_as_tensors(on_cpu: XFormers) -> None:
    from ipn_core.testing.xformers_cpu import FwOp

    q, k, v = (t.detach() for t in _draw((3, 4, 7, 2, 8, 8), torch.float32))
    for extras, kind in (
        ({"lengths": [7, 0, 3]}, "BlockDiagonalMask"),
        ({"lengths": [7, 7, 7]}, "NoneType"),
        ({"mask": torch.rand(3, 7) > 0.5}, "Tensor"),
        ({"lengths": [7, 0, 3], "bias": torch.randn(7)}, "Tensor"),
    ):
        FwOp.calls.clear()
        out = on_cpu.forward(AttentionInputs.make(q, k, v, **extras))
        assert FwOp.calls == {kind: 1}
        torch.testing.assert_close(out, attend(q, k, v, backend="eager", **extras))


def test_xformers_biases_start_each_row_aligned(on_cpu: XFormers) -> None:
    from ipn_core.attention.xformers import _aligned_bias

    q, k, v = _draw((2, 3, 5, 2, 8, 8), torch.float32)
    bias = _aligned_bias(torch.randn(1, 2, 1, 5), AttentionInputs.make(q, k, v))
    assert bias.shape == (2, 2, 3, 5)
    assert bias.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


def test_xformers_passes_on_what_its_operators_object_to(on_cpu: XFormers) -> None:
    q, k, v = (t.double() for t in _draw((1, 2, 3, 1, 8, 8), torch.float32))
    assert on_cpu.not_supported_reasons(AttentionInputs.make(q, k, v)) == [
        "takes float32 or float16 or bfloat16, got float64"
    ]
    q, k, v = (t.detach().float() for t in (q, k, v))
    wide = torch.zeros(1, 3, 1, 520)
    reasons = on_cpu.not_supported_reasons(AttentionInputs.make(wide, wide, wide))
    assert any("cpuF" in r and "512" in r for r in reasons)
    bias = torch.randn(3, requires_grad=True)
    assert on_cpu.not_supported_reasons(AttentionInputs.make(q, k, v, bias=bias)) == [
        "gives no gradient to the bias unless q, k or v need one"
    ]


def test_xformers_is_missed_by_its_function_not_its_name(
    monkeypatch: pytest.MonkeyPatch, on_cpu: XFormers
) -> None:
    from ipn_core.attention import xformers as module

    inputs = AttentionInputs.make(*_draw((1, 2, 3, 1, 8, 8), torch.float32))
    home = pytest.importorskip("xformers.ops.fmha")
    monkeypatch.delattr(home, "memory_efficient_attention")
    module._found.cache_clear()
    try:
        (reason,) = on_cpu.not_supported_reasons(inputs)
        assert "has no memory_efficient_attention, and mslk cannot be imported" in reason
        assert reason.endswith(": install mslk, which has it now, or xformers 0.0.35")
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
        module._found.cache_clear()
        (reason,) = on_cpu.not_supported_reasons(inputs)
        assert "cannot be imported" in reason
        assert "pip install 'ipn-core[cuda]'" in reason
    finally:
        module._found.cache_clear()


def test_auto_takes_the_first_that_can() -> None:
    q, k, v = (t.detach() for t in _draw((1, 2, 3, 1, 8, 8), torch.float32))
    inputs = AttentionInputs.make(q, k, v)
    expected = get_backend("sdpa").forward(inputs)
    assert torch.equal(attend(q, k, v), expected)
    out, seen = attend(q, k, v, return_map=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(seen.sum(-1), torch.ones(1, 1, 2))


def test_a_map_is_float32_and_the_output_is_not() -> None:
    q, k, v = _draw((1, 2, 3, 1, 8, 8), torch.bfloat16)
    out, seen = attend(q, k, v, return_map=True)
    assert out.dtype == torch.bfloat16
    assert seen.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_autocast_reaches_every_backend_alike(backend: str) -> None:
    q, k, v = _draw((1, 2, 3, 1, 8, 8), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k.to(torch.bfloat16), v, backend=backend)
    assert out.dtype == torch.bfloat16
    _close(out.float(), attend(q, k, v, backend="eager"), 3e-2)


def test_errors_say_which_backends_there_are_and_why_not() -> None:
    q, k, v = (t.detach() for t in _draw((1, 2, 3, 1, 8, 8), torch.float32))
    with pytest.raises(UnknownNameError, match=r"unknown attention 'sdpaa'.*did you mean 'sdpa'"):
        attend(q, k, v, backend="sdpaa")
    with pytest.raises(AttentionUnavailableError) as refused:
        attend(q, k, v, backend="xformers", return_map=True)
    assert str(refused.value) == (
        "attention backend 'xformers' does not take q (1, 2, 1, 8), k (1, 3, 1, 8), "
        "v (1, 3, 1, 8) float32 on cpu with return_map: needs a device of cuda, got cpu, returns "
        "no attention map. Choose another one or 'auto'; see 'ipn doctor'. The others have against "
        "it: eager: nothing, take it; flex, sdpa, sdpa-flash, sdpa-math: returns no attention map; "
        "sdpa-cudnn, sdpa-efficient, xformers-blackwell, xformers-ck, xformers-cutlass, "
        "xformers-flash, xformers-flash3, xformers-splitk: needs a device of cuda, got cpu, "
        "returns no attention map."
    )
    with pytest.raises(AttentionUnavailableError) as refused:
        attend(*(t.to(torch.float8_e4m3fn) for t in (q, k, v)))
    text = str(refused.value)
    assert all(name in text for name in get_registry().entries("attention"))
    assert "got float8_e4m3fn" in text


def test_a_kernel_refuses_in_torchs_own_words() -> None:
    q, k, v = _draw((1, 2, 3, 1, 8, 16), torch.float32)
    with pytest.raises(AttentionUnavailableError, match=r"same last dimension"):
        attend(q, k, v, backend="sdpa-flash")


@pytest.mark.parametrize(
    ("extras", "words"),
    [
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"\(B, N\) = \(2, 5\); got \(2, 4\)"),
        ({"mask": torch.ones(2, 5)}, "mask must be bool"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask must have two dimensions"),
        ({"bias": torch.zeros(2, 3)}, r"bias must broadcast to \(B, H, M, N\) = \(2, 1, 3, 5\)"),
        ({"bias": torch.ones(5, dtype=torch.long)}, "bias must be floating-point"),
        ({"lengths": [5]}, "lengths must be 2 numbers from 0 to 5"),
        ({"lengths": [5, 6]}, "lengths must be 2 numbers from 0 to 5"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(extras: dict[str, Any], words: str) -> None:
    q, k, v = _draw((2, 3, 5, 1, 8, 8), torch.float32)
    with pytest.raises(ShapeError, match=words):
        attend(q, k, v, **extras)


def test_tensors_that_do_not_fit_each_other_are_refused() -> None:
    q, k, v = _draw((2, 3, 5, 1, 8, 8), torch.float32)
    with pytest.raises(ShapeError, match="four dimensions"):
        attend(q[0], k, v)
    with pytest.raises(ShapeError, match=r"k must be \(B, N, Hk, K\)"):
        attend(q, k[:1], v)
    with pytest.raises(ShapeError, match="one dtype"):
        attend(q, k.double(), v)


class Uniform(AttentionBackend):
    """Looks everywhere alike."""

    name = "uniform"
    supports_mask = False
    supports_bias = False
    supports_lengths = False
    supports_grad = False
    supports_value_dim = False
    max_head_dim = 64

    def forward(self, inputs: AttentionInputs) -> Tensor:
        return inputs.v.mean(1, keepdim=True).expand(inputs.q.shape)


class UniformPlugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.attention("uniform", Uniform)
        registry.attention("not-one", dict)
        registry.attention("gone", "no_such_module:Backend")


@pytest.fixture
def with_uniform() -> Any:
    registry = get_registry()
    before = dict(registry.entries("attention")), list(registry.plugins)
    add_plugin(registry, "uniform", UniformPlugin())
    yield
    registry.components["attention"], registry.plugins = before


@pytest.mark.usefixtures("with_uniform")
def test_a_plugin_adds_a_backend() -> None:
    q, k, v = (t.detach() for t in _draw((2, 3, 5, 1, 8, 8), torch.float32))
    torch.testing.assert_close(
        attend(q, k, v, backend="uniform"), v.mean(1, keepdim=True).expand(2, 3, 1, 8)
    )
    assert "uniform" in available_backends()
    inputs = AttentionInputs.make(
        *_draw((2, 3, 5, 1, 64, 65), torch.float32),
        mask=torch.ones(2, 5, dtype=torch.bool),
        bias=torch.zeros(5),
        lengths=[5, 4],
    )
    assert get_backend("uniform").not_supported_reasons(inputs) == [
        "takes heads up to 64 wide, got 65",
        "needs values as wide as keys, got 65 and 64 a head",
        "takes no mask",
        "takes no bias",
        "takes no lengths",
        "has no backward pass",
    ]


@pytest.mark.usefixtures("with_uniform")
def test_a_faulty_backend_is_named_and_takes_no_other_down() -> None:
    q, k, v = _draw((2, 3, 5, 1, 8, 8), torch.float32)
    words = "'not-one' of uniform local must be a subclass of ipn_core.attention.Attention"
    with pytest.raises(PluginError, match=words):
        attend(q, k, v, backend="not-one")
    reasons = backend_reasons()
    assert "no_such_module" in reasons["gone"][0]
    assert reasons["eager"] == reasons["sdpa"] == []


def test_every_registered_backend_loads_and_names_itself() -> None:
    for name, component in get_registry().entries("attention").items():
        assert issubclass(component.load(), AttentionBackend)
        assert component.load().name == name


def test_xformers_is_imported_only_when_it_can_run() -> None:
    code = (
        "import sys, torch; from ipn_core.attention import attend, backend_reasons; "
        "q = torch.zeros(1, 2, 1, 8); attend(q, q, q); backend_reasons(); "
        "sys.exit('xformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
