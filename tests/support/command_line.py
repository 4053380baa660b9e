"""Running `ipn`, here or in a process of its own, and what a refusal must look like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""First in a program that is to be interrupted: where the tests run in the background, Python would
leave the signal ignored."""


@dataclass
class Run:
    """What a command line left behind."""

    code: int
    out: str
    err: str


def shell(
    *words: object, env: dict[str, str] | None = None, text: str = "", timeout: float = 120
) -> Run:
    """Run the command line in a process of its own."""
    code = "import sys; from ipn_core.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env={**(env or os.environ), "OMP_NUM_THREADS": "1"},
        input=text,
        timeout=timeout,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def assert_refused(run: Run, *parts: str) -> None:
    """One message that holds the parts, exit code 2, nothing else said."""
    assert run.code == 2, run
    assert run.out == ""
    assert "Traceback" not in run.err
    assert run.err.count("\n") == 1, run.err
    for part in parts:
        assert part in run.err, run.err


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change a checkpoint's config."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
