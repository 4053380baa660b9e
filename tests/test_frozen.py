"""The language model is frozen, and it stays so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import FAMILIES, prompt_of, toy_model

from ipn_core.errors import ConfigError
from ipn_core.testing.tiny import tiny_backbone


def text_logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        return model.backbone.lm(input_ids=ids)["logits"].clone()


@pytest.mark.parametrize("strategy", ["tiny-look", "toy-both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_the_backbone_bit_for_bit_as_it_was(
    registry: Any, family: str, strategy: str
) -> None:
    model = toy_model(registry, strategy, family).train()
    logits = text_logits(model)
    weights = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for step in range(3):
        loss, count = model([prompt_of(row + step, 1, answer="ab") for row in range(2)])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert torch.equal(text_logits(model), logits)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_every_trained_parameter_receives_a_gradient(registry: Any) -> None:
    model = toy_model(registry, "toy-both")
    loss, _ = model([prompt_of(0, 2, answer="ab")])
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_the_backbone_and_the_encoder_stay_in_eval_mode_while_the_stages_train(
    registry: Any,
) -> None:
    model = toy_model(registry, family="opt").train()
    assert model.interaction.training
    assert not any(m.training for m in model.backbone.modules())
    assert not any(m.training for m in model.encoder.modules())


def test_opt_drops_nothing_while_the_stages_train(registry: Any) -> None:
    model = toy_model(registry, family="opt")
    model.backbone.lm.config.dropout = 0.5
    prompts = [prompt_of(0, 1, answer="ab")]
    assert torch.equal(model.eval()(prompts)[0], model.train()(prompts)[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("switch", ["gradient", "activation"])
def test_gradient_checkpointing_is_refused(registry: Any, switch: str) -> None:
    model = toy_model(registry)
    getattr(model.backbone.lm, f"{switch}_checkpointing_enable")()
    with pytest.raises(
        ConfigError, match=r"gradient checkpointing .*gradient_checkpointing_disable"
    ):
        model.train()([prompt_of(0, 1, answer="ab")])


def test_gradient_checkpointing_is_refused_where_a_backbone_is_made() -> None:
    backbone = tiny_backbone()
    backbone.lm.activation_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        type(backbone)(backbone.lm, backbone.tokenizer)


def test_a_cache_that_lost_tokens_is_noticed(registry: Any) -> None:
    backbone = tiny_backbone()
    cache = backbone.new_cache()
    cache.update = lambda key, value, *_, **__: (key, value)
    embeds = backbone.embed(torch.tensor([[5, 6, 7]]))
    with pytest.raises(AssertionError, match="went from 0 to 0 tokens over a segment of 3"):
        backbone.extend(embeds, cache, torch.arange(3)[None], None)


def test_trained_state_holds_neither_backbone_nor_frozen_encoder(registry: Any) -> None:
    keys = toy_model(registry, "toy-both").trained_state()
    assert not any(k.startswith(("backbone.", "perceiver.encoder.")) for k in keys)
    assert {k.split(".")[0] for k in keys} == {"slots", "perceiver", "interaction", "injector"}
