"""Arms made ready: equal budgets, widths that are solved for, the stages that an arm can do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ipn_core.comparison.config import ArmConfig, CompareConfig, CompareStage
from ipn_core.config import lay_over, set_by_path
from ipn_core.errors import ConfigError, UserError
from ipn_core.model import IPN
from ipn_core.training.data import Data
from ipn_core.training.objectives import build_objective
from ipn_core.training.parameters import named, trainable

if TYPE_CHECKING:
    from torch import nn

    from ipn_core.plugins import Registry

__all__ = ["Arm", "Arms"]

_WIDEST = 65536
"""Where the search for a width ends."""


@dataclass(frozen=True)
class Arm:
    """An arm at one number of tokens.

    Attributes:
        name: of the arm.
        asks: whether what the LLM sees of the picture may depend on the question.
        dynamic: tokens K of the reference that it is compared with.
        static, request, message: tokens S, R and K that it puts into the LLM; their sum is equal.
        parameters: how many train in any stage.
        width: what was solved for, and
        width_value: what it is.
        model: its whole config.
        stages: what it trains, as a training config has it.
        left_out: for each stage, what it could not do and why.
    """

    name: str
    asks: bool
    dynamic: int
    static: int
    request: int
    message: int
    parameters: int
    width: str
    width_value: int
    model: dict[str, Any]
    stages: list[dict[str, Any]]
    left_out: dict[str, str]

    @property
    def tokens(self) -> int:
        """Tokens that go into the LLM: S + R + K."""
        return self.static + self.request + self.message

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return asdict(self)


class Arms:
    """Makes the arms of a comparison; backbone and encoder are loaded once."""

    def __init__(self, config: CompareConfig, registry: Registry) -> None:
        self.config = config
        self.registry = registry
        self.data = [Data(entry, registry, training=True) for entry in config.data]
        self._first: IPN | None = None
        self._missed: dict[str, str] = {}
        self._found: set[str] = set()

    def make(self) -> list[Arm]:
        """Return all arms: the main comparison's, then the sweep's.

        Raises:
            ConfigError: an arm cannot be built, has another number of tokens or more than the LLM
                reads, no width brings its parameters near the reference's, or a stage names what no
                arm has.
        """
        names = [*self.config.arms, self.config.control]
        made = self._arms(names, self.config.dynamic)
        sweep = self.config.sweep
        if sweep:
            for dynamic in sweep.dynamic:
                if dynamic != self.config.dynamic:
                    made += self._arms(sweep.arms, dynamic)
        budget = made[0].tokens
        if self._unknown() and self._look_into_others(budget) and (missed := self._unknown()):
            raise ConfigError(f"a stage names what no arm has: {missed[0]}")
        return made

    def _unknown(self) -> list[str]:
        """Say what stages name and no arm has been found to have."""
        return [why for pattern, why in self._missed.items() if pattern not in self._found]

    def _look_into_others(self, budget: int) -> bool:
        """Find what the arms that were left out have of what stages name, with so many tokens.

        False if one of them cannot be built: it may have what nothing else has, and be left out
        because what it is made of is not installed.
        """
        try:
            for name, arm in self.config.others.items():
                base = self._model(arm, self.config.dynamic, budget, control=False)
                _write(base, arm.width, arm.multiple)  # parts have their names at any width
                self._count(self._build(base, name))
        except ConfigError:
            return False
        return True

    def _arms(self, names: Sequence[str], dynamic: int) -> list[Arm]:
        target = self._target(dynamic)
        return [self._arm(name, dynamic, *target) for name in names]

    def _arm(self, name: str, dynamic: int, budget: int, parameters: int) -> Arm:
        control = name == self.config.control
        given = self.config.arms[self.config.reference if control else name]
        base = self._model(given, dynamic, budget, control)
        path = f"arms.{name}.width"
        if name == self.config.reference or control:
            value = _read(base, given.width, path)
        else:
            value = self._solve(name, given, base, parameters)
            _write(base, given.width, value)
        model = self._build(base, name)
        count = self._count(model)
        if abs(count - parameters) > self.config.within * parameters:
            raise ConfigError(
                f"'{path}': with {given.width} at {value} arm '{name}' trains {count:,} "
                f"parameters, and the nearest to the reference's {parameters:,} must be within "
                f"{self.config.within:.0%}. Change its other sizes."
            )
        S, R, K = _tokens(model)
        if budget != S + R + K:
            raise ConfigError(
                f"'arms.{name}': it puts {S} static + {R} request + {K} dynamic = {S + R + K} "
                f"tokens into the LLM, and the reference {budget}. Name the setting that takes its "
                f"number of static tokens in 'arms.{name}.tokens'."
            )
        if budget >= (room := model.backbone.max_positions):
            raise ConfigError(
                f"'dynamic' at {dynamic}: arm '{name}' puts {budget} tokens into an LLM that reads "
                f"{room}, which leaves none for the question. Take fewer."
            )
        stages, left_out = self._stages(model, name)
        asks = model.requester is not None and model.requester.asks
        return Arm(name, asks, dynamic, S, R, K, count, given.width, value, base, stages, left_out)

    def _target(self, dynamic: int) -> tuple[int, int]:
        """Return tokens and trained parameters of the reference."""
        name = self.config.reference
        model = self._build(self._model(self.config.arms[name], dynamic, 0, False), name)
        if model.requester is None or not model.requester.asks:
            raise ConfigError(f"the reference '{name}' makes no request: take an arm that asks.")
        return sum(_tokens(model)), self._count(model)

    def _model(self, arm: ArmConfig, dynamic: int, budget: int, control: bool) -> dict[str, Any]:
        # The shared layout is that of a request, which an arm with static tokens does not make.
        shared = {k: v for k, v in self.config.model.items() if not (arm.tokens and k == "layout")}
        # A copy, because what is shared is written into below.
        model: dict[str, Any] = copy.deepcopy(lay_over(shared, arm.model))
        if arm.tokens:
            _write(model, arm.tokens, budget)
        else:
            _write(model, "layout.dynamic", dynamic)
        if control:
            request = model.get("request", {})
            options = {"name": request} if isinstance(request, str) else dict(request)
            model["request"] = {**options, "name": "constant"}
        return model

    def _solve(self, name: str, arm: ArmConfig, base: dict[str, Any], wanted: int) -> int:
        """Return the width at which an arm's parameters are nearest to those wanted."""

        def count(step: int) -> int:
            _write(base, arm.width, step * arm.multiple)
            try:
                return self._count(self._build(base, name))
            except ConfigError as error:
                if arm.width.rpartition(".")[2] not in str(error):
                    raise
                raise ConfigError(
                    f"{error} It was tried with {arm.width} at {step * arm.multiple}; "
                    f"'arms.{name}.multiple', now {arm.multiple}, lets only multiples be tried."
                ) from error

        low, high = 1, 2
        while count(high) < wanted:
            low, high = high, 2 * high
            if high * arm.multiple > _WIDEST:
                raise ConfigError(
                    f"'arms.{name}.width': even with {arm.width} at {low * arm.multiple} it trains "
                    f"fewer than the reference's {wanted:,} parameters."
                )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) < wanted else (low, middle)
        return min((low, high), key=lambda step: abs(count(step) - wanted)) * arm.multiple

    def _build(self, values: Mapping[str, Any], name: str) -> IPN:
        first = self._first
        try:
            model = IPN.from_config(
                copy.deepcopy(dict(values)),
                backbone=first.backbone if first else None,
                encoder=first.encoder if first else None,
                registry=self.registry,
                name=name,
            )
        except UserError as error:
            raise ConfigError(f"'arms.{name}': {error}") from error
        self._first = self._first or model
        return model

    def _count(self, model: IPN) -> int:
        """Return how many parameters any stage of training may change."""
        every: dict[str, nn.Parameter] = {}
        for stage in self.config.stages:
            for patterns in filter(None, (stage.train, *(o.train for o in stage.otherwise))):
                every |= self._trained(model, stage, patterns)[1]
        return sum(p.numel() for p in every.values())

    def _stages(self, model: IPN, name: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
        stages, left_out = [], {}
        for stage in self.config.stages:
            serves, refusals = self._served(model, stage.objectives)
            wanted = stage.train
            for other in stage.otherwise:
                if not serves:
                    serves, more = self._served(model, other.objectives)
                    refusals |= more
                    wanted = other.train or stage.train
            which, _ = self._trained(model, stage, wanted)
            if refusals:
                left_out[stage.name] = " ".join(refusals.values())
            if not which["train"]:
                left_out[stage.name] = f"it has nothing of {', '.join(wanted)}"
            if serves and which["train"]:
                values = stage.model_dump(mode="json", exclude={"otherwise"}, exclude_unset=True)
                values = {**values, "objectives": serves, **which}
                stages.append({k: v for k, v in values.items() if v or k not in which})
        if not stages:
            raise ConfigError(f"'arms.{name}': it can do none of the stages. {left_out}")
        return stages, left_out

    def _served(
        self, model: IPN, objectives: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, str]]:
        serves, refusals = {}, {}
        for name, weight in objectives.items():
            try:
                build_objective(name, model, self.data, self.registry)
                serves[name] = weight
            except ConfigError as error:
                refusals[name] = str(error)
        return serves, refusals

    def _trained(
        self, model: IPN, stage: CompareStage, wanted: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, nn.Parameter]]:
        """Return what a stage trains in an arm: keys of its config, and the parameters by name.

        Of what the config names, each arm has its own part.

        Args:
            model: of the arm.
            stage: says what is frozen and slower.
            wanted: says what trains, as `train` does.
        """
        train = [p for p in wanted if self._has(p, lambda p: trainable(model, (p,)))]
        found = trainable(model, train) if train else {}
        freeze = [p for p in stage.freeze if self._has(p, lambda p: named(found, p, "freeze"))]
        try:
            left = trainable(model, train, freeze) if train else {}
        except ConfigError as error:
            raise ConfigError(f"'arms.{model.name}': stage '{stage.name}': {error}") from None
        rates = {
            p: rate
            for p, rate in stage.rates.items()
            if self._has(p, lambda p: named(left, p, "rates"))
        }
        return {"train": train, "freeze": freeze, "rates": rates}, left

    def _has(self, pattern: str, find: Callable[[str], object]) -> bool:
        """Say whether a pattern names something here, and remember that it does so anywhere."""
        try:
            find(pattern)
        except ConfigError as error:
            self._missed.setdefault(pattern, str(error))
            return False
        self._found.add(pattern)
        return True


def _tokens(model: IPN) -> tuple[int, int, int]:
    """Return the tokens S, R and K of one question about one picture."""
    layout = model.config.layout
    static = model.perceiver.static_tokens
    if static is None:
        raise ConfigError(
            f"'arms.{model.name}': its static tokens are as many as the picture has patches, so "
            "that no budget can be equal. Pool them, and name the setting in 'tokens'."
        )
    fills = model.injector is not None and model.injector.fills
    return static, layout.request * layout.rounds, layout.dynamic * layout.rounds if fills else 0


def _write(values: dict[str, Any], path: str, value: int) -> None:
    set_by_path(values, f"{path}={value}")


def _read(values: Mapping[str, Any], path: str, where: str) -> int:
    inner: Any = values
    for key in path.split("."):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    if not isinstance(inner, int):
        raise ConfigError(f"'{where}' names {path}, which the reference's model does not set.")
    return inner
