"""An LLM in 8 or 4 bit and over several devices: what is asked of transformers, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import prompt_of, toy_model

from ipn_core.backbone import Backbone
from ipn_core.config import BackboneConfig
from ipn_core.errors import ConfigError
from ipn_core.plugins import get_registry
from ipn_core.quantization import load_options, not_supported_reasons
from ipn_core.testing.tiny import tiny_backbone

ADAPTER: Any = get_registry().get("backbone", "llama").load()


def config(llm: Path, **more: Any) -> BackboneConfig:
    return BackboneConfig.parse({"name": "llama", "weights": str(llm), **more}, "backbone")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine look as if it had a GPU and bitsandbytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: True)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the loading call of transformers is given; a plain model comes back."""
    found: list[dict[str, Any]] = []

    def from_pretrained(cls: Any, source: Any, what: str, **options: Any) -> Any:
        found.append(options)
        return tiny_backbone().lm, {}

    monkeypatch.setattr("ipn_core.pretrained.load_pretrained", from_pretrained)
    return found


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("dtype", "computes"), [("float16", torch.float16), ("auto", torch.bfloat16)]
)
def test_4_bit_asks_for_nf4_that_computes_in_the_dtype(
    llm: Path, loads: list[dict[str, Any]], dtype: str, computes: torch.dtype
) -> None:
    ADAPTER.load(config(llm, quantize="4bit", dtype=dtype))
    (asked,) = loads
    wanted = asked["quantization_config"]
    assert wanted.load_in_4bit
    assert not wanted.load_in_8bit
    assert wanted.bnb_4bit_quant_type == "nf4"
    assert wanted.bnb_4bit_use_double_quant
    assert wanted.bnb_4bit_compute_dtype == computes
    assert "device_map" not in asked


@pytest.mark.usefixtures("a_gpu")
def test_8_bit_over_all_devices(llm: Path, loads: list[dict[str, Any]]) -> None:
    ADAPTER.load(config(llm, quantize="8bit", device_map="auto", dtype="bfloat16"))
    (asked,) = loads
    assert asked["quantization_config"].load_in_8bit
    assert not asked["quantization_config"].load_in_4bit
    assert (asked["device_map"], asked["dtype"]) == ("auto", torch.bfloat16)


def test_plain_weights_ask_for_neither(llm: Path) -> None:
    assert load_options(config(llm, dtype="bfloat16")) == {"dtype": torch.bfloat16}


@pytest.mark.parametrize("asked", [{"quantize": "8bit"}, {"quantize": "4bit"}])
def test_without_cuda_and_bitsandbytes_one_line_says_so_before_anything_loads(
    llm: Path,
    loads: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError) as raised:
        ADAPTER.load(config(llm, **asked))
    assert str(raised.value) == (
        f"torch sees no CUDA device, which backbone.quantize '{asked['quantize']}' must have; "
        f"backbone.quantize '{asked['quantize']}' needs the package bitsandbytes; pip install "
        "'ipn-core[quantize]'."
    )
    assert not loads


def test_a_device_map_needs_devices(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (reason,) = not_supported_reasons(config(llm, device_map="auto"))
    assert reason == "torch sees no CUDA device, which backbone.device_map 'auto' must have"


@pytest.mark.usefixtures("a_gpu")
def test_a_device_map_is_for_one_process(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    (reason,) = not_supported_reasons(config(llm, device_map="auto"))
    assert reason.endswith("spreads the LLM over the GPUs of one process, and there are 2")
    assert not not_supported_reasons(config(llm, quantize="4bit"))


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'backbone\.quantize': .*'8bit' or '4bit', got '3bit'"):
        BackboneConfig.parse({"name": "llama", "quantize": "3bit"}, "backbone")


def test_a_checkpoint_keeps_the_bits_but_not_the_map() -> None:
    asked = BackboneConfig(name="llama", quantize="4bit", device_map="auto")
    assert asked.model_dump(exclude_none=True)["quantize"] == "4bit"
    assert "device_map" not in asked.model_dump()
    assert "quantize" not in BackboneConfig(name="llama").model_dump()


@pytest.mark.parametrize("mark", ["hf_device_map", "is_quantized"])
def test_what_was_placed_by_transformers_stays_where_and_as_it_is(mark: str) -> None:
    backbone = tiny_backbone()
    setattr(backbone.lm, mark, {"model": 0, "lm_head": 1} if mark == "hf_device_map" else True)
    whole = torch.nn.ModuleList([backbone, torch.nn.Linear(2, 2)]).to(torch.float64)
    assert backbone.dtype == torch.float32
    assert whole[1].weight.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_llm_stays_frozen_while_stages_and_an_adapter_learn(
    llm: Path, registry: Any, bits: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    pytest.importorskip("peft", reason="needs the package peft")
    asked = config(llm, quantize=bits, dtype="float16", lora={"rank": 4})
    backbone: Backbone = ADAPTER.load(asked)
    model = toy_model(registry, backbone=backbone).train()
    base = [p.detach().clone() for p in backbone.base_parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss, count = model([prompt_of(row, 1, answer="ab") for row in range(2)])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert all(map(torch.equal, base, backbone.base_parameters()))


@pytest.mark.gpu
def test_a_device_map_gives_what_one_device_gives(llm: Path, registry: Any) -> None:
    spread: Backbone = ADAPTER.load(config(llm, device_map="balanced"))
    prompts = [prompt_of(row, 1 + row, answer="ab") for row in range(2)]
    losses = []
    for backbone in (spread, tiny_backbone().to("cuda:0")):
        loss, _ = toy_model(registry, backbone=backbone)(prompts)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
