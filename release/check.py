"""Build every distribution, look into it, and test the wheels where nothing else is installed.

    python -m release.check                     the whole; leaves wheels and sdists in dist/
    python -m release.check --part short        libraries of the present environment, a few tests
    python -m release.check --part torchless    what the whole does for Python 3.12 and 3.13

Each builds all wheels and sdists and looks into them. Whole: an empty environment gets what is in
`requirements.lock`, and torch, and `make test` runs there against the wheels; one of Python 3.12
and one of 3.13, where these are installed, gets the same without torch (for them an index may hold
a CUDA build of several GB alone), and what needs no torch is tested there.

The last line names the Pythons that were tried, and how, and those that were not; with `--strict`
it is a failure that one was not, unless the part is short, which tries one alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from release.artifacts import PYTHONS, ROOT, Member, build, copy_of, faults_of, members
from release.installing import Environment, interpreter

__all__ = ["main"]

OTHERS = PYTHONS[1:]
MINE = f"{sys.version_info[0]}.{sys.version_info[1]}"
SHORT = (
    "tests/test_plugins.py",
    "tests/test_checkpoint.py",
    "tests/test_images.py",
    "tests/test_dialogue.py",
    "tests/cli/test_words.py",
    "plugins/ipn-film",
    "backbones/ipn-llama",
)
"""Discovery, saving, pictures, the engine, the command line and a member of each folder."""
OF_THE_SOURCES = (
    # They read, list or link to the sources, which are not here.
    "tests/test_error_texts.py",
    "tests/test_imports.py",
    "tests/test_readme.py",
    "tests/test_release.py",
    "tests/test_site.py",
)
WITHOUT = tuple(word for one in OF_THE_SOURCES for word in ("--ignore", one))


class _Check:
    """One run; collects what fails."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.failures: list[str] = []
        self.tried: dict[str, str] = {}
        self.began = time.monotonic()

    def tell(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.tell(f"FAILED: {text}")

    def closing(self, *, strict: bool) -> tuple[int, str]:
        """Return the exit code and the last line.

        Args:
            strict: whether a Python that was not tried is a failure.
        """
        missing = [one for one in PYTHONS if one not in self.tried]
        how = [f"{version} ({what})" for version, what in sorted(self.tried.items())]
        said = f"tried on Python {', '.join(how) or 'none'}"
        said += f"; not tried on {', '.join(missing)}" if missing else ""
        count = len(self.failures) + (len(missing) if strict else 0)
        result = f"{count} failures" if count else "nothing wrong"
        return int(count > 0), f"release-check: {result}; {said}"

    def artifacts(self) -> list[Path]:
        """Build everything and look into it; returns the wheels."""
        workspace = copy_of(ROOT, self.place / "workspace")
        every = members()
        wheels = []
        with ThreadPoolExecutor(2) as pool:
            built = list(pool.map(lambda one: build(one, workspace, self.place / "dist"), every))
        for member, (sdist, wheel) in zip(every, built, strict=True):
            for fault in faults_of(member, sdist, wheel, every[0]):
                self.fail(f"{member.name}: {fault}")
            wheels.append(wheel)
        sizes = sum(w.stat().st_size for w in wheels) / 1e6
        version = every[0].project["version"]
        self.tell(
            f"{len(wheels)} wheels ({sizes:.1f} MB) and sdists of version {version} built; "
            "metadata, licences and contents looked at"
        )
        return wheels

    @cached_property
    def tests(self) -> Path:
        """A folder with the workspace's tests and none of its sources."""
        sources = tuple(str(member.source) for member in members())
        return copy_of(ROOT, self.place / "tests", leave_out=sources)

    def wheels_alone(self, environment: Environment, folder: Path) -> None:
        """Make sure that what is tested is what was built."""
        where = environment.where(folder).strip()
        if not Path(where).is_relative_to(environment.folder):
            self.fail(f"ipn_core is imported from {where!r}, not from its wheel")

    def commands(self, environment: Environment, folder: Path, every: Sequence[Member]) -> None:
        """Run what needs no torch by hand: the help, the plugins, and a package of one's own."""
        ipn = str(environment.folder / "bin" / "ipn")
        run = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
        done = environment.run("-c", run, ipn, "plugins", "--json", folder=folder)
        listed = set(re.findall(r'"distribution": "([\w-]+)"', done.stdout))
        faults = [one for one in re.findall(r'"faults": \[(.*?)\]', done.stdout, re.DOTALL) if one]
        wanted = {m.name for m in every if m.registers}
        if done.returncode or faults or wanted - listed:
            self.fail(f"ipn plugins: {done.returncode}, {faults}, missing {wanted - listed}")
        for words in (
            ("--help",),
            ("--version",),
            ("new", "interaction", "mine", "--dir", str(environment.folder)),
        ):
            done = environment.run("-c", run, ipn, *words, folder=folder)
            if done.returncode:
                self.fail(f"ipn {' '.join(words)}: {done.stderr or done.stdout}")
        self.tell(f"{len(listed)} distributions register without fault; the command line works")

    def test(self, environment: Environment, folder: Path, *words: str) -> None:
        """Run tests, and say the counts."""
        passed, said = environment.test(folder, *words)
        if passed:
            self.tell(f"{environment.folder.name}: {said}")
        else:
            self.fail(f"tests in {environment.folder.name}:\n{said}")


def _short(check: _Check, wheels: list[Path]) -> None:
    folder = check.tests
    environment = Environment(check.place / "short", sys.executable)
    environment.borrow(str(ROOT / ".venv" / "bin" / "python"))
    environment.install(wheels, libraries=False, torch=None)
    check.wheels_alone(environment, folder)
    check.commands(environment, folder, members())
    chosen = "not slow and not gpu and not weights"
    check.test(environment, folder, "-m", chosen, *SHORT)
    check.tried[MINE] = "some tests, libraries of .venv"
    check.tell(
        "short: libraries of .venv, seven of the test files; 'make release-check' is the whole"
    )


def _whole(check: _Check, wheels: list[Path]) -> None:
    folder = check.tests
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert torch is not None
    environment = Environment(check.place / f"python{MINE}", sys.executable)
    environment.install(wheels, libraries=True, torch=torch[0])
    check.tell(f"Python {MINE}: wheels and libraries installed into an empty environment")
    check.wheels_alone(environment, folder)
    check.commands(environment, folder, members())
    check.test(environment, folder, "-n", "2", "-m", "not slow and not gpu", *WITHOUT)
    check.tried[MINE] = "all that make test runs"


def _without_torch(check: _Check, wheels: list[Path]) -> None:
    folder = check.tests
    for version in OTHERS:
        python = interpreter(version)
        if python is None:
            check.tell(f"Python {version}: not installed here, so not tried")
            continue
        environment = Environment(check.place / f"python{version}", python)
        environment.install(wheels, libraries=True, torch=None)
        check.tell(f"Python {version}: wheels and libraries installed, torch left out")
        check.wheels_alone(environment, folder)
        check.commands(environment, folder, members())
        # The conftest.py files import torch; so do the processes that the last file starts.
        words = ("--noconftest", "-p", "release.torchless", "--ignore", "tests/test_memory.py")
        chosen = ("-m", "not slow and not gpu and not weights")
        check.test(environment, folder, *words, *chosen, *WITHOUT)
        check.tried[version] = "what needs no torch"


PARTS = {"short": (_short,), "torchless": (_without_torch,), "whole": (_whole, _without_torch)}


def main(words: Sequence[str] | None = None) -> int:
    """Run from the command line; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=PARTS, default="whole")
    parser.add_argument("--strict", action="store_true")
    asked = parser.parse_args(words)
    part = asked.part
    with tempfile.TemporaryDirectory(prefix="ipn-release-") as place:
        check = _Check(Path(place))
        wheels = check.artifacts()
        for test in PARTS[part]:
            test(check, wheels)
        code, said = check.closing(strict=asked.strict and asked.part != "short")
        if part == "whole" and not code:
            shutil.copytree(check.place / "dist", ROOT / "dist", dirs_exist_ok=True)
        print(said, file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
