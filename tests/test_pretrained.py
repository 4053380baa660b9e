"""Weights that transformers loads fill every tensor, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import picture, toy_registry
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ipn_core.backbone import Backbone, load_tokenizer
from ipn_core.config import BackboneConfig
from ipn_core.errors import CheckpointError, DownloadError, StageError, UnknownNameError
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import add_plugin, get_registry
from ipn_core.pretrained import read_config, refuse_pickles
from ipn_core.testing.tiny import tiny_backbone, tiny_tokenizer
from ipn_core.weights import Weights

QUERY = "model.layers.0.self_attn.q_proj.weight"


def load(weights: object, name: str = "llama") -> Backbone:
    adapter: Any = get_registry().get("backbone", name).load()
    backbone: Backbone = adapter.load(BackboneConfig(name=name, weights=str(weights)))
    return backbone


def change(folder: Path, act: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    act(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda f: change(f, lambda s: s.pop(QUERY)),
            rf"do not fit their config of a LlamaForCausalLM: missing {QUERY}\. Fetch or save",
        ),
        (
            lambda f: change(f, lambda s: s.update({QUERY: torch.zeros(3, 5)})),
            rf"{QUERY} has shape \(3, 5\), the config asks for \(32, 32\)",
        ),
        (lambda f: change(f, dict.clear), r"missing lm_head\.weight; .*; and 15 more\."),
        (cut, r"cannot be loaded: .*incomplete metadata"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nonsense"), "cannot be loaded: "),
        (lambda f: (f / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer of .* cannot be loaded: "),
    ],
    ids=["missing", "shape", "all missing", "cut", "nonsense", "config", "tokenizer"],
)
def test_weights_that_do_not_fill_the_model_are_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    save(tmp_path, tiny_backbone().lm)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=f"the weights '{tmp_path}'.*") as caught:
        load(tmp_path)
    assert caught.match(reason)
    assert caught.value.exit_code == 2


def save(folder: Path, lm: Any) -> None:
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def test_a_missing_tokenizer_is_told_in_whole_sentences(tmp_path: Path) -> None:
    tiny_backbone().lm.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"the tokenizer of the weights '{tmp_path}' cannot be loaded: there is none in "
        f"'{tmp_path}'. Put the files beside the weights that its save_pretrained writes, such as "
        "tokenizer.json."
    )


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights that bring code, which says when it runs, and which nobody may ask the user about."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    save(tmp_path / "it", tiny_backbone().lm)
    for name, kind in (("config.json", "Config"), ("tokenizer_config.json", "Tokenizer")):
        path = tmp_path / "it" / name
        content = {**json.loads(path.read_text()), "auto_map": {f"Auto{kind}": "code.It"}}
        content |= {"model_type": "mine"} if kind == "Config" else {"tokenizer_class": "It"}
        path.write_text(json.dumps(content))
    (tmp_path / "it" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return tmp_path / "it"


@pytest.mark.parametrize(
    "read",
    [
        load,
        lambda folder: read_config(folder, "the weights"),
        lambda folder: load_tokenizer(folder, "the weights"),
        lambda folder: IPN.from_pretrained(f"llava:{folder}"),
    ],
    ids=["backbone", "config", "tokenizer", "import"],
)
def test_code_beside_weights_is_never_run_nor_asked_about(coded: Path, read: Any) -> None:
    with pytest.raises(CheckpointError, match=r"code"):
        read(coded)
    assert not (coded.parent / "ran").exists()


def test_tied_embeddings_are_not_missing(tmp_path: Path) -> None:
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            tie_word_embeddings=True,
        )
    )
    save(tmp_path / "llama", lm)
    assert "lm_head.weight" not in load_file(tmp_path / "llama" / "model.safetensors")
    assert torch.equal(load(tmp_path / "llama").lm.lm_head.weight, lm.model.embed_tokens.weight)
    save(tmp_path / "opt", tiny_backbone("opt").lm)
    assert load(tmp_path / "opt", "opt").D_in == 32


def test_too_little_memory_is_not_blamed_on_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    save(tmp_path, tiny_backbone().lm)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(tmp_path)


def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_user() -> None:
    with pytest.raises(DownloadError, match=r"cannot fetch the weights 'no/such' .*online") as own:
        load("no/such")
    assert own.value.exit_code == 1
    long = f"no/{'x' * 200}"
    with pytest.raises(UnknownNameError, match=r"cannot find the weights 'no/x+' here or on"):
        load(long)


class Here(Weights):
    """Weights that are in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self) -> Path:
        return self._folder

    def present(self) -> bool:
        return True

    def fetch(self, report: Any) -> None: ...


def test_names_are_looked_up_where_the_model_was_told_to(tmp_path: Path) -> None:
    class Plugin:
        @hookimpl
        def register(self, registry: Any) -> None:
            registry.weights("only-here", Here(tmp_path))

    save(tmp_path, tiny_backbone().lm)
    registry = toy_registry()
    add_plugin(registry, "local-weights", Plugin())
    backbone = {"name": "llama", "weights": "only-here"}
    config = {"strategy": "toy-both", "encoder": "tiny", "backbone": backbone}
    model = IPN.from_config(config, registry=registry)
    assert model.label("perceive") == "plugin toys local"
    model.perceiver.forward = lambda *_: 1 / 0
    with pytest.raises(StageError, match="stage perceive of plugin toys local failed: ZeroDiv"):
        model.ask(picture(), "What?")


def test_pickled_weights_of_an_llm_are_refused_unless_safetensors_lie_beside(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError,
        match=r"^LLM are pickled \(a.bin\), which can run code when loaded: refused. Convert them",
    ):
        refuse_pickles(tmp_path, "LLM")
    (tmp_path / "a.safetensors").write_bytes(b"")
    refuse_pickles(tmp_path, "LLM")
