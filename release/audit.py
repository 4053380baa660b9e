"""Ask a database of vulnerabilities about every package of the tested set: `make audit`.

    python -m release.audit [--pip-audit PROGRAM] [--strict]

Exit code 0: every package was looked up and none has a known vulnerability, or no database could be
reached, which is then said with the number of packages that nobody looked up; with `--strict`, for
where there is a network, that is 1, too. Anything else is 1: a vulnerability, a package that the
database does not know, a tool that fails.

Whether a database answers is found out by asking it about a release that is known to be vulnerable:
pip-audit ends without complaint where an index merely has no such data.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Audit", "audit", "main", "pinned"]

ROOT = Path(__file__).parents[1]
SETS = ("requirements.lock", "release/tools.lock", "docs/making/requirements.lock")
UNHASHED = "requirements.txt"
SERVICES = ("pypi", "osv")
CANARY = "pillow==9.0.0"
"""It has had known vulnerabilities since 2022; a database that does not say so does not answer."""
OUT_OF_REACH = re.compile(r"connection|timed? ?out|no answer within|max retries", re.IGNORECASE)
"""What pip-audit says of a database that it cannot reach; any other failure is one of its own."""
LIMIT_S = 300.0
PIN = re.compile(r"^([\w.-]+)==([^\s;\\]+)\s*(;[^\\]*)?", re.MULTILINE)


@dataclass
class Audit:
    """What came of it.

    Attributes:
        code: the exit code.
        lines: what to tell.
    """

    code: int
    lines: list[str]


@dataclass
class _Run:
    """What pip-audit said: packages with their vulnerabilities, those left out, or a failure."""

    found: dict[str, list[str]]
    skipped: list[str]
    failure: str = ""


def pinned(root: Path) -> list[list[str]]:
    """Return the requirements of each of `SETS`, `name==version` with a marker.

    Args:
        root: of the workspace.
    """
    some = [
        [_requirement(match) for match in PIN.finditer((root / name).read_text(encoding="utf-8"))]
        for name in SETS
    ]
    # What the lock cannot hold, such as torch, is pinned there alone.
    held = {one.partition("==")[0].lower() for one in some[0]}
    some[0] += [
        _requirement(match)
        for match in PIN.finditer((root / UNHASHED).read_text(encoding="utf-8"))
        if match[1].lower().replace("_", "-") not in held
    ]
    return some


def audit(sets: Sequence[Sequence[str]], program: str, *, strict: bool = False) -> Audit:
    """Look every requirement up in the first database that answers.

    Args:
        sets: requirements `name==version`, each with its marker if it has one, a list for each
            environment that they are installed into.
        program: pip-audit.
        strict: whether it is a failure that no database answers.
    """
    asked = sum(map(len, sets))
    silent = []
    for service in SERVICES:
        canary = _run(program, service, [CANARY])
        if canary.failure and not OUT_OF_REACH.search(canary.failure):
            return Audit(1, [f"audit: pip-audit failed: {canary.failure}"])
        if not any(canary.found.values()):
            why = canary.failure or f"it has nothing against {CANARY}"
            silent.append(f"{service} ({why})")
            continue
        runs = [_run(program, service, one) for one in sets]
        return _judged(_together(runs), service, asked)
    return Audit(
        1 if strict else 0,
        [
            "audit: could not reach a database of vulnerabilities: " + "; ".join(silent) + ".",
            f"audit: 0 of {asked} packages were looked up. "
            "Run 'make audit' where one can be reached.",
        ],
    )


def _together(runs: Sequence[_Run]) -> _Run:
    """Return what several runs said, as one."""
    return _Run(
        {name: found for run in runs for name, found in run.found.items()},
        sorted({name for run in runs for name in run.skipped}),
        next((run.failure for run in runs if run.failure), ""),
    )


def _judged(run: _Run, service: str, asked: int) -> Audit:
    """Return what the answer of a database means."""
    if run.failure:
        return Audit(1, [f"audit: pip-audit failed: {run.failure}"])
    bad = {name: found for name, found in run.found.items() if found}
    lines = [f"audit: {name} is vulnerable: {', '.join(found)}" for name, found in bad.items()]
    lines += [f"audit: {name} was not looked up" for name in run.skipped]
    lines.append(
        f"audit: {len(run.found)} packages looked up in {service}, {len(bad)} vulnerable, "
        f"{len(run.skipped)} not known there."
    )
    return Audit(1 if bad or run.skipped or not run.found else 0, lines)


def _run(program: str, service: str, requirements: Sequence[str]) -> _Run:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements) + "\n")
        file.flush()
        command = [program, "-r", file.name, "--no-deps", "--disable-pip"]
        command += [
            "--vulnerability-service",
            service,
            "--format",
            "json",
            "--progress-spinner",
            "off",
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return _Run({}, [], f"no answer within {LIMIT_S:.0f} s")
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        return _Run({}, [], said.splitlines()[-1])
    found, skipped = {}, []
    for one in packages:
        if "skip_reason" in one:
            skipped.append(one["name"])
        else:
            found[f"{one['name']} {one['version']}"] = [v["id"] for v in one["vulns"]]
    return _Run(found, skipped)


def _requirement(match: re.Match[str]) -> str:
    return f"{match[1]}=={match[2]}" + (f" {match[3].strip()}" if match[3] else "")


def main(words: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pip-audit", default="pip-audit", metavar="PROGRAM")
    parser.add_argument("--strict", action="store_true", help="fail where no database answers")
    given = parser.parse_args(words)
    result = audit(pinned(ROOT), given.pip_audit, strict=given.strict)
    print("\n".join(result.lines))
    return result.code


if __name__ == "__main__":
    sys.exit(main())
