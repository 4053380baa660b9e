"""What every `Injector` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipn_core.stages import (
    Dims,
    InjectContext,
    Injection,
    LayerContext,
    LayerInjector,
    VisualMessage,
)
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.module import TIGHT, StageContract
from ipn_core.testing.contracts.pictures import SAMPLES, disturbed, ragged

__all__ = ["InjectorContract"]

BATCH, TOKENS, LOOKS = len(SAMPLES), 6, 2
FIRST, SECOND = 2, 5
"""The positions from which on tokens stand after one and two looks, and pictures."""


@dataclass(frozen=True)
class Inputs:
    """What an injector of either kind is called with.

    Attributes:
        message: (B, M, Dm) values of a look.
        context: (K, D_in) slots.
        hidden: (B, T, D) what a layer would read.
        between: what stands before each token.
    """

    message: VisualMessage
    context: InjectContext
    hidden: Tensor
    between: LayerContext


class InjectorContract(StageContract):
    """Subclass it and name the injector: `class TestMine(InjectorContract): name = "mine"`.

    It covers what is injected after a look and, of a `LayerInjector`, what it does between layers.
    """

    kind = "injector"

    def message(self, dtype: torch.dtype = torch.float32) -> VisualMessage:
        """A random message (B, M, Dm)."""
        dims, generator = self.dims(), torch.Generator().manual_seed(6)
        return VisualMessage(torch.randn(BATCH, dims.M, dims.Dm, generator=generator).to(dtype))

    def context(self, dtype: torch.dtype = torch.float32) -> InjectContext:
        """Random embeddings (K, D_in) of the slots."""
        dims, generator = self.dims(), torch.Generator().manual_seed(7)
        return InjectContext(torch.randn(dims.K, dims.D_in, generator=generator).to(dtype))

    def inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """A random batch: a picture and a look before the third token, another before the last."""
        dims, generator = self.dims(), torch.Generator().manual_seed(8)
        positions = torch.arange(TOKENS).expand(BATCH, -1)
        looks = (positions >= FIRST).long() + (positions >= SECOND).long()
        shown = torch.tensor([[len(pictures)] for pictures in SAMPLES])
        messages = torch.randn(BATCH, LOOKS, dims.M, dims.Dm, generator=generator).to(dtype)
        features = ragged(dims.Dv).to(dtype=dtype)
        hidden = torch.randn(BATCH, TOKENS, dims.D_hidden[0], generator=generator).to(dtype)
        between = LayerContext(0, positions, looks.clamp(max=shown), features, looks, messages)
        return Inputs(self.message(dtype), self.context(dtype), hidden, between)

    def parts(self, module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Everything that a batch gets, by what it is: (B, …) each."""
        injection = module(inputs.message, inputs.context)
        assert isinstance(injection, Injection), f"it returned {type(injection).__name__}"
        found = {name: getattr(injection, name) for name in ("tokens", "keys", "values")}
        found |= self.between(module, inputs)
        return {name: part for name, part in found.items() if part is not None}

    def between(self, module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """The hidden states (B, T, D) that each of its layers would read."""
        inner: Any = getattr(module, "_orig_mod", module)
        if not isinstance(inner, LayerInjector):
            return {}
        step: Any = inner.before_layer
        if inner is not module:  # a compiled module compiles its forward alone
            step = torch.compile(step, backend="eager")
        return {
            f"layer {layer}": step(inputs.hidden, replace(inputs.between, layer=layer))
            for layer in inner.layers
        }

    def shapes(self, module: Any) -> dict[str, tuple[int, ...]]:
        """The shape that each part must have."""
        dims = self.dims()
        found: dict[str, tuple[int, ...]] = {}
        if module.fills:
            found["tokens"] = (BATCH, module.fills, dims.D_in)
        if module.caches:
            found["keys"] = (BATCH, dims.layers, module.caches, dims.H_kv, dims.D_head)
            found["values"] = found["keys"]
        for layer in module.layers if isinstance(module, LayerInjector) else ():
            found[f"layer {layer}"] = (BATCH, TOKENS, dims.D_hidden[layer])
        return found

    def result(self, module: nn.Module) -> Tensor:
        """All that a batch gets: tokens (B, K, D_in), or several parts side by side, (B, …)."""
        return _joined(self.parts(module, self.inputs()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_shape_and_dtype(self, dtype: torch.dtype) -> None:
        """Tokens, keys and values, hidden states have their shapes, in the weights' dtype."""
        with clause(
            "shape and dtype",
            "return Injection with tokens (B, K, D_in) where `fills` says K, and keys and values "
            "(B, layers, C, H_kv, D_head) where `caches` says C; from `before_layer`, hidden "
            "states of the shape that came in; all in the dtype that came in.",
        ):
            module = self.build().to(dtype)
            parts, shapes = self.parts(module, self.inputs(dtype)), self.shapes(module)
            assert set(parts) == set(shapes), (
                f"it gives {', '.join(parts) or 'nothing'}; `fills`, `caches` and `layers` say "
                f"{', '.join(shapes) or 'nothing'}"
            )
            for name, part in parts.items():
                got, expected = tuple(part.shape), shapes[name]
                assert got == expected, f"{name}: the shape is {got}, expected {expected}"
                assert part.dtype == dtype, f"{name} are {part.dtype}, not {dtype}"
                assert bool(part.isfinite().all()), f"{name} are not finite"

    def test_order_of_the_batch(self) -> None:
        """Samples in another order get what is theirs in that order."""
        with clause("order of the batch", "let nothing of a sample depend on another sample."):
            module, order, inputs = self.build(), [2, 0, 3, 1], self.inputs()
            between = replace(
                inputs.between,
                features=ragged(self.dims().Dv, [SAMPLES[i] for i in order]),
                pictures=inputs.between.pictures[order],
                messages=inputs.between.messages[order],
            )
            turned = Inputs(
                VisualMessage(inputs.message.values[order]),
                inputs.context,
                inputs.hidden[order],
                between,
            )
            same(_joined(self.parts(module, turned)), self.result(module)[order], TIGHT)

    def test_padding_cannot_leak(self) -> None:
        """A sample gets the same alone, in a ragged batch, and whatever the padding holds."""
        with clause(
            "padding cannot leak",
            "honour `context.features.mask` between the layers: padded patches are never looked "
            "at, nor counted in sums, means and maxima.",
        ):
            module, inputs = self.build(), self.inputs()
            together, between = self.result(module), inputs.between
            noisy = replace(between, features=disturbed(between.features))
            found = _joined(self.parts(module, replace(inputs, between=noisy)))
            same(found, together, TIGHT)
            for index in range(BATCH):
                alone = _joined(self.parts(module, _row(inputs, index)))
                same(alone, together[index : index + 1], TIGHT)

    def test_what_is_injected_decides(self) -> None:
        """Another message or, without `needs_message`, another picture changes every part."""
        with clause(
            "what is injected decides",
            "let what comes out depend on `message.values`, between the layers on "
            "`context.messages` or `context.features`.",
        ):
            module, inputs = self.build(), self.inputs()
            features = inputs.between.features
            other = Inputs(
                VisualMessage(inputs.message.values.flip(0)),
                inputs.context,
                inputs.hidden,
                replace(
                    inputs.between,
                    features=replace(features, values=features.values.flip(1)),
                    messages=inputs.between.messages.flip(0),
                ),
            )
            changed = self.parts(module, other)
            for name, part in self.parts(module, inputs).items():
                alike = torch.allclose(part, changed[name], rtol=1e-4)
                assert not alike, f"{name}: both are equal"

    def test_what_comes_later_stays_unseen(self) -> None:
        """Between the layers, a token sees only what stands before it."""
        with clause(
            "what comes later stays unseen",
            "mask by `context.looks` and `context.pictures`; with `needs_message`, return tokens "
            "without a look as they came.",
        ):
            module, inputs = self.build(), self.inputs()
            features, messages = inputs.between.features, inputs.between.messages.clone()
            messages[:, 1] = messages[:, 1].flip(-1)
            values = features.values.clone()
            for span in features.images:
                if span.place:
                    mine = slice(span.offset, span.offset + span.length)
                    values[mine] = values[mine].flip(-1)
            later = replace(features, values=values)
            between = replace(inputs.between, features=later, messages=messages)
            changed = self.between(module, replace(inputs, between=between))
            for name, part in self.between(module, inputs).items():
                same(changed[name][:, :SECOND], part[:, :SECOND], TIGHT)
                if module.needs_message:
                    same(part[:, :FIRST], inputs.hidden[:, :FIRST], TIGHT)

    def test_a_token_alone_is_as_among_others(self) -> None:
        """Between the layers, decoding one token gives what reading it with the prompt does."""
        with clause(
            "a token alone is as among others",
            "let no token depend on another one that is in `hidden`; keep nothing between calls.",
        ):
            module, inputs = self.build(), self.inputs()
            last = {
                name: getattr(inputs.between, name)[:, -1:]
                for name in ("positions", "pictures", "looks")
            }
            between = replace(inputs.between, **last)
            alone = replace(inputs, hidden=inputs.hidden[:, -1:], between=between)
            whole = self.between(module, inputs)
            for name, part in self.between(module, alone).items():
                same(part, whole[name][:, -1:], TIGHT)

    def test_it_is_refused_where_it_cannot_work(self) -> None:
        """It has reasons against no message, if it needs one, and lengths that it cannot take."""
        with clause(
            "it is refused where it cannot work",
            "return a reason from `not_supported_reasons`, calling the base class's, where "
            "`dims.M` is 0, or say `needs_message = False`; and where it is not `dims.K`, if each "
            "slot takes a token of the message.",
        ):
            target, dims = self.target(), self.dims()
            schema = self.config_class()
            config = None if schema is None else schema.parse(dict(self.options), self.name)
            said = target.not_supported_reasons(config, dims)
            assert not said, f"it is refused for {dims}: {said}"
            blind = replace(dims, K=0, M=0, Dm=0, D_request=0)
            if target.needs_message:
                assert target.not_supported_reasons(config, blind), "no reason against no message"
            longer = replace(dims, M=dims.M + 2)
            if not target.not_supported_reasons(config, longer):
                self._takes(longer)

    def _takes(self, dims: Dims) -> None:
        """Give a message of another length to one that has no reason against it."""
        module = self.make(dict(self.options), dims).eval()
        message = VisualMessage(torch.randn(BATCH, dims.M, dims.Dm))
        takes = f"it has no reason against a message of {dims.M} tokens"
        try:
            tokens = module(message, self.context()).tokens
        except Exception as error:
            raise AssertionError(f"{takes}, and fails: {error}") from error
        got = 0 if tokens is None else tokens.shape[1]
        assert got == module.fills, f"{takes}, and gives {got} for {module.fills} slots"


def _row(inputs: Inputs, index: int) -> Inputs:
    """What an injector is called with for one sample of a batch."""
    own, between = slice(index, index + 1), inputs.between
    return Inputs(
        VisualMessage(inputs.message.values[own]),
        inputs.context,
        inputs.hidden[own],
        replace(
            between,
            positions=between.positions[own],
            pictures=between.pictures[own],
            features=between.features.select([index]),
            looks=between.looks[own],
            messages=between.messages[own],
        ),
    )


def _joined(parts: dict[str, Tensor]) -> Tensor:
    assert parts, "it injects nothing"
    if len(parts) == 1:
        return next(iter(parts.values()))
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)
