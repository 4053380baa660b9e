"""Batches, the cache of features and the cache of requests."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import lesson_registry, stage
from safetensors.torch import load_file, save_file
from toys import pictures, toy_model

from ipn_core.errors import ConfigError, DataError, IPNError, UnknownNameError
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt
from ipn_core.tasks import Example, open_task
from ipn_core.training.config import DataConfig, StageConfig
from ipn_core.training.data import Data
from ipn_core.training.features import FeatureCache
from ipn_core.training.requests import RequestCache, backbone_digest, requests_are_constant
from ipn_core.training.sampler import Sampler

# -- batches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lessons() -> Registry:
    return lesson_registry()


def opened(registry: Registry, **more: Any) -> Data:
    return Data(DataConfig.parse({"task": "colours", **more}, "data"), registry, training=True)


def sampler(sources: list[Data], seed: int = 0, **more: Any) -> Sampler:
    values = stage(more.pop("name", "s"), "language", **more)
    return Sampler(sources, StageConfig.parse(values, "stage"), seed)


def drawn(one: Sampler, step: int) -> list[tuple[str, int]]:
    return [(data.split, index) for data, index in one.draw(step)]


@pytest.mark.parametrize("group_by", ["picture", "question"])
def test_a_batch_depends_on_nothing_but_seed_stage_and_step(
    lessons: Registry, group_by: str
) -> None:
    more = {"group_by": group_by, "per_group": 2}
    one = sampler([opened(lessons), opened(lessons, split="val")], **more)
    in_order = [drawn(one, step) for step in range(12)]
    other = sampler([opened(lessons), opened(lessons, split="val")], **more)
    assert [drawn(other, step) for step in reversed(range(12))] == in_order[::-1]
    seeded = sampler([opened(lessons), opened(lessons, split="val")], seed=1, **more)
    assert [drawn(seeded, step) for step in range(12)] != in_order
    renamed = sampler([opened(lessons), opened(lessons, split="val")], name="t", **more)
    assert [drawn(renamed, step) for step in range(12)] != in_order


@pytest.mark.parametrize("group_by", ["picture", "question"])
@pytest.mark.parametrize("per_group", [2, 100])
def test_every_example_is_drawn_once_in_an_epoch(
    lessons: Registry, group_by: str, per_group: int
) -> None:
    data = opened(lessons)
    groups = data.by_picture if group_by == "picture" else data.by_question
    steps = sum(math.ceil(len(group) / per_group) for group in groups)
    one = sampler([data], groups=1, per_group=per_group, group_by=group_by)
    together = set()
    for epoch in range(3):
        batches = [one.draw(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        counts = Counter(index for batch in batches for _, index in batch)
        assert counts == dict.fromkeys(range(len(data.examples)), 1)
        assert max(map(len, batches)) <= per_group
        together.add(frozenset(frozenset(i for _, i in batch) for batch in batches))
    # A group that is cut is cut anew each time.
    assert len(together) == (3 if per_group == 2 else 1)


def test_groups_hold_one_picture_or_one_question(lessons: Registry) -> None:
    data = opened(lessons)
    assert [{data.examples[i].images[0].name for i in g} for g in data.by_picture] == [
        {p.name} for p in data.pictures
    ]
    assert all(len({data.examples[i].question for i in g}) == 1 for g in data.by_question)


def test_sources_share_a_batch_as_the_config_says(lessons: Registry) -> None:
    sources = [opened(lessons, share=3), opened(lessons, split="val", share=1)]
    counts = Counter(split for split, _ in drawn(sampler(sources, groups=4, per_group=1), 0))
    assert counts == {"train": 3, "val": 1}
    counts = Counter(split for split, _ in drawn(sampler(sources, groups=2, per_group=1), 0))
    assert counts == {"train": 1, "val": 1}
    with pytest.raises(ConfigError, match="'groups' must be at least 2"):
        sampler(sources, groups=1)


def test_data_is_refused_where_it_cannot_serve(lessons: Registry) -> None:
    with pytest.raises(ConfigError, match="split 'test' is a test split"):
        opened(lessons, split="test")
    with pytest.raises(DataError, match=r"unknown split 'vall'.*did you mean 'val'"):
        opened(lessons, split="vall")
    with pytest.raises(UnknownNameError, match="did you mean 'colours'"):
        opened(lessons, task="colors")
    with pytest.raises(ConfigError, match=r"task 'colours'.*'shades'"):
        opened(lessons, options={"shades": 2})
    with pytest.raises(ConfigError, match="has no option 'a': allowed are images"):
        open_task("some.jsonl", {"a": 1}, lessons)


def test_a_limit_keeps_the_first_examples(lessons: Registry) -> None:
    some, every = ([e.question for e in opened(lessons, **m).examples] for m in ({"limit": 5}, {}))
    assert some == every[:5]


# -- requests --------------------------------------------------------------------------------------


def examples() -> list[Example]:
    shown = pictures(2)
    questions = ["Who?", "What is it?", "Who?", "Where is the small dog?"]
    return [
        Example(question, ("yes",), tuple(shown[: 1 + row % 2]))
        for row, question in enumerate(questions)
    ]


def features_in(folder: Path, model: IPN) -> Callable[[Sequence[Example]], VisualFeatures]:
    """What a cache of requests asks for the features of some examples."""
    cache = FeatureCache(model.encoder, folder)
    keys = cache.add(pictures(2))
    return lambda some: cache.get([[keys[p.name] for p in e.images] for e in some])


@pytest.mark.parametrize("layer", [-1, 1])
def test_cached_requests_are_the_engines(tmp_path: Path, registry: Registry, layer: int) -> None:
    request = {"name": "hidden-state", "layer": layer}
    model = toy_model(registry, "tiny-look", request=request)
    features = features_in(tmp_path, model)
    requests = RequestCache(model, backbone_digest(model), tmp_path / "requests")
    told: list[tuple[int, int]] = []
    requests.add(examples(), features, lambda done, of: told.append((done, of)))
    assert told == [(3, 3)]  # one question is asked twice
    for example, hidden in zip(examples(), requests.get(examples())[0], strict=True):
        plan = model.planner.plan(Prompt.ask(example.question, example.images))
        with torch.no_grad():
            percept = model.perceive([[p.load() for p in example.images]], [example.question])
            alone = model.engine.hidden_at_request([plan], percept)[0]
        torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5)

    again = RequestCache(model, backbone_digest(model), tmp_path / "requests")
    again.add(examples(), lambda some: pytest.fail("they are kept on disk"))
    assert torch.equal(again.get(examples())[0], requests.get(examples())[0])
    with torch.no_grad():
        model.slots.request.add_(1)
    assert RequestCache(model, backbone_digest(model), tmp_path).key != requests.key


def test_reading_that_was_interrupted_goes_on(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipn_core.training.requests._BATCH", 1)
    monkeypatch.setattr("ipn_core.training.requests._PART", 1)
    model = toy_model(registry, "tiny-look")
    cached = features_in(tmp_path, model)
    read: list[str] = []

    def features(some: Sequence[Example], last: int) -> Any:
        if len(read) == last:
            raise KeyboardInterrupt
        read.extend(e.question for e in some)
        return cached(some)

    requests = RequestCache(model, backbone_digest(model), tmp_path / "requests")
    with pytest.raises(KeyboardInterrupt):
        requests.add(examples(), lambda some: features(some, 2))
    again = RequestCache(model, backbone_digest(model), tmp_path / "requests")
    told: list[tuple[int, int]] = []
    again.add(examples(), lambda some: features(some, 9), lambda done, of: told.append((done, of)))
    assert told == [(3, 3)]
    assert sorted(read) == sorted({e.question for e in examples()})


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(bytes(content))


def fewer(path: Path) -> None:
    save_file({"hidden": load_file(path)["hidden"][:-1].clone()}, path)


@pytest.mark.parametrize(
    ("damage", "why"), [(cut, ""), (flip, "its checksum"), (fewer, "it holds 2 requests, not 3")]
)
def test_damaged_requests_are_named_and_read_again(
    tmp_path: Path, registry: Registry, damage: Any, why: str
) -> None:
    model = toy_model(registry, "tiny-look")
    features = features_in(tmp_path, model)

    def requests(note: Any) -> RequestCache:
        made = RequestCache(model, "digest", tmp_path / "requests", note=note)
        made.add(examples(), features)
        return made

    expected = requests(pytest.fail).get(examples())[0]
    (path,) = (tmp_path / "requests").iterdir()
    damage(path)
    told: list[str] = []
    assert torch.equal(requests(told.append).get(examples())[0], expected)
    (note,) = told
    assert note.startswith(f"the file of requests '{path}' is damaged ({why}")
    assert note.endswith("): it is removed, and its questions are read again")
    assert torch.equal(requests(pytest.fail).get(examples())[0], expected)


def test_requests_without_a_checksum_are_read(tmp_path: Path, registry: Registry) -> None:
    """As the first version wrote them."""
    model = toy_model(registry, "tiny-look")
    first = RequestCache(model, "digest", tmp_path / "requests", note=pytest.fail)
    first.add(examples(), features_in(tmp_path, model))
    (path,) = (tmp_path / "requests").iterdir()
    save_file({"hidden": load_file(path)["hidden"] + 1}, path)
    again = RequestCache(model, "digest", tmp_path / "requests", note=pytest.fail)
    again.add(examples(), lambda _: pytest.fail("they are kept on disk"))
    assert torch.equal(again.get(examples())[0], first.get(examples())[0] + 1)


def test_requests_are_constant_only_where_nothing_before_them_varies(registry: Registry) -> None:
    assert requests_are_constant(toy_model(registry, "tiny-look").requires_grad_(False))
    trained = toy_model(registry, "tiny-look").requires_grad_(False)
    trained.slots.request.requires_grad_(True)
    assert not requests_are_constant(trained)
    assert not requests_are_constant(toy_model(registry, "toy-both").requires_grad_(False))
    assert not requests_are_constant(toy_model(registry, "static").requires_grad_(False))
    early = toy_model(registry, "tiny-look", layout={"order": ["look", "images", "text"]})
    assert not requests_are_constant(early.requires_grad_(False))


def test_without_a_cache_that_can_be_written_none_starts(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "file"))
    with pytest.raises(IPNError, match=r"file/requests' cannot be written .*IPN_CACHE"):
        RequestCache(toy_model(registry, "tiny-look"), "digest")
