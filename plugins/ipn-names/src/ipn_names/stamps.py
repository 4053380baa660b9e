"""The task `photo-stamps`: photographs with captions, whole and two to four to a picture.

They are those in Debian's package `tuxpaint-stamps-default` (GPL-2), fetched and never kept here:

    python -m ipn_names.stamps

puts them into the user's cache folder (on Debian and what comes from it: it needs apt-get and
dpkg-deb). `IPN_STAMPS` names a folder that holds them elsewhere.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipn_core import Example, Picture, Task
from ipn_core.errors import DataError, DownloadError, IPNError
from ipn_core.files import atomic_folder, make_folder
from ipn_core.images import load_image
from ipn_core.weights import cache_dir
from ipn_names.classes import article, labels
from ipn_names.sayings import NO, UNSURE, YES
from ipn_names.wordings import HELD_OUT, PLACES, TRAINED

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PhotoStamps", "Stamp", "compose", "stamps"]

PACKAGE = "tuxpaint-stamps-default"
INSIDE = "usr/share/tuxpaint/stamps"
FOLDERS = (
    "animals", "clothes", "food", "hobbies", "household", "medical", "plants", "sports", "vehicles",
)  # fmt: skip
"""Those with photographs of things."""
CELL = 240
"""Pixels a side for each of several stamps in a picture."""
FILLS = 0.9
"""How much of it the stamp takes."""

KINDS = (
    "dog", "cat", "bird", "snake", "fish", "insect", "reptile", "monkey", "animal", "fruit",
    "vegetable", "clothing", "furniture", "instrument", "tool", "vehicle", "building",
)  # fmt: skip
"""Words that people ask for and that stand for many classes each."""
ABSENT = 3
"""Kinds that each photograph is asked for although it shows none; the first one is a dog."""

Layout = tuple[tuple[int, int], tuple[str, ...]]
LAYOUTS: tuple[Layout, ...] = (
    ((1, 2), ("left", "right")),
    ((2, 1), ("top", "bottom")),
    ((1, 3), ("left", "middle", "right")),
    ((2, 2), ("top left", "top right", "bottom left", "bottom right")),
)
"""Rows and columns, and where each stamp then is."""


@dataclass(frozen=True)
class Stamp:
    """A photograph.

    Attributes:
        path: of the picture.
        name: below the folder.
        word: the one of our words that its caption ends with; empty where it ends with none.
    """

    path: Path
    name: str
    word: str


@functools.cache
def called() -> dict[str, tuple[str, ...]]:
    """Return, for each word in lower case, the names of all labels that it may stand for."""
    found: dict[str, list[str]] = {}
    for label in labels():
        for word in dict.fromkeys(w.lower() for w in (label.name, *label.also)):
            found.setdefault(word, []).append(label.name)
    return {word: tuple(names) for word, names in found.items()}


def stamps(folder: Path | None = None) -> list[Stamp]:
    """Return the photographs, in an order that is the same everywhere.

    Args:
        folder: holds them; by default where they were fetched to.

    Raises:
        DataError: they are not there.
    """
    own = os.environ.get("IPN_STAMPS")
    folder = folder or (Path(own) if own else cache_dir() / "stamps")
    found = []
    for path in sorted(folder.rglob("*.png")):
        parts = path.relative_to(folder).parts
        caption = path.with_suffix(".txt")
        drawn = "cartoon" in parts or path.stem.endswith("_mirror")
        if parts[0] in FOLDERS and not drawn and caption.is_file():
            text = caption.read_text(encoding="utf-8", errors="replace").splitlines()
            found.append(Stamp(path, "/".join(parts), _word(text[0] if text else "")))
    if not found:
        raise DataError(
            f"there are no stamps in '{folder}'. Fetch them with 'python -m ipn_names.stamps', or "
            f"name the folder that holds those of the package {PACKAGE} in IPN_STAMPS."
        )
    return found


def _word(caption: str) -> str:
    """Return the longest of our words that the first phrase of a caption ends with."""
    said = re.findall(r"[a-z'-]+", re.split(r"[.(!,?]", caption.lower())[0])
    ends = (" ".join(said[-count:]) for count in range(min(4, len(said)), 0, -1))
    return next((end for end in ends if end in called()), "")


def compose(some: Sequence[Stamp], grid: tuple[int, int]) -> Image.Image:
    """Put stamps into the cells of a grid on white, row by row."""
    from PIL import Image

    rows, columns = grid
    image = Image.new("RGB", (columns * CELL, rows * CELL), "white")
    for index, stamp in enumerate(some):
        photo = load_image(stamp.path)
        scale = FILLS * CELL / max(photo.size)
        size = (max(1, int(photo.width * scale)), max(1, int(photo.height * scale)))
        row, column = divmod(index, columns)
        corner = (
            column * CELL + (CELL - size[0]) // 2,
            row * CELL + (CELL - size[1]) // 2,
        )
        image.paste(photo.resize(size, Image.Resampling.BICUBIC), corner)
    return image


class PhotoStamps(Task):
    """What a photograph shows, and of several on white what is where, by their captions.

    `name`: what is this; `kind`: is there one of a kind of thing that has many classes, such as a
    dog, asked of each photograph for one that it shows, if any, and three that it does not.
    Of composed ones, `exist`: is there such a thing, half of them yes; `side`: what is in a place;
    `where`: in which place is it. Where a thing is to be named, every class that its
    caption's word may stand for is right, as a guess, too.

    Splits: `tune` and `test` have other photographs each; `paraphrase` asks about those of `test`
    in wordings that training never uses.
    """

    splits = ("tune", "test", "paraphrase")
    test_splits = ("test", "paraphrase")
    default_split = "test"

    def __init__(self, folder: str | None = None, scenes: int = 200, seed: int = 0) -> None:
        """Choose what is composed.

        Args:
            folder: holds the stamps, by default where they were fetched to.
            scenes: pictures with several stamps.
            seed: another seed gives others.
        """
        if scenes < 0:
            raise DataError(f"'scenes' must be at least 0, got {scenes}.")
        self.folder = None if folder is None else Path(folder)
        self.scenes = scenes
        self.seed = seed

    def examples(self, split: str) -> Sequence[Example]:
        """Return the questions of a split: about each photograph, then about the composed ones."""
        self.check_split(split)
        some = [stamp for stamp in stamps(self.folder) if stamp.word]
        half = some[::2] if split == "tune" else some[1::2]
        whose = "test" if split == "paraphrase" else split
        rng = random.Random(f"photo-stamps/{whose}/{self.seed}")
        words = sorted({stamp.word for stamp in some})
        asker = _Asker(rng, words, HELD_OUT if split == "paraphrase" else None)
        found = [asker.name(stamp) for stamp in half]
        kinds = random.Random(f"photo-stamps/{whose}/{self.seed}/kinds")
        about = _Asker(kinds, words, asker.wordings)
        found += [example for stamp in half for example in about.kinds(stamp)]
        for number in range(self.scenes):
            grid, places = LAYOUTS[number % len(LAYOUTS)]
            chosen = _different(rng, half, len(places))
            found += asker.scene(chosen, grid, places)
        return found


def _different(rng: random.Random, some: Sequence[Stamp], count: int) -> list[Stamp]:
    """Draw stamps of which no two can be called by one name."""
    chosen: list[Stamp] = []
    taken: set[str] = set()
    for stamp in rng.sample(some, len(some)):
        if len(chosen) < count and not taken & {*called()[stamp.word]}:
            chosen.append(stamp)
            taken |= {*called()[stamp.word]}
    return chosen


class _Asker:
    def __init__(
        self,
        rng: random.Random,
        words: Sequence[str],
        wordings: dict[str, tuple[str, ...]] | None,
    ) -> None:
        self.rng = rng
        self.words = words
        self.wordings = wordings

    def name(self, stamp: Stamp) -> Example:
        picture = Picture(stamp.name, functools.partial(load_image, stamp.path))
        return Example(self._word("name"), _accepted(stamp.word), (picture,), "name")

    def kinds(self, stamp: Stamp) -> Iterator[Example]:
        """Ask for what it is, and for what it is not; where only some of its classes are, skip."""
        picture = Picture(stamp.name, functools.partial(load_image, stamp.path))
        own = {*called()[stamp.word]}
        shown = [kind for kind in KINDS if own <= {*called()[kind]}]
        others = [kind for kind in KINDS if not own & {*called()[kind]}]
        first = [kind for kind in others if kind == KINDS[0]]
        drawn = self.rng.sample(others[len(first) :], ABSENT - len(first))
        asked = [(kind, YES) for kind in self.rng.sample(shown, min(1, len(shown)))]
        asked += [(kind, NO) for kind in (*first, *drawn)]
        for kind, answer in asked:
            question = self._thing("exist", kind)
            yield Example(question, (answer,), (picture,), "kind", (kind,), (stamp.word,))

    def scene(
        self, some: Sequence[Stamp], grid: tuple[int, int], places: Sequence[str]
    ) -> Iterator[Example]:
        name = f"{grid[0]}x{grid[1]}:" + "+".join(stamp.name for stamp in some)
        picture = Picture(name, functools.partial(compose, tuple(some), grid))
        there = {one for stamp in some for one in called()[stamp.word]}
        absent = [word for word in self.words if not there & {*called()[word]}] or [""]
        at = self.rng.randrange(len(some))
        noun, place = some[at].word, places[at]
        other = self.rng.choice(absent)
        side = self._word("side", **{"in": PLACES[place][0]})
        shown = tuple(stamp.word for stamp in some)
        asked = [
            (side, _accepted(noun), "side", noun),
            (self._thing("exist", noun), (YES,), "exist", noun),
            (self._thing("exist", other), (NO,), "exist", other),
            (self._thing("where", noun), (place,), "where", noun),
        ]
        for question, answers, kind, named in asked:
            if named:
                yield Example(question, answers, (picture,), kind, (named,), shown)

    def _thing(self, kind: str, noun: str) -> str:
        return self._word(kind, a=article(noun), noun=noun)

    def _word(self, kind: str, **parts: str) -> str:
        plain = TRAINED[kind][0]
        wording = plain if self.wordings is None else self.rng.choice(self.wordings[kind])
        return wording.format(**parts)


def _accepted(word: str) -> tuple[str, ...]:
    names = dict.fromkeys((word, *called()[word]))
    return (*names, *(UNSURE.format(article(name)) for name in names))


def fetch() -> Path:
    """Fetch the package with apt-get and unpack its stamps; returns their folder.

    Raises:
        DownloadError: there is no apt-get or dpkg-deb, one of them failed, what it brought is not
            what it was, or the cache is full.
    """
    target = cache_dir() / "stamps"
    if target.is_dir():
        return target
    make_folder(target.parent)
    with tempfile.TemporaryDirectory() as work:
        _run("apt-get", "download", PACKAGE, folder=work)
        archives = sorted(Path(work).glob(f"{PACKAGE}_*.deb"))
        if len(archives) != 1:
            raise _failed(
                f"apt-get brought {len(archives)} files '{PACKAGE}_….deb' where one is due"
            )
        _run("dpkg-deb", "-x", str(archives[0]), work, folder=work)
        missing = [name for name in FOLDERS if not (Path(work) / INSIDE / name).is_dir()]
        if missing:
            reason = f"'{archives[0].name}' has no {', '.join(missing)} in {INSIDE}"
            raise _failed(reason, "another version of that package")
        try:
            with atomic_folder(target) as building:
                for folder in FOLDERS:
                    # Not renamed: the cache may lie on another disk than temporary files do.
                    shutil.move(Path(work) / INSIDE / folder, building / folder)
        except OSError as error:
            raise DownloadError(
                f"the photographs of {PACKAGE} cannot be put into '{target}': "
                f"{error.strerror or error}. Name another folder for what is fetched in IPN_CACHE."
            ) from error
    return target


def _run(*words: str, folder: str) -> None:
    """Run one of Debian's commands; what it prints is shown as it comes."""
    try:
        subprocess.run(words, cwd=folder, check=True, stdout=sys.stderr)
    except FileNotFoundError:
        reason = f"there is no {words[0]} here"
    except OSError as error:
        reason = f"{words[0]} cannot be started: {error.strerror or error}"
    except subprocess.CalledProcessError as error:
        reason = f"'{' '.join(words)}' ended with code {error.returncode}"
    else:
        return
    raise _failed(reason)


def _failed(reason: str, which: str = "that package") -> DownloadError:
    return DownloadError(
        f"the photographs of Debian's package {PACKAGE} cannot be fetched: {reason}. Fetch and "
        f"unpack {which} yourself, and name the folder {INSIDE} of it in IPN_STAMPS."
    )


def main() -> int:
    """Fetch the photographs and print where they are; returns the exit code."""
    try:
        print(fetch())
    except IPNError as error:
        print(f"ipn: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
