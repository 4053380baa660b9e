"""The task `photo-stamps`, on stamps that are made here."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ipn_names.stamps import (
    ABSENT,
    CELL,
    FOLDERS,
    INSIDE,
    KINDS,
    PhotoStamps,
    called,
    compose,
    main,
    stamps,
)
from PIL import Image

from ipn_core import Example
from ipn_core.errors import DataError
from ipn_core.testing.contracts import TaskContract

CAPTIONS = {
    "animals/dog": "A dog.",
    "animals/frog": "A frog.",
    "animals/cow": "A cow.",
    "food/lemon": "A yellow lemon.",
    "food/pepper": "A green pepper.",
    "food/avocado": "An avocado fruit.",
    "household/mug": "A mug (from England).",
    "household/head": "A head of lettuce.",
    "sports/ball": "A soccer ball.",
    "vehicles/bus": "A green bus.",
    "vehicles/bike": "A pink tricycle.",
}


def make(folder: Path) -> Path:
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 30), (9 * number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=x\n", encoding="utf-8")
    for left_out in ("symbols/a", "animals/cartoon/cat", "animals/dog_mirror"):
        path = folder / f"{left_out}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
        path.with_suffix(".txt").write_text("A dog.\n", encoding="utf-8")
    return folder


class TestPhotoStamps(TaskContract):
    name = "photo-stamps"
    options = {  # noqa: RUF012 the contract declares it
        "folder": str(make(Path(tempfile.mkdtemp(prefix="stamps-")))),
        "scenes": 4,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def test_a_caption_that_ends_with_a_word_of_ours_says_what_it_shows(folder: Path) -> None:
    assert {stamp.name: stamp.word for stamp in stamps(folder)} == {
        "animals/cow.png": "", "animals/dog.png": "dog", "animals/frog.png": "frog",
        "food/avocado.png": "fruit", "food/lemon.png": "lemon", "food/pepper.png": "pepper",
        "household/head.png": "", "household/mug.png": "mug", "sports/ball.png": "soccer ball",
        "vehicles/bike.png": "tricycle", "vehicles/bus.png": "bus",
    }  # fmt: skip


def test_halves_share_no_photograph(folder: Path) -> None:
    def shown(split: str) -> set[str]:
        examples = PhotoStamps(str(folder), scenes=4).examples(split)
        names = {e.images[0].name.rpartition(":")[2] for e in examples}
        return {one for name in names for one in name.split("+")}

    assert shown("tune")
    assert not shown("tune") & shown("test")
    assert shown("test") == shown("paraphrase")


def test_what_is_asked_is_answered_by_where_a_stamp_was_put(folder: Path) -> None:
    examples = PhotoStamps(str(folder), scenes=4).examples("test")
    scenes = [e for e in examples if e.type not in ("name", "kind")]
    assert {e.type for e in scenes} == {"exist", "side", "where"}
    for e in scenes:
        if e.type == "exist":
            assert e.answers == ("yes" if e.names[0] in e.shown else "no",)
        else:
            assert e.names[0] in e.shown
    first = next(e for e in scenes if e.type == "where")
    left, _ = first.shown
    assert first.answers == ("left" if first.names == (left,) else "right",)
    assert {len(e.shown) for e in scenes} == {2, 3, 4}


@pytest.mark.parametrize("split", ["tune", "test", "paraphrase"])
def test_each_photograph_is_asked_for_kinds_that_it_shows_and_that_it_does_not(
    folder: Path, split: str
) -> None:
    asked = [e for e in PhotoStamps(str(folder), scenes=0).examples(split) if e.type == "kind"]
    by_word: dict[str, list[Example]] = {}
    for e in asked:
        by_word.setdefault(e.shown[0], []).append(e)
        own, kind = {*called()[e.shown[0]]}, {*called()[e.names[0]]}
        assert e.answers == (("yes",) if own <= kind else ("no",))
        assert own <= kind or not own & kind
        assert e.names[0] in e.question
    for word, mine in by_word.items():
        no = [e.names[0] for e in mine if e.answers == ("no",)]
        assert len(set(no)) == ABSENT
        assert ("dog" in no) == (word != "dog")
        assert len(mine) - ABSENT == any({*called()[word]} <= {*called()[k]} for k in KINDS)
    assert {e.answers[0] for e in asked} == {"yes", "no"}


def test_kinds_are_words_of_many_classes() -> None:
    assert all(len(called()[kind]) >= 5 for kind in KINDS)
    assert len(called()["dog"]) == 118


def test_stamps_are_put_into_the_cells_of_a_grid(folder: Path) -> None:
    some = [stamp for stamp in stamps(folder) if stamp.word][:2]
    image = compose(some, (1, 2))
    assert image.size == (2 * CELL, CELL)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    middles: list[Any] = [image.getpixel((CELL // 2 + i * CELL, CELL // 2)) for i in (0, 1)]
    assert all(max(pixel) < 120 for pixel in middles)


def test_without_stamps_the_command_is_named_that_fetches_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no stamps in .*python -m ipn_names\.stamps"):
        stamps(tmp_path)
    with pytest.raises(DataError, match="'scenes' must be at least 0"):
        PhotoStamps(scenes=-1)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which commands are looked up; what is fetched goes beside it."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "bin"


def command(folder: Path, name: str, *lines: str) -> None:
    (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (folder / name).chmod(0o755)


def test_stamps_are_fetched_once_and_their_folder_is_told(
    commands: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command(commands, "apt-get", "echo Get:1; : > ${2}_1_all.deb")
    folders = " ".join(f"$3/{INSIDE}/{name}" for name in FOLDERS)
    command(commands, "dpkg-deb", f"/bin/mkdir -p {folders}")
    assert main() == 0
    told = capfd.readouterr()
    assert told.out == f"{tmp_path / 'cache' / 'stamps'}\n"
    assert "Get:1" in told.err
    assert {p.name for p in (tmp_path / "cache" / "stamps").iterdir()} == {*FOLDERS}
    command(commands, "apt-get", "exit 1")
    assert main() == 0


@pytest.mark.parametrize(
    ("apt_get", "dpkg_deb", "reason"),
    [
        (None, None, "there is no apt-get here"),
        ("exit 100", None, "'apt-get download tuxpaint-stamps-default' ended with code 100"),
        (": > ${2}_1_all.deb", None, "there is no dpkg-deb here"),
        (": > ${2}_1_all.deb", "exit 2", "tuxpaint-stamps-default_1_all.deb"),
    ],
)
def test_what_cannot_fetch_them_is_told_with_another_way(
    commands: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    apt_get: str | None,
    dpkg_deb: str | None,
    reason: str,
) -> None:
    for name, line in (("apt-get", apt_get), ("dpkg-deb", dpkg_deb)):
        if line is not None:
            command(commands, name, line)
    assert main() == 1
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith(
        "ipn: the photographs of Debian's package tuxpaint-stamps-default cannot"
    )
    assert reason in told
    assert told.endswith(f"and name the folder {INSIDE} of it in IPN_STAMPS.")
    assert not (tmp_path / "cache" / "stamps").exists()


def test_a_package_that_has_other_folders_is_told(
    commands: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command(commands, "apt-get", ": > ${2}_2_all.deb")
    folders = " ".join(f"$3/{INSIDE}/{name}" for name in FOLDERS[1:-1])
    command(commands, "dpkg-deb", f"/bin/mkdir -p {folders}")
    assert main() == 1
    (told,) = capfd.readouterr().err.splitlines()
    assert told.endswith(
        "cannot be fetched: 'tuxpaint-stamps-default_2_all.deb' has no animals, vehicles in "
        f"{INSIDE}. Fetch and unpack another version of that package yourself, and name the folder "
        f"{INSIDE} of it in IPN_STAMPS."
    )
    assert not (tmp_path / "cache" / "stamps").exists()


@pytest.mark.parametrize(("lines", "count"), [("exit 0", 0), (": > ${2}_1.deb; : > ${2}_2.deb", 2)])
def test_no_package_or_two_are_told(
    commands: Path, capfd: pytest.CaptureFixture[str], lines: str, count: int
) -> None:
    command(commands, "apt-get", lines)
    assert main() == 1
    (told,) = capfd.readouterr().err.splitlines()
    assert (
        f"apt-get brought {count} files 'tuxpaint-stamps-default_….deb' where one is due. Fetch "
        "and unpack that package yourself"
    ) in told


def test_a_command_that_may_not_be_run_is_told(
    commands: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command(commands, "apt-get", "exit 0")
    (commands / "apt-get").chmod(0o644)
    assert main() == 1
    (told,) = capfd.readouterr().err.splitlines()
    assert "cannot be fetched: apt-get cannot be started: Permission denied. Fetch and" in told


def test_a_cache_that_cannot_be_written_is_told(
    commands: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command(commands, "apt-get", ": > ${2}_1_all.deb")
    folders = " ".join(f"$3/{INSIDE}/{name}" for name in FOLDERS)
    command(commands, "dpkg-deb", f"/bin/mkdir -p {folders}")
    monkeypatch.setattr("shutil.move", full)
    assert main() == 1
    (told,) = capfd.readouterr().err.splitlines()
    assert "cannot be put into" in told
    assert told.endswith(
        "No space left on device. Name another folder for what is fetched in IPN_CACHE."
    )
    assert not (tmp_path / "cache" / "stamps").exists()
