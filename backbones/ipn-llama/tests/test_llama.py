"""LLaMA and Vicuna: sizes, layers, chat formats, and which weights they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ipn_llama.llama import Llama, Vicuna

from ipn_core.backbone import Backbone
from ipn_core.config import BackboneConfig, Layout, PromptConfig
from ipn_core.errors import CheckpointError, ConfigError, UnknownNameError, UserError
from ipn_core.plan import Planner, Tokens
from ipn_core.prompt import Prompt
from ipn_core.testing.contracts import BackboneContract
from ipn_core.testing.tiny import tiny_backbone, tiny_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


class TestLlama(BackboneContract):
    name = "llama"

    def build(self) -> Backbone:
        return tiny_backbone("llama")


class TestGroupedQueries(TestLlama):
    def build(self) -> Backbone:
        return tiny_backbone("llama-gqa")


class TestVicuna(BackboneContract):
    name = "vicuna"

    def build(self) -> Backbone:
        return tiny_backbone("vicuna")


def rendered(backbone: Llama, prompt: Prompt, system: str | None = None) -> str:
    plan = Planner(
        backbone.tokenizer, backbone.template, Layout(), PromptConfig(system=system)
    ).plan(prompt)
    return backbone.tokenizer.decode(
        [i for p in plan.pieces if isinstance(p, Tokens) for i in p.ids]
    )


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "vicuna"])
def test_sizes_are_those_of_the_weights(family: str) -> None:
    backbone = tiny_backbone(family)
    assert (backbone.D_in, backbone.D_out, backbone.D_hidden) == (32, 32, (32, 32, 32))
    assert len(backbone.layers) == 2
    assert backbone.max_positions == 512
    assert backbone.eos_ids == (backbone.tokenizer.eos_token_id,)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "vicuna"])
def test_hidden_layers_are_counted_as_transformers_does(family: str) -> None:
    backbone = tiny_backbone(family)
    embeds = backbone.embed(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        mine = backbone.extend(
            embeds, backbone.new_cache(), torch.arange(3)[None], None, [0, 1, -1, -2, 2]
        )
        whole = backbone.lm(inputs_embeds=embeds, output_hidden_states=True)
    assert sorted(mine.hidden) == [0, 1]
    for layer, hidden in mine.hidden.items():
        assert torch.equal(hidden, whole.hidden_states[layer])
    assert torch.equal(mine.last, whole.hidden_states[-1])
    torch.testing.assert_close(backbone.logits(mine.last), whole.logits)


def test_vicuna_speaks_v1_1() -> None:
    backbone = tiny_backbone("vicuna")
    conversation = Prompt.user("Hello!").then_assistant("Hi!").then_user("How?")
    assert rendered(backbone, conversation) == (
        f"<s>{SYSTEM}USER: Hello! ASSISTANT: Hi!</s>USER: How? ASSISTANT:"
    )
    assert rendered(backbone, Prompt.user("How?"), "Be brief.") == (
        "<s>Be brief. USER: How? ASSISTANT:"
    )


def test_vicuna_keeps_its_format_whatever_the_tokenizer_brings() -> None:
    backbone = Vicuna(tiny_backbone("vicuna").lm, tiny_tokenizer(chat=True))
    assert rendered(backbone, Prompt.user("How?")).endswith("USER: How? ASSISTANT:")


def test_llama_uses_the_tokenizers_template_and_plain_text_without_one() -> None:
    conversation = Prompt.user("a").then_assistant("b").then_user("c")
    assert "<|im_start|>user\na<|im_end|>" in rendered(tiny_backbone("llama"), conversation)
    plain = Llama(tiny_backbone("vicuna").lm, tiny_tokenizer(chat=False))
    assert rendered(plain, conversation) == "<s>a\nb\nc\n"


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="Llama takes llama models; these weights are of type 'opt'"
    ):
        Llama(tiny_backbone("opt").lm, tiny_tokenizer())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backbone = tiny_backbone("llama-gqa")
    backbone.lm.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_loaded_in_the_dtype_of_the_config(folder: Path, dtype: str) -> None:
    config = BackboneConfig(name="llama", weights=str(folder), dtype=dtype)
    backbone = Llama.load(config)
    assert backbone.dtype == getattr(torch, dtype)
    assert not any(p.requires_grad for p in backbone.parameters())
    expected = tiny_backbone("llama-gqa").lm.state_dict()
    for key, value in backbone.lm.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model\.bin\).* refused"):
        Llama.load(BackboneConfig(name="llama", weights=str(folder)))


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone.weights is missing"):
        Llama.load(BackboneConfig(name="llama"))
    with pytest.raises(UnknownNameError, match="unknown weights 'nothing'"):
        Llama.load(BackboneConfig(name="llama", weights="nothing"))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        Llama.load(BackboneConfig(name="llama", weights=str(folder)))
