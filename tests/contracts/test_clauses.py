"""What `docs/hooks.md` says that the contracts check is what they check."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from clauses import clauses

from ipn_core.testing import contracts

PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
CONTRACTS = {
    name.removesuffix("Contract").lower(): getattr(contracts, name)
    for name in contracts.__all__
    if name.endswith("Contract")
}


def checked(base: type) -> set[str]:
    """The names of the clauses that a contract's tests check."""
    found = set()
    for name in clauses(base):
        source = inspect.getsource(getattr(base, name))
        (title,) = set(re.findall(r'clause\(\s*"([^"]+)"', source))
        found.add(title)
    return found


def documented() -> dict[str, set[str]]:
    """The clauses that the page lists, by kind."""
    _, _, table = PAGE.partition("| clauses | of |\n|---|---|\n")
    found: dict[str, set[str]] = {kind: set() for kind in CONTRACTS}
    for row in table.strip().splitlines():
        titles, of = (cell.strip() for cell in row.strip("|").split("|"))
        kinds = {kind.strip() for kind in of.removeprefix("all but").split(",")}
        if of.startswith("all but"):
            kinds = set(CONTRACTS) - kinds
        for kind in CONTRACTS if of == "every kind" else kinds:
            found[kind] |= {title.strip() for title in titles.split(";")}
    return found


def test_the_page_lists_every_clause_of_every_kind_and_no_other() -> None:
    assert documented() == {kind: checked(base) for kind, base in CONTRACTS.items()}
