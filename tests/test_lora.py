"""A low-rank adapter on the LLM: it trains, is saved, and leaves what it adapts as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import lesson, lesson_registry, metrics, said, stage, stop_at, training, weights
from safetensors.torch import load_file
from toys import FAMILIES, prompt_of, toy_model

from ipn_core.checkpoint import WEIGHTS
from ipn_core.config import BackboneConfig, IPNConfig, LoraConfig
from ipn_core.errors import CheckpointError, ConfigError
from ipn_core.model import IPN
from ipn_core.testing.tiny import tiny_backbone
from ipn_core.training.checks import FrozenBackbone
from ipn_core.training.loop import StageRun
from ipn_core.training.parameters import trainable
from ipn_core.training.requests import RequestCache, backbone_digest, requests_are_constant

pytest.importorskip("peft", reason="needs the package peft (extra 'lora')")

PROMPTS = [prompt_of(row, 1, answer="ab") for row in range(2)]
BOTH = ["backbone.lora", "interact", "inject", "slots.dynamic"]


def adapted(family: Any = "llama", **options: Any) -> Any:
    backbone = tiny_backbone(family)
    backbone.adapt(LoraConfig(**options))
    return backbone


def stir(backbone: Any) -> None:
    """Let an adapter do something."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.lora.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))


def with_lora(llm: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    values = lesson(llm, *stages, **more)
    values["model"]["backbone"]["lora"] = {"rank": 4, "alpha": 8}
    return values


# -- the adapter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_output_is_that_of_the_plain_backbone(registry: Any, family: str) -> None:
    plain, lora = toy_model(registry, family=family), toy_model(registry, backbone=adapted(family))
    own = {k: v for k, v in lora.trained_state().items() if not k.startswith("backbone.")}
    with torch.no_grad():
        for key, value in plain.trained_state().items():
            own[key].copy_(value)
        for name, value in lora.trained_state().items():
            if name.endswith(".B.weight"):
                value.zero_()
    assert torch.equal(plain(PROMPTS)[0], lora(PROMPTS)[0])


def test_the_adapter_alone_belongs_to_the_checkpoint(registry: Any) -> None:
    model = toy_model(registry, backbone=adapted(rank=4, targets=("q_proj", "down_proj")))
    keys = {k for k in model.trained_state() if k.startswith("backbone.")}
    assert keys == {
        f"backbone.lora.model.layers.{layer}.{place}.{factor}.weight"
        for layer in (0, 1)
        for place in ("self_attn.q_proj", "mlp.down_proj")
        for factor in "AB"
    }
    assert set(trainable(model, ["backbone.lora"])) == keys
    assert set(trainable(model, ["backbone.*.B"])) == {k for k in keys if ".B." in k}
    plain = set(tiny_backbone().lm.parameters())
    assert len(plain) == len(list(model.backbone.base_parameters()))
    assert not any(p.requires_grad for p in model.backbone.base_parameters())


def test_its_weights_are_fp32_on_a_bf16_backbone() -> None:
    backbone = tiny_backbone()
    backbone.lm.bfloat16()
    backbone.adapt(LoraConfig())
    assert {p.dtype for p in backbone.lora.parameters()} == {torch.float32}
    assert {p.dtype for p in backbone.base_parameters()} == {torch.bfloat16}
    embeds = backbone.embed(torch.tensor([[5, 6, 7]]))
    out = backbone.extend(embeds, backbone.new_cache(), torch.arange(3)[None], None)
    assert out.last.dtype == torch.bfloat16


def test_only_the_adapter_drops_units_and_only_in_training(registry: Any) -> None:
    model = toy_model(registry, backbone=adapted(dropout=0.5))
    assert torch.equal(model.eval()(PROMPTS)[0], model(PROMPTS)[0])
    model.train()
    assert {m for m in model.backbone.lm.modules() if m.training} <= set(
        model.backbone.lora.modules()
    )
    assert not torch.equal(model(PROMPTS)[0], model(PROMPTS)[0])


def test_it_is_switched_off_and_on_again(registry: Any) -> None:
    backbone = adapted()
    ids = torch.arange(5, 25)[None]
    plain = tiny_backbone().lm(input_ids=ids).logits
    stir(backbone)
    backbone.lora.requires_grad_(False)
    with_it = backbone.lm(input_ids=ids).logits
    with backbone.lora.switched_off():
        assert torch.equal(backbone.lm(input_ids=ids).logits, plain)
    assert torch.equal(backbone.lm(input_ids=ids).logits, with_it)
    assert not torch.equal(with_it, plain)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_a_copy_is_independent() -> None:
    backbone = adapted()
    other = copy.deepcopy(backbone)
    stir(other)
    ids = torch.arange(5, 25)[None]
    assert not torch.equal(backbone.lm(input_ids=ids).logits, other.lm(input_ids=ids).logits)
    with other.lora.switched_off():
        assert torch.equal(backbone.lm(input_ids=ids).logits, other.lm(input_ids=ids).logits)


# -- what must know of it --------------------------------------------------------------------------


def test_requests_are_no_constants_while_it_trains(registry: Any) -> None:
    model = toy_model(registry, backbone=adapted()).requires_grad_(False)
    assert requests_are_constant(model)
    model.backbone.lora.requires_grad_(True)
    assert not requests_are_constant(model)


def test_kept_requests_are_those_of_the_adapter_that_read(registry: Any, tmp_path: Path) -> None:
    plain = toy_model(registry).requires_grad_(False)
    model = toy_model(registry, backbone=adapted()).requires_grad_(False)
    digest, key = backbone_digest(model), RequestCache(model, "digest", tmp_path).key
    stir(model.backbone)
    assert backbone_digest(model) == digest
    assert RequestCache(model, "digest", tmp_path).key != key
    assert key != RequestCache(plain, "digest", tmp_path).key


def test_the_frozen_check_is_about_the_weights_below(registry: Any) -> None:
    model = toy_model(registry, backbone=adapted())
    frozen = FrozenBackbone(model)
    stir(model.backbone)
    model(PROMPTS)[0].backward()
    assert "without its adapter are equal bit for bit" in frozen.check()
    with torch.no_grad():
        next(iter(model.backbone.base_parameters())).add_(1e-3)
    with pytest.raises(Exception, match="the frozen backbone has changed"):
        frozen.check()


def test_another_model_on_the_same_backbone_begins_without_it(registry: Any) -> None:
    from ipn_core.checkpoint import _Folder

    values = toy_model(registry, backbone=adapted()).config.model_dump(exclude_none=True)
    values["backbone"]["lora"] = {"rank": 4}
    config = IPNConfig.parse(values, "config")

    class Source(_Folder):
        def __init__(self) -> None:
            self.strategies = ("tiny-look",)

        def config(self, *_: Any) -> IPNConfig:
            return config

    assert config.backbone.lora == LoraConfig(rank=4)
    assert "lora" not in Source().base(registry)["backbone"]


# -- trainings -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_training")
def test_it_trains_is_saved_and_says_the_same_again(llm: Path, tmp_path: Path) -> None:
    values = with_lora(llm, stage("s", "language", train=["backbone.lora"], steps=30, lr=2e-2))
    registry = lesson_registry()
    model = IPN.from_config(values["model"], registry=registry)
    before = {k: v.clone() for k, v in model.backbone.lm.state_dict().items() if "lora_" not in k}
    run = training(values, tmp_path / "run", model=model)
    target = run.run()
    losses = [entry["loss"] for entry in metrics(tmp_path / "run") if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    after = model.backbone.lm.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert "its text-only logits without its adapter are equal bit for bit" in said(run)
    again = IPN.from_pretrained(target, registry=registry)
    assert again.config.backbone.lora == LoraConfig(rank=4, alpha=8)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(
            again.backbone.lm(input_ids=ids).logits, model.backbone.lm(input_ids=ids).logits
        )
        assert torch.equal(again.eval()(PROMPTS)[0], model.eval()(PROMPTS)[0])


@pytest.mark.usefixtures("own_training")
@pytest.mark.parametrize("trained", [BOTH[1:], BOTH], ids=["frozen", "adapted"])
def test_a_training_on_a_bf16_backbone_learns_in_fp32(
    llm: Path, tmp_path: Path, trained: list[str]
) -> None:
    one = stage("s", "language", train=trained, steps=12, lr=1e-2)
    make = with_lora if "backbone.lora" in trained else lesson
    values = make(llm, one)
    values["model"]["backbone"]["dtype"] = "bfloat16"
    values["model"]["interact"] |= {"dropout": 0.0, "noise": 0.0}
    run = training(values, tmp_path / "run")
    run.run()
    losses = [entry["loss"] for entry in metrics(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert "the backbone is unchanged" in said(run)
    saved = load_file(tmp_path / "run" / "model" / WEIGHTS)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert any("lora" in name for name in saved) == ("backbone.lora" in trained)
    again = IPN.from_pretrained(tmp_path / "run" / "model", registry=lesson_registry())
    assert again.backbone.dtype == torch.bfloat16


@pytest.mark.usefixtures("own_training")
def test_it_learns_through_requests_alone(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[StageRun] = []
    stop_at(monkeypatch, 1, runs.append)
    one = stage("s", "answer-embedding", train=["backbone.lora", "interact"], steps=2)
    run = training(with_lora(llm, one), tmp_path / "run")
    run.run()
    assert runs[0].requests is None
    # The last layer's values at other places reach no request; every other tensor learns.
    assert any(name.startswith("backbone.lora") for name in runs[0].trained)


@pytest.mark.slow
@pytest.mark.usefixtures("own_training")
def test_a_broken_run_goes_on_to_the_same_weights(llm: Path, tmp_path: Path) -> None:
    first = stage("joint", "language", train=BOTH, rates={"backbone.lora": 0.1})
    second = stage("align", "answer-embedding", train=["interact"])
    values = with_lora(llm, first, second)
    training(values, tmp_path / "whole").run()
    for step in (4, 7):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step, lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                training(values, tmp_path / f"broken{step}").run()
        training(values, tmp_path / f"broken{step}", resume=True).run()
        assert weights(tmp_path / f"broken{step}") == weights(tmp_path / "whole")


@pytest.mark.usefixtures("own_training")
def test_checkpointing_gives_the_same_adapter(llm: Path, tmp_path: Path) -> None:
    values = with_lora(llm, stage("s", "language", train=BOTH, steps=2))
    values["model"]["backbone"]["lora"]["dropout"] = 0.2
    training(values, tmp_path / "plain").run()
    training({**values, "checkpointing": True}, tmp_path / "again").run()
    assert weights(tmp_path / "plain") == weights(tmp_path / "again")


@pytest.mark.usefixtures("own_training")
def test_a_checkpoint_without_one_gets_one_anew(llm: Path, tmp_path: Path) -> None:
    training(lesson(llm, stage("s", "language", steps=1)), tmp_path / "plain").run()
    start = str(tmp_path / "plain" / "model")
    values = with_lora(llm, stage("s", "language", train=["backbone.lora"], steps=1))
    with pytest.raises(CheckpointError, match=r"missing backbone\.lora\.model"):
        training({**values, "start_from": start}, tmp_path / "refused").run()
    more = {"start_from": start, "anew": ["backbone.lora"]}
    training({**values, **more}, tmp_path / "run").run()
    plain, adapted = (load_file(tmp_path / n / "model" / WEIGHTS) for n in ("plain", "run"))
    assert all(torch.equal(adapted[key], value) for key, value in plain.items())
    assert all(bool(v.any()) for k, v in adapted.items() if k.endswith(".B.weight"))


# -- what is refused -------------------------------------------------------------------------------


def test_an_unknown_target_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"'q_prj' names no linear layer .*'q_proj'\?\): it has"):
        adapted(targets=("q_prj",))


def test_an_unknown_key_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'backbone\.lora\.rnk': .*'rank'\?"):
        BackboneConfig.parse({"name": "llama", "lora": {"rnk": 2}}, "backbone")


def test_there_is_one_adapter_a_backbone() -> None:
    backbone = adapted()
    with pytest.raises(ConfigError, match="has an adapter already"):
        backbone.adapt(LoraConfig())


def test_a_ready_backbone_without_the_adapter_is_refused(registry: Any, tmp_path: Path) -> None:
    model = toy_model(registry, backbone=adapted())
    values = model.config.model_dump(exclude_none=True)
    values["backbone"]["lora"] = {}
    with pytest.raises(ConfigError, match=r"asks for backbone\.lora, .* call its adapt\(\) first"):
        IPN.from_config(values, backbone=tiny_backbone(), encoder=model.encoder, registry=registry)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected backbone\.lora\.model"):
        IPN.from_pretrained(
            tmp_path, backbone=tiny_backbone(), encoder=model.encoder, registry=registry
        )


@pytest.mark.slow
def test_without_peft_one_line_says_so_before_anything_loads(llm: Path) -> None:
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "from ipn_core.config import BackboneConfig\n"
        "from ipn_llama.llama import Llama\n"
        "import ipn_core.pretrained\n"
        "ipn_core.pretrained.load_pretrained = None\n"
        "from ipn_core.errors import ConfigError\n"
        "try:\n"
        f"    Llama.load(BackboneConfig(name='llama', weights={str(llm)!r}, lora={{}}))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == (
        "backbone.lora: the package peft is not installed; pip install 'ipn-core[lora]'.\n"
    ), done.stderr
