"""The packaged model answers by made-up evidence, through the real language model."""

from __future__ import annotations

import pytest
import torch
from ipn_names.classes import labels
from ipn_names.connector import NamesConnectorConfig

from ipn_core import IPN, Prompt, VisualFeatures
from ipn_core.clock import Clock
from ipn_core.generate import decode
from ipn_core.testing.tiny import tiny_picture
from ipn_core.vocabulary import Vocabulary

pytestmark = pytest.mark.weights

ASKED = {
    "What is this?": "golden retriever",
    "What is on the left?": "golden retriever",
    "What is on the right?": "coffee mug",
    "Is there a dog?": "yes",
    "Is there a zebra?": "no",
    "Where is the coffee mug?": "right",
}


@pytest.fixture(scope="module")
def photo() -> IPN:
    return IPN.from_pretrained("photo")


def evidence(questions: int) -> VisualFeatures:
    """A picture that is a dog on its left half and a mug on its right one, for each question."""
    names = [label.name for label in labels()]
    dog, mug = names.index("golden retriever"), names.index("coffee mug")
    board = torch.zeros(6, 6, len(names))
    board[:, :3, dog] = board[:, 3:, mug] = 14
    whole = torch.zeros(len(names))
    whole[dog] = 14
    flat = board.flatten(0, 1)
    features = VisualFeatures.pack([flat], [(6, 6)], [0], 1, whole.unsqueeze(0))
    return features.select([0] * questions)


@torch.no_grad()
def test_it_says_what_the_request_asks_of_the_evidence(photo: IPN) -> None:
    plans = [photo.planner.plan(Prompt.ask(q, [tiny_picture()])) for q in ASKED]
    percept = photo.perceive([], list(ASKED), evidence(len(ASKED)))
    clock = Clock(torch.device("cpu"))
    answers, _, _ = decode(photo, plans, percept, {"max_new_tokens": 12}, clock)
    assert {q: answer.text for q, answer in zip(ASKED, answers, strict=True)} == ASKED


def test_it_is_small_and_holds_nothing_of_the_words(photo: IPN) -> None:
    state = photo.trained_state()
    assert sum(p.numel() for p in state.values()) * 2 < 20e6
    assert not any("sayings" in name or "directions" in name for name in state)


def test_every_name_has_room_in_the_slots_that_a_connector_gives_it(photo: IPN) -> None:
    lengths = [len(Vocabulary.of(photo.backbone).ids(label.name)) for label in labels()]
    assert max(lengths) == NamesConnectorConfig().slots
