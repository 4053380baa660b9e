"""`ipn plugins` lists each distribution; pip takes one away, and nothing else goes with it."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from catalogue import CATALOGUE, MEMBERS

from ipn_core.scaffold.package import write_package

KINDS = ("interaction", "task")


class Environment:
    """A virtual environment over this one, with packages of its own."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = str(folder / "bin" / "python")
        (site,) = folder.rglob("site-packages")
        # What is installed here, links to the workspace's folders among it.
        here = sysconfig.get_path("purelib")
        (site / "outer.pth").write_text(f"import site; site.addsitedir({here!r})\n")

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [self.python, *words], capture_output=True, text=True, cwd="/", check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def pip(self, *words: str) -> str:
        return self.run("-m", "pip", "--disable-pip-version-check", *words)

    def plugins(self) -> dict[str, dict[str, object]]:
        """What `ipn plugins --json` lists, by distribution."""
        code = "import sys; from ipn_core.cli import main; sys.exit(main(['plugins', '--json']))"
        return {row["distribution"]: row for row in json.loads(self.run("-c", code))["plugins"]}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Two packages of `ipn new`, installed beside everything else."""
    folder = tmp_path_factory.mktemp("uninstalling")
    made = Environment(folder / "venv")
    packages = [str(write_package(kind, f"gone-{kind}", folder)[1]) for kind in KINDS]
    made.pip("install", "--no-deps", "--no-build-isolation", "--no-index", *packages)
    return made


@pytest.mark.slow
def test_uninstalling_one_removes_exactly_it(environment: Environment) -> None:
    before = environment.plugins()
    for strategy, distribution in CATALOGUE.items():
        components: dict[str, list[str]] = before[distribution]["components"]  # type: ignore[assignment]
        assert components["strategy"] == [strategy]
    assert {"ipn-core", *MEMBERS} <= set(before)
    assert before["ipn-gone-task"]["components"] == {"task": ["gone-task"]}
    assert not any(row["faults"] for row in before.values())

    environment.pip("uninstall", "--yes", "ipn-gone-interaction")

    after = environment.plugins()
    gone = before.pop("ipn-gone-interaction")
    assert gone["components"] == {
        "interaction": ["gone-interaction"],
        "strategy": ["gone-interaction"],
    }
    assert after == before
