"""The packaged checkpoints, through the real language model."""

import json
from pathlib import Path

import pytest
from ipn_starter.weights import STARTER

from ipn_core import IPN
from ipn_core.checkpoint import strategies_of
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.tasks import open_task

HERE = Path(__file__).parents[1]
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def starter():
    return IPN.from_pretrained("starter")


def test_each_strategy_takes_at_most_20_mb():
    checkpoints = strategies_of(STARTER.folder())

    assert list(checkpoints) == ["rvii", "static"]
    for folder in checkpoints.values():
        assert sum(f.stat().st_size for f in folder.iterdir()) <= 20 * MEGABYTE


@pytest.mark.weights
def test_it_answers_new_scenes_about_as_well_as_its_card_says(starter):
    examples = open_task("emoji-scenes", {"scenes": 12, "seed": 99}).examples("test")
    said = json.loads((HERE / "train" / "scores.json").read_text())["rvii test"]["accuracy"]

    report = evaluate(starter, examples)

    # 120 questions: four standard errors of the card's score.
    assert report.accuracy > said - 4 * (said * (1 - said) / len(examples)) ** 0.5


@pytest.mark.weights
def test_with_foreign_requests_it_cannot_answer(starter):
    examples = open_task("emoji-scenes", {"scenes": 12, "seed": 99}).examples("test")

    asked = evaluate(starter, examples)
    shuffled = evaluate(starter, examples, shuffled=True)

    assert shuffled.accuracy < asked.accuracy / 2


@pytest.mark.weights
def test_a_dialogue_starts_as_a_single_question_does(starter):
    scene = open_task("emoji-scenes", {"scenes": 1, "seed": 99}).examples("test")
    picture = scene[0].images[0].load()
    dialogue = starter.dialogue([picture])

    first = dialogue.ask(scene[0].question)
    again = starter.ask(picture, scene[0].question)

    assert first.text == again.text
    assert first.tokens == again.tokens
