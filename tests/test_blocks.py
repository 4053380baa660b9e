"""Every block of code of the documents is run, here or by a test that is named, or it says why not.

Commands whose words stand for others (`IMAGE`, `[--json]`) are forms; what they name must exist.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import PAGES, Block, blocks, commands, every, spoken_of
from matplotlib.cbook import get_sample_data
from typer.main import get_command

from ipn_core.cli.app import app
from ipn_core.config import IPNConfig
from ipn_core.plugins import get_registry
from ipn_core.training.config import TrainConfig

ROOT = Path(__file__).parents[1]

QUICK = {
    "ipn new interaction my-look": r"^wrote ipn-my-look: ",
    "ipn new backbone pythia": r"^wrote ipn-pythia: ",
}
"""Run here, with what must be printed."""

SLOW = {
    'ipn ask examples/scene.png "Is there a dog?"': r"^yes$",
    'ipn ask examples/scene.png "What is in row 3, column 3?"': r"^tomato$",
    'ipn ask examples/scene.png "Which row is the dog in?" --heatmap heatmap.png': r"^four$",
    'ipn ask examples/scene.png "What is to the left of the dog?" --trace trace.html': r"^pig$",
    'ipn ask picture.png "Is there a dog?"': r"^yes$",
    'ipn ask photo.jpg "What is this?" --model photo': r"^military uniform$",
    'ipn ask photo.jpg "Is there a dog?" --model photo': r"^no$",
    'ipn ask photo.jpg "What is on the left?" --model photo': (
        r"^not sure, perhaps a shower curtain$"
    ),
    'ipn ask photo.jpg "Where is the cup?" --model photo --heatmap heatmap.png': (
        r"^I do not see it$"
    ),
    "ipn eval easy-vqa --limit 400": r"all +│ 400 │",
    "ipn plugins": r"(?m)^ipn-rvii ",
    "ipn doctor": r"(?s)^versions\n.*\nattention\n.* eager +works\n.*\nfaults\n    none$",
    "ipn eval emoji-scenes --limit 40 --against-interact static": r"first minus other, in points",
    "ipn eval emoji-scenes --limit 200": r"all +│ 200 │ +(8|9)\d\.\d%",
    "ipn eval emoji-scenes --limit 200 --shuffled": r"all +│ 200 │ +1?\d\.\d%",
}
"""The same, with the starter's weights or a process for each plugin."""

REFUSED = {
    'ipn ask examples/scene.png "Is there a dog?" --interact rvi': r"did you mean 'rvii'\?",
}
"""Wrong on purpose, with what must be said."""

LAUNCHED = "tests/test_training_launch.py::test_accelerate_launch_gives_the_weights_of_one_process"
ELSEWHERE = {
    'ipn ask examples/scene.png "Is there a dog?" --model runs/film/model': (
        "tests/test_write_a_plugin.py::test_the_package_trains_and_answers"
    ),
    'ipn ask photo.jpg "What is it?" --model llava:llava-hf/llava-1.5-7b-hf': (
        "plugins/ipn-static/tests/test_llava.py::test_the_command_asks_it"
    ),
    'ipn ask --model llava:llava-hf/llava-1.5-7b-hf picture.jpg "What is unusual about this?"': (
        "plugins/ipn-static/tests/test_llava.py::test_the_command_asks_it"
    ),
    'ipn ask --model idefics:HuggingFaceM4/idefics-9b-instruct picture.png "What is this?"': (
        "plugins/ipn-gated-xattn/tests/test_idefics.py::test_the_command_asks_it"
    ),
    'ipn ask --model blip2:Salesforce/blip2-opt-2.7b picture.jpg "How many cats are there?"': (
        "plugins/ipn-qformer/tests/test_importing.py::test_the_command_asks_it"
    ),
    "ipn ask --model instructblip:Salesforce/instructblip-vicuna-7b picture.jpg "
    '"What is unusual?"': "plugins/ipn-qformer/tests/test_importing.py::test_the_command_asks_it",
    "ipn models pull starter": (
        "tests/test_weights.py::test_weights_are_pulled_once_into_the_cache"
    ),
    "ipn bench attention --tune": (
        "tests/cli/test_bench_attention.py::test_tuning_keeps_the_fastest_for_auto"
    ),
    "ipn bench attention --tune --model runs/mine/model": (
        "tests/cli/test_bench_attention.py::test_what_a_model_computes_is_timed"
    ),
    "ipn bench attention --tune --backward --shape 5,576,8,64,16 --masking packed "
    "--dtype bfloat16": "tests/cli/test_bench_attention.py::test_tuning_keeps_the_fastest_for_auto",
    "ipn bench engine": "tests/cli/test_bench_engine.py::test_the_command_prints_rows_or_json",
    "ipn bench engine --only first-token": (
        "tests/cli/test_bench_engine.py::test_rows_are_chosen_by_name_or_by_what_they_begin_with"
    ),
    "ipn bench engine --only first-token-128": (
        "tests/cli/test_bench_engine.py::test_rows_are_chosen_by_name_or_by_what_they_begin_with"
    ),
    "ipn bench engine --short": (
        "tests/cli/test_bench_engine.py::test_the_command_prints_rows_or_json"
    ),
    "ipn compare examples/compare.yaml --out runs/compare": (
        "tests/test_comparison.py::test_the_report_holds_what_was_found"
    ),
    "ipn compare examples/compare.yaml --arms rvii,static --seeds 1 --out runs/compare": (
        "tests/test_comparison.py::test_some_of_the_arms_can_be_picked"
    ),
    "ipn compare examples/compare.yaml --arms rvii-constant --seeds 1 --out runs/control "
    "sweep=null 'evaluate=[{task: emoji-scenes, split: val, limit: 300, shuffled: true}]' "
    "'stages.2.rates={perceive: 4}' 'stages.3.rates={perceive: 4}'": (
        "tests/cli/test_compare.py::test_the_control_can_be_trained_at_rates_of_its_own"
    ),
    "ipn compare examples/compare.yaml --out runs/compare --resume": (
        "tests/test_comparison.py::test_going_on_with_a_comparison_that_is_done_trains_nothing"
    ),
    "ipn compare CONFIG.yaml --out runs/mine --resume": (
        "tests/test_comparison.py::test_an_arm_is_added_to_what_is_kept_of_a_comparison"
    ),
    "ipn demo": "tests/demo/test_browser.py::"
    "test_a_dropped_picture_is_asked_and_the_map_follows_the_question",
    "ipn eval questions.jsonl --model runs/mine/model --against starter": (
        "tests/cli/test_eval.py::test_eval_against_a_model_shows_a_table_of_both"
    ),
    "ipn serve --model starter --port 8000": (
        "tests/cli/test_serve.py::test_the_starter_is_served_until_it_is_told_to_end"
    ),
    "ipn train examples/swap.yaml base=llava:llava-hf/llava-1.5-7b-hf": (
        "plugins/ipn-static/tests/test_llava.py::test_a_training_goes_on_from_its_tower_and_language_model"
    ),
    "ipn train film.yaml --out runs/film": (
        "tests/test_write_a_plugin.py::test_the_package_trains_and_answers"
    ),
    'make bench RESULTS=/tmp/trial BENCH="--grid short --row-seconds 0.02 --no-check"': (
        "tests/test_bench_suite.py::test_the_suite_runs_from_the_command_line"
    ),
    "pip install -e ipn-my-film": "tests/test_write_a_plugin.py::outside",
    "pip install -e ipn-my-qwen": (
        "tests/test_attach_a_backbone.py::test_its_package_is_found_and_passes_its_own_test"
    ),
    "pytest ipn-my-film": "tests/test_write_a_plugin.py::test_the_package_passes_its_own_test",
    "pytest ipn-my-qwen": (
        "tests/test_attach_a_backbone.py::test_its_package_is_found_and_passes_its_own_test"
    ),
    "python -m ipn_lmms_eval easy-vqa FOLDER --limit 40": (
        "plugins/ipn-lmms-eval/tests/test_translation.py::"
        "test_the_command_writes_a_file_of_questions_and_says_what_is_wrong"
    ),
    "lmms-eval --model ipn --model_args pretrained=starter --include_path FOLDER "
    "--tasks ipn-easy-vqa": (
        "plugins/ipn-lmms-eval/tests/test_lmms_eval.py::test_it_answers_and_scores_as_ipn_eval_does"
    ),
    "accelerate launch --num_processes 4 -m ipn_core.training CONFIG.yaml": LAUNCHED,
    "accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST "
    "--main_process_port 29500 -m ipn_core.training CONFIG.yaml": LAUNCHED,
    "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "-m ipn_core.training CONFIG.yaml": LAUNCHED,
}
"""Run by a test that is smaller or has what they need, with its own model, data and packages."""

BRIEF = {"--model": "-m"}
"""As which a test may write an option."""

NOT_GIVEN = {
    "test_the_command_asks_it": "--model",
    "test_weights_are_pulled_once_into_the_cache": "models",
    "test_what_a_model_computes_is_timed": "--tune",
    "test_tuning_keeps_the_fastest_for_auto": "--shape",
    "test_the_command_prints_rows_or_json": "--short",
    "test_the_report_holds_what_was_found": "--out",
    "test_some_of_the_arms_can_be_picked": "--arms --seeds --out",
    "test_going_on_with_a_comparison_that_is_done_trains_nothing": "--out",
    "test_an_arm_is_added_to_what_is_kept_of_a_comparison": "--out --resume",
    "test_a_dropped_picture_is_asked_and_the_map_follows_the_question": "demo",
    "test_the_starter_is_served_until_it_is_told_to_end": "--model",
    "test_it_answers_and_scores_as_ipn_eval_does": "--include_path --tasks",
    "test_accelerate_launch_gives_the_weights_of_one_process": (
        "--num_processes --num_machines --machine_rank --main_process_ip --main_process_port "
        "--use_fsdp --fsdp_version --fsdp_auto_wrap_policy"
    ),
}
"""What tests above do not write of their commands, as a helper writes it or they call what the
command calls; may become fewer."""

INDEX = "ipn-core is on no package index yet; 'make setup' installs every extra from the checkout"
LMMS_EVAL = "lmms-eval needs decoders and torchvision, and its pictures from a hub out of reach"
HOURS = "what it needs is hours of training; that its configs are read is tested below"
PHOTOGRAPHS = "the photographs are GPL-2 and fetched by apt-get; the tests make stamps of their own"
NOT_RUN = {
    ". .venv/bin/activate": "it is the shell of the reader that this changes",
    "make setup": "these tests run in what it has installed",
    "make test": "these tests are what it runs",
    "make lint": "it would look at these tests; .ci/run runs it before them",
    "make demo": "its three questions are run one by one, above",
    "make bench": "20 minutes alone on a machine; its benchmarks' own tests run each in short",
    "make bench-gpu": "needs a CUDA device",
    "ipn bench engine --device cuda": "needs a CUDA device",
    "pip install 'ipn-core[demo]'": INDEX,
    "pip install 'ipn-core[serve]'": INDEX,
    "pip install 'ipn-core[ray-serve]'": INDEX,
    "pip install './plugins/ipn-lmms-eval[lmms-eval]'": LMMS_EVAL,
    "pip install './plugins/ipn-lmms-eval[evaluator]'": LMMS_EVAL,
    "pip install --no-deps lmms-eval==0.7.3": LMMS_EVAL,
    "lmms-eval --model ipn --model_args pretrained=starter --batch_size 16 --tasks mme,"
    "mmbench_en_dev,seedbench,vqav2_val,gqa,ok_vqa_val2014,scienceqa_img": LMMS_EVAL,
    "accelerate launch -m lmms_eval --model ipn --model_args pretrained=USER/NAME,interact=rvii "
    "--tasks mme": LMMS_EVAL,
    "lmms-eval --model ipn --model_args pretrained=starter,interact=rvii --tasks mme "
    "--batch_size 16": LMMS_EVAL,
    "ipn eval emoji-details --split test --batch-size 48 --model runs/details-zoom/model": HOURS,
    "ipn eval emoji-details --split test --batch-size 48 --model runs/details-rvii/model": HOURS,
    "python -m benchmarks.hops 0 1 2-early 2": HOURS,
    "python -m ipn_names.stamps": PHOTOGRAPHS,
    "python plugins/ipn-names/train/connector.py": PHOTOGRAPHS,
    "python plugins/ipn-names/train/connector.py --parts 7 --limit 40": PHOTOGRAPHS,
    "python plugins/ipn-names/train/proportions.py": PHOTOGRAPHS,
    "python plugins/ipn-names/train/sides.py": PHOTOGRAPHS,
    "ipn eval photo-stamps --model photo": PHOTOGRAPHS,
    "python examples/make_screenshots.py": "it writes pictures of the documents anew",
}
"""With the reason."""

OTHERS = {
    ("README.md", "print(model.ask("): (
        "tests/test_readme.py::test_the_three_lines_of_python_print_an_answer"
    ),
    ("docs/data.md", "TarWriter"): (
        "tests/test_docs.py::test_the_formats_of_data_md_are_read_as_they_stand"
    ),
    ("docs/demo.md", '.ask("examples/scene.png"'): (
        "tests/test_docs.py::test_the_answer_of_demo_md_shows_itself"
    ),
    ("docs/hooks.md", "def register(registry)"): (
        "tests/test_docs.py::test_the_plugin_of_hooks_md_registers_what_it_names"
    ),
    ("docs/hooks.md", "class Record"): (
        "tests/test_docs.py::test_the_observer_of_hooks_md_sees_the_message"
    ),
    ("docs/hooks.md", "class TwoRequests"): (
        "tests/test_docs.py::test_the_interaction_of_hooks_md_says_what_it_needs"
    ),
    ("docs/serve.md", "OpenAI("): (
        "tests/cli/test_serve.py::test_the_starter_is_served_until_it_is_told_to_end"
    ),
}
"""Blocks of Python, by what they hold, that a test of their own runs as they stand."""

PACKAGES = {
    "docs/attach-a-backbone.md": "tests/test_attach_a_backbone.py",
    "docs/write-a-plugin.md": "tests/test_write_a_plugin.py",
}
"""Pages whose blocks are files, and what writes and runs all of these."""


TRAINING = re.compile(r"ipn train (plugins/\S+\.yaml) --out \S+")
"""A training of a member: hours, or minutes; its config is read."""
INSTALLING = re.compile(r"pip install \.((?: \./\S+)+)")
"""Members into an environment without ours: `make release-check` does it with their wheels."""


def form(command: str) -> bool:
    """Whether a command only shows what may be typed."""
    return bool(re.search(r"\[--|\[key|…|\[list|\b(KIND NAME|A\.json)\b", command))


def run_by_its_own(block: Block) -> bool:
    return any(block.page == page and text in block.text for page, text in OTHERS)


def test_every_command_is_run_or_says_why_not() -> None:
    shown = {command for command in commands() if not form(command)}
    tests = {command for command in shown if command.startswith("python -m pytest ")}
    assert all((ROOT / command.split()[-1]).is_file() for command in tests)
    tests |= {command for command in shown if TRAINING.fullmatch(command)}
    tests |= {command for command in shown if INSTALLING.fullmatch(command)}
    tables = [QUICK, SLOW, REFUSED, ELSEWHERE, NOT_RUN]
    assert shown - tests == set().union(*tables)
    assert len(shown - tests) == sum(map(len, tables))


def test_the_tests_that_are_named_exist() -> None:
    for name in {*ELSEWHERE.values(), *OTHERS.values()}:
        file, test = name.split("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


def named(name: str) -> tuple[str, str]:
    """The source of a test `file::function`, and that of its file."""
    file, test = name.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    (found,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == test
    )
    return ast.get_source_segment(text, found) or "", text


def holds(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def test_a_test_that_runs_a_command_elsewhere_gives_its_words() -> None:
    lacking: dict[str, set[str]] = {}
    for command, name in ELSEWHERE.items():
        function, file = named(name)
        words = shlex.split(command)
        known = words[1:3] if words[1] in ("bench", "models") else words[1:2]
        lacks = {w for w in known if words[0] == "ipn" and not holds(file, w)}
        given = {word for word in words if word.startswith("--")}
        lacks |= {o for o in given if not any(holds(function, w) for w in (o, BRIEF.get(o, o)))}
        if lacks:
            lacking.setdefault(name.split("::")[1], set()).update(lacks)
    assert lacking == {test: set(words.split()) for test, words in NOT_GIVEN.items()}


def test_every_file_of_a_page_belongs_to_a_package_that_is_tested() -> None:
    pages = {page for page in PAGES if any(block.file for block in blocks(page))}
    assert pages == set(PACKAGES)
    for page, test in PACKAGES.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_every_language_is_one_that_is_looked_at() -> None:
    known = {"", "sh", "console", "python", "yaml", "toml", "json", "text"}
    assert {block.language for page in PAGES for block in blocks(page)} == known
    assert {block.page for block in every("json")} == {"docs/data.md"}  # by tests/test_docs.py
    assert {block.page for block in every("text")} == {"docs/method.md"}  # a drawing
    for block in (*every(""), *every("sh"), *every("console")):
        assert block.commands, block


COMMAND: Any = get_command(app)


def options(words: list[str]) -> set[str]:
    """The options of the command that these words name."""
    command = COMMAND
    for word in words[1:]:
        if not hasattr(command, "commands") or word.startswith("-"):
            break
        if word not in command.commands:  # a form such as "ipn models [list|pull NAME]"
            assert re.match(r"[\[A-Z…]", word), f"no command {' '.join(words)}"
            break
        command = command.commands[word]
    return {name for one in command.params for name in one.opts} | {"--help", "--debug"}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "SECURITY.md"])
def test_every_option_that_is_named_exists(page: str) -> None:
    for command, named in spoken_of(page):
        assert set(named) <= options(command.split()), command


def test_an_option_that_does_not_exist_is_seen() -> None:
    assert "--heatmap" in options(["ipn", "ask", "IMAGE"])
    assert "--heatmap" not in options(["ipn", "models", "pull", "NAME"])
    with pytest.raises(AssertionError, match="no command ipn modles"):
        options(["ipn", "modles"])


def test_every_target_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?:^(?:\$ )?|`)make ([a-z][\w-]*)", text, re.MULTILINE)
        assert set(named) <= targets, page


@pytest.mark.parametrize(
    "block", [b for b in every("python") if not run_by_its_own(b)], ids=lambda b: Path(b.page).stem
)
def test_python_runs(block: Block) -> None:
    defined: dict[str, Any] = {"__name__": "block"}
    exec(compile(block.text, block.page, "exec"), defined)
    assert len(defined) > 2


@pytest.mark.parametrize("block", every("yaml"), ids=lambda b: Path(b.page).stem)
def test_configs_are_read(block: Block) -> None:
    """Unknown keys and values out of range are refused by the config itself."""
    whole = {
        "model": {},
        "data": [{"task": "emoji-scenes"}],
        "stages": [{"name": "s", "train": ["inject"], "steps": 1}],
    }
    given = yaml.safe_load(block.text)
    assert given
    if set(given) <= set(IPNConfig.model_fields) | {"strategy"}:
        model = {"backbone": "llama", "encoder": "vision", "strategy": "zoom", **given}
        IPNConfig.resolve(model, get_registry(), block.page)
    else:
        TrainConfig.parse({**whole, **given}, block.page)


@pytest.mark.parametrize("command", [c for c in commands() if TRAINING.fullmatch(c)])
def test_a_training_of_a_member_has_a_config_that_is_read(command: str) -> None:
    file = ROOT / TRAINING.fullmatch(command)[1]  # type: ignore[index]
    config = TrainConfig.parse(yaml.safe_load(file.read_text(encoding="utf-8")), file.name)
    IPNConfig.resolve(config.model, get_registry(), file.name)


@pytest.mark.parametrize("command", [c for c in commands() if INSTALLING.fullmatch(c)])
def test_an_installation_names_all_of_ours_that_it_needs(command: str) -> None:
    """The others would be looked for on an index, which has none of them."""
    members = [ROOT / one for one in shlex.split(command)[3:]]
    needed = {"ipn-core"}
    for member in members:
        project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
        needed |= {d.split(">")[0] for d in project["dependencies"] if d.startswith("ipn-")}
    assert needed <= {"ipn-core", *(member.name for member in members)}


def test_the_entry_point_of_hooks_md_is_in_the_group_that_is_looked_up() -> None:
    (block,) = every("toml")
    (found,) = tomllib.loads(block.text)["project"]["entry-points"].items()
    assert found == ("ipn", {"my-film": "ipn_my_film"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader stands: with our examples, a drawing and a photograph of theirs."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "examples" / "scene.png", tmp_path / "picture.png")
    shutil.copy(get_sample_data("grace_hopper.jpg", asfileobj=False), tmp_path / "photo.jpg")
    return tmp_path


def typed(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line as a reader does."""
    ipn = str(Path(sys.executable).parent / "ipn")
    return subprocess.run(
        [ipn, *shlex.split(command)[1:]],
        cwd=folder,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", QUICK)
def test_a_command_does_what_the_page_says(command: str, folder: Path) -> None:
    done = typed(command, folder)
    assert done.returncode == 0, done.stderr
    assert re.search(QUICK[command], done.stdout)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("command", SLOW)
def test_a_command_with_the_starter_does_what_the_page_says(command: str, folder: Path) -> None:
    done = typed(command, folder)
    assert done.returncode == 0, done.stderr
    assert re.search(SLOW[command], done.stdout.strip())
    for written in re.findall(r"--(?:heatmap|trace) (\S+)", command):
        assert (folder / written).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("command", REFUSED)
def test_what_is_wrong_on_purpose_is_refused(command: str, folder: Path) -> None:
    done = typed(command, folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(REFUSED[command], done.stderr)
