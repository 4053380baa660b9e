"""Every backend, type, shape, masking and grouping against double precision, both ways."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from attention_calls import KINDS, SHAPES, assert_exact, call, on_cpu

from ipn_core.attention import AttentionBackend, attend, get_backend
from ipn_core.errors import ShapeError
from ipn_core.plugins import get_registry

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WITH_BACKWARD = ("eager", "sdpa", "sdpa-math", "sdpa-flash", "xformers")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDTHS = ((64, 64), (32, 32), (40, 24))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_forward_and_backward_are_exact(name: str, kind: str, dtype: str) -> None:
    backend = on_cpu(name)
    for shape in SHAPES:
        inputs = call(kind, shape, DTYPES[dtype])
        assert backend.not_supported_reasons(inputs) == []
        assert_exact(backend, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["xformers", "xformers-splitk"])
def test_xformers_is_exact_without_gradients(name: str, kind: str) -> None:
    backend = on_cpu(name)
    for dtype in DTYPES.values():
        for shape in SHAPES:
            inputs = call(kind, shape, dtype, grad=False)
            assert backend.not_supported_reasons(inputs) == []
            assert_exact(backend, inputs)


# Torch compiles something for each new shape there, which takes far longer than to compute it.
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_flex_is_exact_forward(kind: str) -> None:
    inputs = call(kind, SHAPES[1], torch.float32, grad=False)
    assert get_backend("flex").not_supported_reasons(inputs) == []
    assert_exact(get_backend("flex"), inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[0], "bf16"), (SHAPES[2], "fp16")])
def test_flex_takes_other_shapes_and_types(shape: tuple[int, int, int, int], dtype: str) -> None:
    assert_exact(get_backend("flex"), call("packed-dead", shape, DTYPES[dtype], grad=False))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(get_registry().entries("attention")))
def test_what_a_backend_takes_on_a_gpu_is_exact(name: str, kind: str, dtype: str) -> None:
    backend, served, refused = get_backend(name), 0, set()
    # Flex is compiled anew for each kind of call, and no more than a few times for one function.
    torch.compiler.reset()
    shapes, widths = (SHAPES[1:2], WIDTHS[:1]) if name == "flex" else (SHAPES, WIDTHS)
    for shape, width, grad in product(shapes, widths, (False, True)):
        inputs = call(kind, shape, DTYPES[dtype], "cuda", width, grad)
        reasons = backend.not_supported_reasons(inputs)
        refused.update(reasons)
        if not reasons:
            served += 1
            assert_exact(backend, inputs)
    if not served:
        pytest.skip(f"{name} refuses all: {'; '.join(sorted(refused))}")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_auto_on_a_gpu_is_exact(kind: str) -> None:
    for grad in (False, True):
        inputs = call(kind, SHAPES[1], torch.bfloat16, "cuda", (64, 64), grad)
        options = {"mask": inputs.mask, "bias": inputs.bias, "lengths": inputs.lengths}
        found = attend(inputs.q, inputs.k, inputs.v, query_lengths=inputs.query_lengths, **options)
        wide = (t.double() for t in (inputs.q, inputs.k, inputs.v))
        exact = attend(*wide, query_lengths=inputs.query_lengths, backend="eager", **options)
        assert float((found.double() - exact).detach().abs().max()) < 3e-2


# -- what is refused, and what is not computed -----------------------------------------------------


def test_what_has_no_backward_pass_says_so() -> None:
    inputs = call("none", SHAPES[0], torch.float32)
    assert get_backend("flex").not_supported_reasons(inputs) == ["has no backward pass on the CPU"]
    assert on_cpu("xformers-splitk").not_supported_reasons(inputs) == ["has no backward pass"]
    biased = call("none", SHAPES[0], torch.float32, grad=False)
    biased = replace(biased, bias=torch.zeros(1, 1, 1, 31, requires_grad=True))
    assert get_backend("flex").not_supported_reasons(biased) == ["gives no gradient to the bias"]


def test_flex_says_how_wide_its_kernel_wants_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    on_meta = call("none", SHAPES[0], torch.float32, widths=(16, 8), grad=False)
    on_meta = replace(on_meta, **{n: getattr(on_meta, n).to("meta") for n in "qkv"})
    flex = get_backend("flex")
    monkeypatch.setattr(flex, "devices", ("meta",), raising=False)
    assert flex.not_supported_reasons(on_meta) == ["takes heads from 16 wide, got 8"]


def test_a_backend_takes_no_packing_or_grouping_unless_it_says_so() -> None:
    class Plain(AttentionBackend):
        name = "plain"

        def forward(self, inputs):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    inputs = call("packed", SHAPES[1], torch.float32)
    assert Plain().not_supported_reasons(inputs) == [
        "takes no sequences end to end",
        "needs as many heads of keys as of queries, got 2 and 4",
    ]


@pytest.mark.parametrize("name", ["eager", "sdpa", "xformers"])
def test_a_sequence_gets_what_it_gets_alone(name: str) -> None:
    inputs = replace(
        call("none", (9, 13, 4, 2), torch.float32, grad=False),
        query_lengths=(4, 5),
        lengths=(6, 7),
    )
    inputs = replace(inputs, **{n: getattr(inputs, n)[:1] for n in "qkv"})
    found = on_cpu(name).forward(inputs)
    for queries, keys in ((slice(0, 4), slice(0, 6)), (slice(4, 9), slice(6, 13))):
        alone = attend(inputs.q[:, queries], inputs.k[:, keys], inputs.v[:, keys], backend="eager")
        torch.testing.assert_close(found[:, queries], alone)


def test_a_map_of_sequences_is_zero_between_them() -> None:
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8)
    _, seen = attend(q, k, k, query_lengths=[1, 2], lengths=[2, 3], return_map=True)
    assert seen.shape == (1, 4, 3, 5)
    assert not seen[..., :1, 2:].any()
    assert not seen[..., 1:, :2].any()
    torch.testing.assert_close(seen.sum(-1), torch.ones(1, 4, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"query_lengths": [3]}, "query_lengths need lengths too"),
        ({"query_lengths": [1, 2], "lengths": [5]}, "lengths must be 2 numbers"),
        ({"query_lengths": [1, 1], "lengths": [2, 3]}, "2 numbers from 0, 3 in all"),
        ({"query_lengths": [1, 2], "lengths": [2, 2]}, "2 numbers from 0, 5 in all"),
        ({"query_lengths": [4, -1], "lengths": [2, 3]}, r"got \[4, -1\]"),
    ],
)
def test_lengths_that_do_not_add_up_are_refused(options: dict[str, list[int]], words: str) -> None:
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 5, 2, 8)
    with pytest.raises(ShapeError, match=words):
        attend(q, k, k, **options)


def test_heads_that_do_not_divide_and_rows_that_are_several_are_refused() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 3, 8)
    with pytest.raises(ShapeError, match="the 4 heads of q must be a multiple of the 3 heads"):
        attend(q, k, k)
    k = k[:, :, :2]
    with pytest.raises(ShapeError, match=r"q must be \(1, M, H, K\), got \(2, 3, 4, 8\)"):
        attend(q, k, k, query_lengths=[3], lengths=[5])


def test_no_sequence_at_all_gives_nothing() -> None:
    q = torch.randn(1, 0, 2, 8)
    assert attend(q, q, q, query_lengths=[], lengths=[]).shape == (1, 0, 2, 8)
