"""Packages from outside the workspace: installed into folders of their own, and run from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
IPN = str(BIN / "ipn")


def files(page: str) -> dict[str, str]:
    """Return the files that a page shows: the blocks whose language is followed by a path."""
    return dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))


def write(files: dict[str, str], folder: Path) -> None:
    """Write files into a folder that need not be there."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def install(package: Path, site: Path) -> None:
    """Build a package's wheel and install it, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--disable-pip-version-check", "--target", str(site), str(package)]
    run(pip, package.parent)


def run(command: list[str], folder: Path, *sites: Path) -> str:
    """Run a command that must succeed, in a folder and with what is installed in `sites`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sites))}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
