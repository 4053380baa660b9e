from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import HEARS_CTRL_C, Run, assert_refused, edit, shell

from ipn_core import hookimpl
from ipn_core.plugins import add_plugin, get_registry


def test_models_are_listed_with_or_without_the_word(ipn: Callable[..., Run]) -> None:
    listed = json.loads(ipn("models", "list", "--json").out)["models"]
    assert json.loads(ipn("models", "--json").out)["models"] == listed
    for row in listed:
        assert row["name"] in ipn("models").out


def test_an_unknown_name_cannot_be_pulled(ipn: Callable[..., Run]) -> None:
    assert_refused(
        ipn("models", "pull", "startre"),
        "unknown weights 'startre': known are ",
        "(did you mean 'starter'?). See 'ipn models list'.",
    )


BAD_PLUGINS = {
    "raises": ("raise ImportError('no such cuda')", "ImportError: no such cuda"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "leaves": ("import os; os._exit(0)", "ended the process with exit code 0"),
    "crashes": ("import os; os.abort()", "SIGABRT"),
    "empty": ("", "it has no `@hookimpl def register(registry)`"),
    "misspelt": (
        "from ipn_core import hookimpl\n@hookimpl\ndef registre(registry): pass",
        "registre",
    ),
    "taken": (
        "from ipn_core import hookimpl\n@hookimpl\n"
        "def register(registry): registry.backbone('llama', 'x:Y')",
        "backbone 'llama' is already taken by ipn-llama",
    ),
    "hangs": ("import time; time.sleep(600)", "took longer than 3 s"),
    "interrupts": ("raise KeyboardInterrupt", "import failed: KeyboardInterrupt"),
    "closes": ("raise GeneratorExit", "import failed: GeneratorExit"),
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """All bad plugins installed at once, as `ipn plugins --json` shows them."""
    site = tmp_path_factory.mktemp("site")
    for name, (code, _) in BAD_PLUGINS.items():
        info = site / f"ipn_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ipn-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[ipn]\nz-{name} = ipn_{name}_module\n")
        (site / f"ipn_{name}_module.py").write_text("print('noise')\n" + code)
    code = "import sys; from ipn_core.cli import main, probe; probe.LIMIT_S = 3.0; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "plugins", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return {row["distribution"]: row for row in json.loads(done.stdout)["plugins"]}


@pytest.mark.parametrize("name", BAD_PLUGINS)
def test_a_bad_plugin_is_reported_with_its_reason(
    name: str, probed: dict[str, dict[str, object]]
) -> None:
    row = probed[f"ipn-{name}"]
    assert row["version"] == "1.2"
    assert row["components"] == {}
    (fault,) = row["faults"]  # type: ignore[misc]
    assert BAD_PLUGINS[name][1] in fault


REGISTERS = (
    "from ipn_core import hookimpl\n@hookimpl\n"
    "def register(registry): registry.task('{name}-task', 'x:Y')"
)


def test_wrong_versions_and_names_that_collide_are_faults(
    fake_plugin: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    fake_plugin("one", REGISTERS.format(name="one"))
    env = fake_plugin("two", REGISTERS.format(name="two"))
    info = tmp_path / "site" / "ipn_two-1.2.dist-info"
    with open(info / "METADATA", "a") as file:
        file.write("Requires-Dist: ipn-core>=99\nRequires-Dist: not-there>=1\n")
    (info / "entry_points.txt").write_text("[ipn]\none = ipn_two_module\n")
    run = shell("plugins", "--json", env={**env, "IPN_PLUGINS": "one"})
    rows = {row["distribution"]: row for row in json.loads(run.out)["plugins"]}
    assert rows["ipn-one"]["faults"] == []
    collides, version = rows["ipn-two"]["faults"]
    assert collides == (
        "its entry point has the name of that of ipn-one 1.2, 'one', and one must be renamed"
    )
    assert version.startswith("it needs ipn-core>=99, and version ")
    assert version.endswith("is installed. Run: pip install 'ipn-core>=99'")
    assert rows["ipn-two"]["components"] == {"task": ["two-task"]}
    said = shell("models", "pull", "x", env={**env, "IPN_PLUGINS": "one"}).err
    assert "Not loaded" not in said  # both are, whatever is wrong with a name


IMPATIENT = (
    "import sys; from ipn_core import patience; from ipn_core.cli import main; "
    "patience.NOTE_S, patience.LIMIT_S, patience.GRACE_S = 0.3, 0.6, 0.3; sys.exit(main())"
)
STUBBORN = """
import time
while True:
    try: time.sleep(600)
    except BaseException: pass
"""


@pytest.mark.parametrize(
    ("source", "code", "last"),
    [
        ("import time; time.sleep(600)", 0, "It is given up after 0.6 s. To leave it out, set"),
        (STUBBORN, 1, "can be neither imported nor interrupted. To leave it out, set"),
    ],
)
def test_a_command_does_not_wait_for_a_plugin_that_hangs(
    fake_plugin: Callable[[str, str], dict[str, str]], source: str, code: int, last: str
) -> None:
    env = {**fake_plugin("hangs", source), "IPN_PLUGINS": "hangs,llama,starter"}
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, "models", "--json"],
        capture_output=True, text=True, env=env, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done
    assert "plugin ipn-hangs 1.2 has been importing for 0.3 s" in done.stderr
    assert last in done.stderr.splitlines()[-1]
    assert "IPN_PLUGINS='llama,starter'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    if code == 0:
        assert "starter" in [row["name"] for row in json.loads(done.stdout)["models"]]


def test_the_others_are_listed_beside_bad_ones(probed: dict[str, dict[str, object]]) -> None:
    assert probed["ipn-llama"]["faults"] == []
    assert probed["ipn-llama"]["components"] == {"backbone": ["llama", "vicuna"]}
    assert "hidden-state" in probed["ipn-core"]["components"]["requester"]  # type: ignore[index]


def test_plugins_for_people(
    fake_plugin: Callable[[str, str], dict[str, str]],
) -> None:
    run = shell("plugins", env=fake_plugin("broken", "raise ImportError('no such cuda')"))
    assert (run.code, run.err) == (0, "")
    assert "ipn-broken 1.2" in run.out
    assert "fault:       import failed: ImportError: no such cuda" in run.out
    assert "backbone:    llama, vicuna" in run.out


@pytest.mark.slow
def test_a_plugin_that_raises_on_import_does_not_stop_ask(
    home: Path, fake_plugin: Callable[[str, str], dict[str, str]]
) -> None:
    env = fake_plugin("broken", "raise ImportError('no such cuda')")
    with open(Path(env["PYTHONPATH"]) / "ipn_broken-1.2.dist-info/entry_points.txt", "a") as file:
        file.write("tiny = ipn_core.testing.plugin\n")
    env["IPN_PLUGINS"] = "broken,tiny,llama"
    run = shell("ask", home / "scene.png", "hi", "-m", home / "model", env=env)
    assert run.code == 0
    assert "plugin ipn-broken 1.2 was left out: import failed: ImportError: no such" in run.err
    assert run.err.count("\n") == 1
    run = shell("ask", home / "scene.png", "hi", "-m", "broken", env=env)
    assert_refused(run, "unknown model 'broken'", "Not loaded: ipn-broken 1.2", "no such cuda")


def test_a_component_that_raises_on_import_is_named(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    class Plugin:
        @hookimpl
        def register(self, registry: object) -> None:
            registry.interaction("broken-cli", "no_such_module:X")  # type: ignore[attr-defined]

    if "broken-cli" not in get_registry().entries("interaction"):
        add_plugin(get_registry(), "broken-cli", Plugin())
    edit(copied, lambda c: c.update(interact={"name": "broken-cli"}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "interaction 'broken-cli' of broken-cli local", "No module named")


@pytest.mark.slow
def test_doctor_survives_a_plugin_that_ends_its_process(
    fake_plugin: Callable[[str, str], dict[str, str]],
) -> None:
    env = fake_plugin("leaves", "import os; os._exit(0)")
    # Without the others, whose imports take seconds.
    run = shell("doctor", "--json", env={**env, "IPN_PLUGINS": "leaves"})
    assert run.err == ""
    assert run.code == 0
    found = json.loads(run.out)
    assert list(found) == [
        "versions",
        "device",
        "attention",
        "attention_by",
        "faults",
        "cache",
        "settings",
    ]
    assert found["versions"]["torch"] == torch.__version__
    assert found["attention"]["eager"]["available"] is True
    for row in found["attention"].values():
        assert row["available"] == (not row["reasons"])
    (fault,) = [f for f in found["faults"] if f["plugin"] == "ipn-leaves 1.2"]
    assert "ended the process with exit code 0" in fault["reason"]
    assert Path(found["cache"]["folder"]).is_absolute()
    assert found["settings"]["IPN_PLUGINS"] == "leaves"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_does_not_wait_for_a_plugin_that_hangs(
    tmp_path: Path, fake_plugin: Callable[[str, str], dict[str, str]]
) -> None:
    there = tmp_path / "there"
    hang = f"import os, time; open({str(there)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    env = {**fake_plugin("hangs", hang), "IPN_PLUGINS": "hangs"}
    code = HEARS_CTRL_C + "import sys; from ipn_core.cli import main; sys.exit(main(['plugins']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    while not (there.exists() and there.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out, errors) == (130, b"", b"")
    with pytest.raises(ProcessLookupError):
        os.kill(int(there.read_text()), 0)
