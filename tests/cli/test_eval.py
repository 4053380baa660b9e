from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused
from PIL import Image

from ipn_core import IPN, hookimpl
from ipn_core.evaluation.predictions import read_verdicts
from ipn_core.plugins import add_plugin, get_registry


def test_eval_json_of_a_file(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--json")
    assert run.code == 0
    found = json.loads(run.out)
    assert list(found) == ["task", "split", "n", "accuracy", "ci95", "by_type", "seconds"]
    assert (found["task"], found["split"], found["n"]) == (str(home / "some.jsonl"), "all", 6)
    assert {t: row["n"] for t, row in found["by_type"].items()} == {"exist": 4, "other": 2}
    assert list(found["by_type"]["exist"]) == ["n", "accuracy", "ci95"]


def test_eval_limit_shuffled_and_table(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--limit", "2", "--shuffled")
    assert run.code == 0
    for part in ("exist", "all", "guessing", "95 % interval", "requests shuffled"):
        assert part in run.out
    assert "other " not in run.out
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--shuffled", "--json")
    assert json.loads(run.out)["guess"]["accuracy"] == 1.0


def test_eval_of_a_registered_task(home: Path, ipn: Callable[..., Run]) -> None:
    from ipn_core import Example, Picture, Task

    class Toy(Task):
        splits = ("test", "hard")

        def examples(self, split: str) -> list[Example]:
            self.check_split(split)
            image = Picture("p", lambda: Image.new("RGB", (9, 9)))
            return [Example(f"{split} {i}?", ("yes",), (image,)) for i in range(3)]

    class Plugin:
        @hookimpl
        def register(self, registry: object) -> None:
            registry.task("toy-cli-task", Toy)  # type: ignore[attr-defined]

    if "toy-cli-task" not in get_registry().entries("task"):
        add_plugin(get_registry(), "toy-cli", Plugin())
    model = ("-m", home / "model", "--json")
    assert json.loads(ipn("eval", "toy-cli-task", *model).out)["split"] == "test"
    assert json.loads(ipn("eval", "toy-cli-task", "--split", "hard", *model).out)["n"] == 3
    assert_refused(ipn("eval", "toy-cli-task", "--split", "hart"), "did you mean 'hard'?")
    assert_refused(ipn("eval", "toy-cli-tsk"), "unknown task", "did you mean 'toy-cli-task'?")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object, got list"),
        ('{"image": "scene.png", "question": "q"}', "line 2: 'answer' must be"),
        ('{"image": "scene.png", "question": "", "answer": "a"}', "line 2: 'question' must be"),
        ('{"image": "none.png", "question": "q", "answer": "a"}', "line 2: no such image"),
        ('{"imag": "x", "question": "q", "answer": "a"}', "did you mean 'image'?"),
    ],
)
def test_a_malformed_line_is_named(
    line: str, part: str, home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    shutil.copy(home / "scene.png", tmp_path / "scene.png")
    good = '{"image": "scene.png", "question": "q", "answer": "a"}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    assert_refused(ipn("eval", tmp_path / "bad.jsonl", "-m", home / "model"), part, "bad.jsonl")


def test_eval_names_a_file_that_is_not_there(ipn: Callable[..., Run]) -> None:
    assert_refused(ipn("eval", "none.jsonl"), "no such file: 'none.jsonl'")


def test_eval_names_the_line_of_a_picture_that_does_not_decode(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    shutil.copy(home / "scene.png", tmp_path / "scene.png")
    (tmp_path / "text.png").write_text("no picture")
    rows = [{"image": image, "question": "q", "answer": "a"} for image in ("scene.png", "text.png")]
    # A byte order mark, as editors on Windows write one.
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    # The model does not exist: had it been looked for, it would be what is missed.
    words = ("eval", tmp_path / "a.jsonl", "-m", tmp_path / "none")
    assert_refused(ipn(*words), "a.jsonl' line 2: ", "text.png' is not an image")
    # What is not asked about need not be a picture.
    assert_refused(ipn(*words, "--limit", "1"), "unknown model")


def test_eval_names_the_question_that_is_too_long(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    row = {"image": str(home / "scene.png"), "question": "q", "answer": "a"}
    rows = [row, {**row, "question": "How many dogs " * 100 + "?"}, row]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = ipn("eval", tmp_path / "a.jsonl", "-m", home / "model")
    assert_refused(run, "the prompt of 'How many dogs How many", "fit into the context")


def test_eval_of_a_name_too_long_for_a_file(ipn: Callable[..., Run]) -> None:
    assert_refused(ipn("eval", "x" * 5000), "unknown task 'xxx")
    assert_refused(ipn("eval", "x" * 5000 + ".jsonl"), "cannot be read (File name too long)")


# -- against another model, and files of answers ---------------------------------------------------


@pytest.fixture
def graded(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions of which tiny-look answers five of six rightly; answers are eight tokens long."""
    monkeypatch.setattr("ipn_core.evaluation.evaluate._tokens_needed", lambda *_: 8)
    model = IPN.from_pretrained(home / "model")
    rows = [json.loads(line) for line in (home / "some.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row["answer"] = model.ask(home / row["image"], row["question"], max_new_tokens=8).text
    path = home / "graded.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_eval_against_another_strategy_of_the_same_model(
    home: Path, graded: Path, ipn: Callable[..., Run]
) -> None:
    words = ("eval", graded, "-m", home / "model")
    alone = json.loads(ipn(*words, "--json").out)
    theirs = json.loads(ipn(*words, "-i", "tiny-mean", "--json").out)
    run = ipn(*words, "--against-interact", "tiny-mean", "--json")
    assert run.code == 0
    found = json.loads(run.out)
    assert list(found) == [*alone, "against"]
    against = found["against"]
    assert (against["model"], against["interact"]) == (str(home / "model"), "tiny-mean")
    assert found["accuracy"] == alone["accuracy"] == pytest.approx(5 / 6)
    assert against["accuracy"] == theirs["accuracy"] < 5 / 6
    assert against["difference"] == pytest.approx(found["accuracy"] - against["accuracy"])
    assert against["only_ours"] - against["only_theirs"] == round(6 * against["difference"])
    assert 0 < against["p"] <= 1
    low, high = against["difference_ci95"]
    assert low <= against["difference"] <= high
    assert {t: row["n"] for t, row in against["by_type"].items()} == {"exist": 4, "other": 2}


def test_eval_against_a_model_shows_a_table_of_both(
    home: Path, graded: Path, ipn: Callable[..., Run]
) -> None:
    other = home / "model" / "tiny-mean"
    run = ipn("eval", graded, "-m", home / "model", "--against", other)
    assert run.code == 0
    said = " ".join(run.out.split())  # a title with a long path has lines of its own
    scores, _, differences = said.partition("first minus other, in points")
    for part in ("83.3%", "against", "with tiny-mean", "other", "95 % interval", "exist"):
        assert part in scores
    for part in ("difference", "95 % interval", "only other", "exist", "+", "McNemar"):
        assert part in differences
    assert "from resampling 2 pictures, too few to trust it" in differences
    assert "…" not in run.out


def test_a_table_of_one_picture_and_of_questions_without_a_type(
    home: Path, ipn: Callable[..., Run]
) -> None:
    rows = [json.loads(line) for line in (home / "some.jsonl").read_text().splitlines()][:3]
    del rows[0]["type"]
    (home / "untyped.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("eval", home / "untyped.jsonl", "-m", home / "model")
    run = ipn(*words, "--against-interact", "tiny-mean")
    assert run.code == 0
    # In both tables one row for the questions without a type, and one for all.
    assert run.out.count("│ all ") == 4
    assert "from resampling the questions about one picture, too few" in run.out


def test_eval_against_itself_is_no_difference(
    home: Path, graded: Path, ipn: Callable[..., Run]
) -> None:
    run = ipn("eval", graded, "-m", home / "model", "--against", home / "model", "--json")
    against = json.loads(run.out)["against"]
    assert (against["difference"], against["difference_ci95"], against["p"]) == (0, [0, 0], 1)
    assert against["interact"] == "tiny-look"


def test_eval_against_untrained_weights_needs_to_be_asked_for(
    home: Path, ipn: Callable[..., Run]
) -> None:
    only = home / "model" / "tiny-look"
    words = ("eval", home / "some.jsonl", "-m", only, "--against-interact", "tiny-mean")
    assert_refused(ipn(*words), "no trained weights for interaction 'tiny-mean'")
    run = ipn(*words, "--untrained", "--json")
    assert run.code == 0
    assert json.loads(run.out)["against"]["interact"] == "tiny-mean"
    assert "random" in run.err


def test_eval_writes_every_answer(
    home: Path, graded: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    target = tmp_path / "answers.jsonl"
    run = ipn("eval", graded, "-m", home / "model", "--predictions", target, "--json")
    assert run.code == 0
    assert str(target) in run.err
    verdicts = read_verdicts(target)
    assert sum(v.right for v in verdicts) == 5
    assert [v.type for v in verdicts] == ["exist", "exist", "other"] * 2
    assert verdicts[0].question == "Is there a dog?"
    assert verdicts[0].answers == ("yes", "y")
    assert [Path(v.pictures[0]).name for v in verdicts] == ["scene.png"] * 3 + ["other.png"] * 3
    assert verdicts[1].text == verdicts[1].answers[0]
    assert verdicts[0].against is None
    more = ("--against-interact", "tiny-mean", "--limit", "4", "--predictions", target, "--json")
    found = json.loads(ipn("eval", graded, "-m", home / "model", *more).out)
    both = read_verdicts(target)
    assert [v.text for v in both] == [v.text for v in verdicts[:4]]
    theirs = [v.against.right for v in both if v.against]
    assert sum(theirs) == round(4 * found["against"]["accuracy"])


def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    questions = tmp_path / "some.jsonl"
    shutil.copy(home / "some.jsonl", questions)
    shutil.copy(home / "scene.png", tmp_path)
    shutil.copy(home / "other.png", tmp_path)
    # The model does not exist either: had it been looked for, it would be what is missed.
    words = ("eval", questions, "-m", tmp_path / "none")
    for target, part in (
        (tmp_path / "no" / "a.jsonl", "there is no folder"),
        (tmp_path, "is a folder. Give the name of a JSONL file in it"),
        (questions, "is the file of questions"),
        ("x" * 300, "than a file's name can be"),
        ("/dev/null", "is no ordinary file"),
        ("", "names no file"),
    ):
        assert_refused(ipn(*words, "--predictions", target), "--predictions", part)
    assert_refused(
        ipn(*words, "--shuffled", "--against", "starter"), "--shuffled goes with no --against"
    )
    for nothing in ("", " "):
        refused = ipn(*words, "--against", nothing)
        assert_refused(refused, f"--against '{nothing}' names no model. See 'ipn models")
    assert questions.read_text() == (home / "some.jsonl").read_text()


def test_the_other_model_is_looked_for_before_the_first_question(
    home: Path, tmp_path: Path, ipn: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ipn_core.evaluation.evaluate as module

    monkeypatch.setattr(module, "evaluate", lambda *a, **k: pytest.fail("it was asked"))
    words = ("eval", home / "some.jsonl", "-m", home / "model")
    assert_refused(ipn(*words, "--against", tmp_path / "none"), str(tmp_path / "none"))
    assert_refused(ipn(*words, "--against-interact", "tiny-men"), "did you mean 'tiny-mean'?")
