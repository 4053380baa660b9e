"""OPT: tied and projected embeddings, positions with their offset, its chat format."""

from __future__ import annotations

import pytest
import torch
from ipn_opt.opt import Opt

from ipn_core.backbone import Backbone
from ipn_core.config import Layout, PromptConfig
from ipn_core.errors import ConfigError
from ipn_core.plan import Planner, Tokens
from ipn_core.prompt import Prompt
from ipn_core.testing.contracts import BackboneContract
from ipn_core.testing.tiny import tiny_backbone, tiny_tokenizer


class TestOpt(BackboneContract):
    name = "opt"

    def build(self) -> Backbone:
        return tiny_backbone("opt")


class TestProjectedOpt(TestOpt):
    def build(self) -> Backbone:
        return tiny_backbone("opt-projected")


@pytest.mark.parametrize(("family", "narrow"), [("opt", 32), ("opt-projected", 16)])
def test_sizes_are_those_of_the_weights(family: str, narrow: int) -> None:
    backbone = tiny_backbone(family)
    assert (backbone.D_in, backbone.D_out) == (narrow, narrow)
    assert backbone.D_hidden == (32, 32, narrow)
    assert len(backbone.layers) == 2


@pytest.mark.parametrize("family", ["opt", "opt-projected"])
def test_hidden_layers_have_the_widths_that_the_backbone_names(family: str) -> None:
    backbone = tiny_backbone(family)
    embeds = backbone.embed(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        mine = backbone.extend(embeds, backbone.new_cache(), torch.arange(3)[None], None, [0, 1])
        whole = backbone.lm(inputs_embeds=embeds)
    widths = tuple(h.shape[-1] for h in (mine.hidden[0], mine.hidden[1], mine.last))
    assert widths == backbone.D_hidden
    torch.testing.assert_close(backbone.logits(mine.last), whole.logits)


def test_padding_on_the_left_shifts_no_position() -> None:
    backbone = tiny_backbone("opt")
    embeds = backbone.embed(torch.tensor([[5, 6, 7]]))
    padded = torch.cat([torch.zeros_like(embeds[:, :2]), embeds], dim=1)
    mask = torch.tensor([[False, False, True, True, True]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = backbone.extend(embeds, backbone.new_cache(), torch.arange(3)[None], None)
        shifted = backbone.extend(padded, backbone.new_cache(), positions, mask)
    torch.testing.assert_close(shifted.last[:, 2:], plain.last, rtol=1e-5, atol=1e-5)


def test_questions_and_answers_alternate() -> None:
    backbone = tiny_backbone("opt")
    prompt = Prompt.user("a").then_assistant("b").then_user("c")
    plan = Planner(backbone.tokenizer, backbone.template, Layout(), PromptConfig(system="s")).plan(
        prompt
    )
    text = backbone.tokenizer.decode(
        [i for p in plan.pieces if isinstance(p, Tokens) for i in p.ids]
    )
    assert text == "<s>s\nQuestion: a\nAnswer: b\nQuestion: c\nAnswer:"


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Opt takes opt models; .* of type 'llama'"):
        Opt(tiny_backbone("llama").lm, tiny_tokenizer())
