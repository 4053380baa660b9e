"""The Python of the documents runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ipn_core.plugins import Registry, add_plugin

ROOT = Path(__file__).parents[1]


def run(document: str, containing: str) -> dict[str, Any]:
    """Run the one block of Python that contains a text; returns what it defines."""
    fenced = r"^```python\n(.*?)^```$"
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    (code,) = [b for b in re.findall(fenced, text, re.DOTALL | re.MULTILINE) if containing in b]
    defined: dict[str, Any] = {"__name__": "film"}
    exec(compile(code, document, "exec"), defined)
    return defined


def test_the_plugin_of_hooks_md_registers_what_it_names(registry: Registry) -> None:
    told = run("hooks.md", "def register(registry)")["register"]
    plugin = type("Plugin", (), {"register": staticmethod(told)})
    add_plugin(registry, "my-film", plugin)
    assert registry.get("interaction", "my-film").target == "ipn_my_film.film:FiLM"
    assert registry.get("strategy", "my-film").load()["interact"] == "my-film"


@pytest.mark.weights
def test_the_observer_of_hooks_md_sees_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    run("hooks.md", "class Record")
    assert re.fullmatch(r"torch.Size\(\[1, \d+, \d+\]\)", capsys.readouterr().out.strip())
