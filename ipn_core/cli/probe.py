"""Looking at each plugin in a process of its own, so that a bad one harms nobody.

A plugin that raises, hangs, crashes or ends its process while it is imported shows up as a fault
with the reason; the command that looks goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ipn_core.hooks import PROJECT
from ipn_core.plugins import CORE, chosen, discover, identify, same_name

__all__ = ["Probe", "answer_probe", "probe_plugins"]

LIMIT_S = 20.0
"""A plugin's top module imports nothing heavy; this is far more than it needs."""
DEEP_LIMIT_S = 120.0
"""With everything that it registers imported, torch and transformers among it."""


@dataclass
class Probe:
    """What one plugin said of itself.

    Attributes:
        name: its entry point's name.
        distribution: what pip calls it.
        version: the distribution's.
        components: the names that it registers, by kind.
        faults: what is wrong with it; empty if nothing is.
        answered: whether the process that loaded it lived to tell.
    """

    name: str
    distribution: str
    version: str
    components: dict[str, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    answered: bool = False

    @property
    def label(self) -> str:
        """Return "ipn-rvii 0.1.0" for messages."""
        return f"{self.distribution} {self.version}"

    def to_json(self) -> dict[str, Any]:
        """Return what `ipn plugins --json` prints of it."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "components": self.components,
            "faults": self.faults,
        }


def probe_plugins(*, deep: bool = False, limit_s: float | None = None) -> list[Probe]:
    """Look at every installed plugin, several at a time.

    Args:
        deep: also import everything that each registers.
        limit_s: seconds that one plugin may take.

    Returns:
        The plugins in the order in which they are loaded; a name that two of them have or register
        is a fault of the later one.

    Raises:
        UnknownNameError: `IPN_PLUGINS` names a plugin that is not installed.
    """
    limit_s = limit_s or (DEEP_LIMIT_S if deep else LIMIT_S)
    points = [CORE, *chosen(os.environ.get("IPN_PLUGINS"))]
    running: list[subprocess.Popen[bytes]] = []
    with ThreadPoolExecutor(max_workers=min(8, max(2, os.cpu_count() or 2))) as threads:
        try:
            probes = list(threads.map(lambda p: _probe(p, deep, limit_s, running), points))
        except BaseException:
            # Ctrl-C does not reach processes in groups of their own, nor the threads that wait.
            threads.shutdown(wait=False, cancel_futures=True)
            for process in running:
                _kill(process)
            raise
    _find_clashes(probes)
    return probes


def _probe(
    point: EntryPoint, deep: bool, limit_s: float, running: list[subprocess.Popen[bytes]]
) -> Probe:
    plugin = identify(point)
    probe = Probe(plugin.name, plugin.distribution, plugin.version)
    question = json.dumps([point.name, probe.distribution, deep])
    code = "from ipn_core.cli.probe import answer_probe; answer_probe()"
    process = subprocess.Popen(
        # -P: modules in the folder that the user happens to stand in are not to be imported.
        [sys.executable, "-P", "-c", code, question],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A group of its own, so that its children end with it.
        start_new_session=os.name == "posix",
    )
    running.append(process)
    try:
        out, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        # A grandchild in a group of its own may hold the pipes open for longer.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        probe.faults.append(f"it took longer than {limit_s:g} s to import and was ended")
        return probe
    try:
        answer = json.loads(out)
        probe.components, probe.faults = answer["components"], answer["faults"]
        probe.answered = True
    except (ValueError, LookupError, TypeError):
        probe.faults.append(_death(process.returncode, errors.decode(errors="replace")))
    return probe


def _kill(process: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:  # pragma: no cover
        process.kill()


def _death(code: int, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"it crashed the process with {name} while it was imported{said}"
    return f"it ended the process with exit code {code} while it was imported{said}"


def _find_clashes(probes: Sequence[Probe]) -> None:
    holders: dict[tuple[str, str], Probe] = {}
    named: dict[str, Probe] = {}
    for probe in probes:
        if (first := named.setdefault(probe.name, probe)) is not probe:
            probe.faults.append(same_name(probe.name, first.label))
        for kind, names in probe.components.items():
            for name in list(names):
                holder = holders.setdefault((kind, name), probe)
                if holder is not probe:
                    names.remove(name)
                    probe.faults.append(f"{kind} '{name}' is already taken by {holder.label}")
        probe.components = {kind: names for kind, names in probe.components.items() if names}


def _is(point: EntryPoint, name: str, distribution: str) -> bool:
    plugin = identify(point)
    return (plugin.name, plugin.distribution) == (name, distribution)


def answer_probe() -> None:
    """Be the process that looks: load one plugin and write what it registers as JSON.

    Whatever the plugin prints is kept apart from the answer.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, distribution, deep = json.loads(sys.argv[1])
    points = [p for p in entry_points(group=PROJECT) if _is(p, name, distribution)]
    registry = discover(points=points[:1])
    # The core is always there too, and answers for itself alone.
    plugin = registry.plugins[-1]
    faults = [fault.reason for fault in registry.faults if fault.plugin == plugin]
    components: dict[str, list[str]] = {}
    for component in registry.of(plugin):
        components.setdefault(component.kind, []).append(component.name)
        try:
            if deep:
                component.load()
                component.load_config()
        except Exception as error:
            faults.append(" ".join(str(error).split()))
    with answer:
        json.dump({"components": components, "faults": faults}, answer)
    # A thread or an exit handler that the plugin left behind shall not keep this process.
    os._exit(0)
