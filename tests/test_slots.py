"""The learned embeddings of the slots, and the words that `<img-q>` can start as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import toy_config

from ipn_core.errors import ConfigError
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone


def built(registry: Registry, family: Any = "llama", **layout: Any) -> IPN:
    return IPN.from_config(
        toy_config(registry, "tiny-look", layout=layout),
        backbone=tiny_backbone(family),
        encoder=TinyEncoder(TinyEncoderConfig()),
        registry=registry,
    )


@pytest.mark.parametrize("family", ["llama", "opt-projected"])
def test_request_slots_start_at_the_mean_word(registry: Registry, family: str) -> None:
    model = built(registry, family, request=2)
    mean = model.backbone.lm.get_input_embeddings().weight.detach().mean(0)
    assert model.slots.request.shape == (2, model.backbone.D_in)
    torch.testing.assert_close(model.slots.request.detach(), mean.expand(2, -1))


@pytest.mark.parametrize("family", ["llama", "opt-projected"])
def test_request_slots_start_at_the_words_that_the_layout_gives(
    registry: Registry, family: str
) -> None:
    words = (" the dog", " is")
    tokenizer = tiny_backbone(family).tokenizer
    ids = [i for word in words for i in tokenizer(word, add_special_tokens=False)["input_ids"]]
    model = built(registry, family, request=len(ids), request_init=words)
    expected = model.backbone.lm.get_input_embeddings().weight.detach()[ids]
    assert torch.equal(model.slots.request.detach(), expected)
    # They are the model's own from then on.
    with torch.no_grad():
        model.slots.request.zero_()
    assert model.backbone.lm.get_input_embeddings().weight[ids].abs().min() > 0


def test_words_of_another_length_than_the_slots_are_refused(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"is \d+ tokens of this LLM and 'layout.request' is 40"):
        built(registry, request=40, request_init=[" the dog"])
