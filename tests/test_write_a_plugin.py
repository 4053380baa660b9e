"""The page `docs/write-a-plugin.md` works as it stands: its package installs, tests and trains."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from outside import IPN, files, install, run, write

from ipn_core.scaffold import KINDS, Package

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
FILES = files(PAGE)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, and its package installed in `site`."""
    folder = tmp_path_factory.mktemp("outside")
    places = {name: name if name == "film.yaml" else f"ipn-my-film/{name}" for name in FILES}
    write({places[name]: text for name, text in FILES.items()}, folder)
    install(folder / "ipn-my-film", folder / "site")
    return folder


def inside(outside: Path, *command: str) -> str:
    return run(list(command), outside, outside / "site")


def test_its_code_is_under_forty_lines() -> None:
    code = [text for name, text in FILES.items() if name.endswith(".py")]
    assert len(code) == 3  # what it registers, the interaction, and its test
    lines = [line for text in code for line in text.splitlines() if line.strip()]
    assert len(lines) < 40


def test_the_short_way_leads_to_the_same_places() -> None:
    (kind, name) = re.findall(r"^ipn new (\S+) (\S+)$", PAGE, re.MULTILINE)[0]
    assert Package(kind, name).files()
    assert all(f"`{other}`" in PAGE for other in set(KINDS) - {kind})
    mine = {place.replace("ipn_my_film", "ipn_film") for place in FILES if place != "film.yaml"}
    assert mine == set(Package(kind, "film").files()) - {"README.md", "train.yaml"}
    for command in ("pip install -e", "pytest"):
        assert f"\n{command} {Package(kind, 'my-film').distribution}\n" in PAGE


@pytest.mark.slow
def test_the_package_is_found_with_its_distribution(outside: Path) -> None:
    found = json.loads(inside(outside, IPN, "plugins", "--json"))
    (mine,) = [p for p in found["plugins"] if p["distribution"] == "ipn-my-film"]
    assert mine["version"] == "0.1.0"
    assert "my-film" in json.dumps(mine)


@pytest.mark.slow
def test_the_package_passes_its_own_test(outside: Path) -> None:
    told = inside(outside, sys.executable, "-m", "pytest", "-q", "ipn-my-film")
    assert re.search(r"1\d passed, 1 skipped", told)


@pytest.mark.slow
@pytest.mark.weights
def test_the_package_trains_and_answers(outside: Path) -> None:
    less = ["stages.align.steps=20", "stages.instruct.steps=3"]
    inside(outside, IPN, "train", "film.yaml", *less, "--out", "runs/film")
    picture = str(ROOT / "examples" / "scene.png")
    ask = ["ask", picture, "Is there a dog?", "--model", "runs/film/model"]
    answer = json.loads(inside(outside, IPN, *ask, "--interact", "my-film", "--json"))
    assert answer["interact"] == "my-film"
    assert answer["tokens"]["dynamic"] == 3
    assert answer["answer"]
