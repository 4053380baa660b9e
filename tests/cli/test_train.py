from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused, tree


def test_train_hands_its_words_on(monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]) -> None:
    calls: list[tuple[object, ...]] = []

    def train(config: Path, overrides: list[str], *, resume: bool, out: Path | None) -> Path:
        calls.append((config, overrides, resume, out))
        return Path("trained")

    monkeypatch.setitem(sys.modules, "ipn_core.training", types.ModuleType("training"))
    run_module = types.ModuleType("run")
    run_module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipn_core.training.run", run_module)
    run = ipn("train", "a.yaml")
    assert (run.code, run.out) == (0, "trained\n")
    assert ipn("train", "a.yaml", "x.y=1", "z=[2]", "--resume", "--out", "there").code == 0
    assert calls == [
        (Path("a.yaml"), [], False, None),
        (Path("a.yaml"), ["x.y=1", "z=[2]"], True, Path("there")),
    ]


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("file", "is a file. Name a folder, which is made if it is not there"),
        ("file/below", "file' is a file. Name a folder"),
        ("x" * 300, "is longer than a folder's name can be"),
    ],
)
def test_out_must_be_a_folder(
    out: str, reason: str, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    (tmp_path / "file").write_text("kept")
    before = tree(tmp_path)
    run = ipn("train", "a.yaml", "--out", tmp_path / out)
    assert_refused(run, f"--out '{tmp_path / out}' ", reason)
    assert tree(tmp_path) == before
