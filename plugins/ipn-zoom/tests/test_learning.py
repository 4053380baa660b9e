"""Zoom learns what the picture's own patches cannot tell, and trains on cached features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ipn_rvii.rvii import RVII, RVIIConfig
from ipn_zoom.zoom import Zoom, ZoomConfig
from lessons import lesson, metrics, save_llm, stage, stop_at, training, weights
from safetensors.torch import load_file

from ipn_core.features import VisualFeatures
from ipn_core.stages import Dims, Request
from ipn_core.testing.tiny import TinyEncoder

KINDS, SIDE = 6, 2
BOXES = SIDE * SIDE
DIMS = Dims(Dv=24, D_in=KINDS, D_hidden=(12,), D_out=12, K=1, D_request=12)
SMALL = {"width": 32, "depth": 1, "heads": 4, "guide": {"width": 8, "tallies": 0}}


class Boards:
    """Pictures whose own patches are noise, and whose crops hold one thing of a kind each."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.kinds = 2 * torch.randn(KINDS, DIMS.Dv, generator=self.generator)
        self.asking = torch.randn(BOXES, DIMS.D_request, generator=self.generator)

    def draw(self, count: int) -> tuple[Request, VisualFeatures, torch.Tensor]:
        """Ask of each picture what is in one box: requests, features and the right kinds."""
        noise = {"generator": self.generator}
        things = torch.randint(KINDS, (count, BOXES), **noise)
        crops = 0.3 * torch.randn(count, BOXES, 4, DIMS.Dv, **noise)
        crops[:, :, 2] += self.kinds[things]
        own = 0.3 * torch.randn(count, 16, DIMS.Dv, **noise)
        asked = torch.randint(BOXES, (count,), **noise)

        def look(boxes: Sequence[Any]) -> VisualFeatures:
            found = [
                (i, round(top * SIDE) * SIDE + round(left * SIDE)) for i, left, top, *_ in boxes
            ]
            values = [crops[image, box] for image, box in found]
            return VisualFeatures.pack(values, [(2, 2)] * len(found), [i for i, _ in found], count)

        features = VisualFeatures.pack(list(own), [(4, 4)] * count, range(count), count, None, look)
        return Request(self.asking[asked].unsqueeze(1)), features, things[range(count), asked]


def accuracy_after_training(interaction: RVII, steps: int = 100) -> float:
    boards = Boards()
    interaction.fit(boards.asking.unsqueeze(1), boards.draw(32)[1].values)
    optimizer = torch.optim.AdamW(interaction.parameters(), lr=3e-3)
    for _ in range(steps):
        request, features, right = boards.draw(48)
        loss = F.cross_entropy(interaction(request, features).values[:, 0], right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    interaction.eval()
    request, features, right = boards.draw(300)
    with torch.no_grad():
        said = interaction(request, features).values[:, 0].argmax(-1)
    return float((said == right).float().mean())


@pytest.mark.slow
def test_it_learns_where_to_look_and_what_is_there_and_rvii_cannot() -> None:
    torch.manual_seed(0)
    options = {"boxes": SIDE, "regions": 2}
    zoom = Zoom(ZoomConfig.parse({**SMALL, **options}, "interact"), DIMS)
    assert accuracy_after_training(zoom) > 0.9
    rvii = RVII(RVIIConfig.parse(SMALL, "interact"), DIMS)
    assert accuracy_after_training(rvii, 40) < 0.35


# -- on cached features ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "cache"))


def zooming(llm: Path) -> dict[str, Any]:
    joint = {"answer-embedding": 1.0, "request-image": 0.3}
    answer = stage("answer", joint, train=["interact"], steps=4, validate_every=2)
    values = lesson(llm, answer, stage("instruct", "language", steps=3))
    values["validate_on"] = [{"task": "colours", "split": "val", "limit": 4}]
    model = {**values["model"], "strategy": "zoom"}
    model["interact"] = {**model["interact"], "name": "zoom", "boxes": 2, "regions": 2}
    return {**values, "model": model}


@pytest.mark.slow
def test_it_trains_on_cached_features_and_encodes_each_crop_once(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = TinyEncoder.encode
    monkeypatch.setattr(
        TinyEncoder,
        "encode",
        lambda self, images: encoded.append(len(images)) or encode(self, images),
    )
    training(zooming(llm), tmp_path / "run").run()
    shards = (tmp_path / "cache" / "features").glob("*/*.safetensors")
    keys = [key for shard in shards for key in load_file(shard)]
    assert len(set(keys)) == len(keys) == sum(encoded)
    assert 0 < sum("@" in key for key in keys) <= 4 * sum("@" not in key for key in keys)
    # Another run draws the same boxes, and finds all of them.
    before = sum(encoded)
    training(zooming(llm), tmp_path / "again").run()
    assert sum(encoded) == before
    assert weights(tmp_path / "again") == weights(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    llm: Path, tmp_path: Path, step: int
) -> None:
    training(zooming(llm), tmp_path / "whole").run()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        # With a cache of its own: no crop is there that the first run had.
        patch.setenv("IPN_CACHE", str(tmp_path / "other"))
        with pytest.MonkeyPatch.context() as stopping:
            stop_at(stopping, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                training(zooming(llm), tmp_path / "broken").run()
        training(zooming(llm), tmp_path / "broken", resume=True).run()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
