"""The command `ipn`: its subcommands, and how their failures become messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from ipn_core.cli import (
    ask,
    bench,
    chat,
    compare,
    demo,
    doctor,
    eval,
    models,
    new,
    plugins,
    push,
    serve,
    train,
)
from ipn_core.cli.options import DEBUGGING, Debug
from ipn_core.patience import Watched

__all__ = ["app", "main"]

INTERRUPTED = 130
"""What a shell expects of a program that Ctrl-C ended: 128 + SIGINT."""

app = typer.Typer(
    name="ipn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from ipn_core import __version__

        typer.echo(f"ipn-core {__version__}")
        raise typer.Exit


@app.callback()
def ipn(
    debug: Debug = False,
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Let a frozen language model ask a picture what a question needs."""


app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("eval")(eval.evaluate)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("push")(push.push)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("new")(new.new)
app.command("plugins")(plugins.plugins)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: its words without the program's name, by default those of this process.

    Returns:
        0 done, 2 the user's input is wrong, 130 interrupted, 1 anything else.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in (words[: words.index("--")] if "--" in words else words)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # An answer in a script that the terminal cannot show is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    token = DEBUGGING.set(debug)
    Watched.ends_process = True
    try:
        result = app(words, prog_name="ipn", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # Whoever read our output has had enough, as in `ipn plugins | head -1`; typer exits then.
        if not isinstance(error.__context__ or error, BrokenPipeError):
            raise
        _drop_output()
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        code, text = _explain(error)
        if debug:
            import traceback

            traceback.print_exc()
        print(f"ipn: {text}", file=sys.stderr)
        return code
    finally:
        Watched.ends_process = False
        DEBUGGING.reset(token)
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message for a failure."""
    from ipn_core.errors import IPNError, UnknownNameError

    if isinstance(error, UnknownNameError):
        return error.exit_code, str(error) + _not_loaded()
    if isinstance(error, IPNError):
        return error.exit_code, str(error)
    if hasattr(error, "format_message"):  # typer's own: words that are no command line of ours
        return 2, _usage(error)
    if isinstance(error, OSError) and error.strerror:
        where = f" '{error.filename}'" if error.filename else ""
        return 1, f"{error.strerror}{where}. Run it again with --debug for the details."
    said = " ".join(str(error).split())
    return 1, (
        f"internal error: {type(error).__name__}{': ' if said else ''}{said}. Run it again with "
        "--debug for the traceback."
    )


def _usage(error: Any) -> str:
    said = str(error.format_message()).strip()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ipn"
    if not said:  # typer has printed the help already
        such = ": name one, such as 'ipn ask IMAGE QUESTION'" if path == "ipn" else ""
        return f"no command given{such}. See '{path} --help'."
    return f"{said if said.endswith(('.', ')', '?')) else said + '.'} See '{path} --help'."


def _not_loaded() -> str:
    """Name the plugins that failed to load or were left out: one may bring the unknown name."""
    from ipn_core.errors import IPNError
    from ipn_core.plugins import get_registry

    try:
        registry = get_registry()
    except IPNError:  # which is what the user is told
        return ""
    said = ""
    faults = [f for f in registry.faults if not any(registry.of(f.plugin))]
    if faults:
        shown = (f"{f.plugin.label} ({' '.join(f.reason.split())})" for f in faults[:3])
        said += f" Not loaded: {'; '.join(shown)}."
    chosen = os.environ.get("IPN_PLUGINS")
    if chosen is not None:
        names = ", ".join(sorted(name.strip() for name in chosen.split(",") if name.strip()))
        said += f" IPN_PLUGINS leaves out all plugins{f' but {names}' if names else ''}."
    return said


def _drop_output() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
