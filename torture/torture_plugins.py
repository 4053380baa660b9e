"""Plugins of every broken kind, many at once: each is reported, and takes no other down."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from installed import installed

from ipn_core import patience
from ipn_core.errors import PluginError
from ipn_core.hooks import hookimpl
from ipn_core.plugins import KINDS, Plugin, Registry, discover
from ipn_core.plugins import _Discovery as Discovery
from torture.torture_inputs import generated
from torture.torture_storage import child

HEAD = "from ipn_core import hookimpl\n@hookimpl\ndef register(registry):\n    "
BROKEN = {
    "raises": "raise LookupError('gone')",
    "exits": "import sys; sys.exit(3)",
    "leaves": "import os; os._exit(0)",
    "aborts": "import os; os.abort()",
    "segfaults": "import ctypes; ctypes.string_at(0)",
    "hangs": "import time\ntime.sleep(600)",
    "spins": "while True: pass",
    "recurses": "def f(): f()\nf()",
    "syntax": "def (",
    "nul": "x = '\x00'",
    "latin": "# coding: nowhere\n",
    "deep": "x = " + "(" * 500,
    "empty": "",
    "misspelt": HEAD.replace("def register", "def registre") + "pass",
    "noargs": HEAD.replace("(registry)", "()") + "registry",
    "argues": HEAD.replace("(registry)", "(registry, more)") + "pass",
    "taken": HEAD + "registry.backbone('llama', 'x:Y')",
    "twice": HEAD + "registry.task('t', 'x:Y'); registry.task('t', 'x:Y')",
    "kind": HEAD + "registry.tusk('t', 'x:Y')",
    "half": HEAD + "registry.task('half-task', 'x:Y'); raise ValueError('half-way')",
    "interrupts": "raise KeyboardInterrupt",
    "interrupted": HEAD + "raise KeyboardInterrupt",
    "based": "raise BaseException('of all')",
    "stops": "raise StopIteration",
    "generator": "raise GeneratorExit",
    "closes": "import os\nfor n in range(3): os.close(n)\nraise LookupError('gone')",
    "daemon": "import threading as t, time\nt.Thread(target=time.sleep, args=(600,)).start()\n1/0",
    "talks": "print('noise ' * 100_000)\nraise LookupError('gone')",
}
ODD = {
    "older": {"requires": "ipn-core>=99"},
    "newer": {"requires": "ipn-core<0.0.1"},
    "namesake": {"entry": "z-leaves"},
}
"""Good code, whose distribution is wrong."""
ENDS = ("leaves", "aborts", "segfaults")
"""What ends the process that imports it: `ipn plugins` tells of it, and nothing survives it."""
GOOD = HEAD + "registry.task('{name}-task', 'nowhere:Task')"
LIMIT_S = 5.0


def _install(site: Path, name: str, source: str, *, requires: str = "", entry: str = "") -> None:
    info = site / f"ipn_{name}-1.2.dist-info"
    info.mkdir()
    about = f"Metadata-Version: 2.1\nName: ipn-{name}\nVersion: 1.2\n"
    (info / "METADATA").write_text(about + f"Requires-Dist: {requires}\n" * bool(requires))
    (info / "entry_points.txt").write_text(f"[ipn]\n{entry or f'z-{name}'} = ipn_{name}_module\n")
    (site / f"ipn_{name}_module.py").write_text(source)


def test_broken_plugins_installed_together(tally: Any, tmp_path: Path) -> None:
    """`ipn plugins` with every broken plugin, and a good one between each two."""
    counts = tally("broken plugins installed at once, and good ones between them")
    for name, source in BROKEN.items():
        _install(tmp_path, name, source)
        _install(tmp_path, f"{name}good", GOOD.format(name=name))
    for name, options in ODD.items():
        _install(tmp_path, name, GOOD.format(name=name), **options)
        _install(tmp_path, f"{name}good", GOOD.format(name=f"{name}good"))
    limit = f"probe.LIMIT_S = {LIMIT_S}"
    code = f"import sys; from ipn_core.cli import main, probe; {limit}; sys.exit(main())"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "plugins", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    rows = {row["distribution"]: row for row in json.loads(done.stdout)["plugins"]}
    each = (time.perf_counter() - started) / (2 * len(BROKEN) + 2 * len(ODD))
    for name in (*BROKEN, *ODD):
        bad, good = rows.get(f"ipn-{name}"), rows.get(f"ipn-{name}good")
        told = bad is not None and all(f.strip() for f in bad["faults"]) and bad["faults"]
        counts.count(each, True, "" if told else f"it is listed as {bad}", name)
        fine = good is not None and not good["faults"]
        task = f"{name}good-task" if name in ODD else f"{name}-task"
        fine = fine and good["components"] == {"task": [task]}
        counts.count(each, False, "" if fine else f"it is listed as {good}", f"beside {name}")


def test_broken_plugins_imported_by_a_command(
    tally: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every command but `ipn plugins` imports them: in its own process, good ones beside."""
    counts = tally("broken plugins imported into one process with good ones")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(patience, "NOTE_S", 0.2)
    monkeypatch.setattr(patience, "LIMIT_S", 0.5)
    usual = list(entry_points(group="ipn"))
    for name in ("a", "z"):
        (tmp_path / f"good_{name}.py").write_text(GOOD.format(name=name))
    for name, source in BROKEN.items():
        if name in ENDS:
            continue
        (tmp_path / f"broken_{name}.py").write_text(source)
        names = {"z-a": "good_a", "z-b": f"broken_{name}", "z-z": "good_z"}
        points = [installed(point, module) for point, module in names.items()]

        def load(points: Any = points) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            found = discover(points=[*usual, *points])
            assert {fault.plugin.name for fault in found.faults} == {"z-b"}
            assert {"a-task", "z-task", "emoji-scenes"} <= set(found.entries("task"))
            assert "half-task" not in found.entries("task")

        started = time.perf_counter()
        code = child(load)
        fault = f"its process ended with {code}" if code else ""
        counts.count(time.perf_counter() - started, True, fault, name)


TARGETS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["os:system", "nowhere:X", "json:nothing", ":", "a:b:c", "os", "json:JSONDecoder"]
    ),
    st.none(),
    st.integers(),
    st.just(object()),
    st.just(dict),
    st.lists(st.integers(), max_size=2),
)
NAMES = st.one_of(
    st.sampled_from(["llama", "rvii", "starter", "static", "tokens", "x"]),
    st.text(max_size=9),
    st.integers(),
    st.none(),
)


def test_whatever_is_registered(tally: Any, scaled: Any) -> None:
    """Any name for anything: a fault of that plugin, or a component that says what is wrong."""
    counts = tally("names and targets of any kind, registered and loaded")
    numbers = itertools.count()

    @generated(scaled(200))
    @given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), NAMES, TARGETS), max_size=3))
    def run(entries: list[Any]) -> None:
        class Odd:
            @hookimpl
            def register(self, registry: Any) -> None:
                for kind, name, target in entries:
                    getattr(registry, kind)(name, target)

        def register() -> Registry:
            found = discover()
            usual = {kind: set(found.entries(kind)) for kind in KINDS}
            plugin = Plugin(f"odd-{next(numbers)}", "ipn-odd", "1.2")
            found.plugins.append(plugin)
            Discovery(found).register(plugin, Odd())
            assert all(usual[kind] <= set(found.entries(kind)) for kind in KINDS), "others are gone"
            for component in list(found.of(plugin)):
                with contextlib.suppress(PluginError):
                    component.load()
            return found

        counts.attempt(repr(entries)[:200], register)

    run()
