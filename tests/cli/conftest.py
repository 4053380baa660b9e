"""What the tests of the command line share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run
from PIL import Image

from ipn_core.cli import main
from ipn_core.testing.checkpoints import save_tiny_model

torch.set_num_threads(1)


@pytest.fixture
def ipn(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*words: object) -> Run:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a picture and a file of questions; tests only read it."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "scene.png")
    Image.fromarray(255 - pixels).save(folder / "other.png")
    rows = [
        {"image": image, "question": f"Is there {what}?", "answer": ["yes", "y"], "type": kind}
        for image in ("scene.png", "other.png")
        for what, kind in (("a dog", "exist"), ("a cat", "exist"), ("more", "other"))
    ]
    (folder / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def fake_plugin(tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """Install a plugin into a folder of its own; returns the environment in which it is there."""

    def install(name: str, code: str) -> dict[str, str]:
        site = tmp_path / "site"
        info = site / f"ipn_{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ipn-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[ipn]\n{name} = ipn_{name}_module\n")
        (site / f"ipn_{name}_module.py").write_text(code)
        return {**os.environ, "PYTHONPATH": str(site)}

    return install


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A copy of one checkpoint, to be damaged."""
    return Path(shutil.copytree(home / "model" / "tiny-look", tmp_path / "copy"))
