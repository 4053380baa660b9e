"""Examples for training, and batches of them that depend on nothing but seed, stage and step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ipn_core.errors import ConfigError, DataError
from ipn_core.features import VisualFeatures
from ipn_core.prompt import Prompt
from ipn_core.tasks import Example, Picture, open_task
from ipn_core.training.config import DataConfig, StageConfig
from ipn_core.training.features import FeatureCache

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.plugins import Registry
    from ipn_core.training.requests import RequestCache

__all__ = ["Batch", "Data", "Sampler"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, what the encoder makes of their pictures, and their requests.

    Attributes:
        examples: B questions.
        features: of their pictures; samples with the same picture share its patches.
        hidden: (B, R, D) hidden states at `<img-q>` where they are known beforehand, else None.
    """

    examples: Sequence[Example]
    features: VisualFeatures
    hidden: Tensor | None = None

    def prompts(self, model: IPN) -> list[Prompt]:
        """Return the prompts with the answers to learn."""
        order = model.config.layout.order
        return [
            Prompt.ask(e.question, e.images, order=order, answer=e.answers[0])
            for e in self.examples
        ]


class Data:
    """The examples of one config entry, with the features of their pictures."""

    def __init__(self, config: DataConfig, registry: Registry, training: bool) -> None:
        task = open_task(config.task, config.options, registry)
        split = config.split
        if split is None:
            split = "train" if "train" in task.splits else task.default_split
        if training and split in task.test_splits:
            others = [name for name in task.splits if name not in task.test_splits]
            raise ConfigError(
                f"'{config.task}' split '{split}' is a test split: it is for 'ipn eval', not to "
                f"train on or to choose by. Use {' or '.join(others) or 'another task'}."
            )
        self.name = config.task
        self.split = split
        self.examples: list[Example] = list(task.examples(split)[: config.limit])
        if not self.examples:
            raise DataError(f"'{config.task}' split '{split}' holds no examples.")
        self.share = config.share
        self.keys: dict[str, str] = {}

    @property
    def pictures(self) -> list[Picture]:
        """The distinct pictures."""
        found = {p.name: p for e in self.examples for p in e.images}
        return list(found.values())

    def encode(self, cache: FeatureCache, report: Callable[[int], None] | None = None) -> None:
        """Make sure that the cache holds all pictures."""
        self.keys = cache.add(self.pictures, report)

    @cached_property
    def by_picture(self) -> list[list[int]]:
        """Indices of the examples of each set of pictures."""
        return _grouped([tuple(p.name for p in e.images) for e in self.examples])

    @cached_property
    def by_question(self) -> list[list[int]]:
        """Indices of the examples of each question."""
        return _grouped([e.question for e in self.examples])

    def batch(
        self, indices: Sequence[int], cache: FeatureCache, requests: RequestCache | None
    ) -> Batch:
        """Return the examples of these indices."""
        return make_batch([(self, index) for index in indices], cache, requests)


def make_batch(
    chosen: Sequence[tuple[Data, int]], cache: FeatureCache, requests: RequestCache | None
) -> Batch:
    """Put examples of any data together."""
    examples = [data.examples[index] for data, index in chosen]
    keys = [
        [data.keys[p.name] for p in example.images]
        for (data, _), example in zip(chosen, examples, strict=True)
    ]
    features = cache.get(keys)
    hidden = None if requests is None else requests.get(examples)
    return Batch(examples, features, hidden)


class Sampler:
    """Batches of a stage: the one of a step depends only on seed, stage and step.

    An epoch shows every example of a source once. A group of more examples than fit is cut into
    several, at random and anew each epoch.
    """

    def __init__(self, sources: Sequence[Data], stage: StageConfig, seed: int) -> None:
        self.sources = sources
        self.stage = stage
        self.seed = seed
        self.shares = _split(stage.groups, [data.share for data in sources])

    def draw(self, batch: int) -> list[tuple[Data, int]]:
        """Return the examples of one batch, counted over the whole stage."""
        chosen: list[tuple[Data, int]] = []
        for number, (data, count) in enumerate(zip(self.sources, self.shares, strict=True)):
            cuts = self._cuts[number]
            for at in range(batch * count, (batch + 1) * count):
                epoch, place = divmod(at, len(cuts))
                group, part = cuts[self._order(number, epoch, len(cuts))[place]]
                chosen += [(data, i) for i in self._some(group, part, number, epoch)]
        return chosen

    @cached_property
    def _cuts(self) -> list[list[tuple[list[int], int]]]:
        """For each source, what an epoch shows: groups, and which part of each."""
        by_picture = self.stage.group_by == "picture"
        return [
            [
                (group, part)
                for group in (data.by_picture if by_picture else data.by_question)
                for part in range(math.ceil(len(group) / self.stage.per_group))
            ]
            for data in self.sources
        ]

    def _some(self, group: list[int], part: int, number: int, epoch: int) -> list[int]:
        size = self.stage.per_group
        if len(group) <= size:
            return group
        rng = random.Random(f"{self.seed}/{self.stage.name}/{number}/{epoch}/{group[0]}")
        return rng.sample(group, len(group))[part * size : (part + 1) * size]

    def _order(self, number: int, epoch: int, count: int) -> list[int]:
        key = (number, epoch)
        if key not in self._orders:
            order = list(range(count))
            random.Random(f"{self.seed}/{self.stage.name}/{number}/{epoch}").shuffle(order)
            self._orders = {k: v for k, v in self._orders.items() if k[0] != number} | {key: order}
        return self._orders[key]

    @cached_property
    def _orders(self) -> dict[tuple[int, int], list[int]]:
        return {}


def _grouped(keys: Sequence[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _split(total: int, shares: Sequence[float]) -> list[int]:
    """Split a number of groups by shares; every source gets at least one."""
    if total < len(shares):
        raise ConfigError(f"'groups' must be at least {len(shares)}, one a source, got {total}.")
    exact = [total * share / sum(shares) for share in shares]
    counts = [max(1, int(e)) for e in exact]
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for index in range(total - sum(counts)):
        counts[by_rest[index % len(by_rest)]] += 1
    return counts
