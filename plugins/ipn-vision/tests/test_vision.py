"""The perceiver `vision` gives what the tower itself gives, patch by patch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ipn_vision.loading import TOWERS, named_tower
from ipn_vision.tower import VisionTower, VisionTowerConfig
from PIL import Image

from ipn_core.errors import CheckpointError, ConfigError, UnknownNameError, UserError
from ipn_core.model import IPN
from ipn_core.plugins import get_registry
from ipn_core.stages import PerceiveContext
from ipn_core.testing.contracts import EncoderContract
from ipn_core.testing.tiny import tiny_backbone, tiny_picture

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VISION = {**SMALL, "intermediate_size": 48}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
WHOLE = (0.0, 0.0, 1.0, 1.0)
SQUARE: dict[str, Any] = {"size": {"height": 32, "width": 32}}
CLIP_SETTINGS: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}


def _make(kind: str) -> tuple[Any, dict[str, Any]]:
    """A small random model and the settings of its processor."""
    import transformers as t

    if kind == "clip":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)), CLIP_SETTINGS
    if kind == "siglip":
        settings = {"image_processor_type": "SiglipImageProcessor", **SQUARE}
        return t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)), settings
    if kind == "vit":
        settings = {"image_processor_type": "ViTImageProcessorFast", **SQUARE}
        return t.ViTModel(t.ViTConfig(**VISION)), settings
    if kind == "dinov2":
        settings = {**CLIP_SETTINGS, "image_processor_type": "BitImageProcessor"}
        return t.Dinov2Model(t.Dinov2Config(**SMALL)), settings
    if kind == "dinov2-registers":
        settings = {**CLIP_SETTINGS, "image_processor_type": "BitImageProcessor"}
        config = t.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
        return t.Dinov2WithRegistersModel(config), settings
    if kind == "resnet":
        settings = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}}
        config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        return t.ResNetModel(config), settings
    if kind == "siglip2":
        settings = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8}
        settings["max_num_patches"] = 16
        config = t.Siglip2VisionConfig(**{**VISION, "num_patches": 16})
        return t.Siglip2VisionModel(config), settings
    if kind == "whole-clip":
        texts = {**TEXT, "max_position_embeddings": 16}
        config = t.CLIPConfig(vision_config=VISION, text_config=texts, projection_dim=8)
        return t.CLIPModel(config), CLIP_SETTINGS
    if kind == "whole-siglip":
        settings = {"image_processor_type": "SiglipImageProcessor", **SQUARE}
        texts = {**TEXT, "max_position_embeddings": 16}
        return t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config=texts)), settings
    if kind == "llava":
        config = t.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **VISION},
            text_config={"model_type": "llama", **TEXT},
        )
        return t.LlavaForConditionalGeneration(config), CLIP_SETTINGS
    if kind == "idefics2":
        config = t.Idefics2Config(
            vision_config=VISION,
            text_config={"model_type": "mistral", "num_key_value_heads": 2, **TEXT},
            perceiver_config={
                "resampler_n_latents": 2,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
        )
        settings = {"image_processor_type": "SiglipImageProcessor", **SQUARE}
        return t.Idefics2ForConditionalGeneration(config), settings
    if kind == "idefics":
        vision = {**VISION, "embed_dim": 32}
        vision.pop("hidden_size")
        config = t.IdeficsConfig(**{**TEXT, "vision_config": vision})
        settings = {"image_processor_type": "IdeficsImageProcessor", "image_size": 32}
        return t.IdeficsForVisionText2Text(config), settings
    qformer = {**TEXT, "encoder_hidden_size": 32}
    opt = {**TEXT, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16}
    parts = {"vision_config": VISION, "qformer_config": qformer, "text_config": opt}
    settings = {"image_processor_type": "BlipImageProcessor", **SQUARE}
    if kind == "blip-2":
        config = t.Blip2Config(**parts, num_query_tokens=2)
        return t.Blip2ForConditionalGeneration(config), settings
    assert kind == "instructblip"
    config = t.InstructBlipConfig(**parts, num_query_tokens=2)
    return t.InstructBlipForConditionalGeneration(config), settings


class Stepwise(torch.nn.Module):
    """Idefics' tower, layer by layer: transformers returns no hidden states of it."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor, output_hidden_states: bool) -> Any:
        states = [self.tower.pre_layrnorm(self.tower.embeddings(pixels))]
        for layer in self.tower.encoder.layers:
            states.append(layer(states[-1], None))
        last = self.tower(pixels).last_hidden_state
        return SimpleNamespace(last_hidden_state=last, hidden_states=states)


TOWER_OF = {
    "whole-clip": lambda m: m.vision_model,
    "whole-siglip": lambda m: m.vision_model,
    "llava": lambda m: m.model.vision_tower,
    "blip-2": lambda m: m.vision_model,
    "instructblip": lambda m: m.vision_model,
    "idefics2": lambda m: m.model.vision_model,
    "idefics": lambda m: Stepwise(m.model.vision_model),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small random models by kind, saved once: the model's vision part and the folder."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model, settings = _make(kind)
                # Towers start with zeros here and there, which would hide an error.
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.05 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
            made[kind] = TOWER_OF.get(kind, lambda m: m)(model).eval(), folder
        return made[kind]

    return get


class TestVisionTower(EncoderContract):
    name = "vision"

    @pytest.fixture(autouse=True)
    def _weights(self, saved: Any) -> None:
        self.options = {"weights": str(saved("clip")[1])}


def tower(folder: Path | str, **options: Any) -> VisionTower:
    return VisionTower(VisionTowerConfig(weights=str(folder), **options))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return tiny_picture(seed, (width, height))


PICTURES = [picture(40, 40), picture(60, 30, 1), picture(32, 64, 2)]

LOOKING = ["clip", "siglip", "vit", "dinov2", "dinov2-registers", *TOWER_OF]
SPECIAL = {"siglip": 0, "whole-siglip": 0, "idefics2": 0, "dinov2-registers": 4}


@pytest.mark.parametrize("layer", [-1, -2, 0, 3])
@pytest.mark.parametrize("kind", LOOKING)
def test_it_gives_what_the_tower_gives(saved: Any, kind: str, layer: int) -> None:
    plain, folder = saved(kind)
    encoder = tower(folder, layer=layer, batch=2)
    found = encoder.encode(PICTURES)
    made = encoder.processor(images=PICTURES, return_tensors="pt")
    pixels = made if kind == "idefics" else made["pixel_values"]
    assert pixels.shape == (3, 3, 32, 32)
    with torch.no_grad():
        out = plain(pixels, output_hidden_states=True)
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    special = SPECIAL.get(kind, 1)
    assert expected.shape == (3, 16 + special, 32)
    assert encoder.width == 32
    for image, want in zip(found, expected, strict=True):
        assert image.grid == (4, 4)
        torch.testing.assert_close(image.values, want[special:], rtol=1e-5, atol=1e-5)
        if special:
            torch.testing.assert_close(image.global_token, want[0], rtol=1e-5, atol=1e-5)
        else:
            assert image.global_token is None
        assert not image.values.requires_grad


def test_layer_minus_two_is_not_the_last(saved: Any) -> None:
    _, folder = saved("clip")
    last, before = (tower(folder, layer=n).encode(PICTURES[:1])[0] for n in (-1, -2))
    assert (last.values - before.values).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2"])
def test_pictures_need_not_be_square(saved: Any, kind: str) -> None:
    plain, folder = saved(kind)
    encoder = tower(folder, image_size=[24, 48])
    assert encoder.config.image_size == (24, 48)
    found = encoder.encode(PICTURES)
    pixels = encoder.processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 24, 48)
    more = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = plain(pixels, **more).last_hidden_state
    for image, want in zip(found, expected, strict=True):
        assert image.grid == (3, 6)
        torch.testing.assert_close(image.values, want[-18:], rtol=1e-5, atol=1e-5)


def test_an_image_size_wins_over_that_of_idefics(saved: Any) -> None:
    plain, folder = saved("idefics")
    encoder = tower(folder, image_size=[24, 48])
    pixels = encoder.processor(images=PICTURES, return_tensors="pt")
    assert pixels.shape == (3, 3, 24, 48)
    with torch.no_grad():
        expected = plain.tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    for image, want in zip(encoder.encode(PICTURES), expected, strict=True):
        assert image.grid == (3, 6)
        torch.testing.assert_close(image.values, want[1:], rtol=1e-5, atol=1e-5)


def test_an_image_size_shows_the_whole_picture(saved: Any) -> None:
    _, folder = saved("dinov2")
    edge = picture(64, 32)
    blank = edge.copy()
    blank.paste((0, 0, 0), (16, 0, 48, 32))  # all that a crop of the middle would keep
    cropped = [e.values for e in tower(folder).encode([blank, Image.new("RGB", (64, 32))])]
    whole = tower(folder, image_size=32).encode([blank, Image.new("RGB", (64, 32))])
    torch.testing.assert_close(cropped[0], cropped[1])
    assert (whole[0].values - whole[1].values).abs().max() > 1e-3


def convnext(folder: Path) -> Path:
    """A folder whose processor keeps seven eighths of the middle."""
    import transformers as t

    sizes = {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "image_size": 32}
    t.ConvNextModel(t.ConvNextConfig(**sizes)).save_pretrained(folder)
    settings = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_it_says_which_part_of_a_picture_it_sees(saved: Any, tmp_path: Path) -> None:
    plain, cropping = tower(saved("siglip")[1]), tower(saved("clip")[1])
    percent = tower(convnext(tmp_path))
    for size in ((64, 32), (30, 60), (40, 40)):
        assert plain.shows(size) == tower(saved("clip")[1], image_size=32).shows(size) == WHOLE
    assert cropping.shows((64, 32)) == (0.25, 0.0, 0.75, 1.0)
    assert cropping.shows((32, 128)) == (0.0, 0.375, 1.0, 0.625)
    assert cropping.shows((40, 40)) == WHOLE
    assert percent.shows((40, 40)) == (0.0625, 0.0625, 0.9375, 0.9375)
    # What lies outside changes nothing that it sees.
    for encoder in (cropping, percent):
        seen = picture(256, 128)
        left, top, right, bottom = encoder.shows(seen.size)
        # Resizing reads a few pixels around each edge.
        inner = (round(256 * left) - 12, round(128 * top) - 12)
        inner += (round(256 * right) + 12, round(128 * bottom) + 12)
        other = Image.new("RGB", seen.size)
        other.paste(seen.crop(inner), inner[:2])
        one, two = (e.values for e in encoder.encode([seen, other]))
        torch.testing.assert_close(one, two)
    assert [e.looks for e in (plain, cropping, percent)] == [True, False, False]
    assert tower(saved("clip")[1], image_size=32).looks


def test_pictures_of_their_own_size_keep_their_grid_and_order(saved: Any) -> None:
    _, folder = saved("dinov2")
    encoder = tower(folder, preprocess={"do_resize": False, "do_center_crop": False})
    pictures = [picture(16, 24), picture(32, 16), picture(16, 24, 3)]
    found = encoder.encode(pictures)
    assert [e.grid for e in found] == [(3, 2), (2, 4), (3, 2)]
    for one, image in zip(found, pictures, strict=True):
        torch.testing.assert_close(one.values, encoder.encode([image])[0].values)


def test_siglip2_keeps_proportions(saved: Any) -> None:
    plain, folder = saved("siglip2")
    encoder = tower(folder)
    found = encoder.encode(PICTURES)
    inputs = encoder.processor(images=PICTURES, return_tensors="pt")
    assert [e.grid for e in found] == [tuple(s) for s in inputs["spatial_shapes"].tolist()]
    assert [e.grid for e in found] == [(4, 4), (3, 5), (5, 3)]
    with torch.no_grad():
        expected = plain(
            inputs["pixel_values"], inputs["pixel_attention_mask"], inputs["spatial_shapes"]
        ).last_hidden_state
    for image, want in zip(found, expected, strict=True):
        torch.testing.assert_close(image.values, want[: len(image.values)], rtol=1e-4, atol=1e-5)


def test_a_convolutional_tower_gives_its_map(saved: Any) -> None:
    plain, folder = saved("resnet")
    encoder = tower(folder)
    assert encoder.width == 16
    (image,) = encoder.encode(PICTURES[:1])
    pixels = encoder.processor(images=PICTURES[:1], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = plain(pixels).last_hidden_state[0]
    assert image.grid == tuple(want.shape[1:])
    torch.testing.assert_close(image.values, want.flatten(1).T)


def test_a_class_token_can_be_dropped(saved: Any) -> None:
    _, folder = saved("clip")
    (image,) = tower(folder, keep_class_token=False).encode(PICTURES[:1])
    assert image.global_token is None
    assert image.values.shape == (16, 32)


def test_features_carry_places_and_can_look_again(saved: Any) -> None:
    _, folder = saved("clip")
    encoder = tower(folder)
    context = PerceiveContext([[PICTURES[0]], PICTURES[1:]], ["a", "b"])
    features = encoder(context).features
    assert features.lengths == [16, 32]
    assert features.global_tokens.shape == (3, 32)
    again = features.look([(1, 0.0, 0.0, 0.5, 1.0)])
    (want,) = encoder.encode([PICTURES[1].crop((0, 0, 30, 30))])
    torch.testing.assert_close(again.values, want.values)


def test_it_is_frozen_and_holds_the_dtype_asked_for(saved: Any) -> None:
    _, folder = saved("siglip")
    encoder = tower(folder, dtype="bfloat16")
    assert not encoder.tower.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    half = encoder.encode(PICTURES[:1])[0].values
    full = tower(folder).encode(PICTURES[:1])[0].values
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() <= 0.05 * full.abs().max()


def test_the_fingerprint_changes_with_whatever_changes_features(saved: Any) -> None:
    _, folder = saved("clip")
    encoder = tower(folder)
    prints = [encoder.fingerprint]
    assert tower(folder).fingerprint == prints[0]
    for options in (
        {"layer": -2},
        {"image_size": 40},
        {"preprocess": {"image_mean": [0.5, 0.5, 0.5]}},
        {"keep_class_token": False},
        {"dtype": "bfloat16"},
    ):
        prints.append(tower(folder, **options).fingerprint)
    with torch.no_grad():
        next(encoder.tower.parameters()).add_(1e-3)
    prints.append(encoder.fingerprint)
    prints.append(tower(saved("whole-clip")[1]).fingerprint)
    assert len(set(prints)) == len(prints)
    assert tower(folder, batch=3).fingerprint == prints[0]


def test_a_model_is_built_and_loaded_with_it(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("clip")
    model = IPN.from_config(
        {
            "strategy": "static",
            "backbone": "tiny",
            "encoder": {"name": "vision", "weights": str(folder), "layer": -2},
        },
        backbone=tiny_backbone(),
    )
    assert model.perceive([PICTURES[:2]], ["a"]).tokens[1].shape == (16, model.backbone.D_in)
    model.save_pretrained(tmp_path)
    assert not any("tower" in key for key in model.trained_state())
    again = IPN.from_pretrained(tmp_path, backbone=model.backbone)
    shown = PICTURES[2]
    first, second = (m.ask(shown, "What is it?", max_new_tokens=5) for m in (model, again))
    assert first.text == second.text
    assert again.encoder.fingerprint == model.encoder.fingerprint


@pytest.mark.parametrize("model_type", TOWERS)
def test_towers_that_automodel_refuses_are_named_rightly(model_type: str) -> None:
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    config = CONFIG_MAPPING[model_type]
    assert config not in MODEL_MAPPING
    assert named_tower(config).config_class is config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 4}, r"layer 4 is out of range: the tower has hidden states 0 to 3"),
        ({"layer": -5}, r"or -1 to -4 from the end"),
        ({"image_size": 30}, r"image_size \[30, 30\] must be a multiple.*\[8, 8\] pixels"),
        ({"image_size": 0}, r"must be a multiple"),
        (
            {"preprocess": {"image_processor_type": "SiglipImageProcesor"}},
            r"no image processor 'SiglipImageProcesor'.*did you mean 'SiglipImageProcessor'",
        ),
        (
            {"preprocess": {**CLIP_SETTINGS, "size": {"breadth": 32}}},
            "the image processor 'CLIPImageProcessor' refuses its settings: ",
        ),
    ],
)
def test_wrong_settings_are_refused(saved: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tower(saved("clip")[1], **options)


def test_wrong_weights_are_refused(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown weights 'nothing-here'"):
        tower("nothing-here")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        tower(tmp_path)
    _, folder = saved("clip")
    settings = json.loads((folder / "config.json").read_text())

    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("pre*"))
    with pytest.raises(ConfigError, match="says nowhere how pictures are prepared"):
        tower(tmp_path / "bare")
    given = tower(tmp_path / "bare", preprocess=CLIP_SETTINGS)
    assert given.fingerprint == tower(folder).fingerprint

    shutil.copytree(folder, tmp_path / "deeper")
    deeper = {**settings, "num_hidden_layers": 4}
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(CheckpointError, match=r"CLIPVisionModel: missing .*layers\.3"):
        tower(tmp_path / "deeper")

    shutil.copytree(folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model\.bin\)"):
        tower(tmp_path / "pickled")

    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        tower(tmp_path / "broken")


def test_a_language_model_is_no_tower(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    LlamaModel(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no vision tower that takes pixel values"):
        tower(tmp_path)


def test_its_name_is_listed_without_importing_torch() -> None:
    assert get_registry().get("perceiver", "vision").plugin.distribution == "ipn-vision"
    code = "import sys, ipn_vision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
