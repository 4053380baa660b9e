"""The interaction `zoom`: its contract, its equations, and what it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ipn_rvii.guide import Guided
from ipn_rvii.rvii import RVII, RVIIConfig
from ipn_zoom.boxes import boxes, inside
from ipn_zoom.zoom import Zoom, ZoomConfig, _rows
from PIL import Image
from torch import Tensor

from ipn_core.errors import ConfigError, ShapeError
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.stages import Dims, PerceiveContext, Request, VisualMessage
from ipn_core.testing.contracts import InteractionContract
from ipn_core.testing.contracts.pictures import SAMPLES, ragged
from ipn_core.testing.oracles import assert_same, record_oracle
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone

DIMS = Dims(Dv=24, D_in=20, D_hidden=(14, 14), D_out=14, K=3, D_request=14)
SMALL: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "heads": 4,
    "frequencies": 3,
    "guide": {"width": 8, "tallies": 2, "frequencies": 3},
    "boxes": 2,
}
CROPS = ((2, 2), (1, 3), (2, 3))
"""The grids of the crops of a picture, by its number."""


def looking(features: VisualFeatures, numbers: Sequence[int]) -> VisualFeatures:
    """Let features of made-up pictures look: the same picture and box give the same crop."""

    def look(wanted: Sequence[Any]) -> VisualFeatures:
        grids = [CROPS[numbers[image]] for image, *_ in wanted]
        seeds = [hash((numbers[image], *edges)) % 2**31 for image, *edges in wanted]
        values = [
            torch.randn(h * w, features.values.shape[1], generator=torch.Generator().manual_seed(s))
            for (h, w), s in zip(grids, seeds, strict=True)
        ]
        samples = [features.images[image].sample for image, *_ in wanted]
        return VisualFeatures.pack(values, grids, samples, features.batch)

    return replace(features, looker=look)


def seen(*samples: Sequence[int]) -> VisualFeatures:
    """A batch of made-up pictures that can be looked at again."""
    return looking(ragged(DIMS.Dv, samples), [number for s in samples for number in s])


class TestZoom(InteractionContract):
    name = "zoom"
    options = {**SMALL, "regions": 3}  # noqa: RUF012 as declared

    def features(self, samples: Any = SAMPLES) -> VisualFeatures:
        return looking(super().features(samples), [number for s in samples for number in s])


class TestOverlappingZoom(TestZoom):
    options = {**TestZoom.options, "boxes": 3, "overlapping": True}  # noqa: RUF012 as declared


def build(**more: Any) -> Zoom:
    """A small one whose every number is random."""
    torch.manual_seed(0)
    zoom = Zoom(ZoomConfig.parse({**SMALL, **more}, "interact"), DIMS).eval()
    with torch.no_grad():
        for parameter in zoom.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return zoom


def request(batch: int, return_map: bool = True) -> Request:
    generator = torch.Generator().manual_seed(batch)
    return Request(torch.randn(batch, 1, 14, generator=generator), return_map=return_map)


def looks_at(zoom: Zoom, maps: Tensor) -> None:
    """Let the guide say that it looks with these maps (B, G, P)."""
    findings = torch.zeros(len(maps), 1, 16)
    zoom.guide.forward = lambda asked, features: Guided(maps.log(), findings)


def watched(features: VisualFeatures) -> tuple[VisualFeatures, list[Any]]:
    """The features, and a list that fills with the boxes that are looked at."""
    wanted: list[Any] = []

    def look(some: Sequence[Any]) -> VisualFeatures:
        wanted.extend(some)
        return features.look(some)

    return replace(features, looker=look), wanted


def readings(zoom: Zoom) -> list[tuple[VisualFeatures, VisualMessage]]:
    """A list that fills with the features that are read, crops included, and what comes of it."""
    found: list[tuple[VisualFeatures, VisualMessage]] = []

    def read(asked: Tensor, features: VisualFeatures, *rest: Any) -> VisualMessage:
        found.append((features, RVII.read(zoom, asked, features, *rest)))
        return found[-1][1]

    zoom.read = read  # type: ignore[method-assign,assignment]
    return found


def read_with(zoom: Zoom) -> list[Any]:
    """A list that fills with what the last look's attention is given."""
    given: list[Any] = []
    last = zoom.blocks[-1].cross_attention
    last.register_forward_pre_hook(lambda module, args: given.append(args))
    return given


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("overlapping", "edge"), [(False, 30), (True, 48)])
def test_a_share_is_how_much_of_a_map_falls_into_a_box(overlapping: bool, edge: int) -> None:
    zoom = build(boxes=4, overlapping=overlapping)
    maps = torch.rand(1, 2, 15)
    features = VisualFeatures.pack([torch.zeros(15, DIMS.Dv)], [(3, 5)], [0], 1)
    found = zoom.shares(maps.log(), _rows(features))
    # 120 dots a side: each patch is 40 × 24 dots, each box a square of them.
    dots = maps.view(1, 2, 3, 5).repeat_interleave(40, 2).repeat_interleave(24, 3) / (40 * 24)
    starts = range(0, 120 - edge + 1, (120 - edge) // 3)
    by_hand = [dots[..., y : y + edge, x : x + edge].sum((2, 3)) for y in starts for x in starts]
    torch.testing.assert_close(found, torch.stack(by_hand, dim=-1))
    if not overlapping:
        torch.testing.assert_close(found.sum(-1), maps.sum(-1))


def test_the_two_equations(record_property: Any) -> None:
    zoom, (features, wanted) = build(regions=2), watched(seen((1,)))
    maps = torch.rand(1, 2, 16) * 0.01
    maps[0, 0, 3], maps[0, 1, 12] = 0.7, 0.5  # the corners right above and left below
    looks_at(zoom, maps)
    looks: list[Any] = []
    for block in zoom.blocks:
        block.cross_attention.register_forward_pre_hook(lambda m, args: looks.append((m, *args)))
    message = zoom(request(1), features)
    assert wanted == [(0, 0.5, 0.0, 1.0, 0.5), (0, 0.0, 0.5, 0.5, 1.0)]
    _, _, _, _, lengths, log_maps, _ = looks[0]
    assert lengths == [16 + 2 * 3]
    torch.testing.assert_close(log_maps[:, :, :16], maps.log())
    quarters = maps.view(2, 2, 2, 2, 2).sum((2, 4)).log()
    torch.testing.assert_close(log_maps[0, :, 16:19], quarters[:, 0, 1, None].expand(-1, 3))
    torch.testing.assert_close(log_maps[0, :, 19:22], quarters[:, 1, 0, None].expand(-1, 3))
    by_hand = []
    for layer, tokens, keys, *_ in looks:
        queries = layer.q(tokens).unflatten(-1, (layer.heads, -1))
        scores = torch.einsum("bmhk,bphk->bhmp", queries, keys) / keys.shape[-1] ** 0.5
        scores = scores + torch.einsum("hg,bgp->bhp", layer.follow, log_maps).unsqueeze(2)
        by_hand.append(scores.softmax(-1)[0, layer.guided, : DIMS.K].mean(0))
    assert len(by_hand) == len(zoom.blocks)
    weights = torch.stack(by_hand).mean(0)
    # A crop of one row and three columns of patches: each covers a third of two by two patches.
    expected = weights[:, :16].view(-1, 4, 4).clone()
    for start, y, x in ((16, 0, 2), (19, 2, 0)):
        left, middle, right = weights[:, start : start + 3].unbind(-1)
        expected[:, y : y + 2, x] += ((left + middle / 2) / 2)[:, None]
        expected[:, y : y + 2, x + 1] += ((middle / 2 + right) / 2)[:, None]
    with torch.no_grad():
        worst = assert_same(message.attention[0], expected.flatten(1))
    record_oracle(record_property, "zoom", "its two equations", worst)


def test_the_loss_tells_the_guide_which_box_was_worth_it() -> None:
    zoom, features = build(regions=4), seen((1,))
    good = 2

    def message(maps: Tensor) -> Tensor:
        # What the guide says of the picture's own patches is told nothing.
        looks_at(zoom, maps.detach())
        zoom.shares = lambda _, rows: Zoom.shares(zoom, maps.log(), rows)
        return zoom(request(1, return_map=False), features).values

    def quarters(maps: Tensor) -> Tensor:
        return maps[0, 0].view(2, 2, 2, 2).sum((1, 3)).flatten()

    only = torch.full((1, 2, 16), 1e-4)
    only.view(2, 2, 2, 2, 2)[:, good // 2, :, good % 2] = 0.25
    target = message(only).detach()
    logits = torch.zeros(1, 2, 16, requires_grad=True)
    losses = []
    for _ in range(30):
        loss = (message(logits.softmax(-1)) - target).square().sum()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 3 * gradient).detach().requires_grad_(True)
    assert losses[-1] < 0.8 * losses[0]
    assert quarters(logits.softmax(-1)).argmax() == good


# -- where it looks --------------------------------------------------------------------------------


class Watching(TinyEncoder):
    """Keeps what it encodes."""

    def encode(self, images: Sequence[Image.Image]) -> Any:
        self.shown = list(images)
        return super().encode(images)


def test_the_box_that_is_looked_at_is_the_part_of_the_picture_that_was_meant() -> None:
    picture = Image.new("RGB", (150, 90), (255, 255, 255))
    picture.paste((250, 0, 0), (110, 40, 130, 50))  # in the middle row of three, the right column
    encoder = Watching(TinyEncoderConfig())
    features = encoder(PerceiveContext([[picture]], ["?"])).features
    assert features.grids(0) == ((3, 5),)
    zoom = build(boxes=3, regions=1)
    maps = torch.full((1, 2, 15), 0.01)
    maps[0, :, 1 * 5 + 4] = 0.8
    looks_at(zoom, maps)
    read = readings(zoom)
    message = zoom(request(1), features)
    (crop,) = encoder.shown
    assert crop.size == (50, 30)
    assert crop.getpixel((20, 15)) == (250, 0, 0)
    assert (20 * 10, (250, 0, 0)) in crop.getcolors()
    ((closer, _),) = read
    assert closer.images[1].box == (2 / 3, 1 / 3, 1.0, 2 / 3)
    places = closer.positions()[0, 15:]
    torch.testing.assert_close(places.mean(0), torch.tensor([0.5, 5 / 6]))
    assert torch.equal(closer.packed_positions()[0][15:], places)
    assert (places[:, 0] - 0.5).abs().max() < 1 / 6
    assert (places[:, 1] - 5 / 6).abs().max() < 1 / 6
    assert message.attention.shape == (1, DIMS.K, 15)


def test_the_pictures_of_a_prompt_compete_and_keep_their_places() -> None:
    zoom, (features, wanted) = build(regions=2), watched(seen((0,), (1, 2)))
    maps = torch.full((2, 2, 21), 0.001)
    maps[0, :, 5] = 0.9  # a sample of one picture of 2 × 3 patches: right below
    maps[1, :, 16 + 1] = 0.9  # the second picture, 1 × 5 patches, the second from the left
    maps[1, :, 15] = 0.05  # the first picture, 4 × 4 patches, right below
    looks_at(zoom, maps)
    read, given = readings(zoom), read_with(zoom)
    folded = zoom(request(2), features).attention
    assert (0, 0.5, 0.5, 1.0, 1.0) in wanted
    # One row of patches lies in the upper and in the lower boxes alike.
    assert {box for box in wanted if box[0] == 2} == {(2, 0, 0, 0.5, 0.5), (2, 0, 0.5, 0.5, 1)}
    ((closer, message),) = read
    assert [(span.sample, span.place) for span in closer.images[3:]] == [(0, 0)] * 2 + [(1, 1)] * 2
    assert closer.lengths == [6 + 2 * 4, 16 + 5 + 2 * 6]
    # Two and a half of the five patches, and half of their height.
    share = torch.tensor((0.001 + 0.9 + 0.001 / 2) / 2).log()
    torch.testing.assert_close(given[0][4][1, :, 21:], share.expand(2, 12))
    # The weight of both crops lies on the first half of the second picture.
    whole = message.attention[1]
    torch.testing.assert_close(folded[1, :, :16], whole[:, :16])
    torch.testing.assert_close(folded[1, :, 19:], whole[:, 19:21])
    gained = (folded[1, :, 16:19] - whole[:, 16:19]).sum(-1)
    torch.testing.assert_close(gained, whole[:, 21:].sum(-1))


def test_each_crop_is_seen_once_for_all_questions_about_its_picture() -> None:
    zoom, once = build(regions=2), seen((0,), (1,))
    features, wanted = watched(once.select([0, 1, 0, 1, 0, 0]))
    asked = request(6)
    together = zoom(asked, features)
    assert len(wanted) == len(set(wanted)) <= 8
    copies = zoom(asked, seen((0,), (1,), (0,), (1,), (0,), (0,)))
    torch.testing.assert_close(together.values, copies.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.attention, copies.attention, rtol=1e-4, atol=1e-6)


def test_chance_decides_only_while_training_and_by_the_shares() -> None:
    zoom = build(regions=1)
    rows = _rows(seen((1,)))
    shares = torch.tensor([[[0.1, 0.6, 0.3, 0.0001]]]).expand(2000, -1, -1)
    assert zoom.choose(shares, rows * 2000) == [[1]] * 2000
    zoom.train()
    torch.manual_seed(0)
    drawn = torch.tensor(zoom.choose(shares, rows * 2000)).flatten().bincount(minlength=4) / 2000
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.6, 0.3, 0.0]), rtol=0, atol=0.04)
    without = build(regions=1, explore=0.0).train()
    assert without.choose(shares, rows * 2000) == [[1]] * 2000


def test_more_regions_than_boxes_are_all_of_them() -> None:
    features, wanted = watched(seen((1,), (0, 2)))
    build(regions=50)(request(2), features)
    assert len(wanted) == len(set(wanted)) == 3 * 4


def test_a_sample_without_pictures_gets_what_rvii_gives() -> None:
    zoom, asked = build(), request(2)
    values = zoom(asked, seen((), (1,))).values
    none = VisualFeatures.pack([torch.zeros(0, DIMS.Dv)], [], [], 1)
    alone = zoom(replace(asked, values=asked.values[:1]), none)
    torch.testing.assert_close(values[:1], alone.values, rtol=1e-4, atol=1e-5)
    rvii = RVII.forward(zoom, replace(asked, values=asked.values[:1]), none)
    torch.testing.assert_close(alone.values, rvii.values)


def test_features_that_are_no_places_are_refused_when_the_model_is_built() -> None:
    config = ZoomConfig(**SMALL)
    assert Zoom.not_supported_reasons(config, DIMS) == []
    (reason,) = Zoom.not_supported_reasons(config, replace(DIMS, looks=False))
    assert reason.startswith("it looks again at parts of the picture, and these features are not")


def test_features_that_cannot_look_are_refused() -> None:
    with pytest.raises(
        ShapeError, match=r"'zoom' looks at pictures again.*or use '--interact rvii'"
    ):
        build()(request(1), ragged(DIMS.Dv, [(0,)]))


# -- with the rest ---------------------------------------------------------------------------------


def test_the_boxes_cover_the_picture_and_the_shares_of_a_crop_are_whole() -> None:
    assert boxes(2, False) == [
        (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)
    ]  # fmt: skip
    assert boxes(1, True) == boxes(1, False) == [(0.0, 0.0, 1.0, 1.0)]
    for side in range(1, 12):
        for overlapping in (False, True):
            for box in boxes(side, overlapping):
                assert 0 <= box[0] < box[2] <= 1
                covers = inside((3, 2), box, (5, 7))
                torch.testing.assert_close(covers.sum(1), torch.ones(6))
            assert {edge for box in boxes(side, overlapping) for edge in box} >= {0.0, 1.0}


def test_a_trained_rvii_becomes_a_zoom() -> None:
    options = {k: v for k, v in SMALL.items() if k != "boxes"}
    rvii = RVII(RVIIConfig.parse(options, "interact"), DIMS)
    zoom = build()
    zoom.load_state_dict(rvii.state_dict())
    assert zoom.objectives == rvii.objectives == {"answer-embedding", "request-image", "verbalise"}
    one, other = (m.shared_space(request(1), seen((1,))) for m in (zoom, rvii))
    assert all(map(torch.equal, one, other))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'interact.region'.*did you mean 'regions'"):
        build(region=1)
    with pytest.raises(ConfigError, match=r"interact\.guide"):
        build(guide=None)


def test_a_model_zooms_into_the_picture_that_it_is_asked_about() -> None:
    backbone, encoder = tiny_backbone("llama"), Watching(TinyEncoderConfig())
    config = {
        "strategy": "zoom",
        "backbone": "tiny",
        "encoder": "tiny",
        "interact": {**SMALL, "regions": 3},
    }
    model = IPN.from_config(config, backbone=backbone, encoder=encoder)
    picture = Image.effect_noise((48, 24), 90).convert("RGB")
    answer = model.ask(picture, "What is it?", max_new_tokens=4)
    assert answer.attention.shape == (5, 18)
    assert [crop.size for crop in encoder.shown] == [(24, 12)] * 3
    whole = picture.tobytes()
    assert all(crop.tobytes() != whole for crop in encoder.shown)
