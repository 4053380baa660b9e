"""`ipn serve` as a process: it starts, answers, and ends in order."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
from command_line import assert_refused, shell

from ipn_core.cli.demo import demo
from ipn_core.cli.serve import serve

ROOT = Path(__file__).parents[2]
CODE = "import sys; from ipn_core.cli import main; sys.exit(main())"


@pytest.mark.weights
def test_the_starter_is_served_until_it_is_told_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CODE, "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(m[1] for line in lines if (m := re.search(r"(http://\S+)/v1", line)))
        text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        assert "http://127.0.0.1:8000" in code
        monkeypatch.chdir(ROOT)
        exec(compile(code.replace("http://127.0.0.1:8000", address), "serve.md", "exec"), {})
        assert capsys.readouterr().out == "yes\n"
        with urllib.request.urlopen(f"{address}/healthz") as response:
            assert json.loads(response.read())["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    finally:
        process.kill()
    rest = process.stderr.read()
    assert "Traceback" not in rest, rest


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(command: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = shell(command, "--port", port, "--model", "nowhere")
    assert_refused(run, f"cannot listen at 127.0.0.1, port {port}", "Choose another with --host")


def test_an_address_of_another_machine_is_refused() -> None:
    run = shell("serve", "--host", "192.0.2.1", "--port", "0")
    assert_refused(run, "cannot listen at 192.0.2.1", "--host and --port")


def test_an_unknown_model_is_refused() -> None:
    run = shell("serve", "--port", "0", "--model", "startr")
    assert_refused(run, "startr", "did you mean 'starter'?")


@pytest.mark.parametrize("command", [serve, demo])
def test_its_page_names_every_option(command: Callable[..., None]) -> None:
    page = (ROOT / "docs" / f"{command.__name__}.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(--[\w-]+)", page))
    names = get_type_hints(command).keys() - {"return", "debug"}
    options = {f"--{name.replace('_', '-')}" for name in names}
    assert len(options) > 7
    assert options <= told
