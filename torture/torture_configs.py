"""Configs with every field out of range, in every class of the core and of every plugin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import yaml
from toys import toy_config

from ipn_core.comparison.config import CompareConfig
from ipn_core.config import Config, IPNConfig
from ipn_core.errors import IPNError
from ipn_core.model import IPN
from ipn_core.plugins import KINDS, Registry
from ipn_core.testing.tiny import tiny_backbone
from ipn_core.training.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
WRONG: tuple[Any, ...] = (
    -1,
    0,
    1,
    2**31,
    10**30,
    -(10**30),
    0.5,
    -0.5,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    True,
    None,
    "",
    "x",
    "\x00",
    "../../etc/passwd",
    "os:system",
    "{{7*7}}",
    "9" * 5_000,
    "é" * 50,
    [],
    [[]],
    [None],
    ["x", "x"],
    {},
    {"": ""},
    {"name": "x"},
    {"__class__": "x"},
    b"\xff",
    (),
    {1: 2},
)
"""Values of every kind, for fields of any kind."""
SHORT = 600


def _paths(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a tree."""
    if at:
        yield at
    items = values.items() if isinstance(values, dict) else ()
    if isinstance(values, list):
        items = enumerate(values)  # type: ignore[assignment]
    for key, inner in items:
        yield from _paths(inner, (*at, key))


def _put(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    copied = dict(values) if isinstance(values, dict) else list(values)
    copied[path[0]] = _put(copied[path[0]], path[1:], value)
    return copied


def test_every_field_of_every_config_class(tally: Any, registry: Registry) -> None:
    """Each field alone: the core's classes, and the configs of all installed components."""
    classes: dict[str, type[Config]] = {}
    waiting: list[type] = [Config]
    for kind in KINDS:
        for name in registry.entries(kind):
            if kind not in ("strategy", "task", "importer", "attention"):
                registry.get(kind, name).load_config()
                registry.get(kind, name).load()  # whose config may be its own
    while waiting:
        one = waiting.pop()
        waiting += one.__subclasses__()
        if one.__module__.startswith("ipn_") and one is not Config:
            classes[f"{one.__module__}.{one.__qualname__}"] = one
    counts = tally("one field of a config, in every class")
    for name, one in sorted(classes.items()):
        for field in one.model_fields:
            for value in WRONG:
                counts.attempt(
                    f"{name}.{field} = {value!r:.60}",
                    lambda c=one, f=field, v=value: c.parse({f: v}, "c"),
                )
    counts.more["classes"] = len(classes)


def _with_every_field(one: type[pydantic.BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """What was written, and the defaults of what was not."""
    given = one.model_validate(values).model_dump(mode="json")
    return {**given, **values}


def test_every_place_of_a_training_and_of_a_comparison(tally: Any) -> None:
    counts = tally("one place of a training's or a comparison's YAML")
    for name, one in (("compare.yaml", CompareConfig), ("swap.yaml", TrainConfig)):
        values = yaml.safe_load((EXAMPLES / name).read_text())
        whole = _with_every_field(one, values)
        for path in _paths(whole):
            for value in WRONG:
                changed = _put(whole, path, value)
                counts.attempt(
                    f"{name} {path} = {value!r:.60}", lambda c=one, v=changed: c.parse(v, "config")
                )


def test_every_place_of_a_model(tally: Any, registry: Registry) -> None:
    """Resolved, and built where it is taken: a size that is absurd must be refused by its bound.

    `SHORT`: what a library says of it instead goes over pages, with its frames.
    """
    counts = tally("one place of a model's config, and building it", limit_s=30)
    backbone = tiny_backbone()
    for strategy in ("tiny-look", "rvii", "static"):
        whole = IPNConfig.resolve(toy_config(registry, strategy), registry, "c")
        values = whole.model_dump(mode="json")
        for path in _paths(values):
            for value in WRONG:
                label = f"{strategy} {path} = {value!r:.60}"
                build = partial(
                    IPN.from_config, _put(values, path, value), backbone=backbone, registry=registry
                )
                found = counts.attempt(label, build)
                absurd = type(value) is int and abs(value) >= 2**31
                if absurd and isinstance(found, IPNError) and len(str(found)) > SHORT:
                    counts.broken.append(f"{label}: its refusal has {len(str(found))} characters")


def test_a_config_cannot_name_code(tally: Any, registry: Registry) -> None:
    """A name is looked up among what is registered, whatever it looks like."""
    counts = tally("names that look like code or like paths")
    backbone = tiny_backbone()
    names = [
        "os:system",
        "os.system",
        "builtins:eval",
        "ipn_rvii.rvii:RVII",
        "./x.py",
        "x;import os",
        "__import__('os')",
        "!!python/name:os.system",
        "rvii\n",
        "RVII",
        " rvii",
        "rvii\x00",
    ]
    for key in ("strategy", "encoder", "perceive", "request", "interact", "inject", "backbone"):
        for name in names:
            for given in (name, {"name": name}, {"name": name, "module": "os"}):
                values = {**toy_config(registry, "tiny-look"), key: given}
                given_llm = None if key == "backbone" else backbone
                counts.attempt(
                    f"{key} = {given!r}",
                    partial(IPN.from_config, values, backbone=given_llm, registry=registry),
                    refusal=IPNError,
                    good=lambda _: False,
                )
