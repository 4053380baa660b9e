"""Rendering chat templates, which may come from anybody's checkpoint, in bounded time and memory.

A template runs in the sandbox that transformers renders it in, which bounds what it reaches. A
plain one, as most are, cannot write more than its length times the number of turns: it joins texts,
branches and goes through the turns, and neither assigns, calls, filters nor multiplies. It is
rendered here. Any other is rendered in a process of its own that the system bounds; it is started
once, when it is first needed, and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ipn_core.errors import PromptError

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

__all__ = ["answer_templates", "is_plain", "render"]

LIMIT_S = 5.0
"""Seconds of CPU time that the process may take for one text."""
LIMIT_BYTES = 1 << 30
"""Its address space; importing what it needs takes a fifth of it."""
LIMIT_TEXT = 1_000_000
"""Characters that it may write."""
LIMIT_PLAIN = 20_000
"""Characters of a template that is rendered here; published ones have hundreds or thousands."""

PLAIN = {
    *("Template", "Output", "TemplateData", "Const", "Name", "For", "If", "CondExpr"),
    *("Compare", "Operand", "Getattr", "Getitem", "Add", "And", "Or", "Not"),
}
"""What Jinja calls the parts of which a plain template is made."""


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
        Exception: whatever the template raises, if it is plain.
    """
    if is_plain(template):
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=continues,
            )
        )
    question = {
        **tokenizer.special_tokens_map,
        "conversations": [[dict(message) for message in messages]],
        "chat_template": template,
        "add_generation_prompt": continues,
    }
    return _PROCESS.ask(json.dumps(question, default=str))


@lru_cache(maxsize=64)
def is_plain(template: str) -> bool:
    """Whether nothing in a template can grow beyond its own length times the number of turns."""
    from jinja2 import Environment, TemplateSyntaxError

    if len(template) > LIMIT_PLAIN:
        return False
    try:
        return _plain(Environment().parse(template), looping=False)
    except (TemplateSyntaxError, RecursionError):
        return False  # also what only transformers' own environment can read


def _plain(node: nodes.Node, looping: bool) -> bool:
    from jinja2.nodes import For, Name

    if type(node).__name__ not in PLAIN:
        return False
    if isinstance(node, For):
        turns = isinstance(node.iter, Name) and node.iter.name == "messages"
        if looping or node.recursive or not turns:
            return False
        looping = True
    return all(_plain(child, looping) for child in node.iter_child_nodes())


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
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(question + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:
                self.end()  # the next one would read the answer to this one
                raise
            if not answer:
                raise PromptError(_ended(child.wait()))
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
            self._child = subprocess.Popen(
                # -P: modules in the folder that the user happens to stand in are not imported.
                [sys.executable, "-P", "-c", code, str(LIMIT_S), str(LIMIT_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Threads that it does not need would take address space.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                encoding="utf-8",
                # Ctrl-C is for this process, which then ends that one.
                start_new_session=os.name == "posix",
            )
        return self._child

    def _forget(self) -> None:
        self._child, self._lock = None, threading.Lock()


_PROCESS = _Process()


def _ended(code: int) -> str:
    import signal

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
    from transformers.utils.chat_template_utils import render_jinja_template

    _bound(size)
    timer = getattr(signal, "setitimer", None)
    for line in sys.stdin:
        question = json.loads(line)
        if timer:
            timer(signal.ITIMER_PROF, seconds)
        answer = _rendered(render_jinja_template, question)
        if timer:
            timer(signal.ITIMER_PROF, 0)
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
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))


def _rendered(rendering: Any, question: dict[str, Any]) -> dict[str, str]:
    """Return the text, or why there is none."""
    try:
        (text,), _ = rendering(**question)
    except MemoryError:
        return {"refused": "rendering takes more memory than a template may have"}
    except Exception as error:  # a template may raise whatever its sandbox lets it
        return {"refused": str(error) or type(error).__name__}
    if len(text) > LIMIT_TEXT:
        return {"refused": f"it writes {len(text):,} characters; {LIMIT_TEXT:,} are allowed"}
    return {"text": text}
