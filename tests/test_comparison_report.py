"""What a comparison's report says of results that are made up here."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipn_core.comparison.job import Job
from ipn_core.comparison.report import write_report
from ipn_core.comparison.results import Results

ROOT = Path(__file__).parents[1]
SHARES = {"rvii": 0.9, "rvii-constant": 0.3, "film": 0.7, "static": 0.5}
STAGES = [
    {"name": "answer", "objectives": {"answer-embedding": 1.0}, "train": ["interact"], "steps": 30},
    {"name": "instruct", "objectives": {"language": 1.0}, "train": ["interact"], "steps": 10},
]
FIRST_TOKEN = {
    name: {"seconds": 0.1 * i, "median": i / 1.0, "spread": "0.9-1.1"}
    for i, name in enumerate(SHARES, start=1)
}


def answered(share: float, seed: int, shuffled: bool) -> dict[str, Any]:
    """Two hundred questions about fifty pictures, of two types."""
    right = np.random.default_rng([seed, round(100 * share), shuffled]).random(200) < share
    return {
        "asked": {},
        "task": "colours",
        "split": "test",
        "shuffled": shuffled,
        "guess_by_type": {"cell": 0.2, "exist": 0.3},
        "cpu_s": 1.0,
        "types": ["cell", "exist"] * 100,
        "pictures": [[str(i // 4)] for i in range(200)],
        "said": ["x"] * 200,
        "right": right.tolist(),
    }


def results(folder: Path, shares: dict[str, float], others: float, dynamic: int = 4) -> Results:
    jobs = []
    for number, (name, share) in enumerate(shares.items()):
        for tokens, seeds in ((dynamic, 2), (1, 1)):
            for seed in range(seeds):
                arm = {
                    "name": name,
                    "asks": name in ("rvii", "film"),
                    "dynamic": tokens,
                    "static": 0,
                    "request": 8,
                    "message": tokens,
                    "parameters": 1000 + number,
                    "width": "interact.width",
                    "width_value": 16,
                    "model": {},
                    "stages": STAGES,
                    "left_out": {"align": "it cannot ask."} if name == "static" else {},
                }
                job = Job(
                    f"{name}-{tokens}-{seed}", str(folder / f"{name}-{tokens}-{seed}"), arm, seed,
                    {}, [{}], 4, 1,
                )  # fmt: skip
                scores = [answered(share, seed, False)]
                scores += [answered(others, seed, True)] if arm["asks"] else []
                found = {
                    "seed": seed,
                    "arm": arm,
                    "training": {
                        "peak_memory": 2**30 * (number + 1),
                        "examples_per_s": {"answer": 100.0, "instruct": 10.0 * (number + 1)},
                    },
                    "measured": {"train_flops": 1e12 * (number + 1)},
                    "scores": scores,
                    "cpu_s": 60.0 * (seed + 1),
                }
                job.result.parent.mkdir(parents=True)
                job.result.write_text(json.dumps(found))
                jobs.append(job)
    return Results(jobs, "rvii", "rvii-constant", dynamic)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    found = results(made / "jobs", SHARES, 0.25)
    write_report(found, made, {"command": "ipn compare c.yaml"}, FIRST_TOKEN)
    return made


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    return (folder / "report.md").read_text()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds."""
    monkeypatch.setattr("ipn_core.comparison.report.draw_plots", lambda *_: [])


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, its header first."""
    part = text.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


@pytest.mark.usefixtures("no_plots")
def test_the_first_line_says_whether_requests_matter(tmp_path: Path, report: str) -> None:
    assert report.startswith("**The request of `rvii` is used**: ")
    ignoring = results(tmp_path / "other", SHARES, 0.9)
    write_report(ignoring, tmp_path / "other", {}, {})
    text = (tmp_path / "other" / "report.md").read_text()
    assert text.startswith("**The request of `rvii` is ignored** on colours test: ")
    page = (tmp_path / "other" / "report.html").read_text()
    assert "<body>\n<p><strong>The request of <code>rvii</code> is ignored</strong>" in page


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("static", "verdict"),
    [
        (0.5, "is above every arm of equal budget that cannot ask"),
        (0.9, "is level with the best arm of equal budget that cannot ask"),
        (0.99, "is below the best arm of equal budget that cannot ask"),
    ],
)
def test_the_reference_is_held_against_the_best_arm_that_cannot_ask(
    tmp_path: Path, static: float, verdict: str
) -> None:
    found = results(tmp_path / "jobs", {**SHARES, "static": static}, 0.25)
    write_report(found, tmp_path, {}, {})
    (line,) = [x for x in (tmp_path / "report.md").read_text().splitlines() if x.startswith("- On")]
    assert verdict in line
    assert "`static`" in line


@pytest.mark.usefixtures("no_plots")
def test_above_every_arm_means_above_the_one_that_is_hardest_to_tell_from_it(
    tmp_path: Path,
) -> None:
    found = results(tmp_path / "jobs", {**SHARES, "rvii-constant": 0.6}, 0.25)
    static = found.group("static")
    assert static is not None
    for seed, share in enumerate((0.95, 0.15)):
        static.results[seed]["scores"][0]["right"] = answered(share, seed, False)["right"]
    write_report(found, tmp_path, {}, {})
    (line,) = [x for x in (tmp_path / "report.md").read_text().splitlines() if x.startswith("- On")]
    assert "is not surely above every arm of equal budget that cannot ask" in line
    assert "the best of them is `rvii-constant`" in line
    assert re.search(r"; from `static` \(\d+\.\d %\) it is \+\d+\.\d \(-", line)


def test_every_pair_of_arms_is_tested(report: str) -> None:
    header, _, *rows = table(report, "Paired differences")
    assert header == ["split", "first", "second", "first minus second", "p"]
    names = list(SHARES)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    assert [tuple(row[1:3]) for row in rows] == [(f"`{a}`", f"`{b}`") for a, b in pairs]
    by_pair = {tuple(row[1:3]): row for row in rows}
    assert by_pair["`rvii`", "`static`"][3].startswith("+")
    assert by_pair["`rvii`", "`static`"][4] == "< 0.001"
    assert by_pair["`rvii-constant`", "`film`"][3].startswith("-")


def test_what_an_arm_costs_is_told_in_units(report: str) -> None:
    header, _, *rows = table(report, "What it costs")
    assert header == [
        "arm",
        "train TFLOPs",
        "answer, examples/s",
        "instruct, examples/s",
        "all stages, examples/s",
        "peak memory, GiB",
        "first token, ms",
        "first token / reference",
    ]
    # 960 examples at 100 a second, and 320 at 20.
    constant = ["`rvii-constant`", "2", "100.0", "20.0", "50.0", "2.00", "200", "2.00 (0.9-1.1)"]
    assert rows[1] == constant


def test_what_a_job_took_of_the_cpu_is_told_for_every_arm(report: str, folder: Path) -> None:
    header, _, *rows = table(report, "Arms")
    assert header[-2:] == ["seeds", "CPU minutes"]
    taken = {(row[0], row[1]): row[-2:] for row in rows}
    assert taken["`rvii`", "4"] == ["0, 1", "2.0"]  # of the seed that took most
    assert taken["`rvii`", "1"] == ["0", "1.0"]
    with (folder / "results.csv").open() as file:
        assert {(r["seed"], r["cpu_minutes"]) for r in csv.DictReader(file)} >= {("0", "1.00")}


def test_what_arms_learned_from_and_could_not_is_told(report: str) -> None:
    rows = {row[0]: row for row in table(report, "What each arm learned from")[2:]}
    told = "answer: answer-embedding (30 steps); instruct: language (10 steps)"
    assert rows["`static`"][1:] == [told, "align: it cannot ask."]
    assert rows["`rvii`"][1:] == [told, "nothing"]


def test_the_table_of_all_numbers_holds_costs_too(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    (row,) = [
        r
        for r in rows
        if (r["arm"], r["dynamic"], r["seed"], r["type"]) == ("static", "4", "1", "cell")
    ]
    assert (row["n"], row["examples_per_s"], row["first_token_s"]) == ("100", "72.73", "0.4")
    assert row["train_flops"] == "4e+12"
    assert {r["first_token_s"] for r in rows if r["dynamic"] == "1"} == {""}


def test_plots_show_accuracy_against_tokens_and_every_cost(folder: Path, report: str) -> None:
    for name in ("accuracy", "tokens", "flops", "cost"):
        assert f"]({name}.png)" in report
        with Image.open(folder / f"{name}.png") as plot:
            assert plot.format == "PNG"
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4


@pytest.mark.usefixtures("no_plots")
def test_times_of_an_earlier_version_are_shown_as_they_are(tmp_path: Path) -> None:
    found = results(tmp_path / "jobs", SHARES, 0.25)
    old = {name: {"median": 1.5, "spread": "1.4-1.6"} for name in SHARES}
    write_report(found, tmp_path, {}, old)
    assert table((tmp_path / "report.md").read_text(), "What it costs")[2][-2:] == [
        "",
        "1.50 (1.4-1.6)",
    ]


def test_the_summary_has_every_arm_the_requests_of_others_and_guessing(report: str) -> None:
    header, _, *rows, foreign, of_film, guessed = table(report, "In short")
    assert header == ["arm", "asks", "colours test"]
    assert [row[0] for row in rows] == [f"`{name}`" for name in SHARES]
    assert [row[1] for row in rows] == ["yes", "no", "yes", "no"]
    by_type = {row[0]: row for row in table(report, "Accuracy on colours, split test")}
    assert all(row[2] in by_type[row[0]] for row in rows)
    assert foreign[1] == "in vain"
    assert float(foreign[2].split()[0]) < 35
    assert of_film[0] == "`film`, requests of other questions"
    assert guessed[1:] == ["no", "25.0"]
    assert by_type[guessed[0]][1:] == ["25.0", "20.0", "30.0"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(("each", "few"), [(5, ""), (6, "exist")])
def test_of_how_few_pictures_an_interval_is_stands_above_it(
    tmp_path: Path, each: int, few: str
) -> None:
    found = results(tmp_path / "jobs", SHARES, 0.25)
    for group in found.groups:
        for score in (score for result in group.results for score in result["scores"]):
            # Each `cell` is about a picture of its own, and so many `exist` about the same one.
            pictures = [f"e{i // 2 // each}" if i % 2 else f"c{i}" for i in range(200)]
            score["pictures"] = [[name] for name in pictures]
    write_report(found, tmp_path, {}, {})
    text = (tmp_path / "report.md").read_text()
    count = -(-100 // each)
    assert f"all 200 ({100 + count}), cell 100 (100), exist 100 ({count})." in text
    doubt = "Too few pictures for intervals that can be trusted: "
    assert (f"{doubt}{few}.\n" in text) if few else (doubt not in text)


def test_every_arm_that_asks_is_told_beside_what_others_requests_make_of_it(report: str) -> None:
    header, _, *rows = table(report, "With the requests of other questions")
    assert header[:5] == ["arm", "split", "type", "own requests", "others' requests"]
    kinds = ["all", "cell", "exist"]
    assert [row[0] for row in rows] == ["`rvii`"] * 3 + ["`film`"] * 3
    assert [row[2] for row in rows] == kinds * 2
    own = {row[0]: row for row in table(report, "Accuracy on colours, split test")}
    foreign = {row[0].split(",")[0]: row for row in table(report, "In short") if "in vain" in row}
    for name in ("`rvii`", "`film`"):
        mine = [row for row in rows if row[0] == name]
        assert [row[3] for row in mine] == own[name][1:4]
        assert mine[0][4] == foreign[name][2]


def test_what_is_kept_as_evidence_is_the_report_without_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import keep, summary

    (folder / "weights.safetensors").write_bytes(b"x")
    into = tmp_path / "docs" / "evidence"
    keep(folder, into)
    kept = {path.name for path in into.iterdir()}
    assert {"report.md", "report.html", "results.csv", "accuracy.png"} <= kept
    assert not list(into.rglob("*.safetensors"))
    results = {path.relative_to(folder) for path in folder.glob("jobs/*/result.json")}
    assert {path.relative_to(into / "run") for path in into.rglob("result.json")} == results
    text = summary(into, tmp_path)
    assert text.startswith("**The request of `rvii` is used**: ")
    assert "| `static` | no | " in text
    assert "](docs/evidence/accuracy.png)" in text
    assert "](docs/evidence/report.md)" in text
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"has no report.md, report.html, results.csv: finish"):
        keep(tmp_path / "empty", into)


def test_what_an_unfinished_comparison_goes_on_from_is_its_jobs_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import keep_run

    run, into = tmp_path / "run", tmp_path / "kept"
    done = ["compare.json", "jobs/a/job.json", "jobs/a/result.json"]
    for name in (*done, "jobs/a/eval-0.json", "jobs/a/train/model/config.json", "jobs/b/job.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    for _ in range(2):
        keep_run(run, into)
        kept = {str(p.relative_to(into)): p.read_text() for p in into.rglob("*") if p.is_file()}
        assert kept == {name: name for name in done}


def test_the_readme_shows_the_summary_of_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import EVIDENCE, SECTION, summary
    from benchmarks.pages import held

    assert held(ROOT / "README.md", SECTION) == summary(EVIDENCE, ROOT)
