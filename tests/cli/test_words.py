from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from command_line import Run, assert_refused

COMMANDS = ("ask", "chat", "eval", "train", "push", "new", "plugins", "models", "doctor", "demo")


@pytest.mark.parametrize("words", [(), *((c,) for c in COMMANDS), ("models", "pull")])
def test_help_is_there_and_names_the_debug_option(
    words: tuple[str, ...], ipn: Callable[..., Run]
) -> None:
    run = ipn(*words, "--help")
    assert run.code == 0
    assert "--debug" in run.out
    assert not run.err
    if not words:
        assert all(command in run.out for command in COMMANDS)


def test_no_words_show_the_help_and_are_no_success(ipn: Callable[..., Run]) -> None:
    run = ipn()
    assert run.code == 2
    assert "Usage: ipn" in run.out
    assert run.err.startswith("ipn: no command given: name one, such as 'ipn ask IMAGE QUESTION'.")
    assert run.err.count("\n") == 1


def test_a_group_without_a_command_names_itself(ipn: Callable[..., Run]) -> None:
    run = ipn("bench")
    assert (run.code, run.err) == (2, "ipn: no command given. See 'ipn bench --help'.\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("asq",), ("No such command 'asq'", "'ask'")),
        (("ask",), ("Missing argument", "IMAGE", "See 'ipn ask --help'")),
        (("ask", "a.png"), ("Missing argument", "QUESTION")),
        (("ask", "a.png", "b", "--heatmop", "x"), ("--heatmop", "--heatmap")),
        (("eval", "x", "--limit", "0"), ("--limit",)),
        (("eval", "x", "--limit", "two"), ("--limit", "integer")),
        (("models", "pull"), ("NAME",)),
        (("new",), ("KIND", "See 'ipn new --help'")),
        (("new", "interaction"), ("NAME", "See 'ipn new --help'")),
        (("models", "pul"), ("pul",)),
    ],
)
def test_words_that_are_no_command_line(
    words: tuple[str, ...], parts: tuple[str, ...], ipn: Callable[..., Run]
) -> None:
    assert_refused(ipn(*words), *parts)


def test_version_is_the_distributions(ipn: Callable[..., Run]) -> None:
    from importlib.metadata import version

    assert ipn("--version").out == f"ipn-core {version('ipn-core')}\n"


def test_help_imports_nothing_heavy_and_loads_no_plugin(
    fake_plugin: Callable[[str, str], dict[str, str]],
) -> None:
    env = fake_plugin("loud", "import sys; sys.stderr.write('loaded')")
    code = (
        "import sys\nfrom ipn_core.cli import main\ncode = main(['--help'])\n"
        "heavy = ['torch', 'transformers', 'xformers', 'pydantic', 'pluggy', 'numpy', 'PIL']\n"
        "print([m for m in heavy if m in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert done.stderr == "[] 0\n"
    assert "ask" in done.stdout


def test_help_is_as_quick_as_that_of_an_empty_app() -> None:
    empty = "import typer\napp = typer.Typer()\n" + "".join(
        f"@app.command('{c}')\ndef {c}(): 'Do it.'\n" for c in COMMANDS
    )
    ours = "import sys; from ipn_core.cli import main; sys.exit(main())"
    quickest = {empty: math.inf, ours: math.inf}
    # The quickest of each: tests beside this one can only make a call slower. They do so for
    # minutes at a time, so calls go on until both have had an undisturbed one, or until forty
    # of each say that there is none to be had.
    for calls in range(1, 41):
        for code in quickest:
            call = code + ("app()" if code is empty else "")
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", call, "--help"], check=True, stdout=subprocess.DEVNULL
            )
            quickest[code] = min(quickest[code], time.perf_counter() - start)
        ratio = quickest[ours] / quickest[empty]
        if calls >= 7 and ratio <= 1.5:
            break
    assert ratio <= 1.5, f"{ratio:.2f} times the help of an empty app"


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    code = "import sys; from ipn_core.cli import main; sys.exit(main(['--help']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
