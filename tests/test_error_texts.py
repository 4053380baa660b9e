"""Every error text is tested: some words of each, and of no other, stand in a test.

A crude look, which no import is needed for: of the words that stand in a message between what it
names, some three or more in a row must occur in a test or in the torture, also where that is a
pattern, and must not be words of another message, whose test might hold them.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("tests/**/*.py", "plugins/*/tests/*.py", "backbones/*/tests/*.py", "torture/**/*.py")
SOURCES = ("ipn_core/**/*.py", "plugins/*/src/**/*.py", "backbones/*/src/**/*.py")
ROW = 3
"""Fewer words in a row tell no message from others."""
OURS = {"AssertionError", "AttributeError", "NotImplementedError", "KeyError", "FileExistsError"}
"""What users are not told: what we assert of ourselves, and what Python expects of a protocol."""

UNTESTED = {"ipn demo has ended": "a helper of tests says so to whoever broke the page"}
"""Messages by a part of them, with the reason why no test brings them about."""

CUT = 90
"""Characters of a message that name it below."""

SHARED = """
Addresses are not fetched upload the picture itself
See ipn models list'
before the first step … is not finite
cannot be read
cannot be read … Fetch the weights again
cannot be read … Give the path of a picture
cannot be served … Leave it out
does not fit its config … the config asks for … Fetch it again
does not fit the config missing
have no config json that transformers can read
holds no examples
is no JSON
is not UTF-8 text
its entries are not those of its metadata
its shape does not fit its grid
no attention backend that auto' tries … See ipn doctor'
no such file
no such file … Give the path of a picture
not valid JSON
nothing names the image processor of a … give encoder preprocess image_processor_type
stop' must be a text or a list of at most
the body is nested too deeply
the processes find different saved states in … Choose with out a folder that all machines
the weights in … cannot be read … Fetch them again
there is nothing to write task … has no questions there
this importer reads
with another config so that going on would mix the two Use the same config or another fold
""".strip().splitlines()
"""How messages begin of which a test holds only words that others have, too; may become fewer."""

Message = tuple[tuple[str, ...], ...]
"""The words of a message, without what it names, as those that stand together."""


def words(text: str) -> list[str]:
    return re.findall(r"\w[\w'-]*", text)


def pieces(error: ast.Call) -> Message:
    texts = (part.value for part in ast.walk(error) if isinstance(part, ast.Constant))
    found = [tuple(words(text)) for text in texts if isinstance(text, str)]
    long = tuple(p for p in found if len(p) >= ROW)
    return long or tuple(p for p in found if len(p) == ROW - 1)


def raised(code: str) -> Iterator[tuple[int, Message]]:
    """Yield the line and the words of each error with a message for users."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            found = pieces(node.exc)
            if name.endswith("Error") and name not in OURS and found:
                yield node.lineno, found


def rows(message: Message) -> set[str]:
    """The words in a row of a message, so many and more."""
    return {
        " ".join(piece[start : start + count])
        for piece in message
        for count in range(min(ROW, len(piece)), len(piece) + 1)
        for start in range(len(piece) - count + 1)
    }


def own_rows(messages: Iterable[Message]) -> dict[Message, set[str]]:
    """The rows of each message that are none of another one's."""
    found = {message: rows(message) for message in messages}
    count = Counter(row for some in found.values() for row in some)
    return {message: {r for r in some if count[r] == 1} for message, some in found.items()}


def told(message: Message) -> str:
    return " … ".join(" ".join(piece) for piece in message)


@pytest.fixture(scope="module")
def tested() -> str:
    """All words of all tests; a text over two lines, and an escaped one, are one text."""
    own = Path(__file__).name
    paths = [p for pattern in TESTS for p in ROOT.glob(pattern) if p.name != own]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    text = re.sub(r"[\"']\s*\n\s*[rf]*[\"']", "", text).replace("\\", "")
    return f" {' '.join(words(text))} "


def test_words_of_every_error_and_of_no_other_stand_in_a_test(tested: str) -> None:
    where: dict[Message, list[str]] = {}
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        for line, message in raised(path.read_text(encoding="utf-8")):
            where.setdefault(message, []).append(f"{path.relative_to(ROOT)}:{line}")
    missing, excused, shared = [], set(), set()
    for message, own in own_rows(where).items():
        if any(f" {row} " in tested for row in own):
            continue
        said = told(message)
        reasons = {part for part in UNTESTED if part in said}
        excused |= reasons
        if any(f" {row} " in tested for row in rows(message)):
            shared |= set() if reasons else {said}
        elif not reasons:
            missing.append(f"{', '.join(where[message])}: {said}")
    assert not missing, f"{len(missing)} of {len(where)}: " + "\n".join(missing)
    assert excused == set(UNTESTED), "an exception that is none any more"
    listed = {said[:CUT].rstrip() for said in shared}
    assert listed == set(SHARED), sorted(listed ^ set(SHARED))
    assert len(where) > 300


def test_an_error_without_a_test_is_seen(tested: str) -> None:
    code = "raise errors.DataError(f'{name} holds {0} green elephants hang down.')\n"
    ((line, found),) = raised(f"\n{code}raise AssertionError('never told to anybody')")
    assert line == 2
    assert found == (("green", "elephants", "hang", "down"),)
    three = {"green elephants hang", "elephants hang down"}
    assert rows(found) == {*three, "green elephants hang down"}
    assert not any(f" {row} " in tested for row in three)


def test_words_that_two_errors_share_tell_neither() -> None:
    some, other = (tuple(text.split()) for text in ("they cannot be read", "it cannot be read"))
    found = own_rows([(some,), (other,)])
    assert found[(some,)] == {"they cannot be", "they cannot be read"}
    assert found[(other,)] == {"it cannot be", "it cannot be read"}
    assert own_rows([(other,), (other[1:],)])[(other[1:],)] == set()
