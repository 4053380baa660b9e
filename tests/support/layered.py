"""A virtual environment over the one that the tests run in, with packages of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest


class Environment:
    """Sees everything that is installed here; what it installs, nothing else sees.

    Attributes:
        python: its interpreter.
        site: where its own packages lie.
        settings: environment variables of what runs in it, beside those of here.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = str(folder / "bin" / "python")
        (self.site,) = folder.rglob("site-packages")
        self.settings: dict[str, str] = {}
        # What is installed here, links to the workspace's folders among it.
        here = sysconfig.get_path("purelib")
        (self.site / "outer.pth").write_text(f"import site; site.addsitedir({here!r})\n")

    def tried(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.settings}
        command = [self.python, *words]
        return subprocess.run(
            command, capture_output=True, text=True, cwd="/", env=environment, check=False
        )

    def run(self, *words: str) -> str:
        done = self.tried(*words)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def pip(self, *words: str) -> str:
        return self.run("-m", "pip", "--disable-pip-version-check", *words)

    def declare(self, name: str, points: str) -> None:
        """Let a plugin be installed as far as its name, its version and its entry points go.

        Args:
            name: of the distribution, such as "ipn-mine".
            points: lines `name = module`, of the group of plugins.
        """
        about = self.site / f"{name.replace('-', '_')}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[ipn]\n{points}\n")

    def ipn(self, *words: str) -> str:
        code = "import sys; from ipn_core.cli import main; sys.exit(main(sys.argv[1:]))"
        return self.run("-c", code, *words)


@contextmanager
def environment_with(folder: Path, module: str, *installs: Sequence[str]) -> Iterator[Environment]:
    """Make an environment that has a module, and remove it afterwards, for such are large.

    The test is skipped where it cannot be installed.

    Args:
        folder: where to make it.
        module: installed here already, it is not installed again.
        installs: what each `pip install` is told.
    """
    made = Environment(folder)
    # Another torch than the one that is here may be gigabytes.
    (folder / "pins.txt").write_text(f"torch=={version('torch')}\n")
    made.settings["PIP_CONSTRAINT"] = str(folder / "pins.txt")
    try:
        if made.tried("-c", f"import {module}").returncode:
            for words in installs:
                done = made.tried("-m", "pip", "install", "--quiet", "--no-compile", *words)
                if done.returncode:
                    told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                    pytest.skip(f"{module} cannot be installed here: {' '.join(told)}")
        yield made
    finally:
        shutil.rmtree(folder)
