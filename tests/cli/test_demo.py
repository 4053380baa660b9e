"""`ipn demo`: what it refuses, and that it starts and ends in order."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused, shell

from ipn_core.testing.browser import served_demo


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = shell("demo", "--port", port, "--model", "nowhere")
    assert_refused(run, f"cannot listen at 127.0.0.1, port {port}", "Choose another with --host")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--model", "startr"), ("startr", "did you mean 'starter'?")),
        (("--examples", "emoji-scene"), ("unknown task 'emoji-scene'", "'emoji-scenes'?")),
        (("--interact", "rvi"), ("no trained weights for interaction 'rvi'", "'rvii'?")),
        (("--max-upload", "0"), ("--max-upload",)),
        (("--share",), ("--share",)),
    ],
)
def test_wrong_words_are_refused(
    words: tuple[str, ...], parts: tuple[str, ...], ipn: Callable[..., Run]
) -> None:
    assert_refused(ipn("demo", "--port", "0", *words), *parts)


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_refused(
        ipn("demo", "--port", "0"), "ipn demo needs a package", "pip install 'ipn-core[demo]'"
    )


@pytest.mark.slow
@pytest.mark.weights
def test_the_page_is_served_at_this_machine_alone(tmp_path: Path) -> None:
    with served_demo() as address:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as response:
            assert b"Ask a picture" in response.read()
