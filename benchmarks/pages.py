"""Documents with a part that a program writes, between two comments."""

from __future__ import annotations

from pathlib import Path

from ipn_core.files import atomic_write

__all__ = ["fill", "held"]


def held(page: Path, name: str) -> str:
    """Return what stands between the comments `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        SystemExit: the page does not have both.
    """
    return _parts(page, name)[1].strip("\n")


def fill(page: Path, name: str, text: str) -> None:
    """Write a text between the two comments, and nothing else.

    Raises:
        SystemExit: the page does not have both.
    """
    before, _, after = _parts(page, name)
    atomic_write(page, f"{before}\n{text}\n{after}".encode())


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    inner, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no '{begin}' … '{end}' to write between")
    return before + begin, inner, end + after
