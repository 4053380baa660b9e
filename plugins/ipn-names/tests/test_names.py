"""The interaction `names` on made-up logits: what is named, whether and where a thing is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ipn_names.classes import labels
from ipn_names.interaction import KINDS, WHOLE, Names, NamesConfig, Understood
from ipn_names.sayings import NO, NOWHERE, UNSURE, YES
from ipn_names.windows import WINDOWS, centres, inside, pooling
from ipn_names.wordings import CELLS

from ipn_core.errors import ConfigError
from ipn_core.features import VisualFeatures
from ipn_core.stages import Dims, Label, Request
from ipn_core.vocabulary import Vocabulary

THINGS = (
    Label("tabby", ("cat", "animal")),
    Label("Siamese cat", ("cat", "animal")),
    Label("beagle", ("dog", "animal")),
    Label("mug", ("cup",)),
    Label("orange", ("fruit",)),
)
DIMS = Dims(Dv=len(THINGS), D_in=8, D_hidden=(8, 8), D_out=8, R=1, K=12, D_request=8, labels=THINGS)


class Handed(Names):
    """Is told what is asked, in place of reading a request."""

    asked: Understood

    def understand(self, request: Request) -> Understood:
        return self.asked


def build(things: Sequence[Label] = THINGS, **options: Any) -> Handed:
    words = torch.randn(9999, 8, generator=torch.Generator().manual_seed(0))
    dims = replace(DIMS, Dv=len(things), labels=tuple(things))
    made = Handed(NamesConfig(width=8, hidden=8, **options), dims).eval()
    # One token a word, so that every saying fits.
    known = {word: i for i, text in enumerate(made.sayings.texts) for word in text.split()}
    ids = {word: i for i, word in enumerate([*known, *made.words, "\n"])}
    made.meet(Vocabulary(lambda t: [ids[w] for w in t.split() or [t]] if t not in ids else [ids[t]],
                         lambda i: words[list(i)], 8))  # fmt: skip
    return made


def shown(
    names: Handed,
    kind: str,
    pictures: list[torch.Tensor],
    place: str = "",
    word: str = "",
    asked: Understood | None = None,
) -> tuple[str, torch.Tensor]:
    """What is said about pictures, each (h, w, labels) of logits, and where it was looked."""
    names.asked = asked or Understood(
        torch.eye(3)[KINDS.index(kind)][None] * 9,
        torch.eye(10)[CELLS.index(place) if place else WHOLE][None] * 9,
        torch.eye(len(names.words))[names.words.index(word) if word else 0][None] * 99,
    )
    features = VisualFeatures.pack(
        [one.flatten(0, 1) for one in pictures],
        [(one.shape[0], one.shape[1]) for one in pictures],
        [0] * len(pictures),
        1,
    )
    with torch.no_grad():
        message = names(Request(torch.zeros(1, 1, 8), return_map=True), features)
    said = [
        text
        for index, text in enumerate(names.sayings.texts)
        if torch.equal(names.sayings.said(torch.tensor([index])), message.values)
    ]
    assert message.attention is not None
    return said[0], message.attention[0, 0]


def board(**things: str) -> torch.Tensor:
    """Logits (6, 6, labels) of a picture with a thing in some of its cells."""
    found = torch.zeros(6, 6, len(THINGS))
    names = [label.name for label in THINGS]
    spans = {"left": slice(0, 3), "right": slice(3, 6), "top": slice(0, 3), "bottom": slice(3, 6)}
    for place, name in things.items():
        parts = place.split("_")
        rows = next((spans[p] for p in parts if p in ("top", "bottom")), slice(0, 6))
        columns = next((spans[p] for p in parts if p in ("left", "right")), slice(0, 6))
        found[rows, columns, names.index(name)] = 12
    return found


def test_what_is_named_is_the_likeliest_of_all_the_picture() -> None:
    assert shown(build(), "name", [board(all="beagle")])[0] == "beagle"


def test_a_weak_guess_is_said_as_one() -> None:
    weak = torch.zeros(2, 2, len(THINGS))
    weak[..., 4] = 0.1
    assert shown(build(), "name", [weak])[0] == UNSURE.format("an orange")
    assert shown(build(sure=0.1), "name", [weak])[0] == "orange"


@pytest.mark.parametrize(
    ("picture", "place", "name"),
    [
        ({"left": "mug", "right": "tabby"}, "left", "mug"),
        ({"left": "mug", "right": "tabby"}, "right", "tabby"),
        ({"top": "mug", "bottom": "orange"}, "bottom", "orange"),
        ({"top_left": "mug", "bottom_right": "beagle"}, "bottom right", "beagle"),
    ],
)
def test_a_place_is_looked_at_alone(picture: dict[str, str], place: str, name: str) -> None:
    names = build()
    said, seen = shown(names, "name", [board(**picture)], place)
    assert said == name
    assert seen.sum() == pytest.approx(1)
    # The question decides where: nearly all of the map lies on the thing that was named.
    own = board(**picture)[..., [label.name for label in THINGS].index(name)].flatten() > 0
    assert seen[own].sum() > 0.9


@pytest.mark.parametrize(
    ("word", "answer"), [("tabby", YES), ("cat", YES), ("animal", YES), ("dog", NO), ("mug", NO)]
)
def test_a_thing_is_there_under_every_word_for_it(word: str, answer: str) -> None:
    assert (
        shown(build(), "exist", [board(left="Siamese cat", right="tabby")], word=word)[0] == answer
    )


def test_many_classes_that_are_each_unlikely_are_no_dog() -> None:
    """118 of 1,000 classes have 11.8 % of a picture that shows nothing."""
    every = labels()
    picture = torch.zeros(6, 6, len(every))
    assert shown(build(every), "exist", [picture], word="dog")[0] == NO
    assert shown(build(every, chance=0), "exist", [picture], word="dog")[0] == YES
    picture[:3, :3, [label.name for label in every].index("beagle")] = 12
    assert shown(build(every), "exist", [picture], word="dog")[0] == YES
    assert shown(build(every), "exist", [picture], word="tench")[0] == NO


def test_a_word_that_is_hardly_understood_needs_no_more_evidence() -> None:
    names = build()
    words = torch.zeros(1, len(names.words))
    words[0, names.words.index("dog")] = 0.1
    asked = Understood(torch.tensor([[0.0, 9, 0]]), torch.zeros(1, 10), words)
    for thing, answer in (("beagle", YES), ("mug", NO)):
        assert shown(names, "exist", [board(all=thing)], asked=asked)[0] == answer


@pytest.mark.parametrize("n", [1, 3])
def test_each_further_class_of_a_word_asks_for_more(n: int) -> None:
    """One probability, just above and just below what n classes need together."""
    things = [Label(f"thing {i}", ("kind",) if i < n else ()) for i in range(20)]
    names = build(things, seen=0.2, chance=0.05)
    for share, answer in ((0.2 + 0.05 * (n - 1) + 0.01, YES), (0.2 + 0.05 * (n - 1) - 0.01, NO)):
        rest = [(1 - share) / (20 - n)] * (20 - n)
        picture = torch.tensor([*[share / n] * n, *rest]).log().expand(2, 2, 20)
        assert shown(names, "exist", [picture], word="kind")[0] == answer


@pytest.mark.parametrize(
    ("picture", "place"),
    [
        ({"left": "mug", "right": "tabby"}, "left"),
        ({"right": "mug"}, "right"),
        ({"top": "mug"}, "top"),
        ({"bottom_left": "mug"}, "bottom left"),
        ({"all": "mug"}, "middle"),
        ({"all": "tabby"}, NOWHERE),
    ],
)
def test_where_is_the_cup(picture: dict[str, str], place: str) -> None:
    assert shown(build(), "where", [board(**picture)], word="cup")[0] == place


def test_several_pictures_are_looked_at_one_by_one() -> None:
    both = [board(all="mug"), board(left="beagle")[:, :3]]
    assert shown(build(), "exist", both, word="dog")[0] == YES
    said, seen = shown(build(), "where", both, word="dog")
    assert said == "middle"
    assert seen[:36].sum() < 0.05


def test_what_is_said_about_a_picture_is_words_one_slot_a_token() -> None:
    names = build(lead=2)
    values = names.saying([NOWHERE])[0]
    filler = names.sayings.embeddings[0]
    tokens = [not torch.equal(row, filler) for row in values]
    assert tokens == [*[False] * 2, *[True] * 5, *[False] * 5]


def test_features_that_are_no_evidence_are_refused() -> None:
    (reason,) = Names.not_supported_reasons(NamesConfig(), replace(DIMS, labels=()))
    assert "such as imagenet-names" in reason
    (reason,) = Names.not_supported_reasons(NamesConfig(lead=12), DIMS)
    assert reason.startswith("12 slots have no room for words after 12 empty ones")
    with pytest.raises(ConfigError, match=r"interact\.seen"):
        NamesConfig.parse({"seen": 2}, "interact")


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(12, 12), (1, 5), (2, 2), (7, 3)])
def test_windows_are_means_over_patches(grid: tuple[int, int]) -> None:
    weights = pooling(grid)
    assert weights.shape == (len(WINDOWS), grid[0] * grid[1])
    torch.testing.assert_close(weights.sum(1), torch.ones(len(WINDOWS)))
    # A window over a half of a grid that it halves exactly is that half.
    if grid == (12, 12):
        left = WINDOWS.index((0.0, 0.0, 1.0, 0.5))
        assert (weights[left].view(12, 12)[:, :6] == 1 / 72).all()


def test_each_cell_is_shown_by_windows_that_lie_there() -> None:
    within, places = inside(), centres()
    assert within.any(1).all()
    for index, cell in enumerate(CELLS):
        y, x = places[within[index]].unbind(1)
        assert (x < 0.5).all() == ("left" in cell)
        assert (y > 0.5).all() == ("bottom" in cell)


# -- the table -------------------------------------------------------------------------------------


def test_the_table_has_every_class_and_what_else_it_is_called() -> None:
    every = labels()
    assert len(every) == 1000
    assert [every[i].name for i in (0, 207, 281, 504, 950)] == [
        "tench", "golden retriever", "tabby", "coffee mug", "orange",
    ]  # fmt: skip
    assert {"dog", "animal"} <= {*every[207].also}
    assert sum("dog" in label.also for label in every) == 118
    assert all(label.name and label.name not in label.also for label in every)
