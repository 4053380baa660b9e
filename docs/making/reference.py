"""The reference pages, made from the program: commands by typer, classes by their docstrings."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

__all__ = ["api", "commands"]

WHOLE = ("ipn_core.attention", "ipn_core.hooks", "ipn_core.errors")
"""Modules that are shown besides what `import ipn_core` exports, each with its `__all__`."""


def commands(root: Path) -> str:
    """Return what every command's --help says, as Markdown.

    Raises:
        subprocess.CalledProcessError: the commands cannot be imported.
    """
    words = [sys.executable, "-m", "typer", "ipn_core.cli.app", "utils", "docs", "--name", "ipn"]
    text = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout
    # Its first heading is the page's own.
    return text.partition("\n")[2]


def exports(root: Path) -> dict[str, list[str]]:
    """Return the names that `ipn_core` exports, by module, without importing it."""
    tree = ast.parse((root / "ipn_core" / "__init__.py").read_text(encoding="utf-8"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS"
    )
    return {f"ipn_core.{module}": list(names) for module, names in ast.literal_eval(table).items()}


def api(root: Path) -> str:
    """Return the directives that mkdocstrings fills from the docstrings."""
    parts = ["## `ipn_core`", "`from ipn_core import …`"]
    parts += [f"::: {module}.{name}" for module, names in exports(root).items() for name in names]
    for module in WHOLE:
        options = "    options:\n      heading_level: 2\n      members_order: __all__"
        parts.append(f"::: {module}\n{options}")
    return "\n\n".join(parts)
