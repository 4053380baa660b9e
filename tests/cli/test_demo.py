"""`ipn demo`: what it refuses, and that it starts and ends in order."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused
from PIL import Image

from ipn_core.cli.demo import _samples
from ipn_core.testing.browser import served_demo


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--model", "startr"), ("startr", "did you mean 'starter'?")),
        (("--examples", "emoji-scene"), ("unknown task 'emoji-scene'", "'emoji-scenes'?")),
        (("--interact", "rvi"), ("no trained weights for interaction 'rvi'", "'rvii'?")),
        (("--max-upload", "0"), ("--max-upload",)),
        (("--share",), ("--share",)),
    ],
)
def test_wrong_words_are_refused(
    words: tuple[str, ...], parts: tuple[str, ...], ipn: Callable[..., Run]
) -> None:
    assert_refused(ipn("demo", "--port", "0", *words), *parts)


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_refused(
        ipn("demo", "--port", "0"), "ipn demo needs a package", "pip install 'ipn-core[demo]'"
    )


def test_photographs_that_were_not_fetched_are_missed_only_by_who_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ipn: Callable[..., Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("IPN_STAMPS", str(tmp_path))
    assert _samples(None, "photo", tmp_path) == []
    said = capsys.readouterr().err
    assert "no pictures to begin with: there are no stamps in" in said
    assert "python -m ipn_names.stamps" in said
    assert_refused(ipn("demo", "--port", "0", "--examples", "photo-stamps"), "there are no stamps")


def test_photographs_that_were_fetched_are_there_to_begin_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    captions = {"animals/dog": "A dog.", "animals/frog": "A frog.", "food/lemon": "A lemon.",
                "household/mug": "A mug.", "vehicles/bus": "A bus.", "clothes/hat": "A hat.",
                "household/clock": "A clock.", "household/lamp": "A lamp."}  # fmt: skip
    for name, caption in captions.items():
        path = tmp_path / "stamps" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(path)
        path.with_suffix(".txt").write_text(caption)
    monkeypatch.setenv("IPN_STAMPS", str(tmp_path / "stamps"))
    found = _samples(None, "photo", tmp_path)
    assert len(found) == 4
    assert all(Image.open(one.path).size in {(40, 30), (480, 240), (240, 480)} for one in found)
    assert found[0].question == "What is this?"
    assert len({one.question for one in found}) == 4


def test_pictures_to_begin_with_are_those_that_a_known_model_knows(tmp_path: Path) -> None:
    found = _samples(None, "starter", tmp_path)
    assert len(found) == 4
    assert all(Path(one.path).is_file() for one in found)
    assert len({one.question for one in found}) == 4
    assert _samples(None, str(tmp_path), tmp_path) == []


@pytest.mark.slow
@pytest.mark.weights
def test_the_page_is_served_at_this_machine_alone_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served_demo() as address:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as response:
            assert b"Ask a picture" in response.read()
        assert list(tmp_path.glob("ipn-demo-*/example-1.png"))
    assert not list(tmp_path.glob("ipn-demo-*"))
