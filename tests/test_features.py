"""Packed features: any number of pictures of any size a sample, padded only as a view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import picture

from ipn_core.errors import ShapeError
from ipn_core.features import ImageSpan, VisualFeatures
from ipn_core.stages import PerceiveContext
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig

GRIDS = [(2, 3), (1, 1), (3, 2)]
SAMPLES = [0, 0, 2]


def packed(looker: Any = None) -> VisualFeatures:
    values = [torch.full((h * w, 4), float(i + 1)) for i, (h, w) in enumerate(GRIDS)]
    return VisualFeatures.pack(values, GRIDS, SAMPLES, 3, torch.eye(3, 5), looker)


def test_padding_is_zero_and_masked() -> None:
    values, mask = packed().padded()
    assert values.shape == (3, 7, 4)
    assert mask.sum(1).tolist() == [7, 0, 6]
    assert values[..., 0].tolist() == [[1.0] * 6 + [2.0], [0.0] * 7, [3.0] * 6 + [0.0]]
    assert packed().lengths == [7, 0, 6]


def test_positions_are_centres_and_places_count_the_pictures_of_a_sample() -> None:
    features = packed()
    positions, places = features.positions(), features.places()
    assert places.tolist() == [[0] * 6 + [1], [0] * 7, [0] * 7]
    torch.testing.assert_close(positions[0, 0], torch.tensor([1 / 4, 1 / 6]))
    torch.testing.assert_close(positions[0, 6], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(positions[2, 5], torch.tensor([5 / 6, 3 / 4]))


def test_packed_positions_spread_to_the_padded_ones() -> None:
    features = packed()
    positions, places = features.packed_positions()
    assert torch.equal(features.spread(positions), features.positions())
    assert torch.equal(features.spread(places), features.places())


def test_the_patches_of_a_crop_have_their_places_in_the_whole_picture() -> None:
    box = (0.25, 0.5, 0.75, 1.0)
    spans = (ImageSpan(0, (2, 3), 0), ImageSpan(0, (2, 2), 6, box=box))
    features = VisualFeatures(torch.zeros(10, 4), spans, 1)
    inside = torch.tensor([[y, x] for y in (0.625, 0.875) for x in (0.375, 0.625)])
    torch.testing.assert_close(features.positions()[0, 6:], inside)
    torch.testing.assert_close(features.packed_positions()[0][6:], inside)
    assert features.select([0, 0]).images[3].box == box
    assert torch.equal(features.positions()[0, :6], packed().positions()[0, :6])


def test_equal_grids_need_no_index() -> None:
    features = VisualFeatures.pack([torch.rand(4, 3)] * 2, [(2, 2)] * 2, [0, 1], 2)
    values, mask = features.padded()
    assert torch.equal(values.flatten(0, 1), features.values)
    assert mask.all()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_without_pictures_has_no_patches(batch: int) -> None:
    features = VisualFeatures.pack([torch.zeros(0, 4)], [], [], batch)
    values, mask = features.padded()
    assert values.shape == (batch, 0, 4)
    assert mask.shape == (batch, 0)
    assert features.positions().shape == (batch, 0, 2)


def test_a_wrong_number_of_patches_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"N >= 6, the patches of 1 picture.*got \(5, 4\)"):
        VisualFeatures.pack([torch.zeros(5, 4)], [(2, 3)], [0], 1)


def test_selecting_renumbers_repeats_and_limits_the_pictures() -> None:
    chosen = packed().select([2, 0, 0], [9, 1, 2])
    assert [(s.sample, s.grid, s.place) for s in chosen.images] == [
        (0, (3, 2), 0),
        (1, (2, 3), 0),
        (2, (2, 3), 0),
        (2, (1, 1), 1),
    ]
    assert chosen.lengths == [6, 6, 7]
    assert chosen.padded()[0][:, 0, 0].tolist() == [3.0, 1.0, 1.0]
    assert chosen.global_tokens.argmax(1).tolist() == [2, 0, 0, 1]


def test_selecting_everything_copies_nothing() -> None:
    features = packed()
    assert features.select([0, 1, 2]) is features


def test_another_dtype_keeps_the_rest() -> None:
    changed = packed().to(dtype=torch.float16)
    assert changed.values.dtype == changed.global_tokens.dtype == torch.float16
    assert changed.images == packed().images


def seen(*rows: int) -> VisualFeatures:
    encoder = TinyEncoder(TinyEncoderConfig())
    images = [[picture(10 * row + i) for i in range(n)] for row, n in enumerate(rows)]
    with torch.no_grad():
        return encoder(PerceiveContext(images, [""] * len(rows))).features


def test_looking_again_perceives_the_crop_at_full_resolution() -> None:
    encoder = TinyEncoder(TinyEncoderConfig())
    features = seen(1, 2)
    with torch.no_grad():
        crops = features.look([(2, 0.5, 0.0, 1.0, 1.0), (0, 0, 0, 1, 1)])
        expected = encoder.encode([picture(11).crop((12, 0, 24, 24))])[0]
    assert [(s.sample, s.grid) for s in crops.images] == [(1, expected.grid), (0, (3, 3))]
    torch.testing.assert_close(crops.values[: len(expected.values)], expected.values)


def test_looking_again_after_a_selection_belongs_to_the_selected_sample() -> None:
    crops = seen(1, 2).select([1, 0]).look([(1, 0, 0, 1, 1), (2, 0, 0, 1, 1)])
    assert [s.sample for s in crops.images] == [0, 1]
    assert crops.batch == 2
    with torch.no_grad():
        expected = TinyEncoder(TinyEncoderConfig()).encode([picture(11), picture(0)])
    torch.testing.assert_close(crops.values, torch.cat([e.values for e in expected]))


@pytest.mark.parametrize(
    "box", [(3, 0, 0, 1, 1), (-1, 0, 0, 1, 1), (0, 0.5, 0, 0.5, 1), (0, 0, 0, 1, 1.1)]
)
def test_a_box_outside_is_refused(box: Any) -> None:
    with pytest.raises(ShapeError, match=r"must name one of 3 picture\(s\) and edges"):
        seen(1, 2).look([box])


def test_features_without_pictures_cannot_look_again() -> None:
    with pytest.raises(ShapeError, match="cannot look again: they came without their pictures"):
        packed().look([(0, 0, 0, 1, 1)])


grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=5)


@settings(max_examples=50, deadline=None)
@given(grids=grids, batch=st.integers(1, 3), data=st.data())
def test_padding_loses_and_invents_nothing(grids: Any, batch: int, data: Any) -> None:
    samples = sorted(data.draw(st.integers(0, batch - 1)) for _ in grids)
    values = [torch.rand(h * w, 2) for h, w in grids]
    features = VisualFeatures.pack(values or [torch.zeros(0, 2)], grids, samples, batch)
    padded, mask = features.padded()
    assert torch.equal(padded[mask], features.values)
    assert not padded[~mask].any()
    assert mask.sum(1).tolist() == features.lengths
