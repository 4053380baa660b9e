"""An answer as HTML: all of what was read, nothing of what a user wrote as markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import picture, prompt_of, toy_model

from ipn_core import IPN, Answer
from ipn_core.answer import Asked
from ipn_core.plugins import Registry
from ipn_core.showing.fragments import looks, seconds_bar, style, whereabouts
from ipn_core.showing.tokens import segments_of
from ipn_core.showing.trace import trace_page

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'--></style></title><svg onload=alert(1)>",
    "<img-q> <img-d> </bdi></p></main>",
    "\u202e dlrow olleh &lt;b&gt; &amp;",
    "javascript:alert(1) {{7*7}} ${7*7}",
    "null \0 byte, and ]]> <!-- <![CDATA[",
]


class Reader(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", {}))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def model(registry: Registry) -> IPN:
    return toy_model(registry, "tiny-look", rounds=2).eval()


def shape(html: str) -> list[tuple[str, list[str]]]:
    """The elements and their attributes' names: what markup there is, whatever the words."""
    return [(tag, sorted(attributes)) for tag, attributes in Reader(html).elements]


def test_a_notebook_shows_picture_map_answer_and_seconds(model: IPN) -> None:
    answer = model.ask(picture(1, (48, 24)), "Is there a dog?", max_new_tokens=4)
    html = answer._repr_html_()
    read = Reader(html)
    assert read.count("img") == 2  # one a look
    assert "Is there a dog?" in read.text
    assert answer.text in read.text
    for stage in ("perceive", "prefill", "request", "interact", "inject", "decode"):
        assert re.search(rf"{stage} [\d.,]+ ms", read.text), stage
    assert not [tag for tag, _ in read.elements if tag in ("script", "link", "iframe")]
    assert len(html) < 100_000


def test_a_notebook_shows_the_picture_where_there_is_no_map(registry: Registry) -> None:
    answer = toy_model(registry, "toy-static").eval().ask(picture(), "Hm?", max_new_tokens=2)
    read = Reader(answer._repr_html_())
    assert read.count("img") == 1
    assert read.count("figure") == 0


def test_a_picture_that_is_gone_is_left_out(model: IPN, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    answer = model.ask(tmp_path / "a.png", "Hm?", max_new_tokens=2)
    assert Reader(answer._repr_html_()).count("img") == 2
    (tmp_path / "a.png").unlink()
    read = Reader(answer._repr_html_())
    assert read.count("img") == 0
    assert answer.text in read.text


def test_an_answer_made_by_hand_is_shown(model: IPN) -> None:
    assert "dog" in Reader(Answer("dog", (1,))._repr_html_()).text


def test_answers_of_a_batch_know_their_own_pictures(model: IPN) -> None:
    first, second = model.generate([prompt_of(0, 1), prompt_of(1, 2)], max_new_tokens=2)
    assert len(first.asked.images) == len(first.asked.boxes) == 1
    assert len(second.asked.images) == len(second.asked.boxes) == 2
    assert Reader(second._repr_html_()).count("img") == 4


def test_dialogues_and_subjects_know_their_pictures(model: IPN) -> None:
    subject, dialogue = model.about([picture()]), model.dialogue([picture()])
    for question in ("One?", "Two?"):
        for asker in (subject, dialogue):
            answer = asker.ask(question, max_new_tokens=2)
            assert answer.asked.question == question
            assert len(looks(answer, [picture()])) == 2


def test_features_that_are_no_places_have_no_map(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(registry, "tiny-look").eval()
    monkeypatch.setattr(type(model.encoder), "placed", False)
    answer = model.ask(picture(), "Hm?", max_new_tokens=2)
    assert answer.asked.boxes == ()
    assert Reader(answer._repr_html_()).count("figure") == 0
    assert "no places in these pictures" in Reader(trace_page(model, answer)).text


def test_the_map_lies_where_the_encoder_saw(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(registry, "tiny-look").eval()
    monkeypatch.setattr(type(model.encoder), "shows", lambda self, size: (0.25, 0.0, 0.75, 1.0))
    answer = model.ask(picture(), "Hm?", max_new_tokens=2)
    assert answer.asked.boxes == ((0.25, 0.0, 0.75, 1.0),)


def test_the_trace_holds_every_position_once(model: IPN) -> None:
    answer = model.ask(picture(), "Is there a dog?", max_new_tokens=5)
    segments = segments_of(model, answer)
    assert len(segments) == 3  # two looks
    assert [segment[-1].kind for segment in segments[:-1]] == ["request", "request"]
    read = [one for segment in segments for one in segment]
    positions = sum(one.positions for one in read)
    assert positions == sum(answer.tokens.values())
    assert [one.positions for one in segments[-1]][-2:] == [1, 0]  # no forward reads the last id
    assert [one.text for one in segments[-1] if one.kind == "answer"]
    text = "".join(one.text for one in read if one.kind == "text")
    assert "Is there a dog?" in text


def test_the_trace_of_static_tokens_counts_them(registry: Registry) -> None:
    model = toy_model(registry, "toy-both").eval()
    answer = model.ask(picture(1, (48, 24)), "Hm?", max_new_tokens=2)
    (static,) = [r for s in segments_of(model, answer) for r in s if r.kind == "static"]
    assert static.positions == answer.tokens["static"] == 18


def test_the_trace_has_the_looks_that_the_model_took_by_itself(registry: Registry) -> None:
    model = toy_model(
        registry, "tiny-look", layout={"look_again": 2, "look_threshold": 1e-9}
    ).eval()
    answer = model.ask(picture(), "Hm?", max_new_tokens=4)
    assert len(answer.looked) == 2
    read = [one for segment in segments_of(model, answer) for one in segment]
    assert sum(one.kind == "request" for one in read) == 3
    page = Reader(trace_page(model, answer))
    assert page.count("figure") == 3


def test_the_trace_is_one_file_that_fetches_nothing(model: IPN) -> None:
    answer = model.ask(picture(), "Is there a dog?", max_new_tokens=5)
    html = trace_page(model, answer)
    read = Reader(html)
    assert read.count("img") == 3  # the picture, and it under each look
    assert not [tag for tag, _ in read.elements if tag in ("script", "link", "iframe", "object")]
    sources = [attributes["src"] or "" for tag, attributes in read.elements if tag == "img"]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http:" not in html
    assert "https:" not in html
    policy = next(a for t, a in read.elements if t == "meta" and "http-equiv" in a)
    assert (policy["content"] or "").startswith("default-src 'none'")
    counts = [int(n) for n in re.findall(r"segment \d: (\d+) positions", read.text)]
    assert len(counts) == 3
    assert sum(counts) == sum(answer.tokens.values())
    unread = [a for tag, a in read.elements if "ipn-unread-token" in (a.get("class") or "")]
    assert [one["title"] for one in unread] == ["the last one: nothing reads it"]


def test_the_box_of_a_token_is_not_torn_at_the_end_of_a_line() -> None:
    (rule,) = re.findall(r"^\.ipn-token, \.ipn-slot \{(.*?)\}", style(), re.DOTALL | re.MULTILINE)
    assert "display: inline-block;" in rule


@pytest.mark.parametrize("words", HOSTILE)
def test_what_a_user_typed_stays_text(model: IPN, words: str) -> None:
    plain = model.ask(picture(), "Hm?", max_new_tokens=2)
    plain = replace(plain, text="x", asked=replace(plain.asked, question="Hm?"))
    hostile = replace(plain, text=words, asked=replace(plain.asked, question=words))
    assert shape(hostile._repr_html_()) == shape(plain._repr_html_())
    assert words.replace("\0", "") in Reader(hostile._repr_html_()).text.replace("\0", "")
    page = trace_page(model, hostile)
    bare = shape(trace_page(model, plain))
    allowed = {tag for tag, _ in bare}
    assert {tag for tag, _ in shape(page)} <= allowed
    kept = [one for one in shape(page) if one[0] not in ("span", "bdi")]
    assert kept == [one for one in bare if one[0] not in ("span", "bdi")]


def test_a_model_called_like_markup_stays_text(registry: Registry) -> None:
    model = toy_model(registry, "tiny-look").eval()
    model.name = "<b>model</b>"
    answer = model.ask(picture(), "Hm?", max_new_tokens=2)
    assert "<b>model</b>" in Reader(trace_page(model, answer)).text


def test_bars_of_one_scale_can_be_compared() -> None:
    seconds = {"perceive": 0.1, "prefill": 0.1, "total": 0.2}
    whole, half = (
        [float(width) for width in re.findall(r"width:([\d.]+)%", seconds_bar(seconds, longest))]
        for longest in (None, 0.4)
    )
    assert sum(whole) == pytest.approx(100)
    assert sum(half) == pytest.approx(50)
    assert seconds_bar({}) != ""


@pytest.mark.parametrize(
    ("peak", "words"),
    [
        ((0, 0), "at the upper left"),
        ((1, 1), "in the middle"),
        ((2, 1), "at the bottom"),
        ((1, 2), "on the right"),
    ],
)
def test_where_a_map_is_strongest_is_said_in_words(peak: tuple[int, int], words: str) -> None:
    values = np.zeros((3, 3), np.float32)
    values[peak] = 1
    assert whereabouts(values) == words


def test_a_map_of_one_row_has_no_upper_side() -> None:
    assert whereabouts(np.float32([[0, 0, 1]])) == "on the right"
    assert whereabouts(np.float32([[1]])) == "in the middle"


def test_maps_of_crops_are_not_laid_over_the_picture() -> None:
    maps = torch.zeros(1, 1, 8)
    answer = Answer(
        "x", (1,), maps[0], maps, ((2, 2), (2, 2)), asked=Asked("q", (), ((0, 0, 1, 1),))
    )
    assert looks(answer, [Image.new("RGB", (8, 8))]) == []
