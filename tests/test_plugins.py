"""Discovery reports what is wrong with a plugin and goes on; stages are wrapped model by model."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import installed
from toys import picture, toy_model

from ipn_core import patience, plugins
from ipn_core.errors import PluginError, StageError, UnknownNameError, UserError
from ipn_core.hooks import hookimpl
from ipn_core.plugins import KINDS, Registry, add_plugin, discover, get_registry
from ipn_core.stages import Request
from ipn_core.testing.tiny import tiny_backbone

GOOD = """
from ipn_core.hooks import hookimpl
@hookimpl
def register(registry):
    registry.task("{name}-task", "nowhere:Task")
"""
FAULTY = {
    "raises": ("1 / 0", "import failed: ZeroDivisionError: division by zero"),
    "misses": (
        "import not_there",
        "import failed: ModuleNotFoundError: No module named 'not_there'",
    ),
    "exits": ("raise SystemExit(3)", "import failed: SystemExit: 3"),
    "interrupts": ("raise KeyboardInterrupt", "import failed: KeyboardInterrupt: "),
    "closes": ("raise GeneratorExit", "import failed: GeneratorExit: "),
    "bases": (GOOD + "    raise BaseException('of all')", "BaseException: of all"),
    "stops": (GOOD + "    raise KeyboardInterrupt", "KeyboardInterrupt: "),
    "misspells": (GOOD.replace("def register", "def registr"), "unknown hook 'registr'"),
    "forgets": (GOOD.replace("@hookimpl\n", ""), "it has no `@hookimpl def register(registry)`"),
    "argues": (GOOD.replace("(registry)", "(registry, more)"), "can not be found in the hookspec"),
    "half": (GOOD + "    raise ValueError('half-way')", "ValueError: half-way"),
    "invents": (GOOD.replace("registry.task", "registry.tusk"), "the registry has no kind 'tusk'"),
    "twice": (GOOD.replace("{name}-task", "a-task"), "task 'a-task' is already taken by ipn-a 1.2"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install plugins by name and source; returns their entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def install_all(sources: dict[str, str]) -> list[EntryPoint]:
        points = []
        for name, source in sources.items():
            module = f"toy_plugin_{name}"
            (tmp_path / f"{module}.py").write_text(source.replace("{name}", name))
            monkeypatch.delitem(sys.modules, module, raising=False)
            points.append(installed(name, module))
        monkeypatch.setattr(plugins, "entry_points", lambda group: points)
        return points

    return install_all


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_plugin_is_reported_and_takes_no_other_down(install: Any, fault: str) -> None:
    source, reason = FAULTY[fault]
    install({"a": GOOD, fault: source, "z": GOOD})
    registry = discover()
    (found,) = registry.faults
    assert (found.plugin.distribution, found.plugin.version) == (f"ipn-{fault}", "1.2")
    assert reason in found.reason
    assert list(registry.entries("task")) == ["a-task", "z-task"]


@pytest.mark.parametrize(
    "source", ["import time; time.sleep(600)", "while True: pass", GOOD + "    while True: pass"]
)
def test_a_plugin_that_hangs_is_told_of_and_given_up(
    install: Any, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "NOTE_S", 0.1)
    monkeypatch.setattr(patience, "LIMIT_S", 0.4)
    install({"a": GOOD, "hangs": source, "z": GOOD})
    heard = signal.getsignal(signal.SIGINT)
    registry = discover()
    assert signal.getsignal(signal.SIGINT) == heard
    (fault,) = registry.faults
    assert (fault.plugin.distribution, fault.reason) == (
        "ipn-hangs",
        "it took longer than 0.4 s to import",
    )
    assert list(registry.entries("task")) == ["a-task", "z-task"]
    assert capsys.readouterr().err == (
        "ipn: plugin ipn-hangs 1.2 has been importing for 0.1 s. It is given up after 0.4 s. To "
        "leave it out, set IPN_PLUGINS='a,z'.\n"
    )


SIGNALS = {"SIGINT": KeyboardInterrupt, "SIGTERM": SystemExit, "SIGALRM": TimeoutError}


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("name", SIGNALS)
def test_what_a_signal_raises_is_no_fault_of_the_plugin_that_it_comes_in(
    install: Any, name: str
) -> None:
    def end(*_: Any) -> None:
        raise SIGNALS[name]

    source = f"import os, signal; os.kill(os.getpid(), signal.{name})\nwhile True: pass"
    install({"a": GOOD, "slow": source})
    number = getattr(signal, name)
    before = signal.signal(number, end)
    try:
        with pytest.raises(SIGNALS[name]):
            discover()
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)


def test_where_it_cannot_be_interrupted_a_plugin_that_hangs_is_told_of(
    install: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "NOTE_S", 0.1)
    monkeypatch.setattr(patience, "LIMIT_S", 0.2)
    install(
        {"a": GOOD, "slow": "import time; time.sleep(0.6)\n" + GOOD, "stops": "raise SystemExit"}
    )
    with ThreadPoolExecutor(1) as other:
        registry = other.submit(discover).result()
    assert [fault.plugin.name for fault in registry.faults] == ["stops"]
    assert list(registry.entries("task")) == ["a-task", "slow-task"]
    assert capsys.readouterr().err == (
        "ipn: plugin ipn-slow 1.2 has been importing for 0.1 s. To leave it out, set "
        "IPN_PLUGINS='a,stops'.\n"
    )


def test_two_plugins_of_one_name_are_told_of_and_both_work(install: Any) -> None:
    first, second = install({"one": GOOD, "two": GOOD})
    same = EntryPoint("one", second.value, "ipn")
    vars(same)["dist"] = second.dist
    registry = discover(points=[same, first])
    (fault,) = registry.faults
    assert fault.plugin.label == "ipn-two 1.2"
    assert fault.reason == (
        "its entry point has the name of that of ipn-one 1.2, 'one', and one must be renamed"
    )
    assert list(registry.entries("task")) == ["one-task", "two-task"]


def test_all_faults_together_are_each_reported_once(install: Any) -> None:
    install({"a": GOOD, **{name: source for name, (source, _) in FAULTY.items()}})
    registry = discover()
    assert sorted(f.plugin.name for f in registry.faults) == sorted(FAULTY)
    assert list(registry.entries("task")) == ["a-task"]


def test_a_plugin_that_registers_a_name_twice_itself_is_told_so(install: Any) -> None:
    line = '    registry.task("{name}-task", "nowhere:Task")\n'
    install({"b": GOOD + line})
    (fault,) = discover().faults
    assert fault.reason == "task 'b-task' is already taken by ipn-b 1.2"


def test_only_the_named_plugins_are_loaded(install: Any) -> None:
    install({"a": GOOD, "raises": "1 / 0", "z": GOOD})
    assert list(discover("a, z").entries("task")) == ["a-task", "z-task"]
    assert discover("a, z").faults == []
    assert discover("").entries("task") == {}


@pytest.mark.parametrize(
    ("value", "loaded"), [("a,z", ["a", "z"]), (" z ,", ["z"]), ("", []), (None, ["a", "m", "z"])]
)
def test_ipn_plugins_names_those_that_are_loaded(
    install: Any, monkeypatch: pytest.MonkeyPatch, value: str | None, loaded: list[str]
) -> None:
    install({"a": GOOD, "m": GOOD, "z": GOOD})
    if value is not None:
        monkeypatch.setenv("IPN_PLUGINS", value)
    registry = get_registry.__wrapped__()  # what this process has found already stays as it is
    assert [plugin.name for plugin in registry.plugins] == ["core", *loaded]
    assert list(registry.entries("task")) == [f"{name}-task" for name in loaded]
    imported = [name for name in ("a", "m", "z") if f"toy_plugin_{name}" in sys.modules]
    assert imported == loaded


def test_an_unknown_name_in_ipn_plugins_is_refused_with_the_near_one(install: Any) -> None:
    install({"alpha": GOOD})
    with pytest.raises(UnknownNameError) as caught:
        discover("alpa")
    assert str(caught.value) == (
        "unknown plugin in IPN_PLUGINS 'alpa': installed are alpha (did you mean 'alpha'?). Name "
        "installed ones, or unset it to load all."
    )


def test_the_cores_own_components_are_there_whatever_is_installed(install: Any) -> None:
    install({})
    registry = discover("")
    assert {"hidden-state", "constant", "shuffled"} <= set(registry.entries("requester"))
    assert registry.get("injector", "tokens").plugin.distribution == "ipn-core"


def test_everything_installed_here_loads_without_fault() -> None:
    registry = discover()
    assert registry.faults == []
    assert {"llama", "vicuna", "opt"} <= set(registry.entries("backbone"))
    named = {c.name for plugin in registry.plugins for c in registry.of(plugin)}
    assert named == {name for kind in KINDS for name in registry.entries(kind)}


def test_a_component_that_cannot_be_imported_names_its_plugin(install: Any) -> None:
    install({"a": GOOD})
    with pytest.raises(
        PluginError, match=r"task 'a-task' of ipn-a 1.2 cannot be imported .*nowhere"
    ):
        discover().get("task", "a-task").load()


def test_an_unknown_component_lists_what_there_is() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown backbone 'lama'.*mean 'llama'.*ipn plugins"
    ):
        discover().get("backbone", "lama")


def test_a_name_of_another_kind_is_told_so() -> None:
    with pytest.raises(UnknownNameError) as caught:
        discover().get("interaction", "qformer")
    said = "See 'ipn plugins'. 'qformer' is the name of a perceiver and of a strategy."
    assert str(caught.value).endswith(said)


def test_add_plugin_raises_what_discovery_would_report() -> None:
    class Wrong:
        @hookimpl
        def registre(self, registry: Any) -> None: ...

    with pytest.raises(UserError, match=r"plugin 'wrong': .*registre"):
        add_plugin(Registry(), "wrong", Wrong())


class Recorder:
    def __init__(self) -> None:
        self.maps: list[Any] = []

    @hookimpl(wrapper=True)
    def interact(self, request: Any) -> Any:
        message = yield
        self.maps.append(message.attention)
        return message


class Replacer:
    """Another request than the one that was asked."""

    @hookimpl(wrapper=True)
    def request(self, context: Any) -> Any:
        request = yield
        return Request(torch.ones_like(request.values), request.round, request.layer)


def test_a_wrapper_on_one_model_does_not_touch_another(registry: Any) -> None:
    backbone = tiny_backbone()
    mine, other = (toy_model(registry, backbone=backbone) for _ in range(2))
    plain = other.ask(picture(), "What?", max_new_tokens=3)
    recorder = Recorder()
    with mine.observing(recorder), mine.observing(Replacer()):
        replaced = mine.ask(picture(), "What?", max_new_tokens=3)
        untouched = other.ask(picture(), "What?", max_new_tokens=3)
    assert len(recorder.maps) == 1
    torch.testing.assert_close(recorder.maps[0][0], replaced.attention)
    assert not torch.allclose(replaced.attention, plain.attention)
    assert torch.equal(untouched.attention, plain.attention)
    after = mine.ask(picture(), "What?", max_new_tokens=3)
    assert torch.equal(after.attention, plain.attention)
    assert len(recorder.maps) == 1


def test_a_stage_stays_a_module_with_forward_hooks_and_a_plain_state_dict(registry: Any) -> None:
    model = toy_model(registry)
    seen: list[Any] = []
    model.interaction.register_forward_hook(lambda *_: seen.append(1))
    model.ask(picture(), "What?", max_new_tokens=1)
    assert seen == [1]
    assert model.pm.is_registered(model.interaction)
    assert not any("pm" in key for key in model.state_dict())


def test_an_error_inside_a_wrapper_is_a_plugin_error(registry: Any) -> None:
    class Broken:
        @hookimpl(wrapper=True)
        def inject(self) -> Any:
            yield
            raise RuntimeError("broken")

    model = toy_model(registry)
    with model.observing(Broken()), pytest.raises(StageError, match=r"inject .*broken"):
        model.ask(picture(), "What?")
    assert model.ask(picture(), "What?", max_new_tokens=1).ids


@pytest.mark.parametrize(("requester", "same"), [("constant", True), ("shuffled", False)])
def test_ablation_requesters_cannot_ask(registry: Any, requester: str, same: bool) -> None:
    from ipn_core.prompt import Prompt

    model = toy_model(registry, request=requester)
    prompts = [Prompt.user(picture(), text) for text in ("What?", "Where is the dog?")]
    maps = [a.attention for a in model.generate(prompts, max_new_tokens=1)]
    own = [a.attention for a in toy_model(registry).generate(prompts, max_new_tokens=1)]
    assert torch.allclose(maps[0], maps[1], atol=1e-6) is same
    if not same:
        torch.testing.assert_close(maps, own[::-1])
