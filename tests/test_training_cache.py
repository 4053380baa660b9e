"""A training with the feature cache, without it, and with a damaged one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lessons import lesson, said, stage, training, weights

from ipn_core.testing.tiny import TinyEncoder


@pytest.mark.slow
def test_training_without_a_cache_gives_the_same_weights(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    encode = TinyEncoder.encode

    def counted(self: TinyEncoder, images: Any) -> Any:
        counts.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(TinyEncoder, "encode", counted)
    values = lesson(llm, stage("align", "language", steps=3))
    found = []
    for name, size in (("with", "1GB"), ("again", "1GB"), ("without", "0")):
        monkeypatch.setenv("IPN_CACHE", str(tmp_path / "cache" / name[:5]))
        monkeypatch.setenv("IPN_CACHE_SIZE", size)
        counts.clear()
        training(values, tmp_path / name).run()
        found.append((weights(tmp_path / name), sum(counts)))
    assert found[0] == found[1]
    assert found[2][0] == found[0][0]
    assert found[0][1] == 9
    assert found[2][1] > 9
    assert not list((tmp_path / "cache" / "witho").rglob("*.safetensors"))


def test_training_says_which_shard_was_damaged(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "cache"))
    values = lesson(llm, stage("align", "language", steps=1))
    training(values, tmp_path / "first").run()
    (shard,) = (tmp_path / "cache" / "features").glob("*/*.safetensors")
    os.truncate(shard, shard.stat().st_size - 5)
    run = training(values, tmp_path / "second")
    run.run()
    assert f"shard '{shard}' is damaged" in said(run)
    assert weights(tmp_path / "second") == weights(tmp_path / "first")
