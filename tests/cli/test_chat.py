from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import HEARS_CTRL_C, Run, assert_refused

from ipn_core import IPN


def test_chat_answers_line_by_line_as_a_dialogue(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    pictures = [home / "scene.png", home / "other.png"]
    dialogue = IPN.from_pretrained(home / "model").dialogue(pictures)
    expected = [dialogue.ask(q, max_new_tokens=64).text for q in ("a?", "b?")]
    monkeypatch.setattr("sys.stdin", io.StringIO("a?\n\n   \nb?"))
    run = ipn("chat", *pictures, "-m", home / "model")
    assert (run.code, run.err) == (0, "")
    assert run.out == "".join(f"{text}\n" for text in expected)


def test_a_question_that_does_not_fit_leaves_the_chat_as_it_was(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("why " * 300 + "\na?\n"))
    run = ipn("chat", home / "scene.png", "-m", home / "model")
    expected = IPN.from_pretrained(home / "model").ask(home / "scene.png", "a?").text
    assert run.code == 2
    assert run.out == expected + "\n"
    assert "fit into the context" in run.err
    assert run.err.count("\n") == 1


def test_chat_refuses_a_wrong_picture_before_it_starts(home: Path, ipn: Callable[..., Run]) -> None:
    assert_refused(ipn("chat", home / "scene.png", home / "none.png"), "no such file", "none.png")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.slow
def test_ctrl_c_ends_a_chat_quietly(
    home: Path, fake_plugin: Callable[[str, str], dict[str, str]]
) -> None:
    env = fake_plugin("tinyplugin", "from ipn_core.testing.plugin import register")
    code = HEARS_CTRL_C + "import sys; from ipn_core.cli import main; sys.exit(main())"
    words = ["chat", str(home / "scene.png"), "-m", str(home / "model")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
