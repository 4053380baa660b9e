"""A look: the request is read, interacts with the picture, and what it brings is injected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ipn_core.clock import Clock
from ipn_core.segments import Look, Segment
from ipn_core.shapes import expect
from ipn_core.stages import (
    InjectContext,
    Injection,
    Percept,
    Request,
    RequestContext,
    VisualMessage,
)
from ipn_core.state import LookRecord, State
from ipn_core.transfer import tensor_on

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["at_request", "look_at"]


def at_request(
    model: IPN, segment: Segment, looks: Sequence[Look], hidden: dict[int, Tensor]
) -> Tensor:
    """Return what a segment's request slots hold (n, R, D) at the layer that is read.

    Args:
        model: whose requester reads it.
        segment: ends with the slots.
        looks: the n rows that look.
        hidden: states (B, T, D) by layer, -1 what the language head reads.
    """
    requester = model.requester
    assert requester is not None
    count = len(model.backbone.layers)
    layer = requester.layer % (count + 1)
    states = hidden[-1] if layer == count else hidden[layer]
    rows = [look.row for look in looks]
    if rows != list(range(states.shape[0])):
        states = states[tensor_on(rows, states.device)]
    return states[:, -segment.request :].to(model.stage_dtype)


def look_at(
    model: IPN,
    segment: Segment,
    hidden: dict[int, Tensor],
    percept: Percept,
    state: State,
    clock: Clock | None,
    return_map: bool,
) -> dict[int, Tensor]:
    """Request, interact and inject for the rows of a segment that look.

    Returns:
        By row, the tokens (K, D_in) for its slots, where the injector fills any. What else it
        gives is in the state.
    """
    filled: dict[int, Tensor] = {}
    for round_ in sorted({look.round for look in segment.looks}):
        looks = tuple(look for look in segment.looks if look.round == round_)
        asks = at_request(model, segment, looks, hidden)
        filled |= _look_once(model, looks, asks, percept, state, clock, return_map)
    return filled


def _look_once(
    model: IPN,
    looks: tuple[Look, ...],
    hidden: Tensor,
    percept: Percept,
    state: State,
    clock: Clock | None,
    return_map: bool,
) -> dict[int, Tensor]:
    """Let rows look together that are in the same round; `hidden` (n, R, D) asks."""
    assert model.requester is not None
    assert model.interaction is not None
    assert model.injector is not None
    context = RequestContext(
        hidden,
        [look.row for look in looks],
        looks[0].round,
        model.requester.layer,
    )
    request: Request = model.call("request", context=context)
    expect(model, "request", request, "values", (len(looks), None, None))
    if clock:
        clock.lap("request")
    features = percept.features.to(dtype=model.stage_dtype).select(
        [look.row for look in looks], [look.pictures for look in looks]
    )
    request = replace(request, return_map=return_map)
    message: VisualMessage = model.call("interact", request=request, features=features)
    width = (len(looks), model.interaction.length, model.interaction.width)
    expect(model, "interact", message, "values", width)
    if clock:
        clock.lap("interact")
    injected = model.call(
        "inject",
        message=message,
        context=InjectContext(model.slots.dynamic, looks[0].round, model.backbone.words),
    )
    tokens = _apply(model, injected, message, looks, state)
    if clock:
        clock.lap("inject")
    state.looks.append(LookRecord(looks, request, message, features))
    rows = [look.row for look in looks]
    return {} if tokens is None else dict(zip(rows, tokens, strict=True))


def _apply(
    model: IPN, injected: Injection, message: VisualMessage, looks: Sequence[Look], state: State
) -> Tensor | None:
    """Put what an injector gave where it belongs; the tokens are left to the next segment."""
    backbone, injector = model.backbone, model.injector
    assert injector is not None
    n, caches = len(looks), injector.caches
    slots = (n, injector.fills, backbone.D_in) if injector.fills else None
    sizes = (n, len(backbone.layers), caches, backbone.kv_heads, backbone.head_dim)
    tokens = expect(model, "inject", injected, "tokens", slots)
    keys = expect(model, "inject", injected, "keys", sizes if caches else None)
    values = expect(model, "inject", injected, "values", sizes if caches else None)
    for look, told in zip(looks, message.values.to(model.stage_dtype), strict=True):
        state.told[look.row].append((state.lengths[look.row], told))
    if keys is not None and values is not None:
        with model.driving("remember"):
            state.remember([look.row for look in looks], keys, values, backbone)
    return tokens
