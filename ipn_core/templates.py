"""Rendering chat templates, which may come from anybody's checkpoint, in bounded time and memory.

A template runs in the sandbox that transformers renders it in, which bounds what it reaches. A
plain one, as most are, cannot write more than its length times the number of turns: it joins texts,
branches and goes through the turns, and neither assigns, calls, filters nor multiplies. It is
rendered here. Any other is rendered in a process of its own that the system bounds; it is started
once, when it is first needed, and ends with this one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TextIO

from ipn_core.errors import IPNError, PromptError

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

__all__ = ["answer_templates", "is_plain", "render"]

LIMIT_S = 5.0
"""Seconds of CPU time that the process may take for one text."""
LIMIT_BYTES = 1 << 30
"""Its address space; importing what it needs takes a fifth of it."""
LIMIT_WAIT_S = 60.0
"""Seconds by the clock for one text, and for the start; Windows bounds no CPU time."""
LIMIT_TEXT = 1_000_000
"""Characters that a template may write for a dialogue, or `LIMIT_TURN` a turn if that is more."""
LIMIT_TURN = 1_000
LIMIT_REASON = 1_000
"""Characters of an error that a template may raise."""
LIMIT_PLAIN = 20_000
"""Characters of a template that is rendered here; published ones have hundreds or thousands."""
LIMIT_HERE = 5_000_000
"""Its length times the turns, for the same."""
LIMIT_TOKEN = 200
"""Characters of a special token, for the same: it comes from the checkpoint, as the template."""

PLAIN = {
    *("Template", "Output", "TemplateData", "Const", "Name", "For", "If", "CondExpr"),
    *("Compare", "Operand", "Getattr", "Getitem", "Add", "And", "Or", "Not"),
}
"""What Jinja calls the parts of which a plain template is made."""
COLLECTIONS = {"messages", "tools", "documents"}
"""Names of what may be long: a plain template takes single entries of it, or goes through turns."""

PASSED = {
    *("PATH", "HOME", "USERPROFILE", "HOMEDRIVE", "HOMEPATH", "APPDATA", "LOCALAPPDATA"),
    *("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "PATHEXT", "TMP", "TEMP", "TMPDIR"),
    *("LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HF_HOME", "XDG_CACHE_HOME"),
    *("LANG", "LANGUAGE", "TZ"),
}
"""Environment variables that the process is given; the rest, as tokens of services, is not its."""
PASSED_STARTS = ("PYTHON", "LC_", "DYLD_")


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    continues: bool,
) -> str:
    """Return the text of a dialogue.

    Args:
        tokenizer: its special tokens are known to the template by their names.
        template: in Jinja, as transformers takes it.
        messages: `role` and `content` of each turn, and what else the template reads.
        continues: whether the text ends where an answer begins.

    Raises:
        PromptError: it takes more time or memory than it may, or writes more.
        IPNError: the process that is to render it does not start.
        Exception: whatever the template raises, if it is plain.
    """
    if _is_small(tokenizer, template, messages):
        text = str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=continues,
            )
        )
        if refused := _too_long(text, len(messages)):
            raise PromptError(refused)
        return text
    question = {
        **tokenizer.special_tokens_map,
        "conversations": [[dict(message) for message in messages]],
        "chat_template": template,
        "add_generation_prompt": continues,
    }
    return _PROCESS.ask(json.dumps(question, default=str))


def _is_small(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether what the template writes is short enough for this process."""
    tokens = tokenizer.special_tokens_map.values()
    return (
        is_plain(template)
        and len(template) * len(messages) <= LIMIT_HERE
        and all(len(str(token)) <= LIMIT_TOKEN for token in tokens)
    )


def _too_long(text: str, turns: int) -> str:
    """Return why a text is refused, or nothing."""
    allowed = max(LIMIT_TEXT, LIMIT_TURN * turns)
    if len(text) <= allowed:
        return ""
    return f"it writes {len(text):,} characters; {allowed:,} are allowed"


@lru_cache(maxsize=64)
def is_plain(template: str) -> bool:
    """Whether nothing in a template can grow beyond its own length times the number of turns."""
    from jinja2 import Environment, TemplateSyntaxError

    if len(template) > LIMIT_PLAIN:
        return False
    try:
        return _plain(Environment().parse(template), looping=False)
    except (TemplateSyntaxError, RecursionError, ValueError):
        # Also what only transformers' own environment can read; Python refuses longest integers.
        return False


def _plain(node: nodes.Node, looping: bool) -> bool:
    from jinja2.nodes import For, Getattr, Getitem, Name

    if type(node).__name__ not in PLAIN or (isinstance(node, Name) and node.name in COLLECTIONS):
        return False
    inside = list(node.iter_child_nodes())
    if isinstance(node, For):
        turns = isinstance(node.iter, Name) and node.iter.name == "messages"
        if looping or node.recursive or not turns:
            return False
        inside.remove(node.iter)
        looping = True
    elif isinstance(node, (Getattr, Getitem)) and isinstance(node.node, Name):
        inside.remove(node.node)
    return all(_plain(child, looping) for child in inside)


class _Process:
    """The process that renders what is not plain, for one question at a time."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            # A fork would speak into the pipe of the one that it was forked from.
            os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.end)

    def ask(self, question: str) -> str:
        """Return the text that was rendered.

        Raises:
            PromptError: what the template raised, or which limit it met.
        """
        with self._lock:
            child = self._running()
            try:
                with _ending(child) as late:
                    answer = _said(child, question)
            except BaseException:
                self.end()  # the next one would read the answer to this one
                raise
            if late.is_set():
                self.end()
            if not answer:
                raise PromptError(_ended(child.wait(), late.is_set()))
        found: dict[str, str] = json.loads(answer)
        if "refused" in found:
            raise PromptError(found["refused"])
        return found["text"]

    def end(self) -> None:
        """End the process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self.end()
            code = "from ipn_core.templates import answer_templates; answer_templates()"
            try:
                self._child = subprocess.Popen(
                    # -P: modules in the folder that the user stands in are not imported.
                    [sys.executable, "-P", "-c", code, str(LIMIT_S), str(LIMIT_BYTES)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                    encoding="utf-8",
                    # Ctrl-C is for this process, which then ends that one.
                    start_new_session=os.name == "posix",
                )
            except OSError as error:
                raise _not_started(str(error)) from None
            try:
                self._wait_for(self._child)
            except BaseException:
                self.end()
                raise
        return self._child

    @staticmethod
    def _wait_for(child: subprocess.Popen[str]) -> None:
        """Return when it is ready for questions, or say why it is not."""
        with _ending(child) as late:
            first = _said(child)
        if late.is_set():
            raise _not_started(f"it takes longer than {LIMIT_WAIT_S:g} s")
        if not first:
            raise _not_started(f"it ended with exit code {child.wait()}")
        if refused := json.loads(first).get("refused"):
            raise _not_started(refused)

    def _forget(self) -> None:
        self._child, self._lock = None, threading.Lock()


_PROCESS = _Process()


@contextlib.contextmanager
def _ending(child: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """End a process that is not done by the clock, and set what is returned if so."""
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(LIMIT_WAIT_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()  # it may be about to end what has answered


def _said(child: subprocess.Popen[str], question: str = "") -> str:
    """Return the next line of a process, after a question if there is one; nothing if it ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        if question:
            child.stdin.write(question + "\n")
            child.stdin.flush()
        return child.stdout.readline()
    except OSError:  # a broken pipe, which Windows calls otherwise
        return ""


def _environment() -> dict[str, str]:
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in PASSED or name.upper().startswith(PASSED_STARTS)
    }
    # Threads that it does not need would take address space.
    return {**passed, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _not_started(reason: str) -> IPNError:
    return IPNError(
        f"the process that renders chat templates did not start: {reason.rstrip('.')}. "
        "See 'ipn doctor'."
    )


def _ended(code: int, late: bool) -> str:
    import signal

    if late:
        return f"rendering takes longer than {LIMIT_WAIT_S:g} s by the clock"
    if code == -getattr(signal, "SIGPROF", 0):
        return f"rendering takes longer than {LIMIT_S:g} s"
    return f"the process that rendered it ended with exit code {code}"


# -- in the process of its own ---------------------------------------------------------------------


def answer_templates() -> None:
    """Render what each line of the standard input asks for, until there is none."""
    import signal

    seconds, size = float(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing else may stand among the answers
    # Two thirds of the time of the imports, and none of it is needed.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception as error:  # an import may raise anything
        _tell(answers, {"refused": f"{type(error).__name__}: {error}"[:LIMIT_REASON]})
        return
    _bound(size)
    _tell(answers, {"text": "ready"})
    timer = getattr(signal, "setitimer", None)
    for line in sys.stdin:
        question = json.loads(line)
        if timer:
            timer(signal.ITIMER_PROF, seconds)
        answer = _rendered(render_jinja_template, question)
        if timer:
            timer(signal.ITIMER_PROF, 0)
        _tell(answers, answer)


def _tell(answers: TextIO, answer: dict[str, str]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _bound(size: int) -> None:
    """Let a timer end this process, and have it no more address space than `size`."""
    try:
        import resource
        import signal
    except ImportError:  # pragma: no cover
        return  # Windows has neither
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    least = size if hard == resource.RLIM_INFINITY else min(size, hard)
    # macOS often refuses it; a template is still bounded in time.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))


def _rendered(rendering: Any, question: dict[str, Any]) -> dict[str, str]:
    """Return the text, or why there is none."""
    try:
        (text,), _ = rendering(**question)
    except MemoryError:
        return {"refused": "rendering takes more memory than a template may have"}
    except Exception as error:  # a template may raise whatever its sandbox lets it
        return {"refused": _reason(error)}
    refused = _too_long(text, len(question["conversations"][0]))
    return {"refused": refused} if refused else {"text": text}


def _reason(error: Exception) -> str:
    """Return an error's text, the end left out if a template made it long."""
    try:
        said = str(error) or type(error).__name__
    except MemoryError:
        said = type(error).__name__
    return said if len(said) <= LIMIT_REASON else said[: LIMIT_REASON - 1] + "…"
