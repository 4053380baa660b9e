from __future__ import annotations

import subprocess
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
    words = ("a.yaml", "x.y=1", "z=[2]", "--resume", "--out", "there")
    assert ipn("train", *words).out == "trained\n"
    monkeypatch.setenv("RANK", "1")  # one process of several: another one says it
    run = ipn("train", *words)
    assert (run.code, run.out, run.err) == (0, "", "")
    assert calls == [
        (Path("a.yaml"), [], False, None),
        *2 * [(Path("a.yaml"), ["x.y=1", "z=[2]"], True, Path("there"))],
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


def test_the_folder_that_is_the_default_must_be_one_too(
    tmp_path: Path, ipn: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("kept")
    # The config does not exist either: had it been looked for, it would be what is missed.
    reason = f"cannot be made: '{tmp_path / 'runs'}' is a file. Name a folder"
    assert_refused(ipn("train", "a.yaml"), "--out 'runs/a' ", reason)
    assert (tmp_path / "runs").read_text() == "kept"


@pytest.mark.slow
def test_the_module_that_launchers_start_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ipn_core.training", "none.yaml", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ipn: ")
    assert "none.yaml" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
