"""`ipn demo`: what it refuses, and that it starts and ends in order."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused
from matplotlib.cbook import get_sample_data
from PIL import Image

from ipn_core.cli.demo import _beside, _known, _samples, _samples_beside
from ipn_core.demo.pictures import copy_samples
from ipn_core.hooks import hookimpl
from ipn_core.plugins import Registrar, Registry, add_plugin, discover, get_registry
from ipn_core.testing.browser import served_demo
from ipn_core.weights import Report, Weights

HOPPER = get_sample_data("grace_hopper.jpg", asfileobj=False)


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


def test_without_photographs_that_were_fetched_there_is_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ipn: Callable[..., Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("IPN_STAMPS", str(tmp_path))
    (found,) = _samples(None, "photo", tmp_path)
    assert (found.question, found.model) == ("What is this?", None)
    with Image.open(found.path) as photograph, Image.open(HOPPER) as brought:
        assert photograph.size == brought.size
        shown = photograph.convert("L").histogram()
        assert sum(count > 0 for count in shown) == 256  # of every shade, as no drawing is
    said = capsys.readouterr().err
    assert "fewer pictures to begin with: there are no stamps in" in said
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


def test_without_a_single_photograph_the_page_begins_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IPN_STAMPS", str(tmp_path))
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    assert _samples(None, "photo", tmp_path) == []
    assert "no pictures to begin with: there are no stamps in" in capsys.readouterr().err


@pytest.mark.weights
@pytest.mark.parametrize(
    ("model", "other", "said"),
    [
        ("starter", "photo", "rvii, static: drawings. photo: photographs."),
        ("photo", "starter", "rvii, static: photographs. starter: drawings."),
    ],
)
def test_beside_a_known_model_the_others_are_offered_and_it_is_said_what_each_knows(
    model: str, other: str, said: str, tmp_path: Path
) -> None:
    registry = get_registry()
    (beside,) = _beside(model, registry)
    assert beside.name == other
    assert _known(model, ("rvii", "static"), [beside], registry) == said
    samples = copy_samples(beside, tmp_path, beside=True)
    assert [one.model for one in samples] == (["photo"] if other == "photo" else [])


def test_beside_a_model_of_ones_own_there_is_no_other(tmp_path: Path) -> None:
    registry = get_registry()
    assert _beside(str(tmp_path), registry) == []
    assert _known(str(tmp_path), ("mine",), [], registry) == ""


def test_a_model_whose_weights_are_not_here_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IPN_CACHE", str(tmp_path))
    monkeypatch.delenv("IPN_SMOLLM2", raising=False)
    assert _beside("starter", get_registry()) == []


def test_a_broken_plugin_does_not_keep_the_page_from_opening(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken:
        @hookimpl
        def register(self, registry: Registrar) -> None:
            registry.weights("broken", "no_such_module:WEIGHTS")

    registry = discover()
    add_plugin(registry, "broken", Broken())
    assert "broken" in registry.entries("weights")
    assert "broken" not in [one.name for one in _beside("starter", registry)]
    said = capsys.readouterr().err
    assert "model 'broken' is not offered: weights 'broken' of broken" in said
    assert "cannot be imported from 'no_such_module:WEIGHTS'" in said


class Foreign(Weights):
    """What a stranger's plugin brings."""

    name, description, license, size_bytes, knows = "foreign", "x", "MIT", 1, "maps"

    def __init__(self, raises: str = "") -> None:
        self.raises = raises

    def present(self) -> bool:
        if self.raises == "present":
            raise ZeroDivisionError("present is broken")
        return True

    def pictures(self) -> list[tuple[Path, str]]:
        if self.raises == "pictures":
            raise ZeroDivisionError("pictures is broken")
        return [(Path(HOPPER), "Who?")]

    def fetch(self, report: Report) -> None:
        raise NotImplementedError


def with_foreign(raises: str = "") -> Registry:
    class Plugin:
        @hookimpl
        def register(self, registry: Registrar) -> None:
            registry.weights("foreign", Foreign(raises))

    registry = discover()
    add_plugin(registry, "foreign", Plugin())
    return registry


@pytest.mark.parametrize(
    ("raises", "offered", "note"),
    [
        ("present", False, "model 'foreign' is not offered: weights 'foreign' of plugin foreign"),
        ("pictures", True, "model 'foreign' is offered without its pictures: weights 'foreign' of"),
    ],
)
def test_a_plugin_whose_weights_raise_does_not_keep_the_page_from_opening(
    raises: str, offered: bool, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = with_foreign(raises)
    beside = [one for one in _beside("starter", registry) if one.name == "foreign"]
    assert bool(beside) == offered
    assert _samples_beside(beside, registry, tmp_path) == []
    said = capsys.readouterr().err
    assert note in said
    assert f"failed in {raises}: ZeroDivisionError: {raises} is broken" in said


def test_a_model_that_is_called_as_an_own_strategy_is_not_offered_nor_are_its_pictures(
    tmp_path: Path,
) -> None:
    registry = with_foreign()

    def pictures(own: tuple[str, ...]) -> list[str | None]:
        beside = _beside("starter", registry, own)
        return [one.model for one in _samples_beside(beside, registry, tmp_path)]

    assert "foreign" in pictures(("rvii",))
    assert "foreign" not in pictures(("rvii", "foreign"))


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
