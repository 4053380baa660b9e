from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ipn_core import Example, Picture
from ipn_core.errors import DataError, IPNError
from ipn_core.evaluation.against import Pairs, compare_reports
from ipn_core.evaluation.evaluate import Prediction, Report
from ipn_core.evaluation.predictions import (
    Reply,
    Verdict,
    read_verdicts,
    verdicts_of,
    write_verdicts,
)
from ipn_core.evaluation.scoring import Score
from ipn_core.evaluation.statistics import bootstrap_difference, mcnemar, wilson

PICTURES = 12
"""Each with four questions: two of type "exist", two of type "where"."""


def report(right: list[bool]) -> Report:
    """A report in which the verdicts stand in the order of the pictures, four for each."""
    predictions = tuple(
        Prediction(
            Example(
                f"question {i}",
                ("yes", "Yep"),
                # Made anew for each report: the same picture is one of the same name.
                (Picture(f"picture {i // 4}", lambda: None),),  # type: ignore[arg-type, return-value]
                ("exist", "where")[i % 2],
            ),
            "yes" if verdict else "perhaps",
            verdict,
        )
        for i, verdict in enumerate(right)
    )
    score = Score.of(right)
    by_type = {t: Score.of(right[i::2]) for i, t in enumerate(("exist", "where"))}
    n, accuracy, ci95 = score.n, score.accuracy, score.ci95
    return Report("toy", "test", n, accuracy, ci95, by_type, 1.5, predictions)


OURS = [i % 5 != 0 for i in range(4 * PICTURES)]
THEIRS = [i % 4 != 0 and i < 40 for i in range(4 * PICTURES)]


def test_two_reports_are_compared_in_all_and_by_type() -> None:
    found = compare_reports(report(OURS), report(THEIRS), model="other", interact="static", seed=3)
    assert (found.model, found.interact, found.seconds) == ("other", "static", 1.5)
    clusters = [i // 4 for i in range(len(OURS))]
    assert found.whole.ours == Score.of(OURS)
    assert found.whole.theirs == Score.of(THEIRS)
    assert found.whole.difference == bootstrap_difference([OURS], [THEIRS], clusters, seed=3)
    assert found.whole.p == mcnemar(OURS, THEIRS)
    for index, name in enumerate(("exist", "where")):
        ours, theirs = OURS[index::2], THEIRS[index::2]
        expected = bootstrap_difference([ours], [theirs], clusters[index::2], seed=3)
        assert found.by_type[name].difference == expected
        assert found.by_type[name].p == mcnemar(ours, theirs)
    kinds = found.by_type.values()
    assert sum(pairs.only_ours for pairs in kinds) == found.whole.only_ours
    assert sum(pairs.only_theirs for pairs in kinds) == found.whole.only_theirs


def test_the_json_of_a_comparison() -> None:
    found = compare_reports(report(OURS), report(THEIRS), model="m", interact="film").to_json()
    assert json.loads(json.dumps(found)) == found
    both = ["n", "accuracy", "ci95", "difference", "difference_ci95", "p"]
    both += ["only_ours", "only_theirs", "clusters"]
    assert list(found) == ["model", "interact", *both, "by_type", "seconds"]
    assert list(found["by_type"]["exist"]) == both
    assert found["accuracy"] == sum(THEIRS) / len(THEIRS)
    assert found["ci95"] == list(wilson(sum(THEIRS), len(THEIRS)))
    assert found["difference"] == pytest.approx((sum(OURS) - sum(THEIRS)) / len(OURS))
    low, high = found["difference_ci95"]
    assert low < found["difference"] < high
    wins = sum(a and not b for a, b in zip(OURS, THEIRS, strict=True))
    losses = sum(b and not a for a, b in zip(OURS, THEIRS, strict=True))
    assert (found["only_ours"], found["only_theirs"]) == (wins, losses)
    assert wins > losses > 0
    assert found["clusters"] == found["by_type"]["exist"]["clusters"] == PICTURES


def test_questions_of_a_picture_widen_the_interval_but_not_the_test() -> None:
    ours = [True] * 40 + [False] * 40
    theirs = [False] * 20 + [True] * 20 + [False] * 40
    alone = Pairs.of(ours, theirs, range(80))
    hanging = Pairs.of(ours, theirs, [i // 10 for i in range(80)])
    assert hanging.difference.mean == alone.difference.mean == 0.25
    assert hanging.difference.low < 0.05 < alone.difference.low
    assert hanging.p == alone.p == 2 / 2**20


def test_a_model_against_itself_differs_by_nothing() -> None:
    found = compare_reports(report(OURS), report(OURS), model="m", interact="s").whole
    assert (found.difference.mean, found.difference.low, found.difference.high) == (0, 0, 0)
    assert (found.p, found.only_ours, found.only_theirs) == (1.0, 0, 0)


def test_reports_about_different_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="about different examples"):
        compare_reports(report(OURS), report(OURS[:-1]), model="m", interact="s")
    other = report(OURS)
    last = other.predictions[-1]
    asked = replace(last, example=replace(last.example, question="another"))
    other = replace(other, predictions=(*other.predictions[:-1], asked))
    with pytest.raises(ValueError, match="about different examples"):
        compare_reports(report(OURS), other, model="m", interact="s")


# -- files of answers ----------------------------------------------------------------------------


def test_verdicts_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    ours, theirs = report(OURS).predictions, report(THEIRS).predictions
    alone, both = verdicts_of(ours), verdicts_of(ours, theirs)
    assert alone[5] == Verdict(
        question="question 5",
        type="where",
        pictures=("picture 1",),
        answers=("yes", "Yep"),
        text="perhaps",
        right=False,
    )
    assert both[5].against == Reply(text="yes", right=True)
    for verdicts in (alone, both):
        write_verdicts(path, verdicts)
        assert read_verdicts(path) == verdicts
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ["question", "type", "pictures", "answers", "text", "right"]
    assert list(rows[0]) == [*keys, "against"]
    write_verdicts(path, alone)
    assert list(json.loads(path.read_text().splitlines()[0])) == keys
    assert [p.name for p in tmp_path.iterdir()] == ["answers.jsonl"]


def test_any_text_stays_on_its_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    text = 'é "quoted"\nline\u2028two\r\x0b\x1c\x85\0 \\'
    said = Verdict(question=text, type="a", pictures=(), answers=(), text=text, right=True)
    write_verdicts(path, [said, said])
    assert path.read_bytes().count(b"\n") == 2
    assert "é" in path.read_text(encoding="utf-8")
    assert read_verdicts(path) == [said, said]


def test_a_picture_whose_name_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    row = verdicts_of(report(OURS).predictions)[0]
    write_verdicts(path, [row.model_copy(update={"pictures": ("a\udcff.png",)})])
    assert json.loads(path.read_bytes())["pictures"] == ["a\udcff.png"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"right": 1}, "line 2: 'right': Input should be a valid boolean"),
        ({"text": None}, "line 2: 'text': Input should be a valid string"),
        ({"pictures": "a.png"}, "line 2: 'pictures': Input should be a valid"),
        ({"rihgt": True}, "line 2: 'rihgt': Extra inputs are not permitted"),
        ({"against": {"text": "a"}}, "line 2: 'against.right': Field required"),
    ],
)
def test_a_line_that_is_no_verdict_is_named(
    change: dict[str, object], part: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    row = verdicts_of(report(OURS).predictions)[0].model_dump(exclude_none=True)
    path.write_text(f"{json.dumps(row)}\n{json.dumps({**row, **change})}\n")
    with pytest.raises(DataError, match=r"answers\.jsonl' line 2: ") as caught:
        read_verdicts(path)
    assert part in str(caught.value)


def test_a_file_that_is_cut_or_missing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_verdicts(path, verdicts_of(report(OURS).predictions))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"line {len(OURS)}: Invalid JSON"):
        read_verdicts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_verdicts(tmp_path / "none.jsonl")


def test_a_failing_write_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(IPNError, match="cannot write"):
        write_verdicts(tmp_path / "none" / "a.jsonl", [])
