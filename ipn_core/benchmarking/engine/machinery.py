"""What hooks cost: the stages of an answer called through plugins, and directly.

Beside a first token that is too little to be seen. So stages that return at once what they have are
called both ways, many times; what a call costs more is then held against a first token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ipn_core.benchmarking.engine.first_token import Case, setup_first_token
from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import collected, in_turn
from ipn_core.benchmarking.rows import Row
from ipn_core.features import VisualFeatures
from ipn_core.stages import PerceiveContext, Perceiver, Percept

if TYPE_CHECKING:
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["measure"]

GOAL = 0.01
"""How much of a first token the plugins' machinery may take."""
STAGES = ("perceive", "request", "interact", "inject")
CALLS = 200


class Ready(Perceiver):
    """A stage that returns what it was given when it was made."""

    def __init__(self, percept: Percept) -> None:
        super().__init__(None)
        self.percept = percept

    @property
    def width(self) -> int:
        """Width Dv of the features."""
        return int(self.percept.features.values.shape[1])

    def forward(self, context: PerceiveContext) -> Percept:
        """Return it."""
        return self.percept


def measure(session: Session) -> Found:
    """Measure the machinery, and with it a first token asked both ways."""
    case = setup_first_token(session.backbone, 128)
    case.check()
    count = session.repeats(20, 5)
    direct = _direct(case)
    rows = {"first token, through hooks": case.round, "first token, called directly": direct}
    if rows["first token, through hooks"]() != direct():
        raise AssertionError("a model whose modules are called directly says something else")
    found = collected(in_turn(rows, count))
    calls = _calls(case, count)
    share = [
        len(STAGES) * (hook - plain) / whole
        for hook, plain, whole in zip(
            calls["a hook call"],
            calls["a direct call"],
            found["first token, called directly"],
            strict=True,
        )
    ]
    row = "machinery"
    return Found(
        row,
        f"the {len(STAGES)} stages of an answer through their hooks, and the same modules called "
        "directly",
        [
            *took(row, {**found, **calls}),
            Row.of(f"{row}/what hooks add : a first token", share, unit="ratio", goal=GOAL),
            against(row, found, "first token, through hooks", "first token, called directly"),
        ],
        notes=[f"calls are of a stage that returns at once, means of {CALLS}"],
    )


def _direct(case: Case) -> Callable[[], int]:
    """Return the first token of the same model with its modules called directly."""
    model = case.model
    modules: dict[str, Any] = dict(
        zip(
            STAGES,
            (model.perceiver, model.requester, model.interaction, model.injector),
            strict=True,
        )
    )

    def call(stage: str, **arguments: Any) -> Any:
        return modules[stage](*arguments.values())

    def first() -> int:
        # On the instance, so that it stands before the class's own.
        model.__dict__["call"] = call
        try:
            return case.round()
        finally:
            del model.__dict__["call"]

    return first


def _calls(case: Case, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of one call through a hook, and of one of the module itself."""
    model, ready = case.model, Ready(case.percept)
    context = PerceiveContext([], [""], VisualFeatures.share([], [], [[]], 1))
    model.pm.unregister(model.perceiver)
    model.pm.register(ready)
    calls: dict[str, Callable[[], Any]] = {
        "a hook call": lambda: model.call("perceive", context=context),
        "a direct call": partial(ready, context),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    try:
        for _ in range(repeats):
            for name, call in calls.items():
                started = time.perf_counter()
                for _ in range(CALLS):
                    call()
                found[name].append((time.perf_counter() - started) / CALLS)
    finally:
        model.pm.unregister(ready)
        model.pm.register(model.perceiver)
    return found
