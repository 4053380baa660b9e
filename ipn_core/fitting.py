"""What fits together: the sizes that the stages of a model are made for, and why they refuse it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from ipn_core.errors import ConfigError
from ipn_core.stages import (
    Connector,
    Dims,
    Injector,
    Interaction,
    Perceiver,
    Requester,
    Stage,
    VisionEncoder,
)

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone
    from ipn_core.config import Layout
    from ipn_core.model import IPN

__all__ = ["check_fit", "declared", "refuse", "sizes"]

_KINDS: dict[str, type[Stage]] = {
    "perceiver": Perceiver,
    "requester": Requester,
    "interaction": Interaction,
    "injector": Injector,
}
_LOOK = ("requester", "interaction", "injector")
_FREE = ("S", "looks", "labels")
"""What no stage's weights depend on."""


def sizes(backbone: Backbone, encoder: VisionEncoder, layout: Layout) -> Dims:
    """Return what the first stage of a model is made for."""
    return Dims(
        encoder.width,
        backbone.D_in,
        backbone.D_hidden,
        backbone.D_out,
        R=layout.request,
        K=layout.dynamic if layout.rounds else 0,
        H_kv=backbone.kv_heads if backbone.takes_keys else 0,
        D_head=backbone.head_dim,
        looks=encoder.looks,
        labels=encoder.labels,
    )


def declared(dims: Dims, stage: Stage) -> Dims:
    """Return the sizes with what a stage declares, for the stages after it."""
    if isinstance(stage, Perceiver):
        S = stage.static_tokens or 0
        looks = dims.looks and stage.looks
        return replace(dims, Dv=stage.width, S=S, looks=looks, labels=stage.labels)
    if isinstance(stage, Requester):
        return replace(dims, D_request=stage.width)
    if isinstance(stage, Interaction):
        return replace(dims, M=stage.length, Dm=stage.width)
    return dims


def refuse(what: str, reasons: Sequence[str]) -> None:
    """Refuse what does not fit.

    Args:
        what: does not.
        reasons: why; a text alone, which an author may have returned, is one.

    Raises:
        ConfigError: there are reasons.
    """
    if reasons:
        why = reasons if isinstance(reasons, str) else "; ".join(reasons)
        raise ConfigError(f"{what} does not fit this model: {why}.")


def check_fit(model: IPN) -> None:
    """Refuse a model whose parts do not fit, however it was put together.

    Raises:
        ConfigError: a stage is missing, is none of its kind, has reasons against the model, or was
            made for other sizes.
    """
    config, layout = model.config, model.config.layout
    named = (config.perceive or config.encoder, config.request, config.interact, config.inject)
    stages = {kind: getattr(model, kind) for kind in _KINDS}
    for kind, stage in stages.items():
        if stage is not None and not isinstance(stage, _KINDS[kind]):
            raise ConfigError(
                f"the {kind} is a {type(stage).__name__}, which is no {_KINDS[kind].__name__}."
            )
    for kind in _LOOK:
        if layout.rounds and stages[kind] is None:
            raise ConfigError(
                f"layout.rounds {layout.rounds} needs a requester, an interaction and an "
                f"injector: no {kind} was given."
            )
        if not layout.rounds and kind != "injector" and stages[kind] is not None:
            raise ConfigError(
                f"layout.rounds 0 has no look at <img-q>: a {kind} was given. Leave it out, or "
                "set layout.rounds."
            )
    dims = sizes(model.backbone, model.encoder, layout)
    for (kind, stage), part in zip(stages.items(), named, strict=True):
        if not isinstance(stage, (Connector, Requester, Interaction, Injector)):
            continue
        who = f"{kind} '{part.name}' ({type(stage).__name__})" if part else type(stage).__name__
        reasons = type(stage).not_supported_reasons(stage.config, dims)
        refuse(who, reasons or _other_sizes(stage.dims, dims))
        dims = declared(dims, stage)
        if layout.look_again and isinstance(stage, Injector) and not stage.fills:
            why = f"{who} fills no slot, so that nothing would follow a look within an answer"
            refuse("layout.look_again", [why])


def _other_sizes(made_for: Dims, dims: Dims) -> list[str]:
    """Say which sizes a stage was made for that are not the model's; 0 is one it was not told."""
    pairs = [
        (field.name, getattr(made_for, field.name), getattr(dims, field.name))
        for field in fields(Dims)
        if field.name not in _FREE
    ]
    return [
        f"it was made for {name} {mine}, and this model has {name} {its}"
        for name, mine, its in pairs
        if mine and mine != its
    ]
