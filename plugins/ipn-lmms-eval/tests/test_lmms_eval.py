"""The real lmms-eval, in an environment of its own, finds what `ipn eval` finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from layered import Environment, environment_with

VERSION = "0.7.3"
QUESTIONS = "40"
REFUSALS = """
from types import SimpleNamespace
from ipn_core.errors import UserError
from ipn_lmms_eval.model import IPNModel

asked = [SimpleNamespace(task_name="mmlu")]
for act in (
    lambda: IPNModel(pretrainde="starter"),
    lambda: IPNModel(batch_size="auto"),
    lambda: IPNModel.loglikelihood(None, asked),
    lambda: IPNModel.generate_until_multi_round(None, asked),
):
    try:
        act()
    except UserError as error:
        print(error)
"""


def test_it_is_registered_for_lmms_eval_and_is_no_plugin_of_ours() -> None:
    (point,) = entry_points(group="lmms_eval.models")
    assert (point.name, point.value) == ("ipn", "ipn_lmms_eval.registration:manifest")
    assert "ipn-lmms-eval" not in {p.dist.name for p in entry_points(group="ipn") if p.dist}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("lmms")
    # What it depends on includes torchvision, and a CPU build of that is not on every index.
    installs = ["--no-deps", f"lmms-eval=={VERSION}"], ["ipn-lmms-eval[evaluator]"]
    with environment_with(folder / "venv", "lmms_eval", *installs) as made:
        made.settings |= {"HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
        yield made


@pytest.fixture(scope="module")
def task(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How lmms-eval is told of the first questions of easy-vqa."""
    folder = str(tmp_path_factory.mktemp("task"))
    name = environment.run("-m", "ipn_lmms_eval", "easy-vqa", folder, "--limit", QUESTIONS)
    return ["--include_path", folder, "--tasks", name.strip()]


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("interact", ["rvii", "static"])
def test_it_answers_and_scores_as_ipn_eval_does(
    environment: Environment, task: list[str], tmp_path: Path, interact: str
) -> None:
    model = ["--model", "ipn", "--model_args", f"pretrained=starter,interact={interact}"]
    out = ["--batch_size", "16", "--output_path", str(tmp_path), "--log_samples"]
    done = environment.tried("-m", "lmms_eval", *model, *task, *out)
    # It ends with 0 also where it fails.
    results = list(tmp_path.rglob("*_results.json"))
    assert results, done.stderr + done.stdout
    (samples,) = tmp_path.rglob("*_samples_*.jsonl")

    told = ["easy-vqa", "--limit", QUESTIONS, "--interact", interact, "--json"]
    predictions = tmp_path / "predictions.jsonl"
    ours = json.loads(environment.ipn("eval", *told, "--predictions", str(predictions)))

    (theirs,) = json.loads(results[0].read_text())["results"].values()
    assert theirs["accuracy,none"] == pytest.approx(ours["accuracy"])
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert answers == [json.loads(line)["text"] for line in predictions.read_text().splitlines()]


@pytest.mark.slow
def test_what_it_cannot_do_is_refused_by_name(environment: Environment) -> None:
    said = environment.run("-c", REFUSALS).splitlines()
    assert said == [
        "--model ipn takes no argument 'pretrainde': allowed are pretrained, interact, device, "
        "batch_size (did you mean 'pretrained'?).",
        "--batch_size must be a whole number of at least 1, got 'auto': with --model ipn it is "
        "not found by trying.",
        *(
            f"--model ipn does not serve requests of type {kind}, which mmlu makes: it serves "
            "generate_until. Choose tasks of that output_type, such as seedbench for seedbench_ppl."
            for kind in ("loglikelihood", "generate_until_multi_round")
        ),
    ]
