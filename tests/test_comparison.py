"""Arms at equal budget, a control that cannot ask, and a report that says what came out."""

from __future__ import annotations

import copy
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
from comparing import comparing, comparison, outcomes
from kills import run_killed
from lessons import lesson_registry, stage
from PIL import Image
from rich.console import Console

from ipn_core.comparison import run
from ipn_core.comparison.arms import Arm, Arms
from ipn_core.comparison.config import CompareConfig
from ipn_core.errors import ConfigError, TrainingError, UserError

pytestmark = pytest.mark.usefixtures("own_training")

SCRIPT = Path(__file__).parent / "support" / "comparing.py"

KeepRun: TypeAlias = Callable[[Path, Path], None]


def arms(values: dict[str, Any]) -> dict[tuple[str, int], Arm]:
    made = Arms(CompareConfig.parse(values, "comparing"), lesson_registry()).make()
    return {(arm.name, arm.dynamic): arm for arm in made}


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    new = copy.deepcopy(values)
    inner = new
    *outer, last = path.split(".")
    for key in outer:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    return new


def asked(folder: Path) -> set[int]:
    """How many questions the jobs have answered."""
    found = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    return {len(score["right"]) for one in found for score in one["scores"]}


@pytest.fixture(scope="module")
def done(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPN_CACHE", str(folder / "cache"))
        comparison(comparing(llm), folder / "out").run()
    return folder / "out"


def test_budgets_are_equal_at_every_number_of_tokens(llm: Path) -> None:
    sweep = {"arms": ["rvii", "rvii-constant", "static"], "dynamic": [2, 5], "seeds": 1}
    made = arms({**comparing(llm), "sweep": sweep})
    assert set(made) == {(n, k) for n in ("rvii", "rvii-constant", "static") for k in (2, 5)}
    for (_, dynamic), arm in made.items():
        assert arm.tokens == 2 + dynamic
        ours = made["rvii", dynamic].parameters
        assert abs(arm.parameters - ours) <= 0.05 * ours
    static = made["static", 5]
    assert (static.static, static.request, static.message) == (7, 0, 0)
    assert static.model["perceive"]["hidden"] == static.width_value
    asking = {name for (name, _), arm in made.items() if arm.asks}
    assert asking == {"rvii"}


def test_arms_do_what_their_inputs_allow_and_say_what_they_cannot(llm: Path) -> None:
    made = arms(comparing(llm))
    learned = {
        name: [list(stage["objectives"]) for stage in arm.stages] for (name, _), arm in made.items()
    }
    assert learned == {
        "rvii": [["answer-embedding", "request-image"], ["language"]],
        "rvii-constant": [["image-text"], ["language"]],
        "static": [["image-text"], ["language"]],
    }
    assert made["rvii", 2].left_out == {}
    assert "answer-embedding" in made["static", 2].left_out["answer"]
    steps = {tuple(stage["steps"] for stage in arm.stages) for arm in made.values()}
    assert len(steps) == 1
    told = {"objectives": {"language": 1.0}, "train": ["perceive", "interact", "inject"]}
    stages = [*comparing(llm)["stages"], {**stage("told", "verbalise"), "otherwise": told}]
    made = arms({**comparing(llm), "stages": stages})
    last = {name: list(arm.stages[-1]["objectives"]) for (name, _), arm in made.items()}
    assert last == {"rvii": ["verbalise"], "rvii-constant": ["verbalise"], "static": ["language"]}


def test_an_arm_takes_the_first_of_several_other_ways_that_it_can(llm: Path) -> None:
    values = comparing(llm)
    ways = [
        {"objectives": {"image-text": 1.0}, "train": ["perceive", "interact"]},
        {"objectives": {"answer-embedding": 1.0}},
    ]
    first = {**values["stages"][0], "objectives": {"request-image": 1.0}, "otherwise": ways}
    plain = {**values["arms"]["rvii"]["model"], "strategy": "film", "interact": "film"}
    film = {"width": "interact.width", "model": plain}
    values = {**values, "arms": {**values["arms"], "film": film}, "within": 0.9}
    made = arms({**values, "stages": [first, *values["stages"][1:]]})
    begins = {name: list(arm.stages[0]["objectives"]) for (name, _), arm in made.items()}
    assert begins == {
        "rvii": ["request-image"],
        "film": ["answer-embedding"],
        "static": ["image-text"],
        "rvii-constant": ["image-text"],
    }
    assert made["film", 2].stages[0]["train"] == ["interact"]
    refusals = made["film", 2].left_out["answer"]
    assert "'request-image'" in refusals
    assert "'image-text'" in refusals


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("arms.static.tokens", None, "0 static|no budget can be equal"),
        ("reference", "static", "makes no request"),
        ("reference", "film", "none of arms"),
        ("arms.rvii.width", "interact.depht", "does not set|depht"),
        ("arms.static.width", "perceive.hiden", "hiden"),
        ("evaluate.0.shuffled", False, "evaluate must hold an entry with shuffled: true"),
        ("sweep", {"arms": ["film"], "dynamic": [1]}, "sweep names film, but the arms are rvii, "),
        (
            "arms.rvii-constant",
            {"model": {}, "width": "x"},
            "is made from the reference; take it out",
        ),
        ("stages.1.name", "answer", "stages must have different names"),
        ("stages.1.rates", {"nothing": 2}, "a stage names what no arm has: .*'nothing'"),
        ("within", 0.00001, "must be within"),
        ("arms.a/b", {"model": {}, "width": "x"}, "arm 'a/b' must be named by letters, digits"),
        ("data.0.stream", 5, "a comparison reads all its data beforehand"),
        ("sweep", {"arms": ["rvii"], "dynamic": [1, 1]}, "sweep.dynamic holds 1 twice"),
        ("sweep", {"arms": ["static", "static"], "dynamic": [1]}, "sweep.arms holds static twice"),
        (
            "sweep",
            {"arms": ["rvii"], "dynamic": [500]},
            "502 tokens into an LLM that reads 12",
        ),
        ("arms.static.model.backbone", {"name": "opt"}, "backbone must be equal for all arms"),
        ("arms.static.model.encoder", "tiny", "encoder must be equal for all arms: name it under"),
        ("arms.static.width", "", "it must name a setting of the model such as interact.width"),
        ("arms.static.tokens", "perceive.", "it must name a setting of the model.*'perceive.'"),
        (f"arms.{'a' * 101}", {"model": {}, "width": "x"}, "100 at most: its jobs"),
        ("sweep", {"arms": ["rvii"], "dynamic": [0]}, "greater than or equal to 1, got 0"),
        ("stages.0.train", ["interact", "intract"], "'intract' names nothing.*mean 'interact'"),
        ("stages.0.otherwise.train", ["perceive", "foo"], "'foo' names nothing"),
        ("stages.0.freeze", ["interact.gude"], "'freeze': 'interact.gude' names nothing.*guide"),
        ("stages.1.rates", {"sluts": 2}, "'rates': 'sluts' names nothing.*slots"),
        ("stages.1.freeze", ["*"], "'arms.rvii': .*'freeze' leaves nothing"),
    ],
)
def test_what_cannot_be_compared_is_refused(llm: Path, path: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        arms(changed(comparing(llm), path, value))


def test_an_arm_that_no_width_makes_large_enough_is_refused(
    llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipn_core.comparison.arms._WIDEST", 1)
    said = r"'arms\.static\.width': even with perceive\.hidden at \d+ it trains fewer than the ref"
    with pytest.raises(ConfigError, match=said):
        arms(comparing(llm))


def test_a_width_that_does_not_fit_is_told_with_what_may_be_tried(llm: Path) -> None:
    values = comparing(llm)
    model = {**values["arms"]["rvii"]["model"], "strategy": "lmeye", "interact": "lmeye"}
    values["arms"]["lmeye"] = {"width": "interact.width", "model": model}
    told = r"multiple of heads, got 2 and 4.* 'arms.lmeye.multiple', now 1, lets only multiples"
    with pytest.raises(ConfigError, match=told):
        arms({**values, "within": 0.9})


def test_what_is_frozen_or_slower_concerns_the_arms_that_have_it(llm: Path) -> None:
    values = changed(comparing(llm), "stages.1.freeze", ["interact.guide"])
    made = arms(changed(values, "stages.1.rates", {"perceive": 2, "inject": 0.5}))
    told = {
        name: (arm.stages[1].get("freeze"), arm.stages[1].get("rates"))
        for (name, _), arm in made.items()
    }
    assert told == {
        "rvii": (["interact.guide"], {"inject": 0.5}),
        "rvii-constant": (["interact.guide"], {"inject": 0.5}),
        "static": (None, {"perceive": 2}),
    }


def test_a_part_of_a_comparison_may_name_what_only_the_others_have(llm: Path) -> None:
    config = CompareConfig.parse(comparing(llm), "comparing").only(["rvii"])
    assert [arm.name for arm in Arms(config, lesson_registry()).make()] == ["rvii", "rvii-constant"]


def test_a_part_of_a_comparison_may_not_name_what_no_arm_at_all_has(llm: Path) -> None:
    values = changed(comparing(llm), "stages.0.train", ["nonsense"])
    part = CompareConfig.parse(values, "comparing").only(["rvii"])
    for config in (part, part.only(["rvii"])):
        with pytest.raises(ConfigError, match=r"no arm has: .*'nonsense' names nothing"):
            Arms(config, lesson_registry()).make()


def test_an_arm_that_is_left_out_need_not_be_installed(llm: Path) -> None:
    values = changed(comparing(llm), "arms.static.model.strategy", "missing")
    part = CompareConfig.parse(values, "comparing").only(["rvii"])
    assert [arm.name for arm in Arms(part, lesson_registry()).make()] == ["rvii", "rvii-constant"]


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ([{"task": "none.jsonl"}], "no such file: 'none.jsonl'"),
        (
            [{"task": "colours", "split": "val"}, {"task": "colours", "split": "val"}],
            "'val' twice: scores are told apart by task and split",
        ),
        ([{"task": "{here}/damaged.jsonl"}], "line 1: .*damaged.png' is not an image"),
        ([{"task": "{here}/one.jsonl", "shuffled": True}], r"no request can be taken for 'Why\?'"),
    ],
)
def test_what_is_asked_is_looked_at_before_anything_is_trained(
    llm: Path, tmp_path: Path, evaluate: list[dict[str, Any]], said: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / "damaged.png").write_text("no picture")
    for name in ("one", "damaged"):
        line = {"image": f"{name}.png", "question": "Why?", "answer": "so"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    values = comparing(llm)
    asked = [{**e, "task": e["task"].format(here=tmp_path)} for e in evaluate]
    with pytest.raises(UserError, match=said):
        comparison({**values, "evaluate": [*values["evaluate"], *asked]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_has_nothing_to_do_with_the_width_is_told_without_it(llm: Path) -> None:
    with pytest.raises(ConfigError, match="statik") as caught:
        arms(changed(comparing(llm), "arms.static.model.strategy", "statik"))
    assert "multiple" not in str(caught.value)


def test_jobs_that_fail_are_named_and_the_others_kept(llm: Path, tmp_path: Path) -> None:
    class Half:
        workers = 1

        def run(self, jobs: Any, ended: Any) -> None:
            ended(jobs[0], "out of\n memory")
            ended(jobs[1], None)

    written: list[str] = []
    jobs: Any = [SimpleNamespace(name=n, write=partial(written.append, n)) for n in ("a-0", "b-0")]
    said = r"1 of 2 jobs failed; the others are kept. Mend the cause .*: out of memory$"
    with pytest.raises(TrainingError, match=said):
        comparison(comparing(llm), tmp_path / "out", executor=Half())._run(jobs)
    assert written == ["a-0", "b-0"]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"digest": 3}'])
def test_a_damaged_plan_is_refused(llm: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "compare.json").write_text(content)
    said = r"is damaged or of an earlier version .*Remove it, or choose another folder"
    with pytest.raises(UserError, match=said):
        comparison(comparing(llm), tmp_path, resume=True)


def test_a_comparison_that_does_not_exist_yet_is_begun_with_a_word(
    llm: Path, tmp_path: Path
) -> None:
    said = Console(file=io.StringIO(), width=200)
    comparison(comparing(llm), tmp_path / "out", resume=True, console=said)
    assert f"'{tmp_path / 'out'}' holds no comparison yet: it begins" in said.file.getvalue()


def test_a_commit_is_that_of_the_sources_and_of_no_checkout_around_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "run.py").touch()
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run._commit() == "unknown: not a git checkout"


@pytest.fixture
def keep_run(monkeypatch: pytest.MonkeyPatch) -> KeepRun:
    """How a comparison is kept without its weights."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.evidence import keep_run

    return keep_run


@pytest.mark.slow
def test_the_report_holds_what_was_found(done: Path) -> None:
    text = (done / "report.md").read_text()
    first = text.split("\n", 1)[0]
    assert first.startswith("**The request of `rvii` is ")
    rows = list(csv.DictReader((done / "results.csv").open()))
    whole = {(r["arm"], r["shuffled"]): r for r in rows if r["type"] == "all"}
    assert set(whole) == {
        ("rvii", "False"),
        ("rvii", "True"),
        ("rvii-constant", "False"),
        ("static", "False"),
    }
    for row in rows:
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
    answered = json.loads((done / "jobs" / "static-k2-seed0" / "eval-0.json").read_text())
    assert int(whole["static", "False"]["right"]) == sum(answered["right"])
    shown = f"{100 * float(whole['static', 'False']['accuracy']):.1f} ("
    assert shown in text
    for word in ("trained parameters", "train TFLOPs", "first token", "ipn compare comparing.yaml"):
        assert word in text
    page = (done / "report.html").read_text()
    assert page.count("<table>") == text.count("\n## ")
    assert "<code>rvii-constant</code>" in page
    assert (done / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_flops_are_counted_for_each_stage(done: Path) -> None:
    for name in ("rvii-k2-seed0", "static-k2-seed0"):
        found = json.loads((done / "jobs" / name / "measured.json").read_text())
        stages = found["train_flops_by_stage"]
        assert set(stages) == {"answer", "instruct"}
        assert stages["instruct"] > stages["answer"] > 0
        assert found["train_flops"] == sum(stages.values())


@pytest.mark.slow
def test_the_cpu_time_of_a_job_is_that_of_its_parts(done: Path) -> None:
    for path in (done / "jobs").glob("*/result.json"):
        found = json.loads(path.read_text())
        parts = [found["training"], found["measured"], *found["scores"]]
        assert all(part["cpu_s"] > 0 for part in parts)
        assert found["cpu_s"] == pytest.approx(sum(part["cpu_s"] for part in parts))


@pytest.mark.slow
def test_a_folder_is_gone_on_with_only_on_request_and_with_the_same_config(
    llm: Path, done: Path
) -> None:
    with pytest.raises(ConfigError, match="holds a comparison already"):
        comparison(comparing(llm), done)
    with pytest.raises(ConfigError, match="holds a comparison with another config"):
        comparison(changed(comparing(llm), "stages.0.steps", 9), done, resume=True)
    other = changed(comparing(llm), "arms.static.model.perceive.norm", False)
    plan = (done / "compare.json").read_bytes()
    with pytest.raises(ConfigError, match="holds arm 'static' with another config"):
        comparison(other, done, resume=True).run()
    assert (done / "compare.json").read_bytes() == plan
    job = done / "jobs" / "static-k2-seed0" / "job.json"
    told = job.read_bytes()
    job.unlink()
    with pytest.raises(ConfigError, match="holds arm 'static' with another config"):
        comparison(other, done, resume=True).run()
    job.write_bytes(told)


@pytest.mark.slow
def test_going_on_with_a_comparison_that_is_done_trains_nothing(llm: Path, done: Path) -> None:
    model = done / "jobs" / "rvii-k2-seed0" / "train" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    rows = (done / "results.csv").read_text()
    later = ["ipn", "compare", "comparing.yaml", "--resume"]
    for _ in range(2):
        comparison(comparing(llm), done, resume=True, command=later).run()
    made = (done / "report.md").read_text().split("## How it was made")[1]
    assert "| command | `ipn compare comparing.yaml` |" in made
    assert made.count("ipn compare comparing.yaml --resume") == 1
    assert model.stat().st_mtime_ns == before
    assert (done / "results.csv").read_text() == rows


@pytest.mark.slow
def test_what_is_asked_may_change_while_there_are_weights_to_ask(
    llm: Path, done: Path, tmp_path: Path, keep_run: KeepRun
) -> None:
    keep_run(done, tmp_path / "kept")
    shutil.copytree(done, tmp_path / "whole")
    values = changed(comparing(llm), "evaluate.0.limit", 3)
    gone = "has not answered these questions, and '.*' is gone, which it needs for that"
    with pytest.raises(ConfigError, match=gone):
        comparison(values, tmp_path / "kept", resume=True).run()
    assert asked(tmp_path / "kept") == asked(done)

    whole = tmp_path / "whole"
    trained = {path: path.stat().st_mtime_ns for path in whole.rglob("trained.json")}
    comparison(values, whole, resume=True).run()
    assert asked(whole) == {3}
    assert (
        "Too few pictures for intervals that can be trusted: all"
        in (whole / "report.md").read_text()
    )
    # What a process that was left behind writes of the earlier questions is no answer to these.
    for path in [*done.rglob("result.json"), *done.rglob("eval-*.json")]:
        shutil.copyfile(path, whole / path.relative_to(done))
    comparison(values, whole, resume=True).run()
    assert asked(whole) == {3}
    assert {path: path.stat().st_mtime_ns for path in trained} == trained

    next(whole.rglob("model.safetensors")).unlink()
    with pytest.raises(ConfigError, match=gone):
        comparison(comparing(llm), whole, resume=True).run()
    assert asked(whole) == {3}


@pytest.mark.slow
def test_a_comparison_grows_without_the_weights_of_what_is_done(
    llm: Path, done: Path, tmp_path: Path, keep_run: KeepRun
) -> None:
    moved = tmp_path / "moved"
    keep_run(done, moved)
    assert not any(str(done) in path.read_text() for path in moved.rglob("*.json"))
    before = {path: path.read_bytes() for path in moved.rglob("result.json")}
    comparison({**comparing(llm), "seeds": 2}, moved, resume=True).run()
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(moved.rglob("result.json"))) == 2 * len(before)
    rows = list(csv.DictReader((moved / "results.csv").open()))
    assert {row["seed"] for row in rows} == {"0", "1"}
    timed = (done / "first-token.json").read_text()
    assert (moved / "first-token.json").read_text() == timed
    for ratio in json.loads(timed).values():
        assert ratio["spread"] in (moved / "report.md").read_text()


@pytest.mark.slow
def test_an_arm_is_added_to_what_is_kept_of_a_comparison(
    llm: Path, done: Path, tmp_path: Path, keep_run: KeepRun
) -> None:
    keep_run(done, tmp_path / "mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("result.json")}
    values = comparing(llm)
    values["arms"]["plain"] = changed(values["arms"]["static"], "model.perceive.norm", False)
    said = io.StringIO()
    comparison(values, tmp_path / "mine", resume=True, console=Console(file=said)).run()
    assert {path: path.read_bytes() for path in before} == before
    trained = {path.parent.parent.name for path in tmp_path.rglob("train/model")}
    assert trained == {"plain-k2-seed0"}
    text = (tmp_path / "mine" / "report.md").read_text()
    assert "| colours test | `static` | `plain` | " in text
    untimed = "no first-token times of plain: all arms are timed side by side, and the weights of"
    assert untimed in said.getvalue()


def test_some_of_the_arms_can_be_picked(llm: Path) -> None:
    config = CompareConfig.parse(
        {**comparing(llm), "sweep": {"arms": ["static"], "dynamic": [1]}}, "comparing"
    )
    assert list(config.only(["static"]).arms) == ["rvii", "static"]
    assert list(config.only(["rvii-constant"]).arms) == ["rvii"]
    assert config.only(["rvii"]).sweep is None
    with pytest.raises(ConfigError, match=r"no arm 'statik'.*static"):
        config.only(["statik"])


@pytest.mark.slow
def test_a_comparison_killed_at_twenty_moments_finds_the_same(llm: Path, tmp_path: Path) -> None:
    values = comparing(llm, steps=4)
    comparison(values, tmp_path / "unbroken").run()
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(values))
    run_killed(
        [sys.executable, str(SCRIPT), str(config), str(out)],
        lambda: sorted(p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()),
        kills=20,
    )
    for kept in (tmp_path / "unbroken" / "jobs").glob("*/train/model/model.safetensors"):
        name = kept.relative_to(tmp_path / "unbroken")
        assert (out / name).read_bytes() == kept.read_bytes()
    assert not list(out.rglob("*.tmp*"))
    assert outcomes(out) == outcomes(tmp_path / "unbroken")
