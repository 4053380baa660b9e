"""What the page shows, without a browser: each visitor's own."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from toys import picture

from ipn_core import IPN
from ipn_core.checkpoint import open_source
from ipn_core.demo.pictures import draw_samples, read_picture
from ipn_core.demo.sessions import Sessions
from ipn_core.demo.strategies import Strategies
from ipn_core.demo.streams import stream
from ipn_core.demo.visits import LONGEST, Visits
from ipn_core.errors import ImageError, PromptError, UnknownNameError
from ipn_core.file_task import FileTask
from ipn_core.images import KEPT_SIDE
from ipn_core.plugins import get_registry
from ipn_core.testing.checkpoints import save_tiny_model

LOOK, MEAN = "tiny-look", "tiny-mean"


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    registry = get_registry()
    source = open_source(folder, registry)
    return Strategies(IPN.from_pretrained(folder), source, registry)


@pytest.fixture
def visits(strategies: Strategies) -> Visits:
    return Visits(strategies)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    for seed in range(3):
        picture(seed).save(tmp_path / f"{seed}.png")
    return [str(tmp_path / f"{seed}.png") for seed in range(3)]


def last(shown: Iterator[tuple[str, str]]) -> tuple[str, str]:
    return list(shown)[-1]


def test_the_answer_comes_in_pieces_and_is_the_models(
    visits: Visits, strategies: Strategies, paths: list[str]
) -> None:
    shown = [left for left, _ in visits.ask("a", paths[0], "Is it?", LOOK)]
    assert 'data-state="waiting">…' in shown[0]
    said = strategies.get(LOOK).ask(paths[0], "Is it?").text
    assert escape(said) in shown[-1]
    assert 'data-state="done"' in shown[-1]
    assert shown[-1].count("<figure") == 1
    assert "perceive" in shown[-1]


def test_an_answer_grows_word_by_word(visits: Visits, paths: list[str]) -> None:
    """Words are handed on when they end; most answers of random weights are one, some are three."""
    pieces = []
    for number in range(8):
        asked = visits.ask(f"v{number}", paths[0], f"Is it {number}?", LOOK)
        said = [re.findall(r'"ipn-answer".*?<bdi>(.*?)</bdi>', left, re.S) for left, _ in asked]
        growing = list(dict.fromkeys(text for (text,) in filter(None, said)))
        assert all(later.startswith(earlier) for earlier, later in pairwise(growing))
        pieces.append(len(growing))
    assert max(pieces) >= 3


def test_the_map_follows_the_question(visits: Visits, paths: list[str]) -> None:
    one, _ = last(visits.ask("a", paths[0], "Is there a dog?", LOOK))
    two, _ = last(visits.ask("a", paths[0], "Where was a cat?", LOOK))
    drawn = [html.split('src="')[1].split('"')[0] for html in (one, two)]
    assert drawn[0] != drawn[1]


def test_two_strategies_answer_side_by_side(visits: Visits, paths: list[str]) -> None:
    left, right = last(visits.ask("a", paths[0], "Is it?", LOOK, MEAN))
    assert f'data-strategy="{LOOK}"' in left
    assert f'data-strategy="{MEAN}"' in right
    assert "<figure" in left
    assert "keeps no map" in right


def test_the_same_strategy_twice_is_asked_once(visits: Visits, paths: list[str]) -> None:
    assert last(visits.ask("a", paths[0], "Is it?", LOOK, LOOK))[1] == ""


def test_strategies_share_the_language_model(strategies: Strategies) -> None:
    look, mean = strategies.get(LOOK), strategies.get(MEAN)
    assert look.backbone is mean.backbone
    assert look.encoder is mean.encoder
    assert mean.strategy == MEAN
    assert strategies.names == (LOOK, MEAN)
    with pytest.raises(UnknownNameError, match=r"unknown strategy 'tiny-lok'.*did you mean"):
        strategies.get("tiny-lok")


def test_visitors_do_not_see_each_other(visits: Visits, paths: list[str]) -> None:
    last(visits.ask("a", paths[0], "Mine, the first?", LOOK, goes_on=True))
    other, _ = last(visits.ask("b", paths[0], "Another?", LOOK, goes_on=True))
    assert "Mine" not in other
    again, _ = last(visits.ask("a", paths[0], "And then?", LOOK, goes_on=True))
    assert "Mine, the first?" in again
    assert "Another?" not in again
    alone = Visits(visits.strategies)
    fresh, _ = last(alone.ask("c", paths[0], "Another?", LOOK, goes_on=True))
    assert words_of(fresh) == words_of(other)  # the same answer as if nobody else were there


def words_of(html: str) -> str:
    return html.split('role="status">')[1].split("</p>")[0]


def test_a_conversation_is_the_models_dialogue(
    visits: Visits, strategies: Strategies, paths: list[str]
) -> None:
    dialogue = strategies.get(LOOK).dialogue([paths[0]])
    for question in ("Is it?", "And then?"):
        html, _ = last(visits.ask("a", paths[0], question, LOOK, goes_on=True))
        assert escape(dialogue.ask(question).text) in words_of(html)


def test_another_picture_and_starting_over_forget(visits: Visits, paths: list[str]) -> None:
    last(visits.ask("a", paths[0], "First?", LOOK))
    assert "First?" in last(visits.ask("a", paths[0], "Second?", LOOK))[0]
    assert "First?" not in last(visits.ask("a", paths[1], "Third?", LOOK))[0]
    assert visits.forget("a") == ("", "")
    assert "Third?" not in last(visits.ask("a", paths[1], "Fourth?", LOOK))[0]


def test_visitors_at_once_get_their_own_answers(
    visits: Visits, strategies: Strategies, paths: list[str]
) -> None:
    found: dict[int, str] = {}

    def visit(number: int) -> None:
        path = paths[number % 3]
        found[number] = words_of(last(visits.ask(str(number), path, f"Is it {number}?", LOOK))[0])

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    alone = Visits(strategies)
    for number, said in found.items():
        html, _ = last(alone.ask("x", paths[number % 3], f"Is it {number}?", LOOK))
        assert said == words_of(html)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("  ", "the question is empty"),
        (
            "x" * (LONGEST + 1),
            "the question has 2,001 characters; at most 2,000 are read. Shorten it.",
        ),
        ("word " * 150, "fit into the context"),
    ],
)
def test_a_wrong_question_is_told_on_the_page(
    visits: Visits, paths: list[str], question: str, part: str
) -> None:
    html, _ = last(visits.ask("a", paths[0], question, LOOK))
    assert 'role="alert"' in html
    assert part in html
    assert 'data-state="done"' in last(visits.ask("a", paths[0], "Is it?", LOOK))[0]


def test_a_missing_or_wrong_picture_is_told_on_the_page(visits: Visits, tmp_path: Path) -> None:
    assert "no picture yet" in last(visits.ask("a", None, "Is it?", LOOK))[0]
    (tmp_path / "evil.png").write_bytes(b"<svg onload=alert(1)>")
    html, _ = last(visits.ask("a", str(tmp_path / "evil.png"), "Is it?", LOOK))
    assert "the picture is not an image of a kind that is read" in html
    assert str(tmp_path) not in html


def test_what_a_visitor_typed_stays_text(visits: Visits, paths: list[str]) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    last(visits.ask("a", paths[0], hostile, LOOK))
    html, _ = last(visits.ask("a", paths[0], "Then?", LOOK))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;" in html


def test_a_stage_that_fails_is_told_and_hurts_no_other(
    visits: Visits, strategies: Strategies, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("<b>broken</b>")

    with monkeypatch.context() as patch:
        patch.setattr(strategies.get(LOOK).interaction, "forward", fail)
        left, right = last(visits.ask("a", paths[0], "Is it?", LOOK, MEAN))
    assert "stage interact" in left
    assert "&lt;b&gt;broken&lt;/b&gt;" in left
    assert 'data-state="done"' in right
    assert 'data-state="done"' in last(visits.ask("a", paths[0], "Is it?", LOOK))[0]


def test_whoever_was_away_longest_is_forgotten_first() -> None:
    sessions = Sessions(most=2)
    first = sessions.of("a")
    sessions.of("b")
    assert sessions.of("a") is first
    sessions.of("c")
    assert len(sessions) == 2
    assert sessions.of("a") is first
    sessions.drop("a")
    assert sessions.of("a") is not first
    sessions.drop("nobody")


def test_a_reader_who_leaves_ends_the_answer(strategies: Strategies, paths: list[str]) -> None:
    subject = strategies.get(LOOK).about([paths[0]])
    lock = threading.Lock()
    pieces = stream(subject, "Is it?", lock, max_new_tokens=10_000, eos_token_id=-1)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert lock.acquire(timeout=10), "the answer goes on though nobody reads it"
    lock.release()


def test_a_question_that_nobody_waits_for_is_never_asked(
    strategies: Strategies, paths: list[str]
) -> None:
    subject = strategies.get(LOOK).about([paths[0]])
    lock = threading.Lock()
    asked: list[str] = []
    subject.ask = lambda *_, **__: asked.append("asked")  # type: ignore[method-assign, assignment]
    with lock:
        pieces = stream(subject, "Is it?", lock)
        reader = threading.Thread(target=lambda: next(pieces, None), daemon=True)
        reader.start()
        assert not asked
    reader.join(timeout=10)
    assert asked == ["asked"]


def test_large_pictures_are_scaled_down_and_bombs_refused(tmp_path: Path) -> None:
    picture(0, (3000, 30)).save(tmp_path / "wide.png")
    assert read_picture(str(tmp_path / "wide.png")).size == (KEPT_SIDE, 20)
    from PIL import Image

    Image.new("1", (10_000, 6_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match=r"^the picture has 10000×6000 pixels; at most"):
        read_picture(str(tmp_path / "bomb.png"))
    with pytest.raises(PromptError, match="no picture yet"):
        read_picture(None)


def test_samples_are_the_first_pictures_each_with_another_kind_of_question(
    paths: list[str], tmp_path: Path
) -> None:
    import json

    rows = [
        {"image": path, "question": f"{kind}?", "answer": "yes", "type": kind}
        for path in paths
        for kind in ("one", "two", "three")
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "samples"
    folder.mkdir()
    found = draw_samples(FileTask(str(tmp_path / "some.jsonl")), folder, count=2)
    assert [sample.question for sample in found] == ["one?", "two?"]
    assert sorted(p.name for p in folder.iterdir()) == ["example-1.png", "example-2.png"]


def test_samples_prefer_pictures_whose_questions_are_of_another_kind(
    paths: list[str], tmp_path: Path
) -> None:
    import json

    kinds = ("name", "name", "name", "side")
    rows = [
        {"image": path, "question": f"{kind} {number}?", "answer": "yes", "type": kind}
        for number, (path, kind) in enumerate(zip(paths * 2, kinds, strict=False))
    ]
    assert len(paths) >= 2
    for number, row in enumerate(rows):
        copy = tmp_path / f"{number}.png"
        copy.write_bytes(Path(str(row["image"])).read_bytes())
        row["image"] = str(copy)
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "samples"
    folder.mkdir()
    found = draw_samples(FileTask(str(tmp_path / "some.jsonl")), folder, count=2)
    assert [sample.question for sample in found] == ["name 0?", "side 3?"]


def test_another_model_is_offered_beside_the_strategies(
    tmp_path: Path, strategies: Strategies, paths: list[str]
) -> None:
    registry = get_registry()
    folder = save_tiny_model(tmp_path)
    for name in (LOOK, MEAN):  # that its answers can be told from the first model's
        state = load_file(folder / name / "model.safetensors")
        state = {key: value + 1 for key, value in state.items()}
        save_file(state, folder / name / "model.safetensors", {"format": "pt"})
    other = str(folder)
    both = Strategies(strategies.get(LOOK), open_source(other, registry), registry, [other, MEAN])
    assert (both.own, both.others) == ((LOOK, MEAN), (other,))
    assert both.names == (LOOK, MEAN, other)
    second = both.get(other)
    assert second.strategy == LOOK
    assert second is not both.get(LOOK)
    visits = Visits(both)
    alone = IPN.from_pretrained(other)
    said = {one.ask(paths[0], "Is it?").text for one in (alone, both.get(LOOK))}
    assert len(said) == 2
    for name, model in ((LOOK, both.get(LOOK)), (other, alone), (LOOK, both.get(LOOK))):
        html, _ = last(visits.ask("a", paths[0], "Is it?", name))
        assert escape(model.ask(paths[0], "Is it?").text) in words_of(html)
        assert f'data-strategy="{escape(name)}"' in html
