"""The Python of the documents runs as it stands there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipn_core.plugins import Registry, add_plugin
from ipn_core.stages import Dims

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


def test_the_interaction_of_hooks_md_says_what_it_needs() -> None:
    needs = run("hooks.md", "class TwoRequests")["TwoRequests"].not_supported_reasons
    dims = Dims(Dv=4, D_in=6, D_hidden=(6, 6), D_out=6, R=2)
    assert needs(None, dims) == []
    said = needs(None, replace(dims, R=1))
    assert said == ["it compares 2 request tokens, layout.request is 1"]


@pytest.mark.weights
def test_the_observer_of_hooks_md_sees_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    run("hooks.md", "class Record")
    assert re.fullmatch(r"torch.Size\(\[1, \d+, \d+\]\)", capsys.readouterr().out.strip())
