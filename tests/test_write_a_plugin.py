"""The page `docs/write-a-plugin.md` works as it stands: its package installs, tests and trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
IPN = [str(Path(sys.executable).parent / "ipn")]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, and its package installed in `site`."""
    folder = tmp_path_factory.mktemp("outside")
    for name, text in FILES.items():
        path = folder / name if name == "film.yaml" else folder / "ipn-my-film" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--disable-pip-version-check", "--target", "site", "./ipn-my-film"]
    run(folder, pip)
    return folder


def run(folder: Path, command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_its_code_is_under_forty_lines() -> None:
    code = [text for name, text in FILES.items() if name.startswith("src/")]
    assert len(code) == 2
    lines = [line for text in code for line in text.splitlines() if line.strip()]
    assert len(lines) < 40


def test_the_package_is_found_with_its_distribution(outside: Path) -> None:
    found = json.loads(run(outside, [*IPN, "plugins", "--json"]))
    (mine,) = [p for p in found["plugins"] if p["distribution"] == "ipn-my-film"]
    assert mine["version"] == "0.1.0"
    assert "my-film" in json.dumps(mine)


def test_the_package_passes_its_own_test(outside: Path) -> None:
    told = run(outside, [sys.executable, "-m", "pytest", "-q", "ipn-my-film"])
    assert re.search(r"1\d passed, 1 skipped", told)


@pytest.mark.slow
@pytest.mark.weights
def test_the_package_trains_and_answers(outside: Path) -> None:
    less = ["stages.align.steps=20", "stages.instruct.steps=3"]
    run(outside, [*IPN, "train", "film.yaml", *less, "--out", "runs/film"])
    picture = str(ROOT / "examples" / "scene.png")
    ask = ["ask", picture, "Is there a dog?", "--model", "runs/film/model"]
    answer = json.loads(run(outside, [*IPN, *ask, "--interact", "my-film", "--json"]))
    assert answer["interact"] == "my-film"
    assert answer["tokens"]["dynamic"] == 3
    assert answer["answer"]
