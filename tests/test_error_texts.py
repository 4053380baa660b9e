"""Every error text is tested: some words of each stand in a test.

A crude look, which no import is needed for: of the words that stand in a message between what it
names, some three in a row must occur in a test or in the torture, also where that is a pattern.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("tests/**/*.py", "plugins/*/tests/*.py", "backbones/*/tests/*.py", "torture/**/*.py")
SOURCES = ("ipn_core/**/*.py", "plugins/*/src/**/*.py", "backbones/*/src/**/*.py")
ROW = 3
"""So many words in a row tell one message from others."""
OURS = {"AssertionError", "AttributeError", "NotImplementedError", "KeyError", "FileExistsError"}
"""What users are not told: what we assert of ourselves, and what Python expects of a protocol."""

UNTESTED = {"ipn demo has ended": "a helper of tests says so to whoever broke the page"}
"""Messages by a part of them, with the reason why no test brings them about."""


def words(text: str) -> list[str]:
    return re.findall(r"\w[\w'-]*", text)


def pieces(error: ast.Call) -> list[list[str]]:
    """The words of a message, without what it names, as lists of those that stand together."""
    texts = (part.value for part in ast.walk(error) if isinstance(part, ast.Constant))
    found = [words(text) for text in texts if isinstance(text, str)]
    return [p for p in found if len(p) >= ROW] or [p for p in found if len(p) == ROW - 1]


def raised(code: str) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield the line and the words of each error with a message for users."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            found = pieces(node.exc)
            if name.endswith("Error") and name not in OURS and found:
                yield node.lineno, found


def rows(piece: list[str]) -> Iterator[str]:
    """Yield each few words in a row of a piece."""
    for start in range(max(1, len(piece) - ROW + 1)):
        yield " ".join(piece[start : start + ROW])


@pytest.fixture(scope="module")
def tested() -> str:
    """All words of all tests; a text over two lines, and an escaped one, are one text."""
    own = Path(__file__).name
    paths = [p for pattern in TESTS for p in ROOT.glob(pattern) if p.name != own]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    text = re.sub(r"[\"']\s*\n\s*[rf]*[\"']", "", text).replace("\\", "")
    return f" {' '.join(words(text))} "


def test_some_words_of_every_error_stand_in_a_test(tested: str) -> None:
    missing, excused, count = [], set(), 0
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        for line, found in raised(path.read_text(encoding="utf-8")):
            count += 1
            if any(f" {row} " in tested for piece in found for row in rows(piece)):
                continue
            said = " … ".join(" ".join(piece) for piece in found)
            reasons = {part for part in UNTESTED if part in said}
            excused |= reasons
            if not reasons:
                missing.append(f"{path.relative_to(ROOT)}:{line}: {said}")
    assert not missing, f"{len(missing)} of {count}: " + "\n".join(missing)
    assert excused == set(UNTESTED), "an exception that is none any more"
    assert count > 300


def test_an_error_without_a_test_is_seen(tested: str) -> None:
    code = "raise errors.DataError(f'{name} holds {0} green elephants hang down.')\n"
    ((line, found),) = raised(f"\n{code}raise AssertionError('never told to anybody')")
    assert line == 2
    assert found == [["green", "elephants", "hang", "down"]]
    told = [row for piece in found for row in rows(piece)]
    assert told == ["green elephants hang", "elephants hang down"]
    assert not any(f" {row} " in tested for row in told)
