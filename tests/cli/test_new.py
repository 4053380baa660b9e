"""`ipn new`: what it refuses, what it writes, and that what it writes works."""

from __future__ import annotations

import ast
import errno
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Run, assert_refused, tree
from outside import BIN, IPN, install, run
from toys import toy_model, toy_registry
from watching import check_against_two_passes

from ipn_core.config import IPNConfig
from ipn_core.plugins import add_plugin, discover
from ipn_core.scaffold import KINDS
from ipn_core.scaffold.package import LONGEST, Package, write_package
from ipn_core.testing.tiny import tiny_tokenizer
from ipn_core.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
ODD_NAMES = ("a", "a1", "x" * (LONGEST - 4) + "-y-z")
TRAINED = [kind for kind in KINDS if "train.yaml" in Package(kind, "mine").files()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of each kind, `ipn-made-KIND`."""
    folder = tmp_path_factory.mktemp("made")
    return {kind: write_package(kind, f"made-{kind}", folder)[1] for kind in KINDS}


def project(package: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    return found


# -- the command -----------------------------------------------------------------------------------


def test_it_writes_a_package_and_says_how_to_install_test_and_use_it(
    ipn: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = ipn("new", "interaction", "my-look")
    assert (told.code, told.err) == (0, "")
    assert told.out.splitlines() == [
        "wrote ipn-my-look: the interaction 'my-look' is in src/ipn_my_look/my_look.py",
        "Install it, test it, use it:",
        "    pip install -e ipn-my-look",
        "    pytest ipn-my-look",
        "    ipn train ipn-my-look/train.yaml --out runs/my-look",
    ]
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        "ipn-my-look/README.md",
        "ipn-my-look/pyproject.toml",
        "ipn-my-look/src/ipn_my_look/__init__.py",
        "ipn-my-look/src/ipn_my_look/my_look.py",
        "ipn-my-look/tests/test_my_look.py",
        "ipn-my-look/train.yaml",
    }
    code = (tmp_path / "ipn-my-look/src/ipn_my_look/my_look.py").read_text()
    assert "class MyLook(Interaction):" in code


def test_another_folder_is_made_where_it_is_missing(
    ipn: Callable[..., Run], tmp_path: Path
) -> None:
    folder = tmp_path / "some where" / "else"
    told = ipn("new", "task", "dots", "--dir", folder)
    assert told.code == 0
    assert (folder / "ipn-dots" / "src" / "ipn_dots" / "dots.py").is_file()
    assert f"pip install -e '{folder}/ipn-dots'\n" in told.out
    assert "    ipn eval dots --limit 20\n" in told.out


def test_its_help_names_every_kind(ipn: Callable[..., Run]) -> None:
    told = " ".join(ipn("new", "--help").out.split())
    assert all(kind in told for kind in KINDS)


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ipn_core.cli import main\n"
        f"code = main(['new', 'interaction', 'quick-look', '--dir', {str(tmp_path)!r}])\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[] 0\n"


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "parts"),
    [
        ("interacton", "x", ("unknown kind 'interacton'", "task (did you mean 'interaction'?)")),
        ("strategy", "x", ("unknown kind 'strategy'", "interaction, perceiver", "--help")),
        ("task", "My_Look", ("'My_Look' is no name", "'my-look'?", "'ipn new task NAME'")),
        ("task", "my look", ("no name", "(did you mean 'my-look'?)")),
        ("task", "my--look", ("no name", "(did you mean 'my-look'?)")),
        ("task", "2d", ("'2d' is no name", "begins with a letter and is at most 24")),
        ("task", "", ("'' is no name",)),
        ("task", "..", ("'..' is no name",)),
        ("task", "../x", ("'../x' is no name", "(did you mean 'x'?)")),
        ("task", "a\nb", (r"'a\nb' is no name",)),
        ("task", "ünder", ("'ünder' is no name",)),
        ("task", "x" * (LONGEST + 1), ("at most 24 characters long",)),
        ("task", "ipn-dots", ("'ipn-' is put before every name (did you mean 'dots'?)",)),
        ("task", "class", ("'class' is a word of Python", "such as 'my-class'")),
        ("task", "none", ("'None' is a word of Python", "such as 'my-none'")),
        ("interaction", "interaction", ("a class 'Interaction'", "such as 'my-interaction'")),
        ("interaction", "config", ("a class 'Config'", "uses that name for something else")),
        ("task", "board", ("a class 'Board'",)),
        ("task", "core", ("the module 'ipn_core', and ipn-core 0.1.0 is installed already",)),
        ("task", "film", ("the module 'ipn_film', and ipn-film 0.1.0 is installed already",)),
        ("interaction", "film", ("interaction 'film' is already taken by ipn-film 0.1.0",)),
        ("requester", "static", ("strategy 'static' is already taken by ipn-static 0.1.0",)),
        ("backbone", "vicuna", ("backbone 'vicuna' is already taken", "such as 'my-vicuna'")),
        ("attention", "sdpa", ("'sdpa' is already taken by ipn-core", "See 'ipn plugins'")),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason_and_a_way_out(
    kind: str, name: str, parts: tuple[str, ...], ipn: Callable[..., Run], tmp_path: Path
) -> None:
    assert_refused(ipn("new", kind, name, "--dir", tmp_path), *parts)
    assert not tree(tmp_path)


def test_plugins_that_are_left_out_keep_their_names(
    ipn: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPN_PLUGINS", "")
    assert_refused(ipn("new", "backbone", "vicuna", "--dir", tmp_path), "taken by ipn-llama")


def test_a_module_that_no_distribution_brings_is_taken_too(
    ipn: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ipn_loose_leaf.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    refused = ipn("new", "task", "loose-leaf", "--dir", tmp_path)
    assert_refused(refused, "and ipn_loose_leaf is installed already", "'my-loose-leaf'")


def test_what_exists_is_never_written_over(ipn: Callable[..., Run], tmp_path: Path) -> None:
    assert ipn("new", "task", "dots", "--dir", tmp_path).code == 0
    before = tree(tmp_path)
    assert_refused(ipn("new", "injector", "dots", "--dir", tmp_path), "ipn-dots' exists", "--dir")
    assert tree(tmp_path) == before
    (tmp_path / "ipn-link").symlink_to(tmp_path / "nowhere")
    assert_refused(ipn("new", "task", "link", "--dir", tmp_path), "ipn-link' exists")


def test_a_folder_that_cannot_be_made_is_refused(ipn: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = ipn("new", "task", "dots", "--dir", tmp_path / "file" / "in")
    assert_refused(refused, "ipn-dots' cannot be made: Not a directory", "with --dir")
    refused = ipn("new", "task", "dots", "--dir", tmp_path / ("n" * 300))
    assert_refused(refused, "cannot be made: File name too long")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(ipn: Callable[..., Run], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused = ipn("new", "task", "dots", "--dir", tmp_path)
    tmp_path.chmod(0o700)
    assert_refused(refused, "cannot be made: Permission denied", "with --dir")


def test_a_disk_that_fills_up_leaves_nothing_behind(
    ipn: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused = ipn("new", "interaction", "my-look", "--dir", tmp_path)
    assert_refused(refused, "ipn-my-look' cannot be made: No space left on device")
    assert not tree(tmp_path)


# -- what it writes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, *ODD_NAMES])
def test_every_file_is_filled_in(kind: str, name: str | None) -> None:
    package = Package(kind, name or f"made-{kind}")
    files = package.files()
    assert ("train.yaml" in files) == (kind in TRAINED)
    for place, text in files.items():
        assert "$" not in place + text, place
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        if place.endswith(".py"):
            ast.parse(text)
    tested = files[f"tests/test_{package.stem}.py"]
    assert f'    name = "{package.name}"\n' in tested
    assert "Contract):" in tested


@pytest.mark.parametrize("kind", KINDS)
def test_its_project_is_what_pip_and_ipn_need(kind: str, made: dict[str, Path]) -> None:
    about = project(made[kind])
    assert about["name"] == f"ipn-made-{kind}"
    assert about["entry-points"] == {"ipn": {f"made-{kind}": f"ipn_made_{kind}"}}
    needs = ["ipn-core>=0.1,<0.2"]
    needs += ["ipn-film"] if kind in ("requester", "injector") else []
    assert about["dependencies"] == needs
    brought = {"attention": [], "backbone": ["ipn-film", "ipn-starter"]}
    tries = brought.get(kind, ["ipn-llama", "ipn-starter"])
    assert about["optional-dependencies"] == {"dev": ["pytest", "ruff", "mypy", *tries]}
    readme = (made[kind] / str(about["readme"])).read_text()
    assert f"    {Package(kind, f'made-{kind}').use}\n" in readme


@pytest.mark.parametrize("kind", KINDS)
def test_it_registers_its_name_and_its_training_reads(kind: str, made: dict[str, Path]) -> None:
    name, registry = f"made-{kind}", discover()
    top = made[kind] / "src" / f"ipn_made_{kind}" / "__init__.py"
    spec = importlib.util.spec_from_file_location(f"ipn_made_{kind}", top)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plugin = add_plugin(registry, name, module)
    brought = {component.kind for component in registry.of(plugin)}
    assert brought == {kind, "strategy"} if KINDS[kind].preset else {kind}
    if kind in TRAINED:
        config = TrainConfig.parse(yaml.safe_load((made[kind] / "train.yaml").read_text()), "it")
        resolved = IPNConfig.resolve(config.model, registry, "model")
        assert name in json.dumps(resolved.model_dump())


def test_trainings_name_what_they_need(made: dict[str, Path]) -> None:
    """Whoever installs a package with its extra `dev` can run the commands of its README."""
    assert TRAINED == ["interaction", "perceiver", "requester", "injector", "backbone"]
    registry = discover()
    for kind in TRAINED:
        about, config = project(made[kind]), yaml.safe_load((made[kind] / "train.yaml").read_text())
        model, (data,) = config["model"], config["data"]
        used = [("task", data["task"]), ("perceiver", model["encoder"])]
        used += [("backbone", model["backbone"]["name"])] if kind != "backbone" else []
        used += [("strategy", model["strategy"])] if model["strategy"] == "film" else []
        needed = {registry.get(*one).plugin.distribution for one in used}
        named = {*about["dependencies"], *about["optional-dependencies"]["dev"]}
        assert needed <= named


@pytest.mark.parametrize("kind", ["interaction", "perceiver", "requester", "injector"])
def test_a_training_is_made_to_answer_in_words(kind: str, made: dict[str, Path]) -> None:
    config = yaml.safe_load((made[kind] / "train.yaml").read_text())
    assert config["model"]["prompt"]["template"].endswith("One word:{% endif %}")
    stages = {stage["name"]: stage for stage in config["stages"]}
    told = (made[kind] / "README.md").read_text()
    assert "no more often than who guesses" in told
    assert ("`film`, which looks for it" in told) == (kind in ("requester", "injector"))
    assert stages["align"]["steps"] == 400
    if kind == "perceiver":
        assert stages["align"]["objectives"] == {"image-text": 1.0}
        assert stages["instruct"]["objectives"] == {"language": 1.0}
        return
    assert stages["align"]["objectives"] == {"answer-embedding": 1.0}
    assert stages["verbalise"]["objectives"] == {"verbalise": 1.0}
    readable = {"name": "tokens", "start": "words", "lookup": 30}
    own = kind == "injector"
    assert config["model"]["inject"] == ({"name": "made-injector"} if own else readable)
    assert ("request" in stages["align"]["train"]) == (kind == "requester")


def test_it_is_clean_by_its_own_rules_whatever_the_name(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folders = list(made.values())
    for name in ODD_NAMES:
        folders += [write_package(kind, name, tmp_path / name / kind)[1] for kind in KINDS]
    ruff, where = str(BIN / "ruff"), [str(folder) for folder in folders]
    run([ruff, "check", "--no-cache", *where], tmp_path)
    run([ruff, "format", "--no-cache", "--check", *where], tmp_path)


@pytest.fixture
def sites(made: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Where Python finds all of them, as if each were installed."""
    for package in made.values():
        about = project(package)
        info = tmp_path / f"{str(about['name']).replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
        )
        ((key, value),) = about["entry-points"]["ipn"].items()
        (info / "entry_points.txt").write_text(f"[ipn]\n{key} = {value}\n")
    return [tmp_path, *(package / "src" for package in made.values())]


@pytest.mark.slow
def test_all_of_them_keep_their_contracts(made: dict[str, Path], sites: list[Path]) -> None:
    # The clause about imports starts a process for each; the next test starts one for all.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-rs", "-k", "not test_imports_are_cheap", *(str(p) for p in made.values())]
    told = run(command, sites[0], *sites)
    assert " passed" in told
    # Those that attend to nothing have no backends to compare.
    skips = re.findall(r"^SKIPPED.*", told, re.MULTILINE)
    assert all("it has no option 'backend'" in skip for skip in skips), skips


def test_their_top_modules_import_nothing_heavy(sites: list[Path]) -> None:
    code = "import sys\n" + "".join(f"import ipn_made_{kind}\n" for kind in KINDS)
    code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert run([sys.executable, "-c", code], sites[0], *sites) == "[]\n"


def pythia() -> Any:
    """A small random GPT-NeoX, and a tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = tiny_tokenizer(chat=False)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(config), tokenizer


def test_one_pass_over_its_backbone_equals_two(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(made["backbone"] / "src")
    backbone = importlib.import_module("ipn_made_backbone.made_backbone").MadeBackbone(*pythia())
    check_against_two_passes(toy_model(toy_registry(), rounds=2, backbone=backbone), 3, 2, 2)


# -- as somebody has it who installed wheels -------------------------------------------------------


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ipn-core is installed from its wheel."""
    folder = tmp_path_factory.mktemp("core")
    shutil.copytree(
        ROOT / "ipn_core", folder / "src" / "ipn_core", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "src")
    install(folder / "src", folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def outside(request: pytest.FixtureRequest, core: Path) -> Path:
    """A folder with a package as `ipn new` of the wheel writes it, installed in `site`."""
    kind = request.param
    folder: Path = request.getfixturevalue("tmp_path_factory").mktemp(kind)
    run([IPN, "new", kind, f"made-{kind}"], folder, core)
    install(folder / f"ipn-made-{kind}", folder / "site")
    return folder


def kind_of(outside: Path) -> str:
    (package,) = outside.glob("ipn-made-*")
    return package.name.removeprefix("ipn-made-")


@pytest.mark.slow
@pytest.mark.parametrize("outside", KINDS, indirect=True)
def test_it_is_installed_tested_and_checked(outside: Path, core: Path) -> None:
    kind = kind_of(outside)
    package, sites = outside / f"ipn-made-{kind}", (core, outside / "site")
    assert (outside / "site" / f"ipn_made_{kind}" / f"made_{kind}.py").is_file()
    listed = json.loads(run([IPN, "plugins", "--json"], outside, *sites))["plugins"]
    (mine,) = [plugin for plugin in listed if plugin["distribution"] == f"ipn-made-{kind}"]
    assert mine["components"][kind] == [f"made-{kind}"]
    assert not mine["faults"]
    told = run([sys.executable, "-m", "pytest", "-q", package.name], outside, *sites)
    assert " passed" in told
    run([str(BIN / "ruff"), "check"], package)
    run([str(BIN / "ruff"), "format", "--check"], package)
    # With ipn-core's types, and as mypy sees it where ipn-core is installed as editable.
    for seen in ([core], []):
        cache = core.parent / f"mypy-{len(seen)}"
        run([str(BIN / "mypy"), "--cache-dir", str(cache)], package, *seen)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("outside", TRAINED, indirect=True)
def test_its_training_trains_and_the_model_answers(outside: Path, core: Path) -> None:
    kind = kind_of(outside)
    name, sites = f"made-{kind}", (core, outside / "site")
    config = yaml.safe_load((outside / f"ipn-{name}" / "train.yaml").read_text())
    less = [f"stages.{stage['name']}.steps=2" for stage in config["stages"]]
    less += ["data.0.options.scenes=20"]
    if kind == "backbone":
        for part in pythia():
            part.save_pretrained(outside / "pythia")
        less += ["model.backbone.weights=pythia"]
    run([IPN, "train", f"ipn-{name}/train.yaml", *less, "--out", f"runs/{name}"], outside, *sites)
    ask = ["ask", str(ROOT / "examples/scene.png"), "Is there a dog?", "-m", f"runs/{name}/model"]
    interact = "film" if kind == "backbone" else name
    answer = json.loads(run([IPN, *ask, "--interact", interact, "--json"], outside, *sites))
    assert answer["interact"] == interact
    tokens = {"static": 16, "dynamic": 0} if kind == "perceiver" else {"static": 0, "dynamic": 3}
    assert {key: answer["tokens"][key] for key in tokens} == tokens


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("outside", ["task"], indirect=True)
def test_its_task_is_asked(outside: Path, core: Path) -> None:
    sites = (core, outside / "site")
    told = run([IPN, "eval", "made-task", "--limit", "4", "--json"], outside, *sites)
    assert json.loads(told)["n"] == 4
