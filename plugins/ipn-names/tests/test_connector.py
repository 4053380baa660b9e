"""The connector `names` says in words of the LLM what it sees, also part by part or by patch."""

from __future__ import annotations

import pytest
import torch
from ipn_names.connector import NamesConnector, NamesConnectorConfig
from pydantic import ValidationError
from torch import Tensor

from ipn_core.features import VisualFeatures
from ipn_core.stages import Dims, Label, PerceiveContext
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.vocabulary import Vocabulary

THINGS = ("tench", "tabby cat", "beagle", "mug", "orange", "acoustic guitar", "bus", "hen", "newt")
BACKBONE = tiny_backbone()
LONGEST = max(len(BACKBONE.tokenizer(name, add_special_tokens=False).input_ids) for name in THINGS)


def connector(**options: int) -> NamesConnector:
    n = len(THINGS)
    width = BACKBONE.D_in
    dims = Dims(Dv=n, D_in=width, D_hidden=(width, width), D_out=width,
                labels=tuple(Label(name) for name in THINGS))  # fmt: skip
    made = NamesConnector(
        NamesConnectorConfig(**{"slots": LONGEST, **options}),
        dims,
        TinyEncoder(TinyEncoderConfig(width=n)),
    )
    made.meet(Vocabulary.of(BACKBONE))
    return made.eval()


def decoded(tokens: Tensor, slots: int) -> list[str]:
    """Each name by its tokens' embeddings; slots that hold a new line are empty ones."""
    with torch.no_grad():
        table = BACKBONE.embed(torch.arange(len(BACKBONE.tokenizer))[None])[0]
    ids = torch.cdist(tokens, table, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    rows = ids.view(-1, slots).tolist()
    return [BACKBONE.tokenizer.decode(row).rstrip("\n") for row in rows]


def seen(made: NamesConnector, *boards: Tensor) -> list[Tensor]:
    """The tokens of pictures, each (h, w, labels) of logits, in one prompt."""
    grids = [(one.shape[0], one.shape[1]) for one in boards]
    features = VisualFeatures.pack(
        [one.flatten(0, 1) for one in boards], grids, [0] * len(boards), 1
    )
    with torch.no_grad():
        return made.connect(features, PerceiveContext([[]], ["?"], features))


def nine() -> Tensor:
    """A thing in each of the nine parts, in the order of THINGS row by row."""
    board = torch.zeros(6, 6, len(THINGS))
    for index in range(9):
        row, column = divmod(index, 3)
        board[2 * row : 2 * row + 2, 2 * column : 2 * column + 2, index] = 12
    return board


def test_the_likeliest_names_are_said_first() -> None:
    board = torch.zeros(6, 6, len(THINGS))
    board[..., 3], board[..., 5], board[..., 0] = 6, 5, 4
    made = connector(names=3)
    (tokens,) = seen(made, board)
    assert tokens.shape == (made.static_tokens, BACKBONE.D_in) == (3 * LONGEST, BACKBONE.D_in)
    assert decoded(tokens, LONGEST) == ["mug", "acoustic guitar", "tench"]


def test_the_nine_parts_follow_row_by_row() -> None:
    board = nine()
    board[..., 4] += 1  # the middle one is the likeliest of the whole, too
    made = connector(names=1, parts=3)
    (tokens,) = seen(made, board)
    assert len(tokens) == made.static_tokens == 10 * LONGEST
    assert decoded(tokens, LONGEST) == ["orange", *THINGS]


@pytest.mark.parametrize("grid", [(7, 7), (5, 7)])
def test_with_as_many_parts_as_patches_each_patch_is_named(grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    h, w = grid
    which = torch.randint(len(THINGS), grid, generator=generator)
    board = 12.0 * torch.nn.functional.one_hot(which, len(THINGS))
    made = connector(names=1, parts=max(grid))
    (tokens,) = seen(made, board)
    n = max(grid)
    assert len(tokens) == made.static_tokens == (1 + n * n) * LONGEST
    # Where there are fewer patches than parts, neighbouring parts have the same one.
    of = [int(which[(2 * y + 1) * h // (2 * n), (2 * x + 1) * w // (2 * n)]) for y in range(n)
          for x in range(n)]  # fmt: skip
    assert decoded(tokens, LONGEST)[1:] == [THINGS[i] for i in of]


def test_how_many_parts_is_a_number() -> None:
    for wrong in (True, -1, 33):
        with pytest.raises(ValidationError, match="parts"):
            NamesConnectorConfig(parts=wrong)


def test_each_picture_has_its_own_names() -> None:
    one, two = torch.zeros(2, 6, 6, len(THINGS))
    one[..., 6], two[..., 7] = 9, 9
    said = [decoded(tokens, LONGEST) for tokens in seen(connector(names=1), one, two)]
    assert said == [["bus"], ["hen"]]


@pytest.mark.parametrize("slots", [1, 3])
def test_a_name_is_cut_at_its_slots(slots: int) -> None:
    board = torch.zeros(6, 6, len(THINGS))
    board[..., 5] = 9
    ids = BACKBONE.tokenizer("acoustic guitar", add_special_tokens=False).input_ids
    (tokens,) = seen(connector(names=1, slots=slots), board)
    assert decoded(tokens, slots) == [BACKBONE.tokenizer.decode(ids[:slots]).rstrip("\n")]
