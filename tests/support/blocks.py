"""The blocks of code of the documents, and the command lines in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    *sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("*/ipn-*/*.md")),
)
"""The documents: those of the root, of the site, and of each member with its model cards."""
FENCED = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}\S[^\n]*\n)+)(?=\n)")
PROMPT = re.compile(r"^(?:\$ |\.venv/bin/)+")
FIRST = ("ipn", "make", "python", "pip", "pytest", "accelerate", "lmms-eval", ".")
"""What a line begins with that a reader types; others are what a command printed."""


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        page: where it stands, from the root.
        language: as the page says, "" where it says none.
        file: the path behind the language, "" for most.
        text: what it holds.
    """

    page: str
    language: str
    file: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The command lines, without prompts, comments and what an option's brackets say."""
        if self.language not in ("", "sh", "console"):
            return []
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        found = []
        for line in lines:
            bare = re.split(r" {3,}|\s+# ", PROMPT.sub("", line.strip()))[0]
            if bare.split(" ")[0] in FIRST:
                found.append(" ".join(bare.split()))
        return found


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, fenced and indented, in no order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(page, *match) for match in FENCED.findall(text)]
    rest = FENCED.sub("", text)
    indented = (re.sub(r"^ {4}", "", some, flags=re.MULTILINE) for some in INDENTED.findall(rest))
    return found + [Block(page, "", "", some) for some in indented]


def every(language: str) -> list[Block]:
    """Return the blocks of all pages in a language that are no file of a package."""
    return [b for page in PAGES for b in blocks(page) if b.language == language and not b.file]


def commands() -> dict[str, list[str]]:
    """Return every command line of the pages, with the pages that have it."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks(page):
            for command in block.commands:
                found.setdefault(command, []).append(page)
    return found


def spoken_of(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each `ipn …` of a page, in blocks or in a sentence, with the options that it names."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [command for block in blocks(page) for command in block.commands]
    lines += re.findall(r"`((?:\.venv/bin/)?ipn [^`]+)`", FENCED.sub("", text))
    for line in lines:
        words = PROMPT.sub("", line).split()
        if words and words[0] == "ipn":
            yield " ".join(words), re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(words[1:]))
