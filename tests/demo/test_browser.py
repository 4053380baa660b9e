"""The page of the starter in headless Chromium: dropped, asked, read, as people do it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image

from ipn_core.testing.browser import (
    DESKTOP,
    PHONE,
    Visitor,
    chromium,
    open_browser,
    served_demo,
)

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
PHOTOGRAPH = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
EXISTS, ROW = "Is there a dog?", "Which row is the dog in?"

FOUND = chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(
        FOUND is None, reason="there is no chromium here: 'make chromium' installs it where it may"
    ),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served_demo("--model", "starter") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert FOUND is not None
    with open_browser(FOUND) as opened:
        yield opened


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    visitors: list[Visitor] = []

    def come(size: tuple[int, int] = DESKTOP) -> Visitor:
        visitors.append(Visitor(browser, address, size))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.close()
        assert visitor.foreign == []
        assert visitor.errors == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_dropped_picture_is_asked_and_the_map_follows_the_question(
    visit: Any, size: tuple[int, int]
) -> None:
    visitor = visit(size)
    visitor.drop(SCENE)
    assert visitor.ask(EXISTS) == "yes"
    (first,) = visitor.maps()
    assert visitor.ask("Is there a bus?") == "no"
    (second,) = visitor.maps()
    assert visitor.ask(ROW) == "four"
    (third,) = visitor.maps()
    assert len({first, second, third}) == 3
    side = visitor.page.locator("#ipn-left")
    for stage in ("perceive", "prefill", "request", "interact", "inject", "decode"):
        assert stage in side.inner_text()
    assert visitor.overflows() == 0


def test_two_strategies_answer_side_by_side(visit: Any) -> None:
    visitor = visit()
    visitor.drop(SCENE)
    visitor.page.locator("#ipn-second").get_by_label("static", exact=True).check()
    assert visitor.ask(EXISTS) == "yes"
    assert visitor.answered("right") in ("yes", "no")
    assert len(visitor.maps("left")) == 1
    assert visitor.maps("right") == []
    assert "keeps no map" in visitor.page.locator("#ipn-right").inner_text()
    left, right = (visitor.page.locator(f"#ipn-{s}").bounding_box() for s in ("left", "right"))
    assert left["x"] + left["width"] <= right["x"] + 1


def test_an_example_is_chosen_and_asked_by_keyboard_alone(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    reached = False
    for _ in range(60):
        page.keyboard.press("Tab")
        reached = page.evaluate("document.activeElement.closest('#ipn-examples') !== null")
        if reached:
            break
    assert reached, "no example is within reach of the Tab key"
    page.keyboard.press("Enter")
    page.locator("#ipn-picture img").wait_for()
    box = page.get_by_label("Question", exact=True)
    page.wait_for_function(
        "document.querySelector('#ipn-question textarea, #ipn-question input').value"
    )
    for _ in range(60):
        if page.evaluate("document.activeElement.closest('#ipn-question') !== null"):
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type(EXISTS)
    page.keyboard.press("Enter")
    assert visitor.answered() in ("yes", "no")
    assert len(visitor.maps()) == 1
    assert box.input_value() == EXISTS


def test_a_file_is_chosen_by_keyboard_alone(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#ipn-picture') !== null"):
            break
    # A browser without a window shows its dialog of files only now and then: that it was told to.
    page.evaluate(
        "document.addEventListener('click', e => {"
        " if (e.target.type === 'file') { window.told = 1; e.preventDefault(); } }, true)"
    )
    page.keyboard.press("Enter")
    page.wait_for_function("window.told === 1")
    page.locator("#ipn-picture input[type=file]").set_input_files(SCENE)
    page.locator("#ipn-picture img").wait_for()
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.type(EXISTS)
    page.keyboard.press("Enter")
    assert visitor.answered() == "yes"


def test_the_page_offers_a_photograph_and_the_model_that_knows_it(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    chosen = page.locator("#ipn-first input:checked")
    assert chosen.input_value() == "rvii"
    assert "rvii, static: drawings. photo: photographs." in page.locator("#ipn-first").inner_text()
    page.locator("#ipn-examples button.gallery-item").last.click()
    page.locator("#ipn-first").get_by_label("photo", exact=True).and_(
        page.locator(":checked")
    ).wait_for()
    assert visitor.ask("What is this?") == "military uniform"
    assert len(visitor.maps()) == 1
    assert page.locator("#ipn-left h2").inner_text() == "photo"
    # A drawing is the starter's again.
    page.locator("#ipn-examples button.gallery-item").first.click()
    page.locator("#ipn-first").get_by_label("rvii", exact=True).and_(
        page.locator(":checked")
    ).wait_for()


def test_a_photograph_is_dropped_and_the_model_photo_asked(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPN_STAMPS", str(tmp_path))  # as where none were fetched
    with served_demo("--model", "photo") as address:
        visitor = Visitor(browser, address)
        offered = visitor.page.locator("#ipn-examples img")
        offered.wait_for()
        assert offered.count() == 1
        assert offered.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
        visitor.drop(PHOTOGRAPH)
        assert visitor.ask("What is this?") == "military uniform"
        (first,) = visitor.maps()
        assert visitor.ask(EXISTS) == "no"
        (second,) = visitor.maps()
        assert first != second
        visitor.close()
        assert visitor.foreign == []
        assert visitor.errors == []


def test_two_visitors_at_once_do_not_mix(visit: Any, tmp_path: Path) -> None:
    Image.open(SCENE).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "turned.png")
    one, two = visit(), visit()
    one.drop(SCENE)
    two.drop(tmp_path / "turned.png")
    for visitor in (one, two):
        visitor.page.get_by_label("Question", exact=True).fill(ROW)
    for visitor in (one, two):
        visitor.press_ask()
    assert one.answered() == "four"
    assert two.answered() == "one"
    assert one.maps() != two.maps()
    assert one.ask(EXISTS) == "yes"
    assert ROW in one.page.locator("#ipn-left").inner_text()
    assert "four" in one.page.locator("#ipn-left .ipn-earlier").inner_text()
    assert two.page.locator("#ipn-left .ipn-earlier").count() == 0
    two.ask("What is in row 1, column 1?")
    assert EXISTS not in two.page.locator("#ipn-left").inner_text()


def test_what_is_wrong_is_said_on_the_page(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    visitor.page.get_by_label("Question", exact=True).fill(EXISTS)
    visitor.press_ask()
    alert = visitor.page.locator("#ipn-left").get_by_role("alert")
    alert.wait_for()
    assert "there is no picture yet" in alert.inner_text()
    Image.new("1", (10_000, 6_000)).save(tmp_path / "bomb.png")
    visitor.drop(tmp_path / "bomb.png")
    visitor.press_ask()
    visitor.page.get_by_text("has 10000×6000 pixels").wait_for()


def test_markup_in_a_question_is_shown_as_text(visit: Any) -> None:
    visitor = visit()
    visitor.drop(SCENE)
    hostile = '<img src=x onerror="window.hit = 1"> Is there a dog?'
    visitor.ask(hostile)
    visitor.ask(EXISTS)
    assert hostile in visitor.page.locator("#ipn-left .ipn-earlier").inner_text()
    assert visitor.page.evaluate("window.hit") is None
