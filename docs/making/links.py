"""The links of the documents, and where they lead: for the site, and for the tests.

Documents link to each other and to files of the repository by relative paths, as a code host reads
them. This needs the standard library alone, so that the tests run it without the site's tools.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Link", "anchors", "headings", "links", "relink", "section", "slug"]

FENCE = r"^(?P<fence>(?:`{3,}|~{3,})).*?^(?P=fence)[ \t]*$"
CODE = re.compile(
    rf"{FENCE}|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)",
    re.DOTALL | re.MULTILINE,
)
TARGET = re.compile(r"(?P<before>\]\(|\b(?:src|href)=\")(?P<target>[^()\s\"]+)(?=[)\"])")
HEADING = re.compile(r"^(#{1,6}) +(.+?) *$", re.MULTILINE)
ELSEWHERE = re.compile(r"^(?:[a-z][a-z+.-]*:|//)")


@dataclass(frozen=True)
class Link:
    """One link of a document.

    Attributes:
        target: as it is written.
        path: of the file it leads to, from the root of the repository; None if it leads elsewhere.
        anchor: the part after "#", empty if there is none.
        line: where it stands.
    """

    target: str
    path: str | None
    anchor: str
    line: int


def _blanked(text: str) -> str:
    """Return the text with its code as blanks, so that places stay where they are."""
    return CODE.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)


def _resolve(target: str, document: str, line: int) -> Link:
    if ELSEWHERE.match(target):
        return Link(target, None, "", line)
    path, _, anchor = target.partition("#")
    folder = os.path.dirname(document)
    return Link(
        target, os.path.normpath(os.path.join(folder, path)) if path else document, anchor, line
    )


def links(text: str, document: str) -> Iterator[Link]:
    """Find the links of a document.

    Args:
        text: what it says.
        document: its path from the root of the repository.

    Yields:
        each in its order; what stands in code is none.
    """
    shown = _blanked(text)
    for found in TARGET.finditer(shown):
        yield _resolve(found["target"], document, text.count("\n", 0, found.start()) + 1)


def relink(text: str, document: str, change: Callable[[Link], str]) -> str:
    """Return a document with each link's target as `change` has it."""
    parts, at = [], 0
    for found in TARGET.finditer(_blanked(text)):
        parts += [text[at : found.start("target")], change(_resolve(found["target"], document, 0))]
        at = found.end("target")
    return "".join([*parts, text[at:]])


def headings(text: str) -> list[tuple[int, str, int]]:
    """Return level, title and place of each heading of a document."""
    fences = re.compile(FENCE, re.DOTALL | re.MULTILINE)
    shown = fences.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
    return [(len(m[1]), m[2], m.start()) for m in HEADING.finditer(shown)]


def slug(title: str, separator: str = "-") -> str:
    """Return a heading's anchor as code hosts make it; the site is told to make the same."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", separator)


def anchors(text: str) -> list[str]:
    """Return the anchors of a document's headings."""
    return [slug(title) for _, title, _ in headings(text)]


def section(text: str, anchor: str) -> str:
    """Return what stands under a heading, up to the next one of its level.

    Raises:
        LookupError: there is no such heading.
    """
    found = headings(text)
    for number, (level, title, start) in enumerate(found):
        if slug(title) == anchor:
            after = (place for depth, _, place in found[number + 1 :] if depth <= level)
            return text[text.index("\n", start) : next(after, len(text))].strip()
    raise LookupError(f"no heading '{anchor}': there are {', '.join(anchors(text))}")
