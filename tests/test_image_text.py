"""The objective `image-text`: tokens that no question changes name what the picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import lesson, metrics, said, stage, training

from ipn_core.errors import ConfigError
from ipn_core.training.image_text import ImageText

pytestmark = pytest.mark.usefixtures("own_training")

UNASKED = {
    "strategy": "static",
    "perceive": {"name": "static", "tokens": 2},
    "interact": None,
    "layout": None,
}


def learning(llm: Path, model: dict[str, Any], train: list[str], **more: Any) -> dict[str, Any]:
    """A lesson in `image-text`; `None` takes a part of the model away."""
    values = lesson(llm, stage("name", "image-text", train=train, steps=30, lr=2e-2), **more)
    values["model"] = {k: v for k, v in {**values["model"], **model}.items() if v is not None}
    return values


@pytest.mark.parametrize(
    ("model", "train"),
    [
        (UNASKED, ["perceive"]),
        ({"request": "constant"}, ["interact", "request"]),
    ],
    ids=["static tokens", "messages of a request that cannot ask"],
)
def test_tokens_learn_to_name_what_is_shown(
    llm: Path, tmp_path: Path, model: dict[str, Any], train: list[str]
) -> None:
    training(learning(llm, model, train), tmp_path / "run").run()
    losses = [entry["image-text"] for entry in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_its_labels_are_words_times_distinct_pictures(llm: Path, tmp_path: Path) -> None:
    run = training(learning(llm, UNASKED, ["perceive"]), tmp_path / "run")
    run.run()
    # Four groups of a picture each, and four colours.
    assert "16 pairs of word and picture (image-text)" in said(run)


def test_a_request_that_asks_is_refused(llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs tokens that no question changes"):
        training(learning(llm, {}, ["interact"]), tmp_path / "run").run()


def test_a_message_that_cannot_answer_is_taught_to_be_read_all_the_same(
    llm: Path, tmp_path: Path
) -> None:
    told = stage("told", "verbalise", train=["inject", "slots.dynamic"], steps=40, lr=1e-2)
    values = lesson(llm, told)
    values["model"]["request"] = "constant"
    training(values, tmp_path / "run").run()
    losses = [entry["verbalise"] for entry in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("objective", ["request-image", "answer-embedding"])
def test_what_needs_a_question_refuses_a_request_that_cannot_ask(
    llm: Path, tmp_path: Path, objective: str
) -> None:
    values = lesson(llm, stage("ask", objective))
    values["model"]["request"] = "constant"
    with pytest.raises(ConfigError, match=f"'{objective}' needs a request that depends"):
        training(values, tmp_path / "run").run()


def test_a_word_is_named_by_any_token() -> None:
    scorer = object.__new__(ImageText)
    scorer.directions = torch.eye(3)
    one = scorer._scores(torch.tensor([[1.0, 0, 0]]))
    two = scorer._scores(torch.tensor([[1.0, 0, 0], [0, 5.0, 0]]))
    assert one[0] > 0 > one[1]
    assert two[1] > 0 > two[2]
