"""The encoder `qformer-tokens` against BLIP-2's own Q-Former, and the published LMEye on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ipn_qformer.tokens import QFormerTokens, QFormerTokensConfig
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Model,
    BlipImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
)

from ipn_core.errors import CheckpointError, ConfigError
from ipn_core.model import IPN
from ipn_core.stages import PerceiveContext
from ipn_core.testing.contracts import EncoderContract
from ipn_core.testing.oracles import assert_same, randomise
from ipn_core.testing.tiny import tiny_backbone, tiny_picture

SIDE, S, WIDTH = 16, 3, 12
PICTURES = [tiny_picture(seed, size) for seed, size in enumerate([(28, 20), (16, 16), (20, 40)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BLIP-2 as a checkpoint has it."""
    made = tmp_path_factory.mktemp("blip2")
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = Blip2Config(
        vision_config={**small, "hidden_size": 24, "image_size": SIDE, "patch_size": 4},
        qformer_config={**small, "hidden_size": WIDTH, "vocab_size": 9},
        text_config={"model_type": "opt", "vocab_size": 9, "hidden_size": 8, "ffn_dim": 8}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 8},
        num_query_tokens=S,
    )
    torch.manual_seed(0)
    model: Any = Blip2ForConditionalGeneration(config)
    randomise(model)
    model.save_pretrained(made)
    BlipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(made)
    return made


class TestQFormerTokens(EncoderContract):
    name = "qformer-tokens"

    @pytest.fixture(autouse=True)
    def _with_weights(self, folder: Path) -> None:
        self.options = {"weights": str(folder)}


def build(folder: Path) -> QFormerTokens:
    return QFormerTokens(QFormerTokensConfig(weights=str(folder))).eval()


@torch.no_grad()
def test_its_tokens_are_those_of_blip2(folder: Path) -> None:
    model = Blip2Model.from_pretrained(folder).eval()
    pixels = BlipImageProcessor.from_pretrained(folder)(images=PICTURES, return_tensors="pt")
    found = model.get_qformer_features(**pixels)
    expected = getattr(found, "last_hidden_state", found)
    encoded = build(folder).encode(PICTURES)
    assert [one.grid for one in encoded] == [(1, S)] * 3
    assert_same([one.values for one in encoded], list(expected))
    assert (expected[0] - expected[1]).abs().max() > 0.01 * expected[0].abs().max()


def test_they_are_no_places_and_it_stays_frozen(folder: Path) -> None:
    encoder = build(folder)
    assert not encoder.looks
    assert (encoder.width, encoder.static_tokens) == (WIDTH, 0)
    assert not any(p.requires_grad for p in encoder.parameters())
    percept = encoder(PerceiveContext([PICTURES[:2], []], ["?", "?"]))
    assert percept.features.lengths == [2 * S, 0]
    with pytest.raises(ConfigError, match="zoom' does not fit this model: it looks again at parts"):
        IPN.from_config(
            {"strategy": "zoom", "backbone": "tiny", "encoder": "qformer-tokens"},
            backbone=tiny_backbone(),
            encoder=encoder,
        )


def test_other_weights_have_another_fingerprint(folder: Path) -> None:
    encoder = build(folder)
    before = encoder.fingerprint
    with torch.no_grad():
        encoder.queries.add_(1)
    after = encoder.fingerprint
    assert before != after
    with torch.no_grad():
        encoder.tower.tower.post_layernorm.bias.add_(1)
    assert encoder.fingerprint not in (before, after)


def test_a_checkpoint_without_a_q_former_of_blip2_is_refused(tmp_path: Path) -> None:
    tiny_backbone().lm.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="of type 'llama', and no BLIP-2"):
        build(tmp_path)


def test_lmeye_runs_as_published_on_its_tokens(folder: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "vocab_size": 9, "projection_dim": 16}
    clip = CLIPTextModelWithProjection(CLIPTextConfig(**text, **more))
    clip.save_pretrained(tmp_path / "clip")
    model = IPN.from_config(
        {
            "strategy": "lmeye",
            "backbone": "tiny",
            "encoder": {"name": "qformer-tokens", "weights": str(folder)},
            "perceive": {"name": "static", "norm": False},
            "interact": {"weights": str(tmp_path / "clip")},
        },
        backbone=tiny_backbone(),
    )
    # The two embeddings of <img-q> and <img-d> and four linear maps, as the paper counts them.
    trained = {name.rpartition(".")[0] for name in model.trained_state()}
    maps = {"perceiver.map", "interaction.see", "interaction.ask", "injector.linear"}
    assert trained == {*maps, "slots"}
    assert model.interaction.see.in_features == WIDTH
    tokens = model.ask(PICTURES[0], "What is it?", max_new_tokens=2).tokens
    assert [tokens[kind] for kind in ("static", "request", "dynamic")] == [S, 1, 5]
    model.save_pretrained(tmp_path / "mine")
    again = IPN.from_pretrained(tmp_path / "mine", backbone=model.backbone)
    one, other = (m.ask(PICTURES[0], "What?", max_new_tokens=3).ids for m in (model, again))
    assert one == other
