"""The cache of features: what the encoder gives, shared by processes, checked, limited in size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from toys import SIZES, picture, pictures

from ipn_core.errors import ConfigError, IPNError
from ipn_core.features import VisualFeatures
from ipn_core.images import content_key
from ipn_core.stages import PerceiveContext
from ipn_core.tasks import Picture
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig
from ipn_core.training.features import FeatureCache
from ipn_core.training.shards import Entry, cache_size

TESTS = Path(__file__).parent


def encoder(**more: Any) -> TinyEncoder:
    return TinyEncoder(TinyEncoderConfig(**more))


def opened(folder: Path, **more: Any) -> FeatureCache:
    """A cache that must have nothing to complain about, unless it is given where to."""
    return FeatureCache(encoder(), folder, **{"note": pytest.fail, **more})


def shards(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


def check(cache: FeatureCache, some: list[Picture], keys: dict[str, str]) -> None:
    """What the cache gives is what the encoder makes of the pictures, to bfloat16."""
    features = cache.get([[keys[p.name]] for p in some])
    assert features.batch == len(some)
    for span, one in zip(features.images, encoder().encode([p.load() for p in some]), strict=True):
        assert span.grid == one.grid
        values = features.values[span.offset : span.offset + span.length]
        assert torch.equal(values, one.values.to(torch.bfloat16).float())
        token = features.global_tokens[span.sample]
        assert torch.equal(token, one.global_token.to(torch.bfloat16).float())


def test_pictures_are_encoded_once_over_runs(tmp_path: Path) -> None:
    first = opened(tmp_path)
    told: list[int] = []
    some = pictures(140)
    keys = first.add(some, told.append)
    assert first.encoder.encoded == 140
    assert told == list(range(1, 141))
    assert len(shards(first)) == 3
    check(first, some, keys)
    second = opened(tmp_path)
    more = pictures(142)
    again = second.add(more)
    assert second.encoder.encoded == 2
    assert {name: again[name] for name in keys} == keys
    check(second, more, again)
    check(first, some, keys)  # which was open all the while
    check(first, more, again)  # and reads what the other has added
    assert first.encoder.encoded == 140


def test_the_key_is_the_content_and_the_encoder(tmp_path: Path) -> None:
    cache = opened(tmp_path)
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


def test_samples_with_the_same_picture_share_its_patches(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    keys = cache.add(pictures(3))
    a, b, c = keys.values()
    features = cache.get([[a], [b, c], [], [a], [c, b]])
    assert features.batch == 5
    assert features.lengths == [9, 24, 0, 9, 24]
    # b and c stand at two places, where an interaction may code them differently.
    assert features.values.shape[0] == 9 + 2 * 24
    assert features.images[0].offset == features.images[3].offset
    assert [span.place for span in features.images] == [0, 0, 1, 0, 0, 1]


# -- several processes -----------------------------------------------------------------------------

ADD = f"""
import sys, time
sys.path[:0] = [{str(TESTS / "support")!r}, {str(TESTS)!r}]
from pathlib import Path
from test_feature_cache import encoder, opened, pictures
cache = opened(Path(sys.argv[1]))
encode = cache.encoder.encode
cache.encoder.encode = lambda images: (time.sleep(0.3), encode(images))[1]
"""


def process(folder: Path, then: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", ADD + then, str(folder)], **pipes)


@pytest.mark.slow
def test_processes_encode_different_pictures_at_the_same_time(tmp_path: Path) -> None:
    # Both are there before either starts, so that they do take turns.
    then = "print('ready', flush=True); input(); cache.add(pictures(256))\n"
    both = [process(tmp_path, then + "print(cache.encoder.encoded)") for _ in range(2)]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    counts = [int(one.communicate()[0]) for one in both]
    assert sum(counts) == 256
    assert min(counts) >= 64
    cache = opened(tmp_path)
    some = pictures(256)
    keys = cache.add(some)
    assert cache.encoder.encoded == 0
    check(cache, some, keys)


@pytest.mark.slow
def test_what_a_killed_process_was_encoding_is_encoded_by_the_next(tmp_path: Path) -> None:
    then = "encode = cache.encoder.encode\n"
    then += "cache.encoder.encode = lambda images: (print('on', flush=True), time.sleep(60))\n"
    victim = process(tmp_path, then + "cache.add(pictures(3))")
    assert victim.stdout is not None
    assert victim.stdout.readline() == "on\n"
    victim.kill()
    victim.communicate()
    cache = opened(tmp_path)
    some = pictures(3)
    check(cache, some, cache.add(some))


# -- damage ----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_value(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(bytes(content))


def flip_grid(path: Path) -> None:
    with safe_open(path, "pt") as file:
        label = next(text for text in file.metadata().values() if text.startswith("3 6 "))
    content = path.read_bytes()
    assert content.count(label.encode()) == 1
    path.write_bytes(content.replace(label.encode(), b"6 3 " + label[4:].encode()))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, ""),
        (empty, ""),
        (flip_value, "its checksum does not fit"),
        (flip_grid, "its checksum does not fit"),
    ],
)
def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path, damage: Any, why: str) -> None:
    some = pictures(3)
    first = opened(tmp_path)
    first.add(some)
    (shard,) = shards(first)
    damage(shard)
    told: list[str] = []
    cache = opened(tmp_path, note=told.append)
    keys = cache.add(some)
    check(cache, some, keys)
    (note,) = told
    assert f"shard '{shard}' is damaged (" in note
    assert f"{why}): it is removed" in note
    assert "\n" not in note
    check(cache, some, keys)  # those that were read before the damaged one are gone from the disk
    cache.flush()
    after = opened(tmp_path)
    check(after, some, after.add(some))
    assert after.encoder.encoded == 0


def test_only_the_damaged_shard_is_made_again(tmp_path: Path) -> None:
    some = pictures(130)
    first = opened(tmp_path)
    first.add(some)
    cut(shards(first)[1])
    told: list[str] = []
    cache = opened(tmp_path, note=told.append)
    keys = cache.add(some)
    assert cache.encoder.encoded in (64, 2)
    check(cache, some, keys)
    assert len(told) == 1


def test_a_picture_that_is_gone_is_an_error_with_its_key(tmp_path: Path) -> None:
    cache = opened(tmp_path, size=0)
    key = cache.add(pictures(1))["p0"]
    with pytest.raises(IPNError, match=f"picture {key} are not in the cache .* itself is gone"):
        cache.get([[key]])


# -- size ------------------------------------------------------------------------------------------


@pytest.fixture
def chunk(tmp_path: Path) -> int:
    """Bytes of a shard of 64 pictures."""
    cache = opened(tmp_path / "measured")
    cache.add(pictures(64))
    return shards(cache)[0].stat().st_size


def test_the_shards_that_were_unused_for_longest_go_first(tmp_path: Path, chunk: int) -> None:
    root = tmp_path / "capped"
    written = opened(root)
    for first in (0, 64, 128):
        written.add(pictures(64, first))
    names = {p.stat().st_mtime_ns: p for p in shards(written)}
    assert len(names) == 3
    by_age = [names[at] for at in sorted(names)]
    for at, path in enumerate(by_age):
        os.utime(path, (at, at))
    del written
    reader = opened(root)
    oldest = pictures(1)
    check(reader, oldest, reader.add(oldest))  # uses the first, which is from then on the newest
    del reader
    cache = opened(root, size=int(3.5 * chunk))
    cache.add(pictures(64, 192))
    assert {by_age[0], by_age[2]} < set(shards(cache))
    assert not by_age[1].exists()
    again = opened(root)
    again.add(pictures(256))
    assert again.encoder.encoded == 64


def in_use(root: Path) -> FeatureCache:
    user = opened(root)
    user.get([list(user.add(pictures(64)).values())])
    return user


def check_kept(root: Path, chunk: int) -> None:
    """Nothing can be written beside the one shard that is in use, and that does no harm."""
    told: list[str] = []
    cache = opened(root, size=int(1.5 * chunk), note=told.append)
    (kept,) = shards(cache)
    more = pictures(64, 64)
    keys = cache.add(more)
    assert shards(cache) == [kept]
    assert ["full" in note and "IPN_CACHE_SIZE" in note for note in told] == [True]
    check(cache, more, keys)  # encoded, then and now, but not kept
    assert cache.encoder.encoded == 128


def check_replaced(root: Path, chunk: int) -> None:
    after = opened(root, size=int(1.5 * chunk))
    (kept,) = shards(after)
    after.add(pictures(64, 64))
    assert len(shards(after)) == 1
    assert not kept.exists()


def test_what_is_in_use_is_never_removed(tmp_path: Path, chunk: int) -> None:
    root = tmp_path / "capped"
    user = in_use(root)
    check_kept(root, chunk)
    del user
    check_replaced(root, chunk)


@pytest.mark.slow
def test_what_a_killed_process_used_may_be_removed(tmp_path: Path, chunk: int) -> None:
    root = tmp_path / "capped"
    user = process(
        root,
        "from test_feature_cache import in_use\n"
        "one = in_use(Path(sys.argv[1])); print('on', flush=True); input()",
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "on\n"
    check_kept(root, chunk)
    user.kill()
    user.communicate()
    check_replaced(root, chunk)


def test_other_encoders_shards_count_and_go_as_well(tmp_path: Path, chunk: int) -> None:
    root = tmp_path / "capped"
    other = FeatureCache(encoder(seed=1), root)
    other.add(pictures(64))
    cache = opened(root, size=int(1.5 * chunk))
    cache.add(pictures(64))
    assert (len(shards(other)), len(shards(cache))) == (0, 1)


def test_a_killed_writers_half_file_is_removed(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.add(pictures(1))
    half = cache.folder / ".abc.01234567.tmp.safetensors"
    half.write_bytes(b"half")
    after = opened(tmp_path)
    after.add(pictures(2))
    assert not half.exists()
    assert len(shards(after)) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 50 * 10**9), ("0", 0), ("123", 123), ("1.5kb", 1500), ("20 GB", 20 * 10**9), ("7B", 7)],
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("IPN_CACHE_SIZE", text)
    assert cache_size() == size


@pytest.mark.parametrize("text", ["much", "-1", "5 XB", "GB"])
def test_what_is_no_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setenv("IPN_CACHE_SIZE", text)
    with pytest.raises(ConfigError, match=f"IPN_CACHE_SIZE is '{text}': give a number of bytes"):
        FeatureCache(encoder(), tmp_path)


def test_without_a_cache_that_can_be_written_it_does_not_start_unless_it_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "file"))
    with pytest.raises(IPNError, match=r"file/features' cannot be written .*IPN_CACHE"):
        FeatureCache(encoder())
    assert len(FeatureCache(encoder(), size=0).add(pictures(2))) == 2


# -- the first version's files ---------------------------------------------------------------------


@pytest.fixture
def first_version(tmp_path: Path) -> Iterator[Path]:
    """A folder as the first version wrote it, with six pictures; it must stay as it is."""
    folder = opened(tmp_path).folder
    folder.mkdir()
    lines, values = [], b""
    some = pictures(6)
    for one, encoded in zip(some, encoder().encode([p.load() for p in some]), strict=True):
        entry = Entry.of(encoded)
        place = {"key": content_key(one.load()), "offset": len(values) // 2}
        lines.append({**place, "h": entry.grid[0], "w": entry.grid[1], "global_token": True})
        values += entry.values.view(torch.uint8).numpy().tobytes()
    (folder / "values.bin").write_bytes(values)
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield folder
    assert (folder / "values.bin").read_bytes()[: len(values)] == values


def test_what_the_first_version_wrote_is_read(tmp_path: Path, first_version: Path) -> None:
    cache = opened(tmp_path, size=10**9)
    some = pictures(8)
    keys = cache.add(some)
    assert cache.encoder.encoded == 2
    check(cache, some, keys)
    # A process of that version adds to it meanwhile.
    entry = Entry.of(encoder().encode([picture(9)])[0])
    with open(first_version / "values.bin", "ab") as file:
        offset = file.tell() // 2
        file.write(entry.values.view(torch.uint8).numpy().tobytes())
    line = {"key": content_key(picture(9)), "offset": offset, "h": 3, "w": 3, "global_token": True}
    with open(first_version / "index.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    added = [Picture("p9", lambda: picture(9))]
    check(cache, added, cache.add(added))
    assert cache.encoder.encoded == 2


def test_half_lines_and_lost_values_of_the_first_version_are_left_out(
    tmp_path: Path, first_version: Path
) -> None:
    index = first_version / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    far = {"key": content_key(pictures(3)[2].load()), "offset": 10**6, "h": 3, "w": 3}
    lines[2] = json.dumps({**far, "global_token": True}) + "\n"
    index.write_text("{\n" + "".join(lines)[:-4])
    cache = opened(tmp_path)
    some = pictures(6)
    check(cache, some, cache.add(some))
    assert cache.encoder.encoded == 2


# -- looking again ---------------------------------------------------------------------------------

BOXES = [(1, 0.0, 0.0, 0.5, 1.0), (0, 0.25, 0.5, 1.0, 1.0), (2, 0.0, 0.0, 0.5, 1.0)]
"""Of the pictures of a batch; the last picture is the one before it, asked about again."""


def looked(features: VisualFeatures) -> VisualFeatures:
    return features.look(BOXES)


@pytest.mark.parametrize("size", [0, 10**9])
def test_looking_through_the_cache_is_looking_at_the_picture(tmp_path: Path, size: int) -> None:
    cache = opened(tmp_path, size=size)
    some = pictures(2)
    first, second = cache.add(some).values()
    found = looked(cache.get([[first], [second], [second]]))
    images = [[p.load()] for p in some]
    with torch.no_grad():
        context = PerceiveContext([*images, images[1]], ["", "", ""])
        expected = looked(encoder()(context).features)
    assert found.images == expected.images
    assert (found.batch, found.values.dtype) == (3, torch.float32)
    rounded = expected.values.to(torch.bfloat16).float()
    assert torch.equal(found.values, rounded)
    assert torch.equal(found.global_tokens, expected.global_tokens.to(torch.bfloat16).float())
    # And for a selection of the samples, as the engine makes it.
    chosen = cache.get([[first], [second]]).select([1]).look([(0, *BOXES[0][1:])])
    assert torch.equal(chosen.values, rounded[: len(chosen.values)])
    assert chosen.images[0].sample == 0


def test_a_crop_is_encoded_once_over_runs_and_between_other_pictures(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    some = pictures(5)
    keys = cache.add(some[:2])
    shown = [[keys["p0"]], [keys["p1"]], [keys["p1"]]]
    before = looked(cache.get(shown)).values
    assert cache.encoder.encoded == 2 + 2
    cache.flush()
    # Another process adds pictures and crops while this one is open, and the other way round.
    other = opened(tmp_path)
    check(other, some, other.add(some))
    assert torch.equal(looked(other.get(shown)).values, before)
    assert other.encoder.encoded == 3
    cache.get(shown).look([(0, 0, 0, 1, 1)])
    cache.flush()
    other.get(shown).look([(0, 0.0, 0.0, 1.0, 1.0), (1, 0, 0, 1, 1)])
    other.flush()
    assert (cache.encoder.encoded, other.encoder.encoded) == (5, 4)
    assert torch.equal(looked(cache.get(shown)).values, before)
    again = opened(tmp_path)
    check(again, some, again.add(some))
    assert torch.equal(looked(again.get(shown)).values, before)
    assert again.encoder.encoded == 0


def test_crops_are_written_when_there_are_enough_for_a_shard(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    (one,) = some = pictures(1)
    features = cache.get([[cache.add(some)[one.name]]])
    for step in range(1, 64):
        features.look([(0, 0, 0, step / 64, 1)])
    assert len(shards(cache)) == 1
    features.look([(0, 0, 0, 1, 1)])
    assert len(shards(cache)) == 2


def test_a_crop_is_of_the_picture_with_that_content(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    some = [*pictures(1), Picture("p0", lambda: picture(5))]
    first = cache.get([[cache.add(some[:1])["p0"]]]).look([(0, 0, 0, 0.5, 1)]).values
    changed = cache.add(some[1:])["p0"]
    other = cache.get([[changed]]).look([(0, 0, 0, 0.5, 1)]).values
    assert not torch.equal(first, other)
    (expected,) = encoder().encode([picture(5).crop((0, 0, 12, 24))])
    assert torch.equal(other, expected.values.to(torch.bfloat16).float())
