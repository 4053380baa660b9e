"""What `ipn doctor` says of broken setups: one line each, with what to do, in one screen."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from command_line import shell

from ipn_core.cli.health import cache, merged, requirement_faults, settings, torch_fault


def site(folder: Path, name: str, version: str, *requires: str) -> dict[str, str]:
    """Put metadata of a distribution where it is found first; returns the environment."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(head + "".join(f"Requires-Dist: {r}\n" for r in requires))
    return {**os.environ, "PYTHONPATH": str(folder), "IPN_PLUGINS": ""}


@pytest.mark.slow
def test_a_torch_that_does_not_start_is_one_line_of_one_screen(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: not found')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "IPN_PLUGINS": "rvii"}
    run = shell("doctor", env=env)
    assert (run.code, run.err) == (0, "")
    *others, last = run.out.splitlines()
    assert len(others) < 50
    assert last.startswith("    torch: import failed: OSError: libcudart.so.13: not found. ")
    assert others[-1] == "faults"


def test_another_version_than_is_needed_is_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site(tmp_path, "torch", "2.4.0")
    site(
        tmp_path, "ipn-odd", "1.2", "torch>=2.10", "no-such-thing>=3", 'x; extra == "more"', "numpy"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert requirement_faults(["ipn-odd", "not-installed", "ipn-odd"]) == [
        {
            "plugin": "ipn-odd 1.2",
            "reason": "it needs torch>=2.10, and version 2.4.0 is installed. Run: pip install "
            "'torch>=2.10'",
        },
        {
            "plugin": "ipn-odd 1.2",
            "reason": "it needs no-such-thing>=3, and it is not installed. Run: pip install "
            "'no-such-thing>=3'",
        },
    ]


def test_nothing_is_wrong_with_what_is_installed_here() -> None:
    pytest.importorskip("torch")  # where it was left out, that is wrong
    assert requirement_faults(["ipn-core", "ipn-rvii", "ipn-starter"]) == []


def test_a_cache_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = f"'{tmp_path / 'file'}' is a file, no folder. "
    said += "Set IPN_CACHE to a folder that can be written."
    assert cache(tmp_path / "file")[1] == cache(tmp_path / "file" / "below")[1] == [said]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no folder that nobody can write")
def test_a_cache_that_cannot_be_written_is_told_and_nothing_is_made() -> None:
    (said,) = cache(Path("/proc/nothing"))[1]
    assert said.startswith("'/proc/nothing' cannot be written: ")
    assert said.endswith("Set IPN_CACHE to a folder that can be written.")


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 2 * 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    found, (said,) = cache(tmp_path / "new")
    assert found["free_bytes"] == 2 * 10**8
    assert said.startswith(f"0.20 GB are free for '{tmp_path / 'new'}': the starter alone takes")
    assert not (tmp_path / "new").exists()


def test_a_cache_that_works_has_no_fault(tmp_path: Path) -> None:
    (tmp_path / "some").write_text("12345")
    found, said = cache(tmp_path)
    assert (found["used_bytes"], said) == (5, [])


def test_components_that_fail_alike_are_one_line() -> None:
    def fault(name: str, why: str) -> str:
        return f"task '{name}' of ipn-x 1.0 cannot be imported from 'x:{name}': {why}"

    reasons = [fault(name, "ImportError: no y") for name in "abcde"]
    assert merged([*reasons, fault("f", "OSError: no z"), "it has no hook"]) == [
        "task 'a', task 'b', task 'c' and 2 more cannot be imported: ImportError: no y",
        "task 'f' cannot be imported: OSError: no z",
        "it has no hook",
    ]
    assert merged(reasons, known="no y") == []
    assert torch_fault(OSError("no y")).startswith("import failed: OSError: no y. ")


def test_settings_are_shown_and_a_key_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPN_API_KEY", "secret")
    monkeypatch.setenv("IPN_CACHE_SIZE", "5GB")
    assert settings()["IPN_API_KEY"] == "(set)"
    assert settings()["IPN_CACHE_SIZE"] == "5GB"


@pytest.mark.parametrize("mine", [None, "rvii"])
def test_only_what_the_user_has_set_is_a_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mine: str | None
) -> None:
    pytest.importorskip("torch")
    from ipn_core import attention
    from ipn_core.cli import main, probe

    for name in [name for name in os.environ if name.startswith("IPN_")]:
        monkeypatch.delenv(name)
    if mine is not None:
        monkeypatch.setenv("IPN_PLUGINS", mine)
    found = [probe.Probe(n, f"ipn-{n}", "1", answered=n != "ends") for n in ("zoom", "ends", "a")]
    monkeypatch.setattr(probe, "probe_plugins", lambda deep: found)
    loaded = []

    def reasons(*words: object) -> dict[str, list[str]]:
        loaded.append(os.environ["IPN_PLUGINS"])
        return {"eager": []}

    monkeypatch.setattr(attention, "backend_reasons", reasons)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert ("\nsettings\n" in said) == (mine is not None)
    assert ("    IPN_PLUGINS         rvii\n" in said) == (mine is not None)
    assert os.environ.get("IPN_PLUGINS") == mine
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == (
        {} if mine is None else {"IPN_PLUGINS": mine}
    )
    assert loaded == ["a,zoom"] * 2


@pytest.mark.slow
def test_a_size_that_is_none_is_told() -> None:
    env = {**os.environ, "IPN_PLUGINS": "", "IPN_CACHE_SIZE": "lots"}
    run = shell("doctor", env=env)
    assert run.code == 0
    assert "\n    cache: IPN_CACHE_SIZE is 'lots': give a number of bytes" in run.out
