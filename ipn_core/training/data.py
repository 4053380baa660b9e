"""Examples for training, and what a batch of them is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ipn_core.errors import ConfigError, DataError
from ipn_core.features import VisualFeatures
from ipn_core.tasks import Example, Picture, open_task
from ipn_core.training.config import DataConfig
from ipn_core.training.features import FeatureCache

if TYPE_CHECKING:
    from ipn_core.config import Layout
    from ipn_core.model import IPN
    from ipn_core.plugins import Registry
    from ipn_core.prefixes import PrefixCache
    from ipn_core.prompt import Prompt
    from ipn_core.tasks import Task
    from ipn_core.training.requests import RequestCache

__all__ = [
    "Batch",
    "Data",
    "DataSource",
    "Examples",
    "Place",
    "Whole",
    "known_features",
    "make_batch",
    "open_split",
    "prompt_of",
]

Place: TypeAlias = dict[str, int]
"""Where something begins in a stream; JSON can hold it."""


@dataclass(frozen=True, eq=False)
class Whole:
    """All examples of an optimizer step, where processes or accumulated parts share them out.

    Attributes:
        examples: of the step.
        features: gives the features of some of them, by their indices.
        seed: of noise that is drawn for all of them at once.
    """

    examples: Sequence[Example]
    features: Callable[[Sequence[int]], VisualFeatures]
    seed: int

    @contextmanager
    def noise(self, device: torch.device) -> Iterator[None]:
        """Draw the same numbers in every share of the step, as one that is not shared out would."""
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(self.seed)
            yield


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, what the encoder makes of their pictures, and their requests.

    Attributes:
        examples: B questions.
        features: of their pictures; samples with the same picture share its patches.
        hidden: by look, the hidden states (B, R, D) at `<img-q>` of the examples that have it, as
            far as they are known beforehand.
        whole: what they are a share of; None where they are all there is.
        rows: their indices in it.
        prefixes: keeps what the LLM makes of beginnings that never change; None for nothing.
    """

    examples: Sequence[Example]
    features: VisualFeatures
    hidden: Sequence[Tensor] = ()
    whole: Whole | None = None
    rows: Sequence[int] = ()
    prefixes: PrefixCache | None = None

    @property
    def step(self) -> Sequence[Example]:
        """All examples of the optimizer step."""
        return self.examples if self.whole is None else self.whole.examples

    @property
    def mine(self) -> Sequence[int]:
        """Where the examples stand in `step`."""
        return range(len(self.examples)) if self.whole is None else self.rows

    def features_of(self, indices: Sequence[int]) -> VisualFeatures:
        """Return the features of examples of the step, whosever share they are in."""
        if self.whole is None:
            return self.features.select(indices)
        return self.whole.features(indices)

    def select(self, rows: Sequence[int]) -> Batch:
        """Return some of the examples, with what is known of their first looks."""
        hidden = [first[list(rows)] for first in self.hidden[:1]]
        return Batch([self.examples[i] for i in rows], self.features.select(rows), hidden)

    def prompts(self, model: IPN) -> list[Prompt]:
        """Return the prompts with the answers to learn."""
        return [prompt_of(e, model.config.layout) for e in self.examples]


def prompt_of(example: Example, layout: Layout) -> Prompt:
    """Return an example's prompt with the answers to learn."""
    return example.prompt(layout.order, learn=True, looks=min(example.looks, layout.look_again))


class Examples:
    """Some examples in memory, with the features of their pictures.

    Attributes:
        name, split: where they are from.
        examples: in an order that never changes.
        keys: the content key of each picture, by its name, as far as it is known.
    """

    def __init__(self, name: str, split: str, examples: Sequence[Example]) -> None:
        self.name = name
        self.split = split
        self.examples = examples
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

    def by_length(self, rng: random.Random) -> list[int]:
        """Indices of the examples, fewer pictures and less text first, the same in any order."""
        indices = list(range(len(self.examples)))
        rng.shuffle(indices)
        return sorted(indices, key=self._lengths.__getitem__)

    @cached_property
    def _lengths(self) -> list[tuple[int, int]]:
        return [_length(example) for example in self.examples]

    def keys_of(self, example: Example, cache: FeatureCache) -> list[str]:
        """Return the content keys of an example's pictures, opening those that are new."""
        self.keys |= cache.know([p for p in example.images if p.name not in self.keys])
        return [self.keys[p.name] for p in example.images]

    def batch(
        self, indices: Sequence[int], cache: FeatureCache, requests: RequestCache | None
    ) -> Batch:
        """Return the examples of these indices."""
        return make_batch([(self, index) for index in indices], cache, requests)


class Data(Examples):
    """All the examples of one config entry."""

    def __init__(self, config: DataConfig, registry: Registry, training: bool) -> None:
        task, split = open_split(config, registry, training)
        examples = list(task.examples(split)[: config.limit])
        if not examples:
            raise DataError(f"'{config.task}' split '{split}' holds no examples.")
        super().__init__(config.task, split, examples)
        self.share = config.share

    def windows(self, seed: str, place: Place | None) -> Iterator[tuple[Place | None, Examples]]:
        """Yield the examples once an epoch."""
        while True:
            yield None, self

    def ahead(self, examples: Sequence[Example]) -> None:
        """Get ready for examples that are needed soon: their features are there already."""


def known_features(
    data: DataSource, cache: FeatureCache, examples: Sequence[Example]
) -> VisualFeatures:
    """Return the features of some examples of a source whose pictures were encoded."""
    return cache.get([[data.keys[p.name] for p in e.images] for e in examples])


class DataSource(Protocol):
    """What batches are drawn from: data in memory, or a stream.

    Attributes:
        name, split: say what it is.
        share: how many of a batch's groups come from it, relative to the others.
        examples: all of them, for objectives that look at them beforehand; `ConfigError` where
            they cannot be listed.
        keys: the content key of each picture, by its name, as far as it is known beforehand.
    """

    name: str
    split: str
    share: float
    keys: dict[str, str]

    @property
    def examples(self) -> Sequence[Example]: ...

    @property
    def pictures(self) -> Sequence[Picture]:
        """Those that can be encoded beforehand."""

    def encode(self, cache: FeatureCache, report: Callable[[int], None] | None = None) -> None:
        """Make sure that the cache holds these."""

    def windows(self, seed: str, place: Place | None) -> Iterator[tuple[Place | None, Examples]]:
        """Yield, for ever, what can be drawn from next, each with the place where it begins.

        Args:
            seed: decides the order.
            place: that of an earlier window, to begin with it; None for the first one.
        """

    def ahead(self, examples: Sequence[Example]) -> None:
        """Get ready for examples that are needed soon."""


def open_split(config: DataConfig, registry: Registry, training: bool) -> tuple[Task, str]:
    """Return the task of a config entry, and the split that it means.

    Raises:
        ConfigError: it is a test split, and `training`.
    """
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
    return task, split


def make_batch(
    chosen: Sequence[tuple[Examples, int]], cache: FeatureCache, requests: RequestCache | None
) -> Batch:
    """Put examples of any data together."""
    examples = [data.examples[index] for data, index in chosen]
    keys = [data.keys_of(e, cache) for (data, _), e in zip(chosen, examples, strict=True)]
    features = cache.get(keys)
    hidden = () if requests is None else requests.get(examples)
    return Batch(examples, features, hidden)


def _grouped(keys: Sequence[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _length(example: Example) -> tuple[int, int]:
    """Order examples by how many tokens their prompts may have: pictures count for most."""
    texts = [example.question, example.answers[0]]
    if example.dialogue is not None:
        texts = [turn.text for turn in example.dialogue.turns]
    return len(example.images), sum(map(len, texts))
