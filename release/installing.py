"""Wheels in environments of their own, and the tests of the workspace against them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from release.artifacts import ROOT

__all__ = ["Environment", "interpreter"]

PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
HASHED = ("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", "requirements.lock")
COUNTS = re.compile(r"^=*\s*(\d+ (?:passed|failed|error|skipped).*?)\s*=*$")


def interpreter(version: str) -> str | None:
    """Return the Python of a version, such as "3.13", from the path or from pyenv."""
    found = shutil.which(f"python{version}")
    home = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for one in [found, *(str(p / "bin/python") for p in sorted(home.glob(f"{version}.*")))]:
        # pyenv's own `python3.13` is a script that fails where another version is chosen.
        if one and _says(one, f"Python {version}."):
            return one
    return None


def _says(program: str, begin: str) -> bool:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.startswith(begin)


class Environment:
    """An environment that holds wheels of ours and none of our sources.

    Args:
        folder: where it is made.
        python: an interpreter.
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        self.python = str(folder / "bin" / "python")
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)

    def borrow(self, other: str) -> None:
        """Use the libraries of another environment of the same Python, its editables left out.

        A folder on the path is no place for `.pth` files, which is what an editable install is.
        """
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        theirs, mine = (
            subprocess.run([one, "-c", where], capture_output=True, text=True, check=True)
            for one in (other, self.python)
        )
        (Path(mine.stdout.strip()) / "borrowed.pth").write_text(theirs.stdout)

    def install(self, wheels: Sequence[Path], *, libraries: bool, torch: str | None) -> None:
        """Install wheels, and what they need unless it is borrowed.

        Args:
            wheels: all of ours.
            libraries: also what `requirements.lock` holds.
            torch: its requirement, None for none.
        """
        if libraries:
            self._pip(*HASHED)
        if torch:
            self._pip(torch)
        self._pip("--no-deps", "--no-index", *map(str, wheels))

    def run(self, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run its Python in a folder, with nothing else on the path."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["OMP_NUM_THREADS"] = "1"
        command = [self.python, *words]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    def where(self, folder: Path) -> str:
        """Return where `import ipn_core` comes from."""
        return self.run("-c", "import ipn_core; print(ipn_core.__file__)", folder=folder).stdout

    def test(self, folder: Path, *words: str) -> tuple[bool, str]:
        """Run tests in a folder; returns whether they passed, and the counts or what went wrong."""
        done = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *words, folder=folder)
        counts = [found[1] for line in done.stdout.splitlines() if (found := COUNTS.match(line))]
        if done.returncode or not counts:
            return False, done.stdout[-6000:] + done.stderr[-2000:]
        return True, counts[-1]

    def _pip(self, *words: str) -> None:
        done = subprocess.run(
            [self.python, *PIP, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"pip install {' '.join(words[:6])} … failed:\n{done.stderr[-3000:]}")
