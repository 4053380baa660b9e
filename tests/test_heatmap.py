from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipn_core import IPN, Answer
from ipn_core.errors import IPNError, ShapeError, UserError
from ipn_core.evaluation import heatmap
from ipn_core.evaluation.heatmap import draw_heatmap, require_map
from ipn_core.evaluation.overlay import upsample
from ipn_core.testing.checkpoints import register_tiny, tiny_config
from ipn_core.testing.tiny import tiny_backbone

torch.set_num_threads(1)


def answer(rounds: int = 1, grids: tuple[tuple[int, int], ...] = ((4, 4),)) -> Answer:
    patches = sum(h * w for h, w in grids)
    maps = torch.zeros(rounds, 2, patches)
    maps[:, 0, 0] = 1.0  # the first token looks at the top left patch,
    maps[:, 1, patches - 1] = 1.0  # the second at the bottom right one of the last picture
    return Answer("a dog", (1, 2), maps[-1], maps, grids)


def grey(size: tuple[int, int] = (160, 120)) -> Image.Image:
    return Image.new("RGB", size, (128, 128, 128))


def build(strategy: str) -> IPN:
    register_tiny()
    return IPN.from_config(tiny_config(strategy), backbone=tiny_backbone(), name="toy")


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("grids", [((4, 4),), ((1, 1),), ((3, 5), (2, 2))])
def test_one_panel_a_look_and_picture(
    rounds: int, grids: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    draw_heatmap(answer(rounds, grids), [grey()] * len(grids), "Where?", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.format == "PNG"
        panels = (drawn.width / 120 - 1.1) / heatmap.PANEL_IN
        assert round(panels) == len(grids)
        assert round((drawn.height / 120 - 0.9) / heatmap.PANEL_IN) == rounds
    assert os.listdir(tmp_path) == ["map.png"]


def test_features_that_are_no_places_have_no_heatmap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("tiny-look")
    require_map(model)
    monkeypatch.setattr(type(model.encoder), "placed", False)
    with pytest.raises(UserError, match=r"^model 'toy': what it looks at are no places"):
        require_map(model)


@pytest.mark.parametrize(
    ("box", "lit", "dark"),
    [
        ((0.25, 0.0, 0.75, 1.0), (30, 10), (10, 10)),
        ((0.0, 0.5, 1.0, 1.0), (10, 40), (10, 10)),
        ((-0.5, 0.0, 1.0, 1.0), (2, 10), (60, 60)),  # it was padded on the left
    ],
)
def test_the_map_lies_on_the_part_that_the_encoder_saw(
    box: tuple[float, ...], lit: tuple[int, int], dark: tuple[int, int]
) -> None:
    maps = [[np.float32([[1, 0], [0, 0]])]]
    figure = heatmap._figure(maps, [grey((64, 64))], "q", "a", [box])
    strength = np.asarray(figure.axes[0].get_images()[1].get_alpha())
    assert strength.shape == (64, 64)
    assert strength[lit[1], lit[0]] > 0.3
    assert strength[dark[1], dark[0]] == 0


def test_colour_lies_where_the_attention_went() -> None:
    figure = heatmap._figure([[np.float32([[1, 0], [0, 0]])]], [grey((64, 64))], "q", "a")
    picture, overlay = figure.axes[0].get_images()
    strength = np.asarray(overlay.get_alpha())
    assert strength[8, 8] > 0.6
    assert strength[56, 56] == 0
    faded = np.asarray(picture.get_array())
    assert np.abs(faded[8, 8] - 128 / 255).max() < 0.02
    assert faded[56, 56].min() > 0.6


@pytest.mark.parametrize(("size", "aspect"), [((160, 120), 1.0), ((4000, 9), "auto")])
def test_a_picture_like_a_line_is_widened_so_that_it_is_seen(
    size: tuple[int, int], aspect: object
) -> None:
    figure = heatmap._figure([[np.ones((2, 2), np.float32)]], [grey(size)], "q", "a")
    assert figure.axes[0].get_aspect() == aspect


def test_title_names_question_and_answer_as_they_are() -> None:
    question = "What does $x^2$ & <img> cost?\n" + "very " * 60
    figure = heatmap._figure([[np.ones((2, 2), np.float32)]], [grey()], question, "$5")
    title = figure.get_suptitle()
    assert "$x^2$ & <img> cost?" in title
    assert title.endswith("→ $5")
    assert title.count("\n") == 3
    assert figure._suptitle.get_parse_math() is False


def test_the_bar_shows_shares_of_the_attention() -> None:
    figure = heatmap._figure([[np.full((2, 2), 0.25, np.float32)]], [grey()], "q", "a")
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "share of the attention on one patch"
    assert bar.get_ylim() == (0, 0.25)


def test_upsampling_is_smooth_and_never_negative() -> None:
    large = upsample(np.float32([[0, 0, 0], [0, 1, 0], [0, 0, 0]]), (30, 60))
    assert large.shape == (60, 30)
    assert large.min() == 0
    assert large.argmax() in (29 * 30 + 14, 29 * 30 + 15, 30 * 30 + 14, 30 * 30 + 15)
    assert np.abs(np.diff(large, axis=0)).max() < 0.2


def test_a_map_of_zeros_or_nan_can_be_drawn(tmp_path: Path) -> None:
    empty = Answer("x", (1,), None, torch.full((1, 1, 4), float("nan")), ((2, 2),))
    draw_heatmap(empty, [grey()], "q", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_scripts_without_a_font_and_huge_pictures_are_drawn_quietly(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_heatmap(answer(), [grey((4000, 9))], "这是什么？ 🐶", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_an_answer_without_a_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'static' keeps no attention map.* draw. Choose an inter"):
        draw_heatmap(Answer("x", (1,)), [grey()], "q", tmp_path / "a.png", model="m",
                     interact="static")  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_map_is_refused_before_it_is_asked() -> None:
    require_map(build("tiny-look"))
    with pytest.raises(
        UserError,
        match=r"'tiny-mean' keeps no attention map, .* Leave --heatmap out, or choose an inter"
        "action",
    ):
        require_map(build("tiny-mean"))


def test_a_map_of_other_pictures_is_refused(tmp_path: Path) -> None:
    said = r"the attention map covers 16 patches of grids \(\(4, 4\),\); 2 picture\(s\) were given"
    with pytest.raises(ShapeError, match=said):
        draw_heatmap(answer(), [grey(), grey()], "q", tmp_path / "a.png")


def test_an_old_picture_survives_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(IPNError, match="No space left on device"):
        draw_heatmap(answer(), [grey()], "q", target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_real_answer_can_be_drawn(tmp_path: Path) -> None:
    model = build("tiny-look")
    pictures = [grey(), grey((50, 100))]
    found = model.ask(pictures, "Where is it?", max_new_tokens=2)
    draw_heatmap(found, pictures, "Where is it?", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
