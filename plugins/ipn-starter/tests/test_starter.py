"""The packaged checkpoints, through the real language model."""

import json
from pathlib import Path

import pytest
from ipn_starter.weights import SMOLLM2, STARTER, Packaged

from ipn_core import IPN
from ipn_core.checkpoint import strategies_of
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.placing import place
from ipn_core.tasks import open_task

HERE = Path(__file__).parents[1]
MEGABYTE = 1_000_000
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def starter():
    return IPN.from_pretrained("starter")


def test_each_strategy_takes_at_most_20_mb():
    checkpoints = strategies_of(STARTER.folder())

    assert list(checkpoints) == ["rvii", "static"]
    for folder in checkpoints.values():
        assert sum(f.stat().st_size for f in folder.iterdir()) <= 20 * MEGABYTE


def test_weights_of_plugins_written_before_need_not_say_what_they_know(tmp_path):
    assert Packaged("mine", "what they are", tmp_path, "emoji-scenes").knows == ""


@pytest.mark.weights
@pytest.mark.skipif(not MAPS.exists(), reason="the system does not say what is mapped")
def test_the_language_models_weights_are_mapped_from_their_file_and_not_copied(starter):
    file = (SMOLLM2.folder() / "model.safetensors").resolve()
    rows = [row.split(maxsplit=5) for row in MAPS.read_text().splitlines()]
    named = [row for row in rows if len(row) == 6 and Path(row[5]) == file]
    spans = [tuple(int(end, 16) for end in row[0].split("-")) for row in named]

    weights = dict(place(starter, "cpu").backbone.lm.named_parameters())
    mapped = {
        name
        for name, weight in weights.items()
        if any(begin <= weight.data_ptr() < end for begin, end in spans)
    }

    assert len(weights) == 272
    assert mapped == weights.keys()


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
