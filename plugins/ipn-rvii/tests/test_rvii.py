"""The interaction `rvii`: what it sees, what it must not see, and its optional guide."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ipn_rvii.rvii import RVII, RVIIConfig
from PIL import Image
from torch import Tensor

from ipn_core.errors import ConfigError
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.stages import Dims, Request
from ipn_core.testing.contracts import InteractionContract
from ipn_core.testing.oracles import assert_same, record_oracle
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone

DIMS = Dims(Dv=12, D_in=20, D_hidden=(14, 14), D_out=14, K=3, D_request=14)
GUIDE = {"width": 8, "tallies": 2, "frequencies": 3}
GRIDS = ((2, 3), (4, 4), (1, 5), (3, 2))

SEES = {**GUIDE, "seen": True, "near": 1.5}

both = pytest.mark.parametrize("guide", [None, GUIDE, {**GUIDE, "tallies": 0}, SEES])


class TestRVII(InteractionContract):
    name = "rvii"
    options = {"width": 16, "depth": 2, "heads": 4, "frequencies": 3}  # noqa: RUF012 as declared


class TestGuidedRVII(TestRVII):
    options = {**TestRVII.options, "guide": GUIDE}  # noqa: RUF012 as declared


class TestSeeingRVII(TestRVII):
    options = {**TestRVII.options, "guide": SEES}  # noqa: RUF012 as declared


def build(guide: dict[str, Any] | None = None, R: int = 1, **more: Any) -> RVII:
    """A small one whose every number is random."""
    torch.manual_seed(0)
    options = {"width": 16, "depth": 2, "heads": 4, "frequencies": 3, "guide": guide, **more}
    model = RVII(RVIIConfig.parse(options, "interact"), replace(DIMS, R=R)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def patches(seed: int, grid: tuple[int, int]) -> Tensor:
    count = grid[0] * grid[1]
    return torch.randn(count, DIMS.Dv, generator=torch.Generator().manual_seed(seed))


def features(*samples: tuple[int, ...]) -> VisualFeatures:
    """Pictures of a batch: for each sample, the numbers of its pictures."""
    flat = [(row, picture) for row, pictures in enumerate(samples) for picture in pictures]
    return VisualFeatures.pack(
        [patches(p, GRIDS[p]) for _, p in flat] or [torch.zeros(0, DIMS.Dv)],
        [GRIDS[p] for _, p in flat],
        [row for row, _ in flat],
        len(samples),
    )


def request(batch: int, R: int = 1, return_map: bool = True) -> Request:
    generator = torch.Generator().manual_seed(batch)
    return Request(torch.randn(batch, R, 14, generator=generator), return_map=return_map)


@torch.no_grad()
def test_the_equations_of_the_paper(record_property: Any) -> None:
    model, seen, asked = build(frequencies=0), features((0,), (1,), (3,)), request(3)
    got = model(asked, seen).values
    patches, mask = seen.padded()

    def attention(layer: Any, tokens: Tensor, others: Tensor) -> Tensor:
        looked = []
        keys, values = layer.kv(others).chunk(2, dim=-1)
        heads = zip(
            *(x.chunk(layer.heads, -1) for x in (layer.q(tokens), keys, values)), strict=True
        )
        for q, k, v in heads:
            looked.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return layer.out(torch.cat(looked, dim=-1))

    for row in range(3):
        picture = model.patch_norm(model.patch_in(patches[row][mask[row]]) + model.place.weight[0])
        wanted = model.asked(Request(asked.values[row : row + 1]))[0]  # (1, W)
        x = torch.cat([model.queries + wanted, wanted])
        for block in model.blocks:
            normed = block.self_norm(x)
            x = x + attention(block.self_attention, normed, normed)
            x = x + attention(block.cross_attention, block.cross_norm(x), picture)
            x = x + block.mlp(block.mlp_norm(x))
        expected = model.out(model.out_norm(x[: DIMS.K]))
        worst = assert_same([got[row]], [expected])
        record_oracle(record_property, "rvii", "the paper's equations", worst)


@both
@pytest.mark.parametrize("R", [1, 3])
def test_shapes(guide: dict[str, Any] | None, R: int) -> None:
    seen = features((0,), (1, 2), (3, 0, 1))
    message = build(guide, R)(request(3, R), seen)
    assert message.values.shape == (3, DIMS.K, DIMS.D_in)
    assert message.attention.shape == (3, DIMS.K, max(seen.lengths))
    assert build(guide, R)(request(3, R, return_map=False), seen).attention is None
    assert build(guide, R, message=7)(request(3, R), seen).values.shape == (3, DIMS.K, 7)


@both
def test_padding_never_changes_the_result(guide: dict[str, Any] | None) -> None:
    model, rows = build(guide), [(0,), (1, 2), (3, 0, 1), (2,)]
    asked, seen = request(4), features(*rows)
    together = model(asked, seen)
    for row, pictures in enumerate(rows):
        alone = model(replace(asked, values=asked.values[row : row + 1]), features(pictures))
        torch.testing.assert_close(together.values[row], alone.values[0], rtol=1e-4, atol=1e-5)
        width = seen.lengths[row]
        torch.testing.assert_close(
            together.attention[row, :, :width], alone.attention[0], rtol=1e-4, atol=1e-6
        )
        assert not together.attention[row, :, width:].any()


@both
def test_the_map_is_an_average_of_heads_in_the_order_of_the_patches(
    guide: dict[str, Any] | None,
) -> None:
    model, seen = build(guide), features((1, 2), (3,))
    calls: list[Any] = []
    # Guided: heads 0, 1 and 3 of both blocks; else all heads of the last one.
    blocks, heads = (model.blocks, [0, 1, 3]) if guide else (model.blocks[-1:], [0, 1, 2, 3])
    for block in blocks:
        block.cross_attention.register_forward_pre_hook(lambda m, args: calls.append((m, *args)))
    attention = model(request(2), seen).attention
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, DIMS.K))
    by_hand = []
    for layer, tokens, keys, _, lengths, log_maps, _ in calls:
        order = seen.padded()[1]
        assert torch.equal(torch.arange(order.shape[1]) < torch.tensor(lengths)[:, None], order)
        queries = layer.q(tokens).unflatten(-1, (layer.heads, -1))
        scores = torch.einsum("bmhk,bphk->bhmp", queries, keys) / keys.shape[-1] ** 0.5
        if guide:
            scores = scores + torch.einsum("hg,bgp->bhp", layer.follow, log_maps).unsqueeze(2)
        weights = scores.masked_fill(~order[:, None, None], float("-inf")).softmax(-1)
        by_hand += [weights[:, head, : DIMS.K] for head in heads]
    assert len(by_hand) == (6 if guide else 4)
    expected = torch.stack(by_hand).mean(0)
    torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-6)
    # The keys of a row's first picture come first.
    alone = features((1,))
    _, _, keys, *_ = calls[-1]
    shown = alone.spread(model._patches(alone))
    first, _ = model.blocks[-1].cross_attention.keys_values(shown)
    torch.testing.assert_close(keys[0, : first.shape[1]], first[0])


@pytest.mark.parametrize(("heads", "guided"), [(1, [0]), (2, [0, 1]), (8, [0, 1, 3, 4, 6, 7])])
def test_the_guided_heads_are_those_that_begin_with_a_map(heads: int, guided: list[int]) -> None:
    config = RVIIConfig.parse({"width": 16, "heads": heads, "guide": GUIDE}, "interact")
    for block in RVII(config, DIMS).blocks:
        layer = block.cross_attention
        assert layer.follow.any(1).nonzero()[:, 0].tolist() == guided == layer.guided


@both
def test_questions_that_share_a_picture_see_what_copies_show(guide: dict[str, Any] | None) -> None:
    model, asked = build(guide), request(5)
    once = features((0,), (1, 2))
    shared = once.select([0, 1, 0, 1, 0])
    copies = features((0,), (1, 2), (0,), (1, 2), (0,))
    assert shared.values.shape[0] < copies.values.shape[0]
    one, other = model(asked, shared), model(asked, copies)
    torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.attention, other.attention, rtol=1e-4, atol=1e-6)
    mapped: list[int] = []
    model.patch_in.register_forward_hook(lambda m, args, out: mapped.append(len(out)))
    model(asked, shared)
    assert mapped == [once.values.shape[0]]


@both
def test_pictures_of_a_prompt_are_told_apart(guide: dict[str, Any] | None) -> None:
    model, asked = build(guide), request(1)
    one, other = model(asked, features((0, 3))), model(asked, features((3, 0)))
    assert (one.values - other.values).abs().max() > 1e-4
    few = build(guide, max_images=1)  # then all pictures share one code
    assert few(asked, features((0, 3, 1))).values.isfinite().all()


@both
@pytest.mark.parametrize("R", [1, 3])
def test_every_request_token_decides(guide: dict[str, Any] | None, R: int) -> None:
    model, seen, asked = build(guide, R), features((1,)), request(1, R)
    before = model(asked, seen)
    for place in range(R):
        values = asked.values.clone()
        values[:, place] = torch.randn(14, generator=torch.Generator().manual_seed(9))
        after = model(replace(asked, values=values), seen)
        assert (after.values - before.values).abs().max() > 1e-3
        assert (after.attention - before.attention).abs().max() > 1e-5


def test_evidence_says_how_similar_the_most_similar_patches_are() -> None:
    # With everything else of the guide silenced, a better match is still told apart.
    guide = build({**GUIDE, "tallies": 0}).guide
    asked, seen = torch.randn(1, 16), features((1,))
    unit = guide.text(asked)[0]
    with torch.no_grad():
        guide.patch_out.bias.zero_()
        guide.patch_out.weight.copy_(torch.eye(8))
    found = []
    for cosine in (0.2, 0.6, 0.9):
        shown = torch.nn.functional.normalize(torch.randn(16, 8), dim=-1)
        shown -= (shown @ unit)[:, None] * unit
        shown[3] = cosine * unit + (1 - cosine**2) ** 0.5 * shown[3] / shown[3].norm()
        similarity = guide._similarity(asked, seen.spread(guide.image(shown)))
        assert similarity.max().item() == pytest.approx(16 * cosine, rel=1e-4)
        found.append(guide._evidence(similarity, seen.mask))
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert (found[1] - found[2]).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_seen_is_what_the_maps_show_in_the_shared_space() -> None:
    # With every weight of the other findings at 0 a finding is that alone.
    guide, asked, seen = build(SEES).guide, torch.randn(2, 16), features((0,), (1, 3))
    told = guide(asked, seen)
    for layer in (guide.evidence_in, guide.count_in):
        layer.weight.zero_()
        layer.bias.zero_()
    found = guide(asked, seen)
    assert torch.equal(found.log_maps, told.log_maps)
    assert not torch.equal(found.findings, told.findings)
    patches, mask = seen.padded()
    for row in range(2):
        shown = guide.image(guide.patch_in(patches[row][mask[row]])) * 8**0.5
        maps = found.log_maps[row, :, mask[row]].exp() - 1e-4
        expected = guide.seen_in((maps @ shown).flatten())
        torch.testing.assert_close(found.findings[row, 0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_second_look_begins_near_the_first() -> None:
    asked, seen = torch.zeros(1, 16), features((1,))
    kept = {}
    for near in (0.0, 1.5):
        guide = RVII(RVIIConfig.parse({"width": 16, "guide": {**GUIDE, "near": near}}, "x"), DIMS)
        first = torch.zeros(1, 16)
        first[0, 5] = 1.0
        kept[near] = guide.guide._moved(first, asked, seen).reshape(4, 4)
    torch.testing.assert_close(kept[0.0], torch.full((4, 4), 1 / 16))
    near = kept[1.5]
    assert near.sum().item() == pytest.approx(1)
    # A quarter of a side down, and half a side down and right.
    for place, cosines in (((2, 1), 1 + 0.5**0.5), ((3, 3), 0.0)):
        ratio = math.exp(1.5 * (2 - cosines))
        assert (near[1, 1] / near[place]).item() == pytest.approx(ratio, rel=1e-4)


@both
def test_gradients_reach_every_weight_request_and_patch(guide: dict[str, Any] | None) -> None:
    model, seen = build(guide), features((0,), (1, 2))
    asked = request(2)
    asked.values.requires_grad_(True)
    seen.values.requires_grad_(True)
    model(asked, seen).values.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to all keys of a softmax changes nothing.
    assert [n for n in missing if "kv.bias" not in n] == []
    assert all(bool(g.any()) for g in (asked.values.grad, seen.values.grad))
    assert asked.values.grad.isfinite().all()


def test_eager_and_sdpa_agree() -> None:
    asked, seen = request(3, return_map=False), features((0,), (1, 2), (3,))
    for guide in (None, GUIDE):
        one, other = (build(guide, backend=b)(asked, seen).values for b in ("eager", "sdpa"))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@both
def test_asking_for_the_map_changes_no_message(guide: dict[str, Any] | None) -> None:
    model, seen = build(guide), features((0,), (1, 2))
    with_map = model(request(2), seen).values
    without = model(request(2, return_map=False), seen).values
    torch.testing.assert_close(with_map, without, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_maps_of_earlier_blocks_are_taken_beside_their_looks(
    guide: dict[str, Any] | None, backend: str
) -> None:
    model, seen = build(guide, depth=3, backend=backend), features((0,), (1, 2))
    reached: list[Tensor] = []
    model.blocks[-1].register_forward_pre_hook(lambda m, args: reached.append(args[0]))
    for return_map in (True, False):
        model(request(2, return_map=return_map), seen)
    assert torch.equal(*reached)


def test_noise_and_dropout_only_while_training() -> None:
    model, seen = build(GUIDE, noise=0.5, dropout=0.2), features((0,))
    assert torch.equal(model(request(1), seen).values, model(request(1), seen).values)
    model.train()
    assert not torch.equal(model(request(1), seen).values, model(request(1), seen).values)


@pytest.mark.parametrize(("n", "m"), [(400, 500), (6, 9)])
def test_fit_whitens_what_comes_in(n: int, m: int) -> None:
    model = build(GUIDE, R=2)
    mix = torch.randn(14, 14) * 3
    requests, seen = torch.randn(n, 2, 14) @ mix + 5, torch.randn(m, DIMS.Dv) * 20 - 3
    model.fit(requests, seen)
    layers = (model.request_scale, model.patch_in, model.guide.patch_in)
    samples = (requests.flatten(1), seen, seen)
    for layer, sample in zip(layers, samples, strict=True):
        out = layer(sample)
        width = out.shape[1]
        rank = min(width, len(sample) - 1, sample.shape[1])
        torch.testing.assert_close(out.mean(0), torch.zeros(width), rtol=0, atol=1e-3)
        spread = torch.zeros(width, width)
        spread[range(rank), range(rank)] = 1
        torch.testing.assert_close(out.T.cov(), spread, rtol=0, atol=1e-2)
        assert layer.weight.abs().max() < 1e3


def test_fit_makes_little_of_rounding() -> None:
    model, other = build(), build()
    seen = torch.randn(60, DIMS.Dv)
    seen[:, 1] = seen[:, 0] + 1e-4 * torch.randn(60)  # a direction of hardly any variation
    requests = torch.randn(40, 1, 14)
    model.fit(requests, seen)
    other.fit(requests, seen * (1 + 1e-7 * torch.randn_like(seen)))
    left_out = model.patch_in.weight.abs().sum(1) == 0
    assert torch.equal(other.patch_in.weight.abs().sum(1) == 0, left_out)
    product = (
        model.patch_in.weight.T @ model.patch_in.weight
    ).detach()  # whatever the directions' signs
    again = other.patch_in.weight.T @ other.patch_in.weight
    torch.testing.assert_close(again, product, rtol=1e-4, atol=1e-4 * float(product.abs().max()))


def test_what_scales_requests_is_not_trained_but_kept() -> None:
    model = build()
    assert not any("request_scale" in name for name, _ in model.named_parameters())
    assert {"request_scale.weight", "request_scale.bias"} <= set(model.state_dict())


def test_fit_leaves_a_projection_alone_where_nothing_varies() -> None:
    model = build()
    before = model.request_scale.weight.clone()
    model.fit(torch.full((5, 1, 14), 2.5), torch.randn(40, DIMS.Dv))
    assert torch.equal(model.request_scale.weight, before)
    model.fit(torch.randn(1, 1, 14), torch.randn(40, DIMS.Dv))
    assert torch.equal(model.request_scale.weight, before)


def test_the_shared_space_needs_a_guide() -> None:
    assert build().objectives == {"answer-embedding", "verbalise"}
    model = build(GUIDE)
    assert model.objectives == {"answer-embedding", "request-image", "verbalise"}
    text, image = model.shared_space(request(2), features((0,), (1,)))
    assert text.shape == (2, 8)
    assert image.shape == (6 + 16, 8)
    for unit in (text, image):
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(len(unit)))


def test_configs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be a multiple of 'interact.heads', got 16 and 3"):
        build(heads=3)
    with pytest.raises(ConfigError, match=r"unknown key 'interact.widht'.*did you mean 'width'"):
        build(widht=3)
    with pytest.raises(ConfigError, match=r"interact\.guide\.talies"):
        build({"talies": 3})
    with pytest.raises(ConfigError, match="'near' needs 'frequencies' of at least 2"):
        build({"frequencies": 1, "near": 1.0})


@both
def test_saved_and_loaded_it_answers_the_same(guide: dict[str, Any] | None, tmp_path: Path) -> None:
    backbone, encoder = tiny_backbone("llama"), TinyEncoder(TinyEncoderConfig())
    config = {
        "strategy": "rvii",
        "backbone": "tiny",
        "encoder": "tiny",
        "interact": {"width": 16, "depth": 1, "heads": 2, "guide": guide},
    }
    model = IPN.from_config(config, backbone=backbone, encoder=encoder)
    assert model.config.layout.dynamic == 5
    model.save_pretrained(tmp_path)
    again = IPN.from_pretrained(tmp_path, backbone=backbone, encoder=encoder)
    assert again.interaction.config == model.interaction.config
    picture = Image.new("RGB", (48, 24), (200, 40, 10))
    one, other = (m.ask(picture, "What is it?", max_new_tokens=4) for m in (model, again))
    assert one.ids == other.ids
    assert torch.equal(torch.as_tensor(one.attention), torch.as_tensor(other.attention))
    assert one.attention.shape == (5, 18)


@torch.no_grad()
def test_what_the_heads_look_at_is_mapped_once_until_weights_change() -> None:
    model = build()
    seen = features((0,))
    calls: list[Any] = []
    model.patch_in.register_forward_hook(lambda *_: calls.append(1))
    asked = request(1)
    first = model(asked, seen).values
    assert torch.equal(model(asked, seen).values, first)
    assert len(calls) == 1
    model.blocks[1].cross_attention.kv.weight += 0.5
    changed = model(asked, seen).values
    assert len(calls) == 2
    assert not torch.equal(changed, first)
    assert torch.equal(model(asked, features((0,))).values, changed)
    with torch.enable_grad():
        model(asked, seen)
    assert len(calls) == 4
