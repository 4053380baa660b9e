"""A source of examples that is read as it goes, and decoded ahead by processes of its own."""

from __future__ import annotations

import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING

from ipn_core.errors import ConfigError, DataError
from ipn_core.tasks import Example, Picture, ShardedTask
from ipn_core.training.config import DataConfig
from ipn_core.training.data import Data, DataSource, Examples, Place, open_split

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.plugins import Registry
    from ipn_core.training.features import FeatureCache

__all__ = ["Stream", "open_data"]


def open_data(config: DataConfig, registry: Registry, workers: int = 0) -> DataSource:
    """Open a config entry to train on, as a stream if it says so.

    Args:
        config: the entry.
        registry: where tasks are looked up.
        workers: processes that decode pictures of a stream, 0 for this one.

    Raises:
        ConfigError: it is a test split, or a stream of a task that cannot be streamed.
    """
    return Stream(config, registry, workers) if config.stream else Data(config, registry, True)


class Stream:
    """The examples of one config entry, a window at a time.

    An epoch goes through all shards, in an order of its own; within a shard the order stays, and a
    window of examples is mixed. Every process reads all of it, and decodes only what it needs.
    """

    def __init__(self, config: DataConfig, registry: Registry, workers: int = 0) -> None:
        task, split = open_split(config, registry, training=True)
        if not isinstance(task, ShardedTask):
            raise ConfigError(
                f"task '{config.task}' cannot be streamed; JSONL and tar files can. Leave 'stream' "
                "out."
            )
        self.task = task
        self.name = config.task
        self.split = split
        self.share = config.share
        self.size = config.stream
        self.pictures: Sequence[Picture] = ()
        self.keys: dict[str, str] = {}
        self._shards = task.shards(split)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    @property
    def examples(self) -> Sequence[Example]:
        """Raise `ConfigError`: they cannot be listed."""
        raise ConfigError(
            f"'{self.name}' is a stream, and this needs all examples beforehand. Leave 'stream' "
            "out, or take an objective that needs none, such as 'language'."
        )

    def encode(self, cache: FeatureCache, report: Callable[[int], None] | None = None) -> None:
        """Do nothing: pictures are encoded when they are drawn."""

    def windows(self, seed: str, place: Place | None) -> Iterator[tuple[Place, Examples]]:
        """Yield windows from a place on; the last one of an epoch is as long as what is left."""
        place = place or {"epoch": 0, "shard": 0, "skip": 0}
        while True:
            coming = self._from(seed, place)
            while drawn := list(islice(coming, self.size)):
                yield place, Examples(self.name, self.split, [example for example, _ in drawn])
                place = drawn[-1][1]
            if place["shard"] == place["skip"] == 0:
                raise DataError(f"'{self.name}' holds no examples.")
            place = {"epoch": place["epoch"] + 1, "shard": 0, "skip": 0}

    def ahead(self, examples: Sequence[Example]) -> None:
        """Let the workers decode the pictures of some examples."""
        if not self._workers:
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._workers, get_context("spawn"), initializer=_follow_parent
            )
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        for example in examples:
            for picture in example.images:
                assert isinstance(picture.load, _Ahead)
                picture.load.start(self._pool)

    def _from(self, seed: str, place: Place) -> Iterator[tuple[Example, Place]]:
        """Yield the examples of an epoch from a place on, each with the place after it."""
        order = list(range(len(self._shards)))
        random.Random(f"{seed}/shards/{place['epoch']}").shuffle(order)
        for number in range(place["shard"], len(order)):
            skip = place["skip"] if number == place["shard"] else 0
            for example in self.task.read(self._shards[order[number]], skip):
                skip += 1
                yield _decodable(example), {**place, "shard": number, "skip": skip}


class _Ahead:
    """Opens a picture, or waits for the process that was told to."""

    def __init__(self, load: Callable[[], Image.Image]) -> None:
        self._load = load
        self._coming: Future[Image.Image] | None = None

    def start(self, pool: ProcessPoolExecutor) -> None:
        """Let a process open it."""
        if self._coming is None:
            self._coming = pool.submit(self._load)

    def __call__(self) -> Image.Image:
        coming, self._coming = self._coming, None  # a picture is large; it is kept by whoever asks
        return self._load() if coming is None else coming.result()


def _decodable(example: Example) -> Example:
    """Let the pictures of an example be opened ahead."""
    images = tuple(replace(picture, load=_Ahead(picture.load)) for picture in example.images)
    return replace(example, images=images)


def _follow_parent() -> None:
    """End when the training does, even if it was killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
