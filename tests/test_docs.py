"""The Python of the documents runs as it stands there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ipn_core.plugins import Registry, add_plugin
from ipn_core.stages import Dims
from ipn_core.tasks import open_task
from ipn_core.training.config import TrainConfig
from ipn_core.training.stream import open_data

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


@pytest.mark.weights
def test_the_answer_of_demo_md_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    first, last = code.strip().rsplit("\n", 1)
    defined: dict[str, Any] = {}
    exec(compile(first, "demo.md", "exec"), defined)
    shown = eval(compile(last, "demo.md", "eval"), defined)._repr_html_()
    assert "<bdi>yes</bdi>" in shown
    assert shown.count("<figure") == 1


def test_the_formats_of_data_md_are_read_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dog.png", "cat.png"):
        Image.new("RGB", (8, 8), "red" if name == "dog.png" else "blue").save(name)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^`([\w.]+)`:\n\n```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for name, content in files.items():
        Path(name).write_text(content, encoding="utf-8")
    found = {name: open_task(name).examples("all") for name in files}
    assert {name: len(examples) for name, examples in found.items()} == {
        "questions.jsonl": 2,
        "conversations.json": 2,
        "documents.jsonl": 1,
    }
    learnt = [
        [turn.text for turn in example.prompt(("images", "text"), learn=True).turns if turn.learn]
        for examples in found.values()
        for example in examples
    ]
    assert learnt == [
        ["a dog"],
        ["dog"],
        ["A dog.", "No."],
        ["A dog."],
        ["The dog barks.", "The cat does not."],
    ]
    run("data.md", "TarWriter")
    (config,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    given = yaml.safe_load(config)
    stages = [{"name": "s", "train": ["inject"], "steps": 1}]
    read = TrainConfig.parse({"model": {}, "stages": stages, **given}, "data.md")
    sources = [open_data(entry, Registry(), read.workers) for entry in read.data]
    window = next(sources[-1].windows("0", None))[1]
    assert [e.answers for e in window.examples] == [("red",), ("blue",)]
    assert len(sources[1].examples) == 2
