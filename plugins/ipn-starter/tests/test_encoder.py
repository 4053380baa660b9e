"""The encoder `efficientnet-lite0`: features of the size it says, the same for the same pixels."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from ipn_starter.emoji_scenes import Scene, draw
from ipn_starter.encoder import EfficientNetLite0, EfficientNetLite0Config

from ipn_core.errors import ConfigError
from ipn_core.stages import PerceiveContext
from ipn_core.tasks import Picture
from ipn_core.testing.contracts import EncoderContract
from ipn_core.training.features import FeatureCache


class TestEfficientNetLite0(EncoderContract):
    name = "efficientnet-lite0"


@pytest.fixture(scope="module")
def encoder() -> EfficientNetLite0:
    return EfficientNetLite0(EfficientNetLite0Config())


def test_a_picture_is_eight_by_eight_patches_of_1280(encoder: EfficientNetLite0) -> None:
    images = [draw(Scene.make("test", n)) for n in range(2)]
    one, other = encoder.encode([*images])
    assert one.grid == other.grid == (8, 8)
    assert one.values.shape == (64, 1280) == (64, encoder.width)
    assert one.values.dtype == torch.float32
    assert not torch.equal(one.values, other.values)
    alone = encoder.encode(images[:1])[0]
    scale = float(one.values.abs().max())
    torch.testing.assert_close(alone.values, one.values, rtol=0, atol=1e-4 * scale)


def test_features_are_the_same_bits_with_and_without_a_cache(tmp_path: Path) -> None:
    """In whatever order and company pictures, and parts of them, are encoded.

    From 16 at once on, this encoder's last bits are others on a CPU.
    """
    encoder = EfficientNetLite0(EfficientNetLite0Config(size=128))
    some = [Picture(str(n), partial(draw, Scene.make("test", n))) for n in range(18)]
    filled, without = FeatureCache(encoder, tmp_path), FeatureCache(encoder, tmp_path, size=0)
    keys = filled.add(some[7:] + some[:7])
    assert without.know(some) == keys
    for names in (["0"], ["1", "2"], [str(n) for n in range(3, 18)]):
        kept, anew = (cache.get([[keys[name]] for name in names]) for cache in (filled, without))
        assert torch.equal(kept.values, anew.values)
    boxes = [(image, 0.0, 0.25, 0.5, 0.75) for image in range(len(names))]
    together = kept.look([(0, 0.0, 0.0, 1.0, 1.0), *boxes, (1, 0.0, 0.0, 1.0, 1.0)]).values
    one_by_one = torch.cat([anew.look([box]).values for box in boxes])
    assert torch.equal(together[16:-16], one_by_one)
    assert next(filled.folder.glob("*.safetensors"))


def test_any_proportions_give_the_same_grid(encoder: EfficientNetLite0) -> None:
    image = draw(Scene.make("test", 0)).resize((400, 100))
    features = encoder(PerceiveContext([[image], [image, image]], ["a", "b"])).features
    assert features.lengths == [64, 128]
    assert not features.values.requires_grad


def test_patches_lie_row_by_row(encoder: EfficientNetLite0) -> None:
    """What is painted over a corner changes the features there most."""
    image = draw(Scene.make("test", 0))
    painted = image.copy()
    painted.paste((255, 0, 0), (192, 0, 256, 64))
    before, after = encoder.encode([image, painted])
    change = (before.values - after.values).norm(dim=-1).reshape(8, 8)
    row, column = divmod(int(change.argmax()), 8)
    assert row < 3
    assert column > 4


def test_the_fingerprint_names_weights_and_size(encoder: EfficientNetLite0) -> None:
    assert encoder.fingerprint == EfficientNetLite0(EfficientNetLite0Config()).fingerprint
    assert encoder.fingerprint == "efficientnet-lite0-579344248a93-256"
    small = EfficientNetLite0(EfficientNetLite0Config(size=128))
    assert small.fingerprint != encoder.fingerprint
    assert small.encode([draw(Scene.make("test", 0))])[0].grid == (4, 4)


def test_sizes_that_give_no_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.size.*multiple of 32"):
        EfficientNetLite0Config.parse({"size": 250}, "encoder")
