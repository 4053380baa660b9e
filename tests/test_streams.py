"""Streams: drawn like other data, resumed in the middle of a shard, decoded by other processes."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from lessons import lesson, lesson_registry, stage, stop_at, training, two_colours, weights
from toys import picture

from ipn_core.errors import ConfigError, DataError, IPNError
from ipn_core.plugins import Registry
from ipn_core.tasks import open_task
from ipn_core.training.config import DataConfig, StageConfig
from ipn_core.training.data import Data
from ipn_core.training.sampler import Sampler
from ipn_core.training.state import peek
from ipn_core.training.stream import Stream

pytestmark = pytest.mark.usefixtures("own_training")

COLOURS = ("red", "tan", "sky", "ink")
PAIRS = [(COLOURS[n % 4], COLOURS[(n + 1 + n // 4) % 4]) for n in range(18)]


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def question(text: str, answer: str, **more: Any) -> str:
    return json.dumps({"question": text, "answer": answer, **more})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tar files with 3, 4, 5 and 6 questions, numbered over all of them."""
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard in range(4):
        members: dict[str, bytes | str] = {}
        for _ in range(3 + shard):
            pair = PAIRS[number]
            members[f"{number:03}.png"] = png(two_colours(pair))
            members[f"{number:03}.json"] = question(f"Colour left {number}?", pair[0])
            number += 1
        write_tar(folder / f"s-{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def registry() -> Registry:
    return lesson_registry()


def stream(shards: Path, registry: Registry, size: int = 5, **more: Any) -> Stream:
    return Stream(DataConfig(task=f"{shards}/s-*.tar", stream=size, **more), registry)


def sampler(sources: list[Any], seed: int = 0, **more: Any) -> Sampler:
    values = stage("s", "language", **{"groups": 2, "per_group": 2, **more})
    return Sampler(sources, StageConfig.parse(values, "stage"), seed)


def asked(one: Sampler, step: int) -> list[str]:
    return [window.examples[i].question for window, i in one.draw(step)]


# -- tar files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s-*.tar", "s-{0..3}.tar"])
def test_samples_become_examples(shards: Path, registry: Registry, name: str) -> None:
    examples = open_task(f"{shards}/{name}", None, registry).examples("all")
    assert [e.question for e in examples] == [f"Colour left {i}?" for i in range(18)]
    assert (examples[5].answers, len(examples[5].images)) == (("tan",), 1)
    assert examples[5].images[0].load().tobytes() == two_colours(("tan", "ink")).tobytes()
    assert examples[0].images[0].name == f"{shards}/s-0.tar/000.png"


def test_a_sample_may_hold_any_record_and_name_its_pictures(
    tmp_path: Path, registry: Registry
) -> None:
    a, b = png(picture(1)), png(picture(2))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "ab"}]
    tar = write_tar(
        tmp_path / "a.tar",
        {
            "x/1.a.png": a,
            "x/1.b.PNG": b,
            "x/1.json": question("Which?", "b", image=["b.png", "x/1.a.png"]),
            "x/2.jpg": a,
            "x/2.json": json.dumps({"image": "coco/7.jpg", "conversations": turns}),
            "x/3.jpg": b,
            "x/3.txt": "a caption\n",
            "x/3.json": '{"width": 24}',
            "x/4.0.png": a,
            "x/4.1.png": b,
            "x/4.json": question("Both?", "yes"),
        },
    )
    one, two, three, four = open_task(str(tar), None, registry).examples("all")
    assert [p.load().tobytes() for p in one.images] == [
        picture(2).tobytes(),
        picture(1).tobytes(),
    ]
    assert (two.question, two.answers, two.dialogue) == ("What?", ("ab",), None)
    assert three.answers == ("a caption",)
    assert [turn.text for turn in three.prompt((), learn=True).turns] == ["", "a caption"]
    assert [p.name.rpartition(".")[0][-1] for p in four.images] == ["0", "1"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"k.png": "x"}, "it has neither .json nor .txt, but png"),
        ({"k.json": "{"}, "its .json: not valid JSON"),
        ({"k.json": b"\xff"}, "its .json is not UTF-8 text"),
        ({"k.png": "x", "k.txt": b"a caf\xe9"}, "its .txt is not UTF-8 text .byte 0xe9"),
        ({"k.png": "x", "k.txt": " \n"}, "it has no text after a picture"),
        ({"k.json": question("?", "x")}, r"'image' must be a path or a list of paths, got None"),
        (
            {"k.a.png": "x", "k.b.png": "x", "k.json": question("?", "x", image="c.png")},
            "no picture 'c.png': the sample has a.png, b.png",
        ),
        ({"k.png": "x", "k.json": question(" ", "x")}, "'question' must be a non-empty text"),
    ],
)
def test_a_broken_sample_is_named_by_its_file_and_key(
    tmp_path: Path, registry: Registry, members: dict[str, bytes | str], reason: str
) -> None:
    good = {"g.png": png(picture(1)), "g.json": question("What?", "x")}
    tar = write_tar(tmp_path / "a.tar", {**good, **members})
    with pytest.raises(DataError, match=rf"^'{tar}' sample 'k': {reason}"):
        open_task(str(tar), None, registry).examples("all")


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path, registry: Registry) -> None:
    tar = write_tar(tmp_path / "a.tar", {"k.png": "x", "k.json": question("What?", "x")})
    (example,) = open_task(str(tar), None, registry).examples("all")
    with pytest.raises(DataError, match=rf"^'{tar}' sample 'k': the image .* is not an image"):
        example.images[0].load()


def test_a_damaged_tar_is_named_with_its_last_good_sample(
    tmp_path: Path, registry: Registry
) -> None:
    members = {
        f"{i}.{e}": c
        for i in range(3)
        for e, c in (("png", "x" * 2000), ("json", question("?", "x")))
    }
    tar = write_tar(tmp_path / "a.tar", members)
    content = tar.read_bytes()
    tar.write_bytes(content[:7000])
    with pytest.raises(DataError, match=rf"^'{tar}' is damaged or no tar file after sample '0' \("):
        open_task(str(tar), None, registry).examples("all")
    tar.write_bytes(b"no tar file at all")
    with pytest.raises(DataError, match=r"no tar file after the beginning \(truncated header\)"):
        open_task(str(tar), None, registry).examples("all")
    with pytest.raises(DataError, match=r"no such file: '.*none.tar'. Give tar files"):
        open_task(str(tmp_path / "none.tar"), None, registry).examples("all")
    with pytest.raises(DataError, match="no such file: 'pipe:"):
        open_task("pipe:cat a.tar", None, registry).examples("all")


def cut_points(content: bytes) -> list[int]:
    """In the middle of each header after the first, and where one should begin."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        ends = [512 * -(-(m.offset_data + m.size) // 512) for m in tar]
    return [at for end in ends for at in (end, end + 52)]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_tar_that_is_cut_between_its_files_is_refused(
    shards: Path, registry: Registry, tmp_path: Path, compress: Any
) -> None:
    """Python's own reader takes it for the end, and what follows is never missed."""
    content = (shards / "s-0.tar").read_bytes()
    tar = tmp_path / "cut.tar"
    for at in cut_points(content):
        tar.write_bytes(compress(content[:at]))
        why = f"neither a file nor the end follows: {'truncated' if at % 512 else 'empty'} header"
        with pytest.raises(DataError, match=rf"^'{tar}' is damaged .* \({why}\)\. Fetch"):
            open_task(str(tar), None, registry).examples("all")
    one = sampler([Stream(DataConfig(task=str(tar), stream=2), registry)])
    with pytest.raises(DataError, match=rf"^'{tar}' is damaged"):
        one.draw(2)


def test_a_header_that_is_damaged_is_not_the_end(
    shards: Path, registry: Registry, tmp_path: Path
) -> None:
    content = bytearray((shards / "s-0.tar").read_bytes())
    content[cut_points(content)[2] + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar' is damaged .* the end follows: bad checksum\)"):
        open_task(str(tmp_path / "a.tar"), None, registry).examples("all")


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("tail", [bytes(512), bytes(1024), bytes(1024) + b"x" * 700])
def test_a_block_of_zeros_ends_a_tar_however_it_goes_on(
    shards: Path, registry: Registry, tmp_path: Path, tail: bytes, compress: Any
) -> None:
    """Python and GNU tar fill the last 10 kB; other writers put two blocks, and some one."""
    content = (shards / "s-0.tar").read_bytes()
    end = cut_points(content)[-2]
    assert not any(content[end:])
    (tmp_path / "a.tar").write_bytes(compress(content[:end] + tail))
    assert len(open_task(str(tmp_path / "a.tar"), None, registry).examples("all")) == 3


def test_what_the_librarys_writer_wrote_is_read_without_what_belongs_to_no_sample(
    registry: Registry, tmp_path: Path
) -> None:
    from webdataset import TarWriter

    sample = {"png": png(picture(1)), "json": question("What?", "x").encode()}
    for name in ("a.tar", "a.tar.gz"):
        with TarWriter(str(tmp_path / name)) as writer:
            writer.write({"__key__": "some/1", **sample})
            writer.write({"__key__": "__meta__/1", "txt": "of all"})
            writer.write({"__key__": "some/2", **sample})
    (tmp_path / "a.tar.gz").rename(tmp_path / "b.tar")
    for name in ("a.tar", "b.tar"):
        examples = open_task(str(tmp_path / name), None, registry).examples("all")
        assert [e.images[0].name[-10:] for e in examples] == ["some/1.png", "some/2.png"]


def test_without_its_library_a_tar_is_refused_in_one_line(
    shards: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(IPNError, match=r"pip install 'ipn-core\[shards\]'$"):
        open_task(f"{shards}/s-0.tar", None, registry)


# -- drawing ---------------------------------------------------------------------------------------


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own(
    shards: Path, registry: Registry
) -> None:
    one = sampler([stream(shards, registry)], groups=1, per_group=1)
    epochs = [[asked(one, step)[0] for step in range(e * 18, (e + 1) * 18)] for e in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == {f"Colour left {i}?": 1 for i in range(18)}
    assert len(set(map(tuple, epochs))) == 3
    assert epochs[0] != sorted(epochs[0])


def test_a_batch_depends_on_nothing_but_seed_stage_and_step(
    shards: Path, registry: Registry
) -> None:
    one = sampler([stream(shards, registry)])
    in_order = [asked(one, step) for step in range(12)]
    other = sampler([stream(shards, registry)])
    assert [asked(other, step) for step in (7, 3, 11, 0)] == [in_order[i] for i in (7, 3, 11, 0)]
    assert [asked(sampler([stream(shards, registry)], seed=1), step) for step in range(12)] != (
        in_order
    )


def test_a_stream_goes_on_in_the_middle_of_a_shard_without_reading_what_came_before(
    shards: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = [stream(shards, registry), Data(DataConfig(task="colours"), registry, training=True)]
    one = sampler(source, groups=4)
    in_order = [asked(one, step) for step in range(30)]
    inside = 0
    for step in range(0, 30, 3):
        one.draw(step)
        state = json.loads(json.dumps(one.state(step)))
        fresh = stream(shards, registry)
        read: list[tuple[str, int]] = []
        task_read = fresh.task.read
        fresh.task.read = lambda shard, skip=0, read=read, task_read=task_read: (  # type: ignore[method-assign]
            read.append((shard, skip)),
            task_read(shard, skip),
        )[1]
        other = sampler([fresh, source[1]], groups=4)
        other.resume(state)
        assert [asked(other, at) for at in range(step, min(step + 4, 30))] == in_order[
            step : step + 4
        ]
        place = state[0]["place"]
        assert read[0][1] == place["skip"]
        inside += place["skip"] > 0
        assert len(read) <= 5
    assert inside > 3


def test_a_jsonl_file_is_streamed_as_well(tmp_path: Path, registry: Registry) -> None:
    picture(1).save(tmp_path / "a.png")
    lines = [question(f"{i}?", "x", image="a.png") for i in range(7)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    one = sampler([Stream(DataConfig(task=str(tmp_path / "a.jsonl"), stream=3), registry)])
    assert set(asked(one, 0)) == {"0?", "1?", "2?"}
    with pytest.raises(DataError, match=r"a.jsonl' line 8: not valid JSON"):
        one.draw(2)


def test_an_empty_stream_is_refused(tmp_path: Path, registry: Registry) -> None:
    tar = write_tar(tmp_path / "a.tar", {})
    one = sampler([Stream(DataConfig(task=str(tar), stream=3), registry)])
    with pytest.raises(DataError, match=r"a.tar' holds no examples"):
        one.draw(0)


def test_what_cannot_be_streamed_is_refused(shards: Path, registry: Registry, llm: Path) -> None:
    with pytest.raises(ConfigError, match="task 'colours' cannot be streamed"):
        Stream(DataConfig(task="colours", stream=3), registry)
    with pytest.raises(ConfigError, match=r"'data': .*: give it no limit"):
        DataConfig.parse({"task": "colours", "stream": 3, "limit": 4}, "data")
    with pytest.raises(ConfigError, match="validated on cannot be a stream"):
        training(lesson(llm, validate_on=[{"task": "colours", "stream": 3}]), Path("unused"))


def test_an_objective_that_looks_at_all_answers_refuses_a_stream(
    shards: Path, llm: Path, tmp_path: Path
) -> None:
    data = [{"task": f"{shards}/s-*.tar", "stream": 5}]
    values = lesson(llm, stage("s", "answer-embedding"), data=data)
    with pytest.raises(ConfigError, match=r"stage 's': .* is a stream, and this needs all"):
        training(values, tmp_path / "run").run()


# -- length ----------------------------------------------------------------------------------------


def by_length(registry: Registry, tmp_path: Path, count: int, **more: Any) -> tuple[Sampler, int]:
    picture(1).save(tmp_path / "a.png")
    lines = [question("w" * (1 + 37 * i % count) + "?", "x", image="a.png") for i in range(count)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = DataConfig(task=str(tmp_path / "a.jsonl"), **more)
    source: Any = Stream(data, registry) if data.stream else Data(data, registry, True)
    return sampler([source], group_by="length", groups=4, per_group=2), count


@pytest.mark.parametrize("count", [80, 78, 83])
@pytest.mark.parametrize("size", [0, 40])
def test_batches_hold_examples_of_about_the_same_length(
    registry: Registry, tmp_path: Path, count: int, size: int
) -> None:
    one, _ = by_length(registry, tmp_path, count, stream=size)
    drawn = [[len(text) for text in asked(one, step)] for step in range(3 * count // 8)]
    spread = [max(batch) - min(batch) for batch in drawn]
    # Neighbours among all, or among the examples of a window; odd batches join two windows.
    assert sorted(spread)[len(spread) // 2] <= (7 if not size else 25)
    assert [sum(b) for b in drawn] != sorted(sum(b) for b in drawn)
    shown = Counter(length for batch in drawn for length in batch)
    assert set(shown) == set(range(2, count + 2))
    assert max(shown.values()) - min(shown.values()) <= 1
    again, _ = by_length(registry, tmp_path, count, stream=size)
    assert [len(t) for t in asked(again, 7)] == drawn[7]


def test_epochs_group_by_length_anew(registry: Registry, tmp_path: Path) -> None:
    one, count = by_length(registry, tmp_path, 80)
    first = [asked(one, step) for step in range(10)]
    second = [asked(one, step) for step in range(10, 20)]
    assert sorted(map(sorted, first)) == sorted(map(sorted, second))
    assert first != second
    assert count == 80


# -- training --------------------------------------------------------------------------------------


def streaming(llm: Path, shards: Path, **more: Any) -> dict[str, Any]:
    data = [{"task": f"{shards}/s-*.tar", "stream": 5}, {"task": "colours"}]
    one = stage("s", "language", steps=7, groups=4, per_group=2, accumulate=2)
    return lesson(llm, one, data=data, **more)


@pytest.fixture(scope="module")
def whole(llm: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPN_CACHE", str(folder / "cache"))
        training(streaming(llm, shards), folder / "run").run()
    return weights(folder / "run")


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    llm: Path, shards: Path, tmp_path: Path, whole: bytes, step: int
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            training(streaming(llm, shards), tmp_path / "run").run()
    position = peek(tmp_path / "run")
    assert position is not None
    assert position.windows is not None
    assert position.windows[0]["place"] is not None
    training(streaming(llm, shards), tmp_path / "run", resume=True).run()
    assert weights(tmp_path / "run") == whole


@pytest.mark.slow
def test_processes_that_decode_change_nothing(
    llm: Path, shards: Path, tmp_path: Path, whole: bytes
) -> None:
    training(streaming(llm, shards, workers=2), tmp_path / "run").run()
    assert weights(tmp_path / "run") == whole


@pytest.mark.slow
def test_features_of_streams_are_kept_too(llm: Path, shards: Path, tmp_path: Path) -> None:
    first, again = (training(streaming(llm, shards), tmp_path / name) for name in ("a", "b"))
    first.run()
    again.run()
    encoders: list[Any] = [first.cache.encoder, again.cache.encoder]
    different = {*PAIRS, *list(permutations(COLOURS, 2))[:9]}  # the task's own have some of them
    assert [encoder.encoded for encoder in encoders] == [len(different), 0]
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


@pytest.mark.slow
def test_a_worker_decodes_and_says_what_it_cannot(tmp_path: Path, registry: Registry) -> None:
    good = {"g.png": png(picture(1)), "g.json": question("What?", "x")}
    tar = write_tar(tmp_path / "a.tar", {**good, "k.png": "x", "k.json": question("What?", "x")})
    source = Stream(DataConfig(task=str(tar), stream=2), registry, workers=1)
    _, window = next(source.windows("0", None))
    source.ahead(window.examples)
    shown, broken = (example.images[0] for example in window.examples)
    assert shown.load().tobytes() == picture(1).tobytes()
    with pytest.raises(DataError, match=r"a.tar' sample 'k': the image .* is not an image"):
        broken.load()
    assert replace(shown, name="y").load().tobytes() == picture(1).tobytes()
