"""Which parameters of a model a stage trains, and how fast each of them learns.

Configs name parameters by the start of their name or by a glob, with the stages called by their
hook: `interact`, `interact.guide`, `*.bias`, `backbone.lora`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from ipn_core.errors import ConfigError, near

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.training.config import StageConfig

__all__ = ["choose", "factors", "groups", "named", "trainable"]

_PARTS = {
    "perceive": "perceiver",
    "request": "requester",
    "interact": "interaction",
    "inject": "injector",
}


def choose(
    model: IPN, patterns: Iterable[str], freeze: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Make exactly the named parameters of a model trainable, and return them by name.

    Raises:
        ConfigError: see `trainable`.
    """
    chosen = trainable(model, patterns, freeze)
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def trainable(
    model: IPN, patterns: Iterable[str], freeze: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the named parameters of a model by their full names.

    Args:
        model: whose stages, slots and adapter.
        patterns: starts of names as configs write them, or globs.
        freeze: the same, of those to leave out again.

    Raises:
        ConfigError: a pattern names nothing that the model uses and may train, or nothing is left.
    """
    unused = _unused_slots(model)
    # What the config names stays frozen: the vision encoder, what stages borrow, and the LLM.
    frozen = {id(p) for part in (model.encoder, *model.borrowed) for p in part.parameters()}
    frozen |= {id(p) for p in model.backbone.base_parameters()}
    known = {
        name: p
        for name, p in model.named_parameters()
        if name not in unused and id(p) not in frozen
    }
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        found = _matching(known, pattern)
        if not found:
            slots = ("slots.image", "slots.request", "slots.dynamic")
            starts = [*_PARTS, *(slot for slot in slots if slot not in unused)]
            starts += [] if model.look_head is None else ["look_head"]
            starts += [] if model.backbone.lora is None else ["backbone.lora"]
            raise ConfigError(
                f"'train': '{pattern}' names nothing that can be trained in this model"
                f"{_near(pattern, known)}. Start with one of {', '.join(starts)}."
            )
        chosen |= {name: known[name] for name in found}
    left_out = {name for pattern in freeze for name in named(chosen, pattern, "freeze")}
    if chosen and left_out == set(chosen):
        raise ConfigError("'freeze' leaves nothing of what 'train' names: shorten it.")
    return {name: p for name, p in chosen.items() if name not in left_out}


def factors(trained: Collection[str], rates: Mapping[str, float]) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied with.

    Args:
        trained: their full names.
        rates: factors by pattern; of several that match a parameter the last counts.

    Raises:
        ConfigError: a pattern names none of them.
    """
    found = dict.fromkeys(trained, 1.0)
    for pattern, factor in rates.items():
        for name in named(trained, pattern, "rates"):
            found[name] = factor
    return found


def groups(trained: Mapping[str, nn.Parameter], stage: StageConfig) -> list[dict[str, Any]]:
    """Return an optimizer's groups: by decay, which is for matrices alone, and by `factor`.

    Raises:
        ConfigError: see `factors`.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    by_name = factors(trained, stage.rates)
    for matrices in (True, False):
        for name, parameter in trained.items():
            if (parameter.ndim > 1) == matrices:
                decay = stage.weight_decay if matrices else 0.0
                found.setdefault((decay, by_name[name]), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in found.items()
    ]


def named(names: Collection[str], pattern: str, key: str) -> list[str]:
    """Return the names that a pattern matches.

    Args:
        names: of what trains.
        pattern: the start of a name, or a glob.
        key: of the stage's config that holds it.

    Raises:
        ConfigError: it matches none.
    """
    found = _matching(names, pattern)
    if not found:
        raise ConfigError(
            f"'{key}': '{pattern}' names nothing that trains in this stage"
            f"{_near(pattern, names)}. It takes starts of names and globs, as 'train' does."
        )
    return found


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    head, dot, rest = pattern.partition(".")
    inner = _PARTS.get(head, head) + dot + rest
    return [n for n in names if fnmatchcase(n, inner) or fnmatchcase(n, f"{inner}.*")]


def _near(pattern: str, names: Iterable[str]) -> str:
    """Point at the nearest start of a name, as configs write it."""
    hooks = {part: hook for hook, part in _PARTS.items()}
    starts: dict[str, None] = {}
    for name in names:
        head, *rest = name.split(".")
        for end in range(len(rest) + 1):
            starts[".".join([hooks.get(head, head), *rest[:end]])] = None
    return near(pattern, starts)


def _unused_slots(model: IPN) -> set[str]:
    """Name the slots that no prompt of this model holds."""
    unused = {
        "slots.image": model.perceiver.static_tokens == 0,
        "slots.request": model.requester is None,
        "slots.dynamic": model.injector is None or not model.injector.fills,
    }
    return {slot for slot, idle in unused.items() if idle}
