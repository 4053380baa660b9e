"""Completion: a shell is offered commands, options and installed names, and nothing is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, shell

from ipn_core.cli.completing import installed, kinds
from ipn_core.plugins import discover
from ipn_core.scaffold import KINDS

BIN = Path(sys.executable).parent


def offered(words: str, env: dict[str, str] | None = None) -> list[str]:
    """What bash is offered for the last word of a line; "ipn " has an empty last one."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    run = shell(env={**(env or os.environ), **asked, "_IPN_COMPLETE": "complete_bash"})
    assert (run.code, run.err) == (0, "")
    return run.out.split()


def test_commands_are_offered() -> None:
    assert offered("ipn e") == ["eval"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("ipn ask a.png why --model ", "weights"),
        ("ipn ask a.png why --interact ", "strategy"),
        ("ipn eval ", "task"),
        ("ipn models pull ", "weights"),
        ("ipn demo --examples ", "task"),
    ],
)
def test_installed_names_are_offered(words: str, kind: str) -> None:
    # A registry of its own: other tests put components into the one of this process.
    assert offered(words) == sorted(discover().entries(kind))


def test_only_names_that_begin_so_are_offered() -> None:
    assert installed("strategy")("rv") == ["rvii"]
    assert installed("task")("no-such") == []
    assert kinds("in") == ["injector", "interaction"]
    assert kinds("") == sorted(KINDS)


def test_a_plugin_of_ones_own_is_offered_whatever_it_prints_and_others_do(
    fake_plugin: Callable[[str, str], dict[str, str]],
) -> None:
    code = (
        "print('noise')\nfrom ipn_core import hookimpl\n@hookimpl\ndef register(registry):\n"
        "    registry.task('own-task', 'nowhere:Task')\n"
    )
    env = fake_plugin("own", code)
    assert offered("ipn eval own", env) == ["own-task"]
    assert offered("ipn eval own", {**env, "IPN_PLUGINS": "no-such"}) == []


def test_nothing_heavy_is_imported_for_it() -> None:
    code = (
        "from ipn_core.cli.completing import installed, kinds; import sys\n"
        "assert installed('task')('') and installed('strategy')('') and kinds('')\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_with_what_is_shown() -> None:
    code = (
        'eval "$(ipn --show-completion bash)"; COMP_WORDS=(ipn mod); COMP_CWORD=1; '
        '_ipn_completion ipn; echo "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # a shell by name, not the parent
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert (done.stdout, done.stderr) == ("models\n", "")


def test_it_is_installed_into_the_users_own_folder(tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    run = shell("--install-completion", "bash", env=env)
    assert run.code == 0
    assert str(tmp_path) in run.out
    (script,) = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".bashrc"]
    assert "_IPN_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


def test_help_tells_of_it(ipn: Callable[..., Run]) -> None:
    assert "--install-completion" in ipn("--help").out
