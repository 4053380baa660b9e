"""The injectors `prefix-kv` and `layers`, and what is refused when a model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import two_pass
from lessons import four_stages, lesson, metrics, said, stage, training
from toys import FAMILIES, K, picture, prompt_of, toy_config, toy_model, toy_registry
from watching import check_against_two_passes, gradients, last_logits, seen_positions

from ipn_core.backbone import Backbone
from ipn_core.builtin.layers import CrossLayers
from ipn_core.builtin.prefix_kv import PrefixKV
from ipn_core.errors import (
    ConfigError,
    GenerationOptionError,
    PromptError,
    ShapeError,
    TrainingError,
)
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import Registry, add_plugin
from ipn_core.prompt import Prompt
from ipn_core.segments import lay_out
from ipn_core.stages import Dims, Injection, LayerContext
from ipn_core.testing.contracts.pictures import ragged
from ipn_core.testing.interactions import TinyLook
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.training.checks import awake
from ipn_core.training.requests import requests_are_constant

INJECTORS: dict[str, dict[str, Any]] = {
    "prefix-kv": {"name": "prefix-kv", "hidden": 8},
    "layers": {"name": "layers", "every": 1, "heads": 2, "head_width": 4, "mlp_ratio": 1},
}
LONGER = 2


class Longer(TinyLook):
    """An interaction whose message is longer than the layout's slots are many."""

    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.queries = torch.nn.Parameter(torch.randn(dims.K + LONGER, config.width))

    @property
    def length(self) -> int:
        return len(self.queries)


class Mute(PrefixKV):
    """Forgets to give the keys it says it does."""

    def forward(self, message: Any, context: Any) -> Injection:
        return Injection()


class Plugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.interaction("toy-longer", Longer)
        registry.injector("toy-mute", Mute)


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = toy_registry()
    add_plugin(registry, "toy-injections", Plugin())
    return registry


def model_of(registry: Any, injector: str, family: Any = "llama", **more: Any) -> IPN:
    return toy_model(registry, "tiny-look", family, inject=INJECTORS[injector], **more)


# -- against a reference that runs whole prompts ---------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "vicuna"])
@pytest.mark.parametrize("injector", INJECTORS)
def test_a_ragged_batch_equals_two_passes(
    registry: Any, injector: str, family: str, rounds: int
) -> None:
    check_against_two_passes(model_of(registry, injector, family, rounds=rounds), 3, rounds, 2)


@pytest.mark.parametrize("injector", INJECTORS)
def test_static_tokens_and_a_longer_message_equal_two_passes(registry: Any, injector: str) -> None:
    model = toy_model(
        registry,
        "toy-both",
        "llama-gqa",
        rounds=2,
        interact="toy-longer",
        inject=INJECTORS[injector],
    )
    assert model.injector.dims.M == K + LONGER
    check_against_two_passes(model, 3, 2, 2)


@pytest.mark.parametrize("injector", INJECTORS)
def test_several_sequences_of_a_prompt_equal_two_passes(registry: Any, injector: str) -> None:
    model = model_of(registry, injector)
    prompts = [prompt_of(0, 1), prompt_of(1, 2)]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    answers = model.generate(prompts, **options)
    expected = [ids for p in prompts for ids in two_pass.generate(model, p, **options)]
    assert [a.ids for a in answers] == expected


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("injector", INJECTORS)
def test_a_dialogue_equals_a_fresh_start(
    registry: Any, injector: str, family: str, rounds: int
) -> None:
    model = model_of(registry, injector, family, rounds=rounds)
    shown, asked = [picture(0)], ["What?", "Who?", "Where?"]
    dialogue, again = model.dialogue(shown), Prompt(())
    for turn, question in enumerate(asked):
        # The second turn's beams leave the cache at the prompt's end; the third goes on from it.
        options = {"max_new_tokens": 3, "num_beams": 3 if turn == 1 else 1}
        answer = dialogue.ask(question, **options)
        again = again.then_user(*([] if turn else shown), question)
        assert answer.ids == two_pass.generate(model, again, **options)[0]
        ended = answer.ids[-1] in model.backbone.eos_ids
        again = again.then_assistant(answer.ids[:-1] if ended else answer.ids)


@pytest.mark.parametrize("injector", INJECTORS)
def test_a_turn_that_fails_leaves_no_message_behind(registry: Any, injector: str) -> None:
    model = model_of(registry, injector)
    expected, dialogue = (model.dialogue([picture(0)]) for _ in range(2))
    for one in (expected, dialogue):
        one.ask("What?", max_new_tokens=2)
    with pytest.raises(GenerationOptionError, match="max_length"):
        dialogue.ask("And where is it?", max_length=1)  # found out after the look
    options = {"max_new_tokens": 4, "num_beams": 2}
    assert dialogue.ask("Who?", **options).ids == expected.ask("Who?", **options).ids


@pytest.mark.parametrize("injector", INJECTORS)
def test_rows_of_one_question_share_what_stands_before_the_look(
    registry: Any, injector: str
) -> None:
    model = model_of(registry, injector)
    prompts = [Prompt.user(picture(i), "What is it, and where?") for i in range(3)]
    with seen_positions(model) as seen, torch.no_grad():
        logits, real = last_logits(model, prompts)
    assert seen[0][0] == 1
    for row, prompt in enumerate(prompts):
        mine = logits[row][real[row]]
        torch.testing.assert_close(
            mine, two_pass.logits(model, prompt)[-len(mine) :], rtol=1e-4, atol=1e-4
        )


# -- what is counted -------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("injector", INJECTORS)
def test_only_what_the_llm_processes_is_counted(registry: Any, injector: str, rounds: int) -> None:
    model = model_of(registry, injector, rounds=rounds)
    prompt = prompt_of(0, 1)
    dialogue = model.dialogue()
    with seen_positions(model) as seen:
        answer = dialogue.ask("What?", prompt.images, max_new_tokens=4)
    assert answer.tokens["dynamic"] == 0
    assert answer.tokens["request"] == rounds
    assert sum(tokens for _, tokens in seen) == sum(answer.tokens.values())
    added = rounds * K if injector == "prefix-kv" else 0
    assert dialogue.prefilled == sum(answer.tokens.values()) + added


def test_a_picture_after_a_look_stands_behind_what_is_in_the_cache(registry: Any) -> None:
    model = model_of(registry, "prefix-kv")
    prompt = Prompt.user(picture(0), "a").then_assistant("b").then_user("c", picture(1))
    plan = model.planner.plan(prompt)
    _, _, pictures = lay_out([plan], [[0, 0]], 1, 0, K)
    assert pictures == [two_pass.whole(model, prompt).pictures]


def test_positions_in_the_cache_count_towards_the_context(registry: Any) -> None:
    short = tiny_backbone("llama", positions=40)
    model = model_of(registry, "prefix-kv", backbone=short)
    plan = model.planner.plan(Prompt.user(picture(0), "Wh?"))
    length = len(two_pass.whole(model, Prompt.user(picture(0), "Wh?")).embeds)
    assert length == len(plan.text_ids) + 1 + K
    fits = Prompt.user(picture(0), "Wh?" + "!" * (39 - length))
    assert len(model.generate([fits], max_new_tokens=9)[0].ids) <= 1
    with pytest.raises(PromptError, match=r"has 40 tokens; with the answer, at most 40"):
        model.generate([Prompt.user(picture(0), "Wh?" + "!" * (40 - length))])


# -- each of its own -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_stand_where_the_llm_would_have_put_them(family: Any) -> None:
    backbone = tiny_backbone(family)
    count, layers, start = 5, len(backbone.layers), 3
    ids = torch.randint(5, 200, (2, start + count), generator=torch.Generator().manual_seed(0))
    embeds, positions = backbone.embed(ids), torch.arange(start + count).expand(2, -1)
    bare: dict[str, list[torch.Tensor]] = {"k_proj": [], "v_proj": []}
    handles = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda module, args, output, name=name: bare[name].append(output[:, start:])
        )
        for layer in backbone.layers
        for name in bare
    ]
    whole = backbone.new_cache()
    backbone.extend(embeds, whole, positions, None)
    for handle in handles:
        handle.remove()
    keys, values = (
        torch.stack(found, 1).unflatten(-1, (backbone.kv_heads, backbone.head_dim))
        for found in bare.values()
    )
    cache = backbone.new_cache()
    backbone.extend(embeds[:, :start], cache, positions[:, :start], None)
    backbone.remember(keys, values, positions[:, start:], cache)
    for layer in range(layers):
        torch.testing.assert_close(cache.layers[layer].keys, whole.layers[layer].keys)
        torch.testing.assert_close(cache.layers[layer].values, whole.layers[layer].values)


def test_cross_layers_change_nothing_until_their_gates_open(registry: Any) -> None:
    model = model_of(registry, "layers")
    prompt = prompt_of(0, 1)
    with torch.no_grad():
        opened = two_pass.logits(model, prompt)
        for block in model.injector.blocks.values():
            block.gate.zero_()
            block.mlp_gate.zero_()
        (logits, real), filled = last_logits(model, [prompt]), two_pass.whole(model, prompt)
        plain = model.backbone.lm(inputs_embeds=filled.embeds[None]).logits[0]
    mine = logits[0][real[0]]
    torch.testing.assert_close(mine, plain[-len(mine) :])
    assert not torch.allclose(mine, opened[-len(mine) :], rtol=1e-2)
    fresh = CrossLayers(CrossLayers.Config(), Dims(4, 6, (6,) * 10, 6, M=2, Dm=5))
    assert fresh.layers == (0, 4, 8)
    assert not any(bool(p) for name, p in fresh.named_parameters() if name.endswith("gate"))


def test_cross_layers_see_the_messages_of_earlier_looks_alone() -> None:
    torch.manual_seed(0)
    injector = CrossLayers(
        CrossLayers.Config(every=1, heads=2, head_width=4), Dims(4, 6, (6, 6), 6, M=2, Dm=5)
    )
    with torch.no_grad():
        for parameter in injector.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    hidden, messages = torch.randn(2, 6, 6), torch.randn(2, 2, 2, 5)
    # The second row has looked once, its second message is what pads it.
    looks = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1]])
    positions = torch.arange(6).expand(2, -1)

    def changed(messages: torch.Tensor) -> torch.Tensor:
        context = LayerContext(0, positions, looks, ragged(4, [(0,), (1,)]), looks, messages)
        return injector.before_layer(hidden, context)

    before = changed(messages)
    assert torch.equal(before[looks == 0], hidden[looks == 0])
    other = messages.clone()
    other[:, 1] = torch.randn(2, 2, 5)
    moved = (changed(other) - before).abs().amax(-1) > 1e-6
    assert torch.equal(moved, looks == 2)
    other = messages.clone()
    other[:, 0] = torch.randn(2, 2, 5)
    moved = (changed(other) - before).abs().amax(-1) > 1e-6
    assert torch.equal(moved, looks >= 1)


@pytest.mark.parametrize("injector", INJECTORS)
def test_every_weight_of_the_injector_gets_a_gradient(registry: Any, injector: str) -> None:
    model = model_of(registry, injector)
    loss, _ = model([prompt_of(0, 1, answer="ab")])
    found = gradients(model, loss)
    mine = {name: g for name, g in found.items() if name.startswith("injector.")}
    assert mine
    for name, gradient in mine.items():
        assert gradient.abs().sum() > 0, name


def test_a_model_in_half_precision_keeps_its_cache_in_it(registry: Any) -> None:
    backbone = tiny_backbone("llama-gqa")
    backbone.lm.bfloat16()
    model = model_of(registry, "prefix-kv", backbone=backbone)
    dialogue = model.dialogue([picture(0)])
    assert len(dialogue.ask("What?", max_new_tokens=2).ids) == 2
    assert dialogue._state.cache.layers[0].keys.dtype == torch.bfloat16
    assert next(model.injector.parameters()).dtype == torch.float32


def test_a_ragged_batch_runs_under_autocast(registry: Any) -> None:
    model = model_of(registry, "layers", rounds=2)
    taught = [prompt_of(0, 1, answer="ab"), prompt_of(1, 0, answer="b")]
    full, _ = model(taught)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = model(taught)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


# -- what is refused -------------------------------------------------------------------------------


def build(registry: Any, backbone: Any = None, **more: Any) -> IPN:
    return IPN.from_config(
        toy_config(registry, "tiny-look", **more),
        backbone=backbone or tiny_backbone(),
        encoder=TinyEncoder(TinyEncoderConfig()),
        registry=registry,
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"interact": "toy-longer"},
            "^injector 'tokens' does not fit this model: the interaction's message has 5 tokens "
            "and the layout 3 slots for them: set layout.dynamic to 5.$",
        ),
        ({"layout": {"dynamic": 0}}, r"^injector 'tokens' does not fit .* layout.dynamic 0 there"),
        (
            {"layout": {"dynamic": 0}, "inject": "prefix-kv"},
            r"^injector 'prefix-kv' does not fit .* layout.dynamic 0 there",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_reason(
    registry: Any, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        build(registry, **more)


def test_a_backbone_that_takes_no_keys_is_refused(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone()
    monkeypatch.setattr(type(backbone), "place_keys", Backbone.place_keys)
    assert not backbone.takes_keys
    with pytest.raises(ConfigError, match=r"^injector 'prefix-kv' does not fit .*place_keys"):
        build(registry, backbone, inject="prefix-kv")
    assert build(registry, backbone, inject="layers").injector.fills == 0


def test_an_injector_that_does_not_keep_its_word_is_named(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = toy_model(registry, "tiny-look", inject="toy-mute")
    with pytest.raises(ShapeError, match=r"^stage inject .*\(Mute\) returned Injection, expected"):
        mute.generate([prompt_of(0, 1)])
    tokens = toy_model(registry)
    monkeypatch.setattr(type(tokens.injector), "fills", property(lambda self: 0))
    with pytest.raises(ShapeError, match=r"returned \(1, 3, 32\), expected no tokens"):
        tokens.generate([prompt_of(0, 1)])


@pytest.mark.parametrize("injector", INJECTORS)
def test_a_prompt_that_ends_with_the_look_is_refused(registry: Any, injector: str) -> None:
    bare = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = model_of(registry, injector, prompt={"template": bare})
    asked = Prompt.user(picture(0), "What?")
    for prompt in (asked, asked.then_assistant("a", learn=True)):
        with pytest.raises(PromptError, match="nothing stands between the look and the answer"):
            model([prompt]) if prompt.turns[-1].learn else model.generate([prompt])
    first = {"order": ["images", "look", "text"]}
    looking = model_of(registry, injector, prompt={"template": bare}, layout=first)
    assert len(looking.generate([asked], max_new_tokens=1)[0].ids) == 1


# -- training --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_training")
@pytest.mark.parametrize("injector", INJECTORS)
def test_rvii_with_another_injector_trains_and_answers(
    llm: Path, tmp_path: Path, injector: str
) -> None:
    stages = four_stages(steps=2)
    for one in stages:
        one["train"] = [name for name in one["train"] if name != "slots.dynamic"]
    values = lesson(llm, *stages)
    values["model"]["inject"] = INJECTORS[injector]
    run = training(values, tmp_path / "run")
    run.run()
    assert said(run).count("every tensor gets a finite non-zero gradient") == 4
    assert {line["stage"] for line in metrics(tmp_path / "run") if "loss" in line} == {
        one["name"] for one in stages
    }
    model = IPN.from_pretrained(tmp_path / "run" / "model", registry=run.registry)
    answer = model.ask(picture(0), "Colour left?", max_new_tokens=2)
    assert answer.tokens["dynamic"] == 0
    assert answer.attention is not None
    # What is injected comes after the question is read, so that it may be read once for all.
    model.requires_grad_(False)
    assert requests_are_constant(model)


@pytest.mark.usefixtures("own_training")
@pytest.mark.parametrize("injector", INJECTORS)
def test_slots_that_the_injector_does_not_fill_cannot_be_trained(
    llm: Path, tmp_path: Path, injector: str
) -> None:
    values = lesson(llm, stage("s", "language"))
    values["model"]["inject"] = INJECTORS[injector]
    with pytest.raises(ConfigError, match=r"'slots.dynamic' names nothing .*slots\.request\.$"):
        training(values, tmp_path / "run").run()


@pytest.mark.usefixtures("own_training")
def test_blocks_behind_a_gate_that_stays_shut_are_refused(llm: Path, tmp_path: Path) -> None:
    blocks = [f"inject.blocks.{i}.{part}" for i in (0, 1) for part in ("q", "kv", "out")]
    values = lesson(llm, stage("s", "language", train=blocks))
    values["model"]["inject"] = INJECTORS["layers"]
    with pytest.raises(TrainingError, match=r"the gradient of injector\.blocks\.0\..* is zero"):
        training(values, tmp_path / "run").run()


def test_what_starts_at_zero_is_awake_for_the_check_alone() -> None:
    gate, weight = (torch.nn.Parameter(x) for x in (torch.zeros(3), torch.ones(3)))
    with awake({"gate": gate, "weight": weight}):
        assert bool(gate.all())
        assert torch.equal(weight, torch.ones(3))
    assert torch.equal(gate, torch.zeros(3))
