"""The strategy `static`: tokens from patches, whatever is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ipn_static.static import StaticConfig
from PIL import Image

from ipn_core.errors import ConfigError, UserError
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.plugins import get_registry
from ipn_core.prompt import Prompt
from ipn_core.stages import PerceiveContext
from ipn_core.testing.contracts import ConnectorContract
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone, tiny_picture

NOTHING = PerceiveContext([], [])


class TestStatic(ConnectorContract):
    name = "static"


class TestPooledMLP(ConnectorContract):
    name = "static"
    options = {"map": "mlp", "hidden": 7, "pool": 2}  # noqa: RUF012 as declared


def build(family: Any = "llama", **perceive: Any) -> IPN:
    torch.manual_seed(0)
    config: dict[str, Any] = {"strategy": "static", "backbone": "tiny", "encoder": "tiny"}
    if perceive:
        config["perceive"] = perceive
    return IPN.from_config(
        config, backbone=tiny_backbone(family), encoder=TinyEncoder(TinyEncoderConfig())
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return tiny_picture(seed, (width, height))


@pytest.mark.parametrize(
    ("perceive", "S", "sizes"),
    [
        ({}, None, (9, 18)),
        ({"map": "mlp", "hidden": 7}, None, (9, 18)),
        ({"map": "mlp", "norm": False}, None, (9, 18)),
        ({"pool": "mean"}, 1, (1, 1)),
        ({"pool": 2}, 4, (4, 4)),
        ({"pool": 5, "map": "mlp"}, 25, (25, 25)),
        ({"tokens": 12}, 12, (12, 12)),
        ({"tokens": 7, "map": "mlp"}, 7, (7, 7)),
    ],
)
def test_each_picture_gets_its_tokens(
    perceive: dict[str, Any], S: int | None, sizes: tuple[int, int]
) -> None:
    model = build(**perceive)
    assert model.strategy == "static"
    assert model.config.layout.rounds == 0
    assert model.perceiver.static_tokens == S
    percept = model.perceive([[picture(24, 24), picture(48, 24)], []], ["a", "b"])
    assert [tuple(t.shape) for t in percept.tokens] == [(n, model.backbone.D_in) for n in sizes]
    assert percept.features.lengths == [27, 0]


def test_pooling_is_the_mean_of_each_part_of_the_grid() -> None:
    model = build(pool=2, norm=False)
    values = torch.arange(4 * 6 * 24, dtype=torch.float32).reshape(24, 24)
    features = VisualFeatures.pack([values], [(4, 6)], [0], 1)
    (tokens,) = model.perceiver.connect(features, NOTHING)
    grid = values.reshape(4, 6, 24)
    parts = [grid[r : r + 2, c : c + 3].mean((0, 1)) for r in (0, 2) for c in (0, 3)]
    torch.testing.assert_close(tokens, model.perceiver.map(torch.stack(parts)))


def test_pictures_that_samples_share_are_mapped_once() -> None:
    model = build()
    percept = model.perceive([[picture(24, 24)], [picture(48, 24)]], ["a", "b"])
    shared = percept.features.select([1, 0, 1])
    mapped: list[int] = []
    model.perceiver.map.register_forward_hook(lambda m, args, out: mapped.append(len(out)))
    tokens = model.perceiver.connect(shared, NOTHING)
    assert mapped == [27]
    assert [len(t) for t in tokens] == [18, 9, 18]
    torch.testing.assert_close(tokens[0], percept.tokens[1])
    torch.testing.assert_close(tokens[1], percept.tokens[0])


def test_no_pictures_give_no_tokens() -> None:
    model = build()
    assert model.perceive([[], []], ["a", "b"]).tokens == []


def test_an_encoder_of_another_dtype_is_welcome() -> None:
    model = build()
    model.encoder.to(torch.bfloat16)
    percept = model.perceive(
        [[]], ["a"], VisualFeatures.pack([torch.randn(9, 24).bfloat16()], [(3, 3)], [0], 1)
    )
    assert percept.tokens[0].dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_learns_and_only_the_connector_does(family: str) -> None:
    model = build(family, pool=2, map="mlp").train()
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    prompts = [
        Prompt.ask("What is it?", [picture(24, 24), picture(60, 24)]).then_assistant(
            "a dog", learn=True
        ),
        Prompt.ask("And this one here?", [picture(24, 48, 1)]).then_assistant("cat", learn=True),
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss, count = model(prompts)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        losses.append(loss.item() / count)
    assert losses[-1] < losses[0]
    for name, parameter in model.perceiver.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.any()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, frozen[key])


def test_saved_and_loaded_it_answers_the_same(tmp_path: Path) -> None:
    model = build(map="mlp", hidden=12, pool=3)
    model.save_pretrained(tmp_path)
    again = IPN.from_pretrained(tmp_path, backbone=model.backbone, encoder=model.encoder)
    assert again.config == model.config
    assert again.config.perceive.options == {"map": "mlp", "hidden": 12, "pool": 3}
    shown = picture(48, 24)
    first = model.ask(shown, "What is it?", max_new_tokens=6)
    second = again.ask(shown, "What is it?", max_new_tokens=6)
    assert first.text == second.text
    assert second.tokens["static"] == 9
    assert second.tokens["dynamic"] == 0


@pytest.mark.parametrize(
    ("perceive", "words"),
    [
        ({"pool": "max"}, r"static\.pool'.*must be none, mean, or the rows.*got 'max'"),
        ({"pool": 0}, r"from 1 to 64, got 0"),
        ({"pool": True}, r"pool must be a number, got true"),
        ({"map": "conv"}, r"static\.map'.*'linear' or 'mlp', got 'conv'"),
        ({"hidden": -1}, r"static\.hidden'.*greater than or equal to 0, got -1"),
        ({"hidden": 8}, r"hidden is the width inside map: mlp"),
        ({"pol": 2}, r"unknown key 'perceiver static\.pol'.*did you mean 'pool'"),
    ],
)
def test_wrong_values_are_refused_with_the_allowed_ones(
    perceive: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        build(**perceive)
    assert isinstance(refused.value, UserError)


def test_its_names_are_listed_without_importing_torch() -> None:
    registry = get_registry()
    assert registry.get("perceiver", "static").plugin.distribution == "ipn-static"
    assert "static" in registry.entries("strategy")
    code = "import sys, ipn_static; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("tokens", "parts"), [(1, (1, 1)), (7, (1, 7)), (9, (3, 3)), (12, (3, 4)), (24, (4, 6))]
)
def test_a_number_of_tokens_is_the_squarest_grid(tokens: int, parts: tuple[int, int]) -> None:
    assert StaticConfig(tokens=tokens).parts == parts


def test_two_numbers_of_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="pool and tokens both say"):
        build(pool=2, tokens=4)
