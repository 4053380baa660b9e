"""Any chat template is rendered in bounded time and memory, as transformers renders it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest

from ipn_core import templates
from ipn_core.config import Layout, PromptConfig
from ipn_core.errors import IPNError, PromptError
from ipn_core.plan import Planner
from ipn_core.prompt import Prompt
from ipn_core.templates import is_plain, render
from ipn_core.testing.tiny import CHATML, tiny_backbone

TURNS = [
    {"role": "user", "content": "one", "image_first": True},
    {"role": "assistant", "content": "two", "image_first": False},
    {"role": "user", "content": "three", "image_first": False},
]
TYPICAL = (
    "{%- set ns = namespace(n=0) -%}{%- macro say(text) -%}<{{ text | trim }}>{%- endmacro -%}"
    "{{ bos_token }}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% generation %}{{ m.role | upper }} {{ say(m.content) }}{% endgeneration %}"
    "{% for i in range(2) %}{% if i == 1 %}{% break %}{% endif %}-{% endfor %}"
    "{% endfor %}{{ ns.n }}{{ messages | length | tojson }}{{ 'x' * 3 }}"
)
"""As those of published models: none of them is plain, all of them work."""


@pytest.fixture(scope="module", autouse=True)
def limited() -> Iterator[None]:
    """A process that may take half a second and 400 MiB."""
    with pytest.MonkeyPatch.context() as patch:
        templates._PROCESS.end()
        patch.setattr(templates, "LIMIT_S", 0.5)
        patch.setattr(templates, "LIMIT_BYTES", 400 << 20)
        yield
        templates._PROCESS.end()


@pytest.fixture
def tokenizer() -> Any:
    return tiny_backbone().tokenizer


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("template", [TYPICAL, CHATML])
def test_a_text_is_what_transformers_gives(tokenizer: Any, template: str, continues: bool) -> None:
    assert is_plain(template) == (template == CHATML)
    expected = tokenizer.apply_chat_template(
        TURNS, chat_template=template, tokenize=False, add_generation_prompt=continues
    )
    assert render(tokenizer, template, TURNS, continues) == expected


def started(tokenizer: Any) -> tuple[subprocess.Popen[str], IO[str]]:
    """Have the process render a text; returns it, and what it writes its answers to."""
    assert render(tokenizer, "{{ 'a' | upper }}", TURNS, False) == "A"
    child = templates._PROCESS._child
    assert child is not None
    assert child.stdout is not None
    return child, child.stdout


MEMORY = "rendering takes more memory than a template may have"
TOO_MUCH = {
    "{{ 'x' * 3000000000 }}": MEMORY,
    "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}": MEMORY,
    "{{ 'x'.center(2000000) }}": "it writes 2,000,003 characters; 1,000,000 are allowed",
    "{{ raise_exception('x' * 10000000) }}": "x" * 999 + "…",
    "{{ 10 ** (10 ** 9) }}": "rendering takes longer than 0.5 s",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": (
        "rendering takes longer than 0.5 s"
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the system's bounds are those of Linux")
@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_template_that_takes_too_much_is_refused_with_the_reason(
    tokenizer: Any, template: str
) -> None:
    assert not is_plain(template)
    with pytest.raises(PromptError) as caught:
        Planner(tokenizer, template + "{{ messages[0]['content'] }}", Layout(), PromptConfig())
    assert str(caught.value) == (
        f"the chat template refuses these turns: {TOO_MUCH[template]}. Set 'prompt.template' to "
        "one that takes them."
    )


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_process_that_is_ended_is_told_and_replaced(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, said = started(tokenizer)
    monkeypatch.setattr(said, "readline", lambda: [child.kill(), ""][1], raising=False)
    with pytest.raises(PromptError, match="process that rendered it ended with exit code -9"):
        render(tokenizer, "{{ 'b' | upper }}", TURNS, False)
    assert render(tokenizer, "{{ 'c' | upper }}", TURNS, False) == "C"


def test_an_error_without_a_text_has_a_reason(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: Any) -> str:
        raise MemoryError

    from ipn_core import plan

    planner = Planner(tokenizer, CHATML, Layout(), PromptConfig())
    monkeypatch.setattr(plan, "render", fail)
    with pytest.raises(PromptError, match=r"refuses these turns: MemoryError. Set 'prompt.templ"):
        planner.plan(Prompt.user("a"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for n in messages %}x{% endfor %}{% endfor %}",
        "{% for c in 'a long text' %}a long text{% endfor %}",
        "{% for m in messages recursive %}x{% endfor %}",
        "{% for m in messages + messages %}x{% endfor %}",
        "{% set a = 'a' %}",
        "{% set a %}a{% endset %}",
        "{{ 'a' ~ 'a' }}",
        "{{ 2 * 2 }}",
        "{{ '%9d' % 2 }}",
        "{{ 'a' | trim }}",
        "{{ lipsum() }}",
        "{{ [1, 2] }}",
        "{% macro f() %}{% endmacro %}",
        "{% generation %}{% endgeneration %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * 20_001,
        "{{",
        "{% for m in messages %}" + "{{messages}}" * 1500 + "{% endfor %}",
        "{% for m in messages %}{% if messages == messages %}{% endif %}{% endfor %}",
        "{{ (messages or 1)[0] }}",
        "{% for messages in messages %}{% endfor %}",
        "{{ tools }}",
        "{{ '' + documents }}",
        "{{ 1" + "0" * 5000 + " }}",
    ],
)
def test_what_may_grow_is_not_plain(template: str) -> None:
    assert not is_plain(template)


def test_single_entries_of_what_may_be_long_are_plain() -> None:
    assert is_plain("{{ messages[0]['role'] + messages[0].content }}{{ tools[0] }}")
    assert is_plain("{% for m in messages %}{{ messages[loop.index0].role }}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "limits"),
    [
        ("{{ bos_token }}", {"LIMIT_TOKEN": 5}),
        (CHATML, {"LIMIT_HERE": 3 * len(CHATML) - 1}),
    ],
)
def test_what_is_long_for_another_reason_is_not_rendered_here(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, limits: dict[str, int]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(templates._PROCESS, "ask", lambda text: [asked.append(text), "there"][1])
    tokenizer.bos_token = "<long>"
    assert render(tokenizer, template, TURNS, False) != "there"
    assert not asked
    for name, value in limits.items():
        monkeypatch.setattr(templates, name, value)
    assert render(tokenizer, template, TURNS, False) == "there"
    assert len(asked) == 1


def test_a_plain_template_may_write_no_more_either(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "LIMIT_TEXT", 25)
    template = "{% for m in messages %}0123456789{% endfor %}"
    assert len(render(tokenizer, template, TURNS, False)) == 30  # 1,000 a turn
    monkeypatch.setattr(templates, "LIMIT_TURN", 9)
    with pytest.raises(PromptError, match=r"^it writes 30 characters; 27 are allowed$"):
        render(tokenizer, template, TURNS, False)


@pytest.mark.skipif(os.name != "posix", reason="there is no such limit")
@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_system_that_bounds_no_memory_still_renders(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    import resource

    asked: list[Any] = []

    def refuse(*words: Any) -> None:
        asked.append(words)
        raise error("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    templates._bound(1 << 30)
    assert [words[0] for words in asked] == [resource.RLIMIT_AS]


def test_who_takes_too_long_by_the_clock_is_ended(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(tokenizer, "{{ 'a' | upper }}", TURNS, False) == "A"
    child = templates._PROCESS._child
    assert child is not None
    monkeypatch.setattr(templates, "LIMIT_WAIT_S", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(PromptError, match=r"^rendering takes longer than 0.2 s by the clock$"):
        render(tokenizer, loop, TURNS, False)
    if os.name == "posix":
        assert child.returncode == -signal.SIGKILL  # and not by the bound of CPU time
    else:
        assert child.returncode is not None
    monkeypatch.setattr(templates, "LIMIT_WAIT_S", 60.0)
    assert render(tokenizer, "{{ 'c' | upper }}", TURNS, False) == "C"


@pytest.fixture
def unstarted() -> Iterator[None]:
    templates._PROCESS.end()
    yield
    templates._PROCESS.end()


FAKES = {
    "raise ImportError('no such library.')": "ImportError: no such library",
    "import os; os._exit(7)": "it ended with exit code 7",
    "import time; time.sleep(99)": "it takes longer than 0.9 s",
}


@pytest.mark.usefixtures("unstarted")
@pytest.mark.parametrize("fake", FAKES)
def test_a_process_that_does_not_start_is_not_the_templates_fault(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: str
) -> None:
    planner = Planner(tokenizer, CHATML, Layout(), PromptConfig())
    planner.template = "{{ messages[0].content | trim }}"
    (tmp_path / "transformers.py").write_text(fake)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(templates, "LIMIT_WAIT_S", 0.9 if "sleep" in fake else 60.0)
    with pytest.raises(IPNError) as caught:
        planner.plan(Prompt.user("a"))
    assert type(caught.value) is IPNError
    assert str(caught.value) == (
        f"the process that renders chat templates did not start: {FAKES[fake]}. See 'ipn doctor'."
    )
    assert templates._PROCESS._child is None


@pytest.mark.usefixtures("unstarted")
def test_a_python_that_is_not_there_is_said(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(IPNError, match=r"templates did not start: .*python'. See 'ipn doctor'."):
        render(tokenizer, "{{ 'a' | upper }}", TURNS, False)


@pytest.mark.usefixtures("unstarted")
def test_the_process_is_given_no_secrets(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("IPN_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    told = tmp_path / "told.json"
    (tmp_path / "transformers.py").write_text(
        "import json, os, pathlib\n"
        f"pathlib.Path({str(told)!r}).write_text(json.dumps(dict(os.environ)))\n"
        "raise ImportError('told')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(IPNError, match="did not start: ImportError: told"):
        render(tokenizer, "{{ 'a' | upper }}", TURNS, False)
    found = json.loads(told.read_text())
    assert "secret" not in found.values()
    assert (found["PATH"], found["PYTHONPATH"]) == (os.environ["PATH"], path)
    assert found["OMP_NUM_THREADS"] == "1"


def test_the_templates_of_what_we_ship_are_plain() -> None:
    from ipn_core.plugins import get_registry

    registry = get_registry()
    found = [one.load().TEMPLATE for one in registry.entries("backbone").values()]
    for package in ("ipn_starter", "ipn_names"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.glob("checkpoints/*/config.json")):
            found.append(json.loads(path.read_text()).get("prompt", {}).get("template"))
    found = [template for template in found if template]
    assert len(found) >= 4
    assert all(map(is_plain, found))


def test_dialogues_of_one_shape_are_rendered_once(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipn_core import plan

    asked: list[Any] = []

    def counted(*words: Any) -> str:
        asked.append(words)
        return render(*words)

    monkeypatch.setattr(plan, "render", counted)
    monkeypatch.setattr(plan, "_KEPT", 4)
    planner = Planner(tokenizer, CHATML, Layout(), PromptConfig())
    begun = len(asked)
    first, second = (planner.plan(Prompt.user(text)) for text in ("one", "two"))
    assert first.text_ids != second.text_ids
    assert len(asked) == begun + 1
    for count in range(1, 6):
        planner.plan(Prompt((*Prompt.user("a").turns * count,)))
    assert len(planner._kept) == 4
    # What says the date is not kept.
    dated = Planner(tokenizer, CHATML + "{{ strftime_now('') }}", Layout(), PromptConfig())
    begun = len(asked)
    for _ in range(2):
        dated.plan(Prompt.user("one"))
    assert len(asked) == begun + 2


def test_a_long_text_is_not_kept(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipn_core import plan

    planner = Planner(tokenizer, CHATML, Layout(), PromptConfig())
    before = list(planner._kept)
    monkeypatch.setattr(plan, "_KEPT_TEXT", 100)
    turns = (*Prompt.user("a").turns * 3,)
    long = planner.plan(Prompt(turns))
    assert list(planner._kept) == before
    monkeypatch.setattr(plan, "_KEPT_TEXT", 1000)
    assert planner.plan(Prompt(turns)).text_ids == long.text_ids
    assert len(planner._kept) == len(before) + 1


def test_planning_takes_time_in_proportion_to_the_turns(tokenizer: Any) -> None:
    planner = Planner(tokenizer, CHATML, Layout(), PromptConfig())

    def taken(count: int) -> float:
        prompt = Prompt((*Prompt.user("a").turns * count,))
        begun = time.process_time()
        planner.plan(prompt)
        return time.process_time() - begun

    short = min(taken(2_000) for _ in range(3))
    assert taken(20_000) < 40 * short  # not a hundred times


def test_a_template_that_shows_a_turn_twice_or_not_is_refused(tokenizer: Any) -> None:
    planner = Planner(tokenizer, CHATML, Layout(), PromptConfig())
    for template, times in (("{{ messages[1].content }}", 0), ("{{ messages[0].content }}" * 2, 2)):
        planner.template = template
        planner._kept.clear()
        said = f"shows a user's turn {times} times; it must show each once"
        with pytest.raises(PromptError, match=said):
            planner.plan(Prompt((*Prompt.user("a").turns * 2,)))


def test_an_interrupted_question_leaves_no_answer_for_the_next(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, said = started(tokenizer)

    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(said, "readline", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        render(tokenizer, "{{ 'b' | upper }}", TURNS, False)
    assert child.poll() is not None
    assert render(tokenizer, "{{ 'c' | upper }}", TURNS, False) == "C"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is forked here")
def test_the_process_ends_with_its_own_and_a_fork_has_one_of_its_own() -> None:
    code = """
import os
from types import SimpleNamespace
from ipn_core import templates
tokenizer = SimpleNamespace(special_tokens_map={})
def say(text):
    turns = [{"content": text}]
    said = templates.render(tokenizer, "{{ messages[0].content | upper }}", turns, False)
    print(said, templates._PROCESS._child.pid, flush=True)
say("a")
if not os.fork():
    say("b")
    templates._PROCESS.end()
    os._exit(0)
os.wait()
say("c")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    (a, first), (b, forked), (c, again) = (line.split() for line in done.stdout.splitlines())
    assert (a, b, c) == ("A", "B", "C")
    assert first == again != forked
    for pid in map(int, (first, forked)):
        until = time.monotonic() + 10
        while _runs(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
