"""The strategy `gated-xattn`: its contract, Idefics' own block, and training from nothing."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from ipn_gated_xattn.block import GatedBlock, GatedXattnConfig
from ipn_gated_xattn.importing import blocks_from_idefics
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from ipn_core.errors import ConfigError
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.testing.contracts import InjectorContract
from ipn_core.testing.oracles import prompt_logits, randomise
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone, tiny_picture
from ipn_core.training.checks import awake, check_gradients
from ipn_core.training.parameters import trainable

SMALL: dict[str, Any] = {
    "perceive": {"latents": 3, "depth": 1, "heads": 2, "head_width": 4},
    "inject": {"every": 1, "heads": 2, "hidden": 24},
}


class TestGatedXattn(InjectorContract):
    name = "gated-xattn"
    options = {"every": 1, "heads": 3, "hidden": 16, "qk_norm": True, "gate": "vector"}  # noqa: RUF012 the contract declares it

    def test_only_the_last_picture_before_a_token_is_seen(self) -> None:
        module, inputs = self.build(), self.inputs()
        context = inputs.between
        features = context.features
        for changed in (0, 1):
            values = features.values.clone()
            for span in features.images:
                if span.place == changed:
                    values[span.offset : span.offset + span.length] += 1
            other = replace(context, features=replace(features, values=values))
            one, two = (module.before_layer(inputs.hidden, c) for c in (context, other))
            differs = (one - two).abs().amax(-1) > 1e-5
            assert torch.equal(differs, context.pictures == changed + 1)

    def test_a_global_token_is_a_part_of_its_tiny_picture(self) -> None:
        module, inputs = self.build(), self.inputs()
        features = inputs.between.features
        tokens = torch.randn(len(features.images), features.values.shape[1])

        def run(given: torch.Tensor) -> torch.Tensor:
            seen = replace(features, global_tokens=given)
            changed: torch.Tensor = module.before_layer(
                inputs.hidden, replace(inputs.between, features=seen)
            )
            return changed

        turned = tokens.clone()
        turned[0] += 1
        differs = (run(tokens) - run(turned)).abs().amax(-1) > 1e-5
        first = torch.zeros_like(differs)
        first[0] = inputs.between.pictures[0] == 1
        assert torch.equal(differs, first)

    def test_what_is_kept_while_decoding_is_what_training_computes(self) -> None:
        module, inputs = self.build(), self.inputs()
        learning = module.before_layer(inputs.hidden, inputs.between)
        with torch.no_grad():
            first, second = (module.before_layer(inputs.hidden, inputs.between) for _ in range(2))
        again = module.before_layer(inputs.hidden, inputs.between)
        assert torch.equal(first, learning.detach())
        assert torch.equal(second, first)
        again.sum().backward()
        assert module.blocks[0].k.weight.grad.abs().sum() > 0
        features = weakref.ref(inputs.between.features)
        del inputs, learning, first, second, again
        assert features() is None, "what is kept with them keeps them"


# -- one block -------------------------------------------------------------------------------------

D, DV, T, P = 24, 20, 7, 5


@pytest.mark.parametrize("alpha", ["vector", "float"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_equals_that_of_idefics(alpha: str, qk_norm: bool) -> None:
    config = IdeficsConfig(
        hidden_size=D,
        intermediate_size=36,
        num_attention_heads=3,
        qk_layer_norms=qk_norm,
        alpha_type=alpha,
        vision_config={"embed_dim": DV},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    randomise(theirs)
    mine = GatedXattnConfig(
        heads=3, hidden=36, qk_norm=qk_norm, gate="vector" if alpha == "vector" else "scalar"
    )
    ours = GatedBlock(mine, D, DV)
    state = blocks_from_idefics(torch.nn.ModuleList([theirs]).state_dict(), 1, qk_norm)
    ours.load_state_dict({key.removeprefix("0."): value for key, value in state.items()})

    hidden, pictures = torch.randn(2, T, D), torch.randn(2, 3 * P, DV)
    last = torch.tensor([[-1, -1, 0, 0, 1, 2, 2], [-1, 0, 0, 1, 1, 1, 1]])
    seen = last.unsqueeze(-1) == torch.arange(3).repeat_interleave(P)
    with torch.no_grad():
        keys, values = ours.keys_values(pictures)
        got = ours(hidden, keys, values, seen)
        expected = theirs(
            hidden,
            image_hidden_states=pictures,
            image_attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None],
            cross_attention_gate=seen.any(-1).float(),
        )
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


# -- from nothing ----------------------------------------------------------------------------------

FAMILIES = ("llama", "llama-gqa", "opt", "opt-projected")


def fresh(family: Any = "llama", **more: Any) -> IPN:
    torch.manual_seed(0)
    return IPN.from_config(
        {"strategy": "gated-xattn", "backbone": "tiny", "encoder": "tiny", **SMALL, **more},
        backbone=tiny_backbone(family),
        encoder=TinyEncoder(TinyEncoderConfig()),
    )


ASKED = [
    Prompt.user("What?", tiny_picture(0), " And then?", tiny_picture(1)),
    Prompt.user(tiny_picture(2), "Who?"),
    Prompt.user("Nothing to see?"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_llm_is_unchanged(family: Any) -> None:
    model = fresh(family)
    (got,) = prompt_logits(model, ASKED[:1])
    ids = torch.tensor([model.planner.plan(ASKED[0]).text_ids])
    with torch.no_grad():
        plain = model.backbone.lm(ids).logits[0]
    assert torch.allclose(got, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    randomise(model.injector)
    (changed,) = prompt_logits(model, ASKED[:1])
    assert (changed - plain).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns(family: Any) -> None:
    model = fresh(family)
    model.train()
    prompts = [p.then_assistant(a, learn=True) for p, a in zip(ASKED, "abc", strict=True)]
    learned = trainable(model, ["perceive", "inject"])
    with awake(learned):  # closed gates keep every gradient from what stands behind them
        model(prompts)[0].backward()
        check_gradients(model, learned)
    optimiser = torch.optim.Adam(learned.values(), lr=1e-2)
    losses = []
    for _ in range(16):
        optimiser.zero_grad()
        loss, count = model(prompts)
        loss.backward()
        losses.append(float(loss.detach()) / count)
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in model.backbone.parameters())


def test_a_batch_gives_what_each_alone_gives() -> None:
    model = fresh()
    randomise(model.injector)
    together = model.generate(ASKED, max_new_tokens=5)
    for prompt, answer in zip(ASKED, together, strict=True):
        assert model.generate([prompt], max_new_tokens=5)[0].ids == answer.ids
    beams = model.generate(ASKED, max_new_tokens=5, num_beams=3)
    for prompt, answer in zip(ASKED, beams, strict=True):
        assert model.generate([prompt], max_new_tokens=5, num_beams=3)[0].ids == answer.ids


def test_another_picture_gives_another_answer() -> None:
    model = fresh()
    randomise(model.injector)
    answers = {model.ask(tiny_picture(i), "What?", max_new_tokens=8).ids for i in range(3)}
    assert len(answers) > 1


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model = fresh()
    randomise(model.injector)
    model.save_pretrained(tmp_path)
    again = IPN.from_pretrained(tmp_path, backbone=model.backbone, encoder=model.encoder)
    one, two = prompt_logits(model, ASKED[:1]), prompt_logits(again, ASKED[:1])
    assert torch.equal(one[0], two[0])


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inject\.heads 5 does not divide the LLM's width 32"):
        fresh(inject={"heads": 5})
    fresh(inject={"heads": 5, "head_width": 4})
