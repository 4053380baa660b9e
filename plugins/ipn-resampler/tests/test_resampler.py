"""The connector `resampler`: its contract, and the resampler of Idefics in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ipn_resampler.idefics import from_idefics
from ipn_resampler.resampler import PerceiverResampler, ResamplerConfig, with_global_tokens
from PIL import Image
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.testing.contracts import ConnectorContract
from ipn_core.testing.contracts.pictures import ragged
from ipn_core.testing.oracles import assert_same, randomise, record_oracle
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.training.checks import check_gradients
from ipn_core.training.parameters import trainable

WIDTH = 20
SMALL: dict[str, Any] = {"latents": 5, "depth": 2, "heads": 3, "head_width": 4}


class TestResampler(ConnectorContract):
    name = "resampler"
    options = SMALL

    def test_there_is_no_map_where_the_widths_agree(self) -> None:
        module = self.build()
        assert module.map.weight.shape == (self.dims().D_in, WIDTH)
        encoder = module.encoder
        dims = self.dims()
        same = type(dims)(WIDTH, WIDTH, dims.D_hidden, dims.D_out)
        assert not list(self.make(SMALL, same, encoder).map.parameters())


class TestNarrowResampler(ConnectorContract):
    name = "resampler"
    options = {**SMALL, "width": 6}  # noqa: RUF012 as declared

    def test_it_is_as_wide_as_it_is_told(self) -> None:
        module = self.build()
        assert module.inner.weight.shape == (6, WIDTH)
        assert module.resampler.latents.shape == (5, 6)


def original(qk_norm: bool) -> IdeficsPerceiverResampler:
    config = IdeficsConfig(
        vision_config={"embed_dim": WIDTH},
        perceiver_config={"qk_layer_norms_perceiver": qk_norm},
    )
    torch.manual_seed(0)
    built = IdeficsPerceiverResampler(config, WIDTH, depth=2, n_heads=3, head_dim=4, n_latents=5)
    randomise(built)
    return built.eval()


def ours(theirs: IdeficsPerceiverResampler, qk_norm: bool) -> PerceiverResampler:
    config = ResamplerConfig(**SMALL, qk_norm=qk_norm)
    built = PerceiverResampler(config, WIDTH)
    built.load_state_dict(from_idefics(theirs.state_dict(), config))
    return built.eval()


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_equals_that_of_idefics(qk_norm: bool, summary: bool, record_property: Any) -> None:
    theirs = original(qk_norm)
    features = ragged(WIDTH)
    count = len(features.images)
    tokens = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))
    if summary:
        features = VisualFeatures(features.values, features.images, features.batch, tokens)
    with torch.no_grad():
        latents, whose = ours(theirs, qk_norm)(features)
        assert [len(span) for span in latents[whose]] == [5] * count
        for image, span in enumerate(features.images):
            patches = features.values[span.offset : span.offset + span.length]
            context = torch.cat([tokens[image : image + 1], patches]) if summary else patches
            expected = theirs(context[None])[0]
            worst = assert_same([latents[whose[image]]], [expected])
            record_oracle(record_property, "resampler", "`IdeficsPerceiverResampler`", worst)


def test_a_shared_picture_is_read_once() -> None:
    once = ragged(WIDTH, ((0,), (1,)))
    shared = once.select([0, 1, 0, 1, 0])
    latents, whose = PerceiverResampler(ResamplerConfig(**SMALL), WIDTH)(shared)
    assert len(latents) == 2
    assert whose == [0, 1, 0, 1, 0]


def test_a_batch_without_pictures_has_no_latents() -> None:
    nothing = VisualFeatures(torch.zeros(0, WIDTH), (), 3, torch.zeros(0, WIDTH))
    latents, whose = PerceiverResampler(ResamplerConfig(**SMALL), WIDTH)(nothing)
    assert latents.shape == (0, 5, WIDTH)
    assert whose == []


def test_global_tokens_join_their_pictures_also_where_samples_share_them() -> None:
    once = ragged(WIDTH, ((0, 1), (2,)))
    tokens = torch.arange(3.0).unsqueeze(1).expand(3, WIDTH)
    features = VisualFeatures(once.values, once.images, once.batch, tokens).select([1, 0, 1])
    merged = with_global_tokens(features)
    padded, mask = merged.padded()
    assert mask.sum(1).tolist() == [n + k for n, k in zip(features.lengths, (1, 2, 1), strict=True)]
    assert padded[:, 0, 0].tolist() == [2.0, 0.0, 2.0]
    assert merged.values.shape[0] == once.values.shape[0] + 3
    first = merged.images[1]
    assert torch.equal(
        merged.values[first.offset + 1 : first.offset + first.length], once.values[:6]
    )


def test_the_strategy_learns() -> None:
    torch.manual_seed(0)
    model = IPN.from_config(
        {"strategy": "resampler", "backbone": "tiny", "encoder": "tiny", "perceive": SMALL},
        backbone=tiny_backbone(),
        encoder=TinyEncoder(TinyEncoderConfig()),
    )
    shown = Image.new("RGB", (24, 48), (200, 40, 90))
    prompt = Prompt.ask("What?", [shown, shown], answer="a")
    learned = trainable(model, ["perceive", "slots.image"])
    optimiser = torch.optim.Adam(learned.values(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss, _ = model([prompt])
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    check_gradients(model, learned)
    assert losses[-1] < 0.8 * losses[0]
    assert model.ask([shown, shown], "What?", max_new_tokens=1).tokens["static"] == 10
