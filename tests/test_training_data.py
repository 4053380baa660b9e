"""Batches, the cache of features and the cache of requests."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import lesson_registry, stage
from toys import picture, toy_model

from ipn_core.errors import ConfigError, DataError, UnknownNameError
from ipn_core.features import VisualFeatures
from ipn_core.images import content_key
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt
from ipn_core.stages import PerceiveContext
from ipn_core.tasks import Example, Picture, open_task
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig
from ipn_core.training.config import DataConfig, StageConfig
from ipn_core.training.data import Data, Sampler
from ipn_core.training.features import FeatureCache
from ipn_core.training.requests import RequestCache, backbone_digest, requests_are_constant

# -- batches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lessons() -> Registry:
    return lesson_registry()


def opened(registry: Registry, **more: Any) -> Data:
    return Data(DataConfig.parse({"task": "colours", **more}, "data"), registry, training=True)


def sampler(sources: list[Data], seed: int = 0, **more: Any) -> Sampler:
    return Sampler(sources, StageConfig.parse(stage("s", "language", **more), "stage"), seed)


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
    renamed = sampler([opened(lessons), opened(lessons, split="val")], **more)
    renamed.stage = renamed.stage.model_copy(update={"name": "t"})
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
    with pytest.raises(ConfigError, match="takes no options"):
        open_task("some.jsonl", {"a": 1}, lessons)


def test_a_limit_keeps_the_first_examples(lessons: Registry) -> None:
    some, every = ([e.question for e in opened(lessons, **m).examples] for m in ({"limit": 5}, {}))
    assert some == every[:5]


# -- features --------------------------------------------------------------------------------------

SIZES = [(24, 24), (48, 24), (24, 48)]


def pictures(count: int, first: int = 0) -> list[Picture]:
    def named(seed: int) -> Picture:
        return Picture(f"p{seed}", lambda: picture(seed, SIZES[seed % 3]))

    return [named(seed) for seed in range(first, first + count)]


def encoder(**more: Any) -> TinyEncoder:
    return TinyEncoder(TinyEncoderConfig(**more))


def check(cache: FeatureCache, some: list[Picture], keys: dict[str, str]) -> None:
    """What the cache holds is what the encoder makes of the pictures, to bfloat16."""
    features = cache.get([[keys[p.name]] for p in some])
    assert features.batch == len(some)
    for span, one in zip(features.images, encoder().encode([p.load() for p in some]), strict=True):
        assert span.grid == one.grid
        values = features.values[span.offset : span.offset + span.length]
        assert torch.equal(values, one.values.to(torch.bfloat16).float())
        token = features.global_tokens[span.sample]
        assert torch.equal(token, one.global_token.to(torch.bfloat16).float())


def test_pictures_are_encoded_once_over_runs(tmp_path: Path) -> None:
    first = FeatureCache(encoder(), tmp_path)
    told: list[int] = []
    keys = first.add(pictures(40), told.append)
    assert first.encoder.encoded == 40
    assert told[-1] == 40
    check(first, pictures(40), keys)
    second = FeatureCache(encoder(), tmp_path)
    again = second.add(pictures(42))
    assert second.encoder.encoded == 2
    assert {name: again[name] for name in keys} == keys
    check(second, pictures(42), again)
    check(first, pictures(40), keys)  # which was open all the while


def test_the_key_is_the_content_and_the_encoder(tmp_path: Path) -> None:
    cache = FeatureCache(encoder(), tmp_path)
    keys = cache.add(pictures(1))
    assert keys == {"p0": content_key(picture(0, SIZES[0]))}
    # The same pixels under another name, and other pixels under the same.
    renamed = cache.add([Picture("q", pictures(1)[0].load)])
    assert (renamed["q"], cache.encoder.encoded) == (keys["p0"], 1)
    changed = cache.add([Picture("p0", lambda: picture(5))])
    assert changed["p0"] != keys["p0"]
    assert cache.encoder.encoded == 2
    other = FeatureCache(encoder(seed=1), tmp_path)
    other.add(pictures(1))
    assert other.encoder.encoded == 1


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    support = Path(__file__).parent / "support"
    code = (
        f"import sys; sys.path[:0] = [{str(support)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_training_data import FeatureCache, encoder, pictures\n"
        f"cache = FeatureCache(encoder(), Path({str(tmp_path)!r}))\n"
        "cache.add(pictures(60)); print(cache.encoder.encoded)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    ]
    counts = sorted(int(process.communicate()[0]) for process in both)
    assert counts == [0, 60]
    cache = FeatureCache(encoder(), tmp_path)
    keys = cache.add(pictures(60))
    assert cache.encoder.encoded == 0
    check(cache, pictures(60), keys)


@pytest.mark.parametrize("lost", [1, 100, 2001])
def test_lost_values_are_computed_again(tmp_path: Path, lost: int) -> None:
    cache = FeatureCache(encoder(), tmp_path)
    cache.add(pictures(6))
    path = cache.folder / "values.bin"
    path.write_bytes(path.read_bytes()[:-lost])
    # Others come first, so that old places in the file hold other pictures by the end.
    between = FeatureCache(encoder(), tmp_path)
    check(between, pictures(6, 6), between.add(pictures(6, 6)))
    after = FeatureCache(encoder(), tmp_path)
    keys = after.add(pictures(12))
    assert 0 < after.encoder.encoded < 6
    check(after, pictures(12), keys)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace('"key"', '"kex"', 1),
        lambda text: "{\n" + text,
        lambda text: "",
    ],
)
def test_a_damaged_index_is_mended(tmp_path: Path, damage: Any) -> None:
    cache = FeatureCache(encoder(), tmp_path)
    cache.add(pictures(6))
    path = cache.folder / "index.jsonl"
    path.write_text(damage(path.read_text()))
    for _ in range(2):
        after = FeatureCache(encoder(), tmp_path)
        keys = after.add(pictures(6))
        check(after, pictures(6), keys)
    assert after.encoder.encoded == 0
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_samples_with_the_same_picture_share_its_patches(tmp_path: Path) -> None:
    cache = FeatureCache(encoder(), tmp_path)
    keys = cache.add(pictures(3))
    a, b, c = keys.values()
    features = cache.get([[a], [b, c], [], [a], [c, b]])
    assert features.batch == 5
    assert features.lengths == [9, 24, 0, 9, 24]
    # b and c stand at two places, where an interaction may code them differently.
    assert features.values.shape[0] == 9 + 2 * 24
    assert features.images[0].offset == features.images[3].offset
    assert [span.place for span in features.images] == [0, 0, 1, 0, 0, 1]


BOXES = [(1, 0.0, 0.0, 0.5, 1.0), (0, 0.25, 0.5, 1.0, 1.0), (2, 0.0, 0.0, 0.5, 1.0)]
"""Of the pictures of a batch; the last picture is the one before it, asked about again."""


def looked(features: VisualFeatures) -> VisualFeatures:
    return features.look(BOXES)


def test_looking_through_the_cache_is_looking_at_the_picture(tmp_path: Path) -> None:
    cache = FeatureCache(encoder(), tmp_path)
    keys = cache.add(pictures(2))
    first, second = keys.values()
    found = looked(cache.get([[first], [second], [second]]))
    images = [[p.load()] for p in pictures(2)]
    with torch.no_grad():
        context = PerceiveContext([*images, images[1]], ["", "", ""])
        expected = looked(encoder()(context).features)
    assert found.images == expected.images
    assert (found.batch, found.values.dtype) == (3, torch.float32)
    rounded = expected.values.to(torch.bfloat16).float()
    assert torch.equal(found.values, rounded)
    assert torch.equal(found.global_tokens, expected.global_tokens.to(torch.bfloat16).float())
    # And for a selection of the samples, as the engine makes it.
    some = cache.get([[first], [second]]).select([1]).look([(0, *BOXES[0][1:])])
    assert torch.equal(some.values, rounded[: len(some.values)])
    assert some.images[0].sample == 0


def test_a_crop_is_encoded_once_over_runs_and_between_other_pictures(tmp_path: Path) -> None:
    cache = FeatureCache(encoder(), tmp_path)
    keys = cache.add(pictures(2))
    shown = [[keys["p0"]], [keys["p1"]], [keys["p1"]]]
    before = looked(cache.get(shown)).values
    assert cache.encoder.encoded == 2 + 2
    # Another process adds pictures and crops while this one is open, and the other way round.
    other = FeatureCache(encoder(), tmp_path)
    check(other, pictures(5), other.add(pictures(5)))
    assert torch.equal(looked(other.get(shown)).values, before)
    assert other.encoder.encoded == 3
    cache.get(shown).look([(0, 0, 0, 1, 1)])
    other.get(shown).look([(0, 0.0, 0.0, 1.0, 1.0), (1, 0, 0, 1, 1)])
    assert (cache.encoder.encoded, other.encoder.encoded) == (5, 4)
    assert torch.equal(looked(cache.get(shown)).values, before)
    again = FeatureCache(encoder(), tmp_path)
    check(again, pictures(5), again.add(pictures(5)))
    assert torch.equal(looked(again.get(shown)).values, before)
    assert again.encoder.encoded == 0


def test_a_crop_is_of_the_picture_with_that_content(tmp_path: Path) -> None:
    cache = FeatureCache(encoder(), tmp_path)
    first = cache.get([[cache.add(pictures(1))["p0"]]]).look([(0, 0, 0, 0.5, 1)]).values
    changed = cache.add([Picture("p0", lambda: picture(5))])["p0"]
    other = cache.get([[changed]]).look([(0, 0, 0, 0.5, 1)]).values
    assert not torch.equal(first, other)
    (expected,) = encoder().encode([picture(5).crop((0, 0, 12, 24))])
    assert torch.equal(other, expected.values.to(torch.bfloat16).float())


# -- requests --------------------------------------------------------------------------------------


def examples() -> list[Example]:
    shown = pictures(2)
    questions = ["Who?", "What is it?", "Who?", "Where is the small dog?"]
    return [
        Example(question, ("yes",), tuple(shown[: 1 + row % 2]))
        for row, question in enumerate(questions)
    ]


@pytest.mark.parametrize("layer", [-1, 1])
def test_cached_requests_are_the_engines(tmp_path: Path, registry: Registry, layer: int) -> None:
    request = {"name": "hidden-state", "layer": layer}
    model = toy_model(registry, "tiny-look", request=request)
    cache = FeatureCache(model.encoder, tmp_path)
    keys = cache.add(pictures(2))

    def features(some: Any) -> Any:
        return cache.get([[keys[p.name] for p in e.images] for e in some])

    requests = RequestCache(model, backbone_digest(model), tmp_path / "requests")
    told: list[tuple[int, int]] = []
    requests.add(examples(), features, lambda done, of: told.append((done, of)))
    assert told == [(3, 3)]  # one question is asked twice
    for example, hidden in zip(examples(), requests.get(examples()), strict=True):
        plan = model.planner.plan(Prompt.ask(example.question, example.images))
        with torch.no_grad():
            percept = model.perceive([[p.load() for p in example.images]], [example.question])
            alone = model.engine.hidden_at_request([plan], percept)[0]
        torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5)

    again = RequestCache(model, backbone_digest(model), tmp_path / "requests")
    again.add(examples(), lambda some: pytest.fail("they are kept on disk"))
    assert torch.equal(again.get(examples()), requests.get(examples()))
    with torch.no_grad():
        model.slots.request.add_(1)
    assert RequestCache(model, backbone_digest(model), tmp_path).key != requests.key


def test_requests_are_constant_only_where_nothing_before_them_varies(registry: Registry) -> None:
    assert requests_are_constant(toy_model(registry, "tiny-look").requires_grad_(False))
    trained = toy_model(registry, "tiny-look").requires_grad_(False)
    trained.slots.request.requires_grad_(True)
    assert not requests_are_constant(trained)
    assert not requests_are_constant(toy_model(registry, "toy-both").requires_grad_(False))
    assert not requests_are_constant(toy_model(registry, "static").requires_grad_(False))
    early = toy_model(registry, "tiny-look", layout={"order": ["look", "images", "text"]})
    assert not requests_are_constant(early.requires_grad_(False))
