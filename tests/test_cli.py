from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ipn_core import IPN, hookimpl
from ipn_core.cli import main
from ipn_core.plugins import add_plugin, get_registry
from ipn_core.testing.checkpoints import save_tiny_model
from PIL import Image

torch.set_num_threads(1)

COMMANDS = ("ask", "chat", "eval", "train", "plugins", "models", "doctor")
STAGES = ("perceive", "prefill", "request", "interact", "inject", "decode")
KINDS = ("text", "static", "request", "dynamic", "generated")


@dataclass
class Run:
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def ipn(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*words: object) -> Run:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a picture and a file of questions; tests only read it."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "scene.png")
    Image.fromarray(255 - pixels).save(folder / "other.png")
    rows = [
        {"image": image, "question": f"Is there {what}?", "answer": ["yes", "y"], "type": kind}
        for image in ("scene.png", "other.png")
        for what, kind in (("a dog", "exist"), ("a cat", "exist"), ("more", "other"))
    ]
    (folder / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def fake_plugin(tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """Install a plugin into a folder of its own; returns the environment in which it is there."""

    def install(name: str, code: str) -> dict[str, str]:
        site = tmp_path / "site"
        info = site / f"ipn_{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ipn-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[ipn]\n{name} = ipn_{name}_module\n")
        (site / f"ipn_{name}_module.py").write_text(code)
        return {**os.environ, "PYTHONPATH": str(site)}

    return install


def shell(
    *words: object, env: dict[str, str] | None = None, text: str = "", timeout: float = 120
) -> Run:
    """Run the command line in a process of its own."""
    code = "import sys; from ipn_core.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env={**(env or os.environ), "OMP_NUM_THREADS": "1"},
        input=text,
        timeout=timeout,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def assert_refused(run: Run, *parts: str) -> None:
    """One message that holds the parts, exit code 2, nothing else said."""
    assert run.code == 2, run
    assert run.out == ""
    assert "Traceback" not in run.err
    assert run.err.count("\n") == 1, run.err
    for part in parts:
        assert part in run.err, run.err


# -- help and words ----------------------------------------------------------------------------


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
    assert "Usage: ipn" in run.out + run.err


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
    times: dict[str, list[float]] = {empty: [], ours: []}
    for _ in range(7):
        for code, taken in times.items():
            call = code + ("app()" if code is empty else "")
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", call, "--help"], check=True, stdout=subprocess.DEVNULL
            )
            taken.append(time.perf_counter() - start)
    ratio = statistics.median(times[ours]) / statistics.median(times[empty])
    assert ratio <= 1.5, f"{ratio:.2f} times the help of an empty app"


# -- ask ---------------------------------------------------------------------------------------


def test_ask_prints_the_answer_alone(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("ask", home / "scene.png", "Is there a dog?", "--model", home / "model")
    expected = IPN.from_pretrained(home / "model").ask(home / "scene.png", "Is there a dog?")
    assert (run.code, run.out, run.err) == (0, expected.text + "\n", "")


def test_ask_json_adds_up(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("ask", home / "scene.png", "Is there a dog?", "-m", home / "model", "--json")
    found = json.loads(run.out)
    assert list(found) == ["answer", "model", "interact", "seconds", "tokens", "answer_tokens"]
    assert found["model"] == str(home / "model")
    assert found["interact"] == "tiny-look"
    assert list(found["seconds"]) == [*STAGES, "first_token", "total"]
    assert list(found["tokens"]) == list(KINDS)
    total = sum(found["seconds"][stage] for stage in STAGES)
    assert total == pytest.approx(found["seconds"]["total"], rel=0.02)
    assert found["tokens"]["dynamic"] == 2
    assert found["tokens"]["generated"] == found["answer_tokens"] - 1


def test_the_wished_interaction_is_used(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn(
        "ask", home / "scene.png", "hi", "-m", home / "model", "--interact", "tiny-mean", "--json"
    )
    assert json.loads(run.out)["interact"] == "tiny-mean"


def test_a_question_that_looks_like_an_option(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("ask", "-m", home / "model", "--", home / "scene.png", "--debug")
    assert run.code == 0


def test_an_interaction_without_weights_needs_to_be_asked_for(
    home: Path, ipn: Callable[..., Run]
) -> None:
    only = home / "model" / "tiny-look"
    ask = ("ask", home / "scene.png", "hi", "-m", only, "-i", "tiny-mean")
    assert_refused(ipn(*ask), "no trained weights for interaction 'tiny-mean'", "tiny-look")
    run = ipn(*ask, "--untrained", "--json")
    assert run.code == 0
    assert json.loads(run.out)["interact"] == "tiny-mean"
    assert "no trained weights for interaction 'tiny-mean'" in run.err
    assert "random" in run.err


def test_the_heatmap_is_written_beside_the_answer(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    target = tmp_path / "map.png"
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model", "--heatmap", target)
    assert run.code == 0
    assert run.out.count("\n") >= 1
    assert str(target) in run.err
    with Image.open(target) as drawn:
        assert drawn.format == "PNG"


def broken_inputs(home: Path, folder: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    """Wrong inputs of `ask` by name, with a part of the message that each must give."""
    picture, model = home / "scene.png", home / "model"
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    content = picture.read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    # A header that claims 30,000 × 30,000 pixels: it starts at byte 12, its checksum ends it.
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + content[24:29]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(content[:12] + header + checksum + content[33:])
    (folder / "nothing").mkdir()
    (folder / "d.png").mkdir()
    return {
        "missing": ((folder / "none.png", "hi"), "no such file"),
        "folder": ((folder, "hi"), "is a folder"),
        "text": ((folder / "text.png", "hi"), "not an image"),
        "empty": ((folder / "empty.png", "hi"), "not an image"),
        "cut": ((folder / "cut.png", "hi"), "damaged or cut short"),
        "bomb": ((folder / "bomb.png", "hi"), "at most 50,000,000 are accepted"),
        "no question": ((picture, "  \n"), "the question is empty"),
        "bytes": ((picture, "what \udcff"), "not valid text"),
        "long": ((picture, "why " * 200, "-m", model), "fit into the context"),
        "model": ((picture, "hi", "-m", "startre"), "unknown model 'startre'"),
        "near model": ((picture, "hi", "-m", "startre"), "did you mean 'starter'?"),
        "no model": ((picture, "hi", "-m", folder / "nothing"), "is no model of ours"),
        "interact": ((picture, "hi", "-m", model, "-i", "tiny-lok"), "did you mean 'tiny-look'?"),
        "untrained": (
            (picture, "hi", "-m", model, "-i", "tiny-lok", "--untrained"),
            "unknown strategy 'tiny-lok'",
        ),
        "no map": (
            (picture, "hi", "-m", model, "-i", "tiny-mean", "--heatmap", folder / "a.png"),
            "interaction 'tiny-mean' keeps no attention map",
        ),
        "map type": ((picture, "hi", "--heatmap", folder / "a.jpg"), "does not end in .png"),
        "map folder": ((picture, "hi", "--heatmap", folder / "no" / "a.png"), "there is no folder"),
        "map is a folder": ((picture, "hi", "--heatmap", folder / "d.png"), "is a folder"),
        "map is the picture": ((picture, "hi", "--heatmap", picture), "is the picture itself"),
    }


CASES = (
    "missing", "folder", "text", "empty", "cut", "bomb", "no question", "bytes", "long", "model",
    "near model", "no model", "interact", "untrained", "no map", "map type", "map folder",
    "map is a folder", "map is the picture",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_of_ask(
    case: str, home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    cases = broken_inputs(home, tmp_path)
    assert set(cases) == set(CASES)
    words, part = cases[case]
    before = tree(tmp_path), tree(home)
    assert_refused(ipn("ask", *words), part)
    assert (tree(tmp_path), tree(home)) == before


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A copy of one checkpoint, to be damaged."""
    return Path(shutil.copytree(home / "model" / "tiny-look", tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_that_do_not_fit_the_config(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    edit(copied, lambda c: c.update(interact={"name": "tiny-look", "width": 12}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "do not fit its config", "interaction.queries has shape (2, 16)", "(2, 12)")


def test_a_checkpoint_that_is_a_pickle(home: Path, copied: Path, ipn: Callable[..., Run]) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "pytorch_model.bin", "pickled weights can run code when loaded: refused")
    (copied / "config.json").unlink()
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "pickled weights (pytorch_model.bin)", "refused")


def test_a_pickle_under_the_name_of_safetensors(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    (copied / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "damaged or no safetensors file")


def test_unknown_names_and_keys_in_a_config(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    ask = ("ask", home / "scene.png", "hi", "-m", copied)
    edit(copied, lambda c: c.update(interact={"name": "tiny-look", "widht": 12}))
    assert_refused(ipn(*ask), "unknown key", "widht", "did you mean 'width'?")
    edit(copied, lambda c: c.update(interact={"name": "tiny-loop"}))
    assert_refused(ipn(*ask), "unknown interaction 'tiny-loop'", "did you mean 'tiny-look'?")
    edit(copied, lambda c: c.update(promt={}))
    assert_refused(ipn(*ask), "unknown key", "promt", "did you mean 'prompt'?")
    (copied / "config.json").write_text("{")
    assert_refused(ipn(*ask), "config.json' is not valid JSON")


# -- failures of ours --------------------------------------------------------------------------


def explode(*_: object, **__: object) -> None:
    raise RuntimeError("no luck")


def test_an_internal_error_is_1_and_shows_its_traceback_only_on_demand(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    monkeypatch.setattr(IPN, "ask", explode)
    ask = ("ask", home / "scene.png", "hi", "-m", home / "model")
    run = ipn(*ask)
    assert run.code == 1
    assert run.err == (
        "ipn: internal error: RuntimeError: no luck. Run it again with --debug for the "
        "traceback.\n"
    )
    for words in ((*ask, "--debug"), ("--debug", *ask)):
        run = ipn(*words)
        assert run.code == 1
        assert "Traceback" in run.err
        assert run.err.endswith("traceback.\n")


def test_a_full_disk_is_1_and_the_old_heatmap_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    target = tmp_path / "map.png"
    target.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model", "--heatmap", target)
    assert (run.code, run.out) == (1, "")
    assert "No space left on device" in run.err
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["map.png"]


def test_ctrl_c_is_130_and_says_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IPN, "ask", interrupt)
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model")
    assert (run.code, run.out, run.err) == (130, "", "")


# -- chat --------------------------------------------------------------------------------------


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


def test_chat_refuses_a_wrong_picture_before_it_starts(
    home: Path, ipn: Callable[..., Run]
) -> None:
    assert_refused(ipn("chat", home / "scene.png", home / "none.png"), "no such file", "none.png")


# -- eval --------------------------------------------------------------------------------------


def test_eval_json_of_a_file(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--json")
    assert run.code == 0
    found = json.loads(run.out)
    assert list(found) == ["task", "split", "n", "accuracy", "ci95", "by_type", "seconds"]
    assert (found["task"], found["split"], found["n"]) == (str(home / "some.jsonl"), "all", 6)
    assert {t: row["n"] for t, row in found["by_type"].items()} == {"exist": 4, "other": 2}
    assert list(found["by_type"]["exist"]) == ["n", "accuracy", "ci95"]


def test_eval_limit_shuffled_and_table(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--limit", "2", "--shuffled")
    assert run.code == 0
    for part in ("exist", "all", "guessing", "95 % interval", "requests shuffled"):
        assert part in run.out
    assert "other " not in run.out
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--shuffled", "--json")
    assert json.loads(run.out)["guess"]["accuracy"] == 1.0


def test_eval_of_a_registered_task(home: Path, ipn: Callable[..., Run]) -> None:
    from ipn_core import Example, Picture, Task

    class Toy(Task):
        splits = ("test", "hard")

        def examples(self, split: str) -> list[Example]:
            self.check_split(split)
            image = Picture("p", lambda: Image.new("RGB", (9, 9)))
            return [Example(f"{split} {i}?", ("yes",), (image,)) for i in range(3)]

    class Plugin:
        @hookimpl
        def register(self, registry: object) -> None:
            registry.task("toy-cli-task", Toy)  # type: ignore[attr-defined]

    if "toy-cli-task" not in get_registry().entries("task"):
        add_plugin(get_registry(), "toy-cli", Plugin())
    model = ("-m", home / "model", "--json")
    assert json.loads(ipn("eval", "toy-cli-task", *model).out)["split"] == "test"
    assert json.loads(ipn("eval", "toy-cli-task", "--split", "hard", *model).out)["n"] == 3
    assert_refused(ipn("eval", "toy-cli-task", "--split", "hart"), "did you mean 'hard'?")
    assert_refused(ipn("eval", "toy-cli-tsk"), "unknown task", "did you mean 'toy-cli-task'?")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object, got list"),
        ('{"image": "scene.png", "question": "q"}', "line 2: 'answer' must be"),
        ('{"image": "scene.png", "question": "", "answer": "a"}', "line 2: 'question' must be"),
        ('{"image": "none.png", "question": "q", "answer": "a"}', "line 2: no such image"),
        ('{"imag": "x", "question": "q", "answer": "a"}', "did you mean 'image'?"),
    ],
)
def test_a_malformed_line_is_named(
    line: str, part: str, home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    shutil.copy(home / "scene.png", tmp_path / "scene.png")
    good = '{"image": "scene.png", "question": "q", "answer": "a"}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    assert_refused(ipn("eval", tmp_path / "bad.jsonl", "-m", home / "model"), part, "bad.jsonl")


def test_eval_names_a_file_that_is_not_there(ipn: Callable[..., Run]) -> None:
    assert_refused(ipn("eval", "none.jsonl"), "no such file: 'none.jsonl'")


# -- models, plugins, doctor -------------------------------------------------------------------


def test_models_are_listed_with_or_without_the_word(ipn: Callable[..., Run]) -> None:
    listed = json.loads(ipn("models", "list", "--json").out)["models"]
    assert json.loads(ipn("models", "--json").out)["models"] == listed
    for row in listed:
        assert row["name"] in ipn("models").out


def test_an_unknown_name_cannot_be_pulled(ipn: Callable[..., Run]) -> None:
    assert_refused(ipn("models", "pull", "startre"), "unknown weights 'startre'", "'starter'?")


BAD_PLUGINS = {
    "raises": ("raise ImportError('no such cuda')", "ImportError: no such cuda"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "leaves": ("import os; os._exit(0)", "ended the process with exit code 0"),
    "crashes": ("import os; os.abort()", "SIGABRT"),
    "empty": ("", "it has no `@hookimpl def register(registry)`"),
    "misspelt": (
        "from ipn_core import hookimpl\n@hookimpl\ndef registre(registry): pass",
        "registre",
    ),
    "taken": (
        "from ipn_core import hookimpl\n@hookimpl\n"
        "def register(registry): registry.backbone('llama', 'x:Y')",
        "backbone 'llama' is already taken by ipn-llama",
    ),
    "hangs": ("import time; time.sleep(600)", "took longer than 3 s"),
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """All bad plugins installed at once, as `ipn plugins --json` shows them."""
    site = tmp_path_factory.mktemp("site")
    for name, (code, _) in BAD_PLUGINS.items():
        info = site / f"ipn_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ipn-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[ipn]\nz-{name} = ipn_{name}_module\n")
        (site / f"ipn_{name}_module.py").write_text("print('noise')\n" + code)
    code = (
        "import sys; from ipn_core.cli import main, probe; probe.LIMIT_S = 3.0; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plugins", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return {row["distribution"]: row for row in json.loads(done.stdout)["plugins"]}


@pytest.mark.parametrize("name", BAD_PLUGINS)
def test_a_bad_plugin_is_reported_with_its_reason(
    name: str, probed: dict[str, dict[str, object]]
) -> None:
    row = probed[f"ipn-{name}"]
    assert row["version"] == "1.2"
    assert row["components"] == {}
    (fault,) = row["faults"]  # type: ignore[misc]
    assert BAD_PLUGINS[name][1] in fault


def test_the_others_are_listed_beside_bad_ones(probed: dict[str, dict[str, object]]) -> None:
    assert probed["ipn-llama"]["faults"] == []
    assert probed["ipn-llama"]["components"] == {"backbone": ["llama", "vicuna"]}
    assert "hidden-state" in probed["ipn-core"]["components"]["requester"]  # type: ignore[index]


def test_plugins_for_people(
    fake_plugin: Callable[[str, str], dict[str, str]],
) -> None:
    run = shell("plugins", env=fake_plugin("broken", "raise ImportError('no such cuda')"))
    assert (run.code, run.err) == (0, "")
    assert "ipn-broken 1.2" in run.out
    assert "fault:       import failed: ImportError: no such cuda" in run.out
    assert "backbone:    llama, vicuna" in run.out


def test_a_plugin_that_raises_on_import_does_not_stop_ask(
    home: Path, fake_plugin: Callable[[str, str], dict[str, str]]
) -> None:
    env = fake_plugin("broken", "raise ImportError('no such cuda')")
    with open(Path(env["PYTHONPATH"]) / "ipn_broken-1.2.dist-info/entry_points.txt", "a") as file:
        file.write("tiny = ipn_core.testing.plugin\n")
    env["IPN_PLUGINS"] = "broken,tiny,llama"
    run = shell("ask", home / "scene.png", "hi", "-m", home / "model", env=env)
    assert run.code == 0
    assert "plugin ipn-broken 1.2 was left out: import failed: ImportError: no such" in run.err
    assert run.err.count("\n") == 1
    run = shell("ask", home / "scene.png", "hi", "-m", "broken", env=env)
    assert_refused(run, "unknown model 'broken'", "Not loaded: ipn-broken 1.2", "no such cuda")


def test_a_component_that_raises_on_import_is_named(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    class Plugin:
        @hookimpl
        def register(self, registry: object) -> None:
            registry.interaction("broken-cli", "no_such_module:X")  # type: ignore[attr-defined]

    if "broken-cli" not in get_registry().entries("interaction"):
        add_plugin(get_registry(), "broken-cli", Plugin())
    edit(copied, lambda c: c.update(interact={"name": "broken-cli"}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "interaction 'broken-cli' of broken-cli local", "No module named")


def test_doctor_survives_a_plugin_that_ends_its_process(
    fake_plugin: Callable[[str, str], dict[str, str]],
) -> None:
    env = fake_plugin("leaves", "import os; os._exit(0)")
    # Without the others, whose imports take seconds.
    run = shell("doctor", "--json", env={**env, "IPN_PLUGINS": "leaves"})
    assert run.err == ""
    assert run.code == 0
    found = json.loads(run.out)
    assert list(found) == ["versions", "device", "attention", "faults", "cache"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["attention"]["eager"]["available"] is True
    for row in found["attention"].values():
        assert row["available"] == (not row["reasons"])
    (fault,) = [f for f in found["faults"] if f["plugin"] == "ipn-leaves 1.2"]
    assert "ended the process with exit code 0" in fault["reason"]
    assert Path(found["cache"]["folder"]).is_absolute()


# -- processes ---------------------------------------------------------------------------------


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


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_ends_a_chat_quietly(
    home: Path, fake_plugin: Callable[[str, str], dict[str, str]]
) -> None:
    env = fake_plugin("tinyplugin", "from ipn_core.testing.plugin import register")
    code = "import sys; from ipn_core.cli import main; sys.exit(main())"
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
